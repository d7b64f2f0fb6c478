"""Where documents come from: the Hugging Face hub, streamed. For what a source is see prepare/sources.py."""

import functools
import gzip
import itertools
import os
import random
import sys
import urllib.request

from prepare.sources import Lost, Unavailable, first_line

SHUFFLED = 10_000  # rows held at a time where they are shuffled
WINDOW = 256  # else


class Hub:
    """The rows of a dataset on the Hugging Face hub, streamed: a few hundred are held at a time.

    columns: which fields are wanted (default: all). starts(row, row_before): rows are gathered into lists, a new one where
    this is true. shuffle: a seed, for the order of files and that of rows within SHUFFLED of them. converted: the revision
    that has the data where the main one has but a loading script.
    """

    def __init__(
        self,
        repo,
        subset='',
        split='train',
        columns=(),
        starts=None,
        shuffle=None,
        converted='refs/convert/parquet',
    ):
        self.repo, self.subset, self.split, self.columns = repo, subset, split, columns
        self.starts, self.shuffle, self.converted = starts, shuffle, converted
        self.identity, self.size = ', '.join(filter(None, (repo, subset, split))), 0

    def read(self, position=None, shard=0, num_shards=1):
        # a position: the commit, where datasets goes on, the rows before that, the rows behind it that are done, the records so far
        commit, state, before, done, count = position or (None, None, 0, 0, 0)
        stream, commit, by_file = self._open(commit, shard, num_shards)
        if state:
            stream.load_state_dict(state)
        gathered, last, number, place = [], None, before + done, None
        for row, number, place in self._rows(stream, before, done):
            if not self.starts:
                gathered, place_after = row, place
            elif not gathered or not self.starts(row, last):
                gathered.append(row)
                last, place_after = row, place
                continue
            if by_file or count % num_shards == shard:
                yield (
                    gathered,
                    (self.identity, number - bool(self.starts)),
                    (commit, *place_after, count + 1),
                )
            count += 1
            if self.starts:
                gathered, last, place_after = [row], row, place
        if self.starts and gathered and (by_file or count % num_shards == shard):
            yield gathered, (self.identity, number), (commit, *place_after, count + 1)

    def _rows(self, stream, before, done):
        """(row, its number, (where datasets goes on, rows before that, rows behind it that are done))."""
        rows, length = iter(stream), SHUFFLED if self.shuffle is not None else WINDOW
        while True:
            state = stream.state_dict()
            try:
                window = list(itertools.islice(rows, length))
            except Exception as e:  # the network's, a server's, a parser's
                raise Lost(
                    f'{self.identity} fails after {before:,} rows ({first_line(e)})'
                ) from None
            if before == 0 and window and not set(self.columns) <= window[0].keys():
                raise Unavailable(
                    f'{self.identity} has no field {", ".join(set(self.columns) - window[0].keys())}; it has {", ".join(window[0])}'
                )
            if self.shuffle is not None:
                random.Random(f'{self.shuffle} {before}').shuffle(window)
            for i, row in enumerate(window[done:], done + 1):
                yield (
                    {c: row[c] for c in self.columns} if self.columns else row,
                    before + i,
                    (state, before, i),
                )
            before, done = before + len(window), 0
            if len(window) < length:
                return

    def _open(self, commit, shard, num_shards):
        """The stream of rows, its commit, and whether it is this shard's alone (whole files) already."""
        datasets = _quiet_datasets()
        import huggingface_hub

        load = functools.partial(
            datasets.load_dataset, self.repo, self.subset or None, split=self.split, streaming=True
        )
        try:
            revision = commit or 'main'
            try:
                stream = load(revision=commit)
            except RuntimeError as e:
                if 'scripts' not in str(e):
                    raise
                revision = self.converted
                stream = load(revision=revision)
                print(
                    f'{self.identity} is a loading script, which is not run; its revision {revision} is read'
                    + ', of which the hub keeps the first 5 GB alone'
                    * (revision == 'refs/convert/parquet'),
                    file=sys.stderr,
                )
            commit = (
                commit or huggingface_hub.HfApi().dataset_info(self.repo, revision=revision).sha
            )
        except Exception as e:
            gone = isinstance(
                e, (FileNotFoundError, ValueError, RuntimeError)
            ) and 'LocalEntryNotFoundError' not in str(e)
            raise (Unavailable if gone else Lost)(
                f'{self.identity} cannot be opened ({first_line(e)})'
            ) from None
        info = (stream.info.splits or {}).get(self.split)
        self.size = info.num_bytes or 0 if info else 0
        by_file = (
            num_shards > 1 and stream.num_shards >= num_shards and not self.starts
        )  # what is gathered may go on in the next file
        if by_file:
            stream = stream.shard(num_shards, shard)
        if self.shuffle is not None:  # files here, rows in _rows(), which can go on anywhere
            stream = stream.shuffle(seed=self.shuffle, buffer_size=1, max_buffer_input_shards=1)
        return stream, commit, by_file or num_shards == 1


class Urls:
    """The lines of the .json.gz files whose addresses a file of a dataset repository lists, in an order drawn by seed."""

    def __init__(self, repo, path, seed):
        self.repo, self.path, self.seed, self.identity, self.size = (
            repo,
            path,
            seed,
            f'{repo}, {path}',
            0,
        )

    def read(self, position=None, shard=0, num_shards=1):
        commit, current, skip = position or (None, 0, 0)
        _quiet_datasets()
        from huggingface_hub import HfApi, errors, hf_hub_download

        try:
            commit = commit or HfApi().dataset_info(self.repo).sha
            with open(
                hf_hub_download(self.repo, self.path, repo_type='dataset', revision=commit),
                encoding='utf-8',
            ) as f:
                urls = sorted(f.read().split())
        except (
            errors.RepositoryNotFoundError,
            errors.RemoteEntryNotFoundError,
            errors.RevisionNotFoundError,
            errors.HFValidationError,
        ) as e:
            raise Unavailable(f'{self.identity} cannot be opened ({first_line(e)})') from None
        except Exception as e:
            raise Lost(f'{self.identity} cannot be opened ({first_line(e)})') from None
        random.Random(self.seed).shuffle(urls)
        for i, url in enumerate(urls[shard::num_shards]):
            if i < current:
                continue
            try:
                with (
                    urllib.request.urlopen(url, timeout=60) as response,
                    gzip.open(response) as lines,
                ):
                    for number, line in enumerate(lines, 1):
                        if i > current or number > skip:
                            yield line, (url, number), (commit, i, number)
            except Exception as e:  # the network's, the server's, a .gz that ends too early
                raise Lost(f'{url} fails ({first_line(e)})') from None


def _quiet_datasets():
    """The package datasets, without its retries (ours know where to go on), notices, and requests to other hosts."""
    for name, value in (
        ('HF_UPDATE_DOWNLOAD_COUNTS', '0'),
        ('HF_HUB_DISABLE_TELEMETRY', '1'),
        ('HF_HUB_DISABLE_PROGRESS_BARS', '1'),
    ):
        os.environ.setdefault(name, value)
    import datasets
    import huggingface_hub

    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
    datasets.config.STREAMING_READ_RETRY_INTERVAL = (
        datasets.config.STREAMING_OPEN_RETRY_INTERVAL
    ) = 0
    datasets.config.USE_PARQUET_EXPORT = False
    datasets.logging.set_verbosity(50)
    huggingface_hub.logging.set_verbosity(50)
    return datasets
