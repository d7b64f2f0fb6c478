"""Where documents come from: local files and the Hugging Face hub.

A source has `identity`, a JSON value that says what it is; `size`, its bytes, 0 where nobody knows; and
read(position, shard, num_shards), which yields (record, place, position): a record, the file and line to name it by,
and the JSON value from which another read() goes on behind it. read(None) starts. Shard i of n is a slice of the
source; all n are the whole.
"""
import collections
import filecmp
import functools
import gzip
import itertools
import json
import math
import os
import random
import re
import sys
import urllib.request
import zlib
from typing import NamedTuple

from fledge import UserError, replacing

REPAIRED = 'invalid UTF-8'  # such text is kept, with U+FFFD in place of the bytes
SHUFFLED = 10_000  # rows of the hub held at a time where they are shuffled
WINDOW = 256  # else
PART_BYTES = 4 << 20  # a text file above this is read, and tokenized, in parts


class Skip(Exception):
    """A record that cannot be used, and why."""


class Unavailable(UserError):
    """A source that cannot be had at all, so that another may take its place."""


class Lost(UserError):
    """A source that stopped answering: worth another try, from the last position."""


class Text(NamedTuple):
    """A text file, or a part of a long one: then key is the same for all its parts, and last ends the document.

    broken: the first line that is no valid UTF-8 and now has U+FFFD in it, or 0.
    """
    text: str
    broken: int = 0
    key: str = ''
    last: bool = True


class Files:
    """The records of files and folders of them, in the order of their names: the lines of a .jsonl (.jsonl.gz), the
    rows of a .parquet or of a .json list, any other file whole. columns: which of a .parquet are wanted."""

    def __init__(self, paths, extensions=('.txt', '.md', '.jsonl', '.jsonl.gz', '.json', '.parquet'), columns=None, without=()):
        self.files, self.columns, self.empty = [], columns, []
        for path in paths:
            if not os.path.exists(path):
                raise UserError(f'{path} does not exist')
            found = [path]
            if os.path.isdir(path):
                found = sorted(os.path.join(d, n) for d, folders, names in os.walk(path) for n in names
                               if n.endswith(extensions) and not set(os.path.relpath(d, path).split(os.sep)) & set(without))
                self.empty += [path] * (not found)
            self.files += [(f, os.path.getsize(f) if os.path.exists(f) else 0) for f in found if f.endswith(extensions)]
        sizes = collections.Counter(size for _, size in self.files)
        large = [f for f, size in self.files if size > PART_BYTES and sizes[size] > 1]  # too large to be known again by the hash of their text
        self.twins = {b for i, b in enumerate(large) if any(filecmp.cmp(a, b, shallow=False) for a in large[:i])}
        if not self.files:
            raise UserError(f'{", ".join(paths)}: no {", ".join(extensions[:-1])}{" or " * (len(extensions) > 1)}{extensions[-1]} files there')
        self.size = sum(size for _, size in self.files)
        self.identity = [[f, size, os.stat(f).st_mtime_ns if size else 0] for f, size in self.files]

    def read(self, position=None, shard=0, num_shards=1):
        if position is None and shard == 0:
            yield from ((Skip('a folder without text files'), (path, 0), (0, 0, 0)) for path in self.empty)
        current, offset, number = position or (0, 0, 0)
        low, high, begin = self.size * shard // num_shards, self.size * (shard + 1) // num_shards, 0
        for i, (path, size) in enumerate(self.files):
            start, stop = max(low - begin, 0), min(high - begin, size)  # this slice's bytes of the file
            begin += size
            here = start < stop or size == 0 and low <= begin and (begin < high or shard == num_shards - 1)
            if i < current or not here:
                continue
            read = next((r for end, r in (('.jsonl', _lines), ('.gz', _lines), ('.parquet', self._parquet), ('.json', _json)) if path.endswith(end)), _text)
            at = (offset, number) if i == current else (0, 0)
            try:
                if size == 0:
                    open(path, 'rb').close()
                    raise Skip('an empty file')
                if path in self.twins and read is _text:
                    raise Skip('a duplicate')
                for record, line, after in read(path, size, start, stop, *at):
                    yield record, (path, line), (i, *after)
            except Skip as e:
                yield e, (path, 0), (i + 1, 0, 0)
            except (OSError, EOFError, ValueError, RecursionError, zlib.error) as e:  # of a broken file; what came before it is kept
                yield Skip(f'a file that cannot be read any further ({getattr(e, "strerror", None) or _first_line(e)})'), (path, 0), (i + 1, 0, 0)

    def _parquet(self, path, size, start, stop, row, _):
        import pyarrow.parquet
        file = pyarrow.parquet.ParquetFile(path)
        names, total, begin = file.schema_arrow.names, file.metadata.num_rows, 0
        missing = [c for c in self.columns or () if c not in names]
        if missing:
            raise Skip(f'a .parquet without a column {missing[0]!r}; it has {", ".join(names)}')
        row, stop = max(row, math.ceil(start * total / size)), math.ceil(stop * total / size)
        for group in range(file.num_row_groups):
            end = begin + file.metadata.row_group(group).num_rows
            if end > row and begin < stop:
                for batch in file.iter_batches(256, row_groups=[group], columns=self.columns):
                    rows = batch.slice(max(0, row - begin)).to_pylist()
                    begin += len(batch)
                    for record in rows[:max(0, stop - row)]:
                        row += 1
                        yield record, row, (row, 0)
            begin = end


class Hub:
    """The rows of a dataset on the Hugging Face hub, streamed: a few hundred are held at a time.

    columns: which fields are wanted (default: all). starts(row, row_before): rows are gathered into lists, a new one where
    this is true. shuffle: a seed, for the order of files and that of rows within SHUFFLED of them. converted: the revision
    that has the data where the main one has but a loading script.
    """

    def __init__(self, repo, subset='', split='train', columns=(), starts=None, shuffle=None, converted='refs/convert/parquet'):
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
                yield gathered, (self.identity, number - bool(self.starts)), (commit, *place_after, count + 1)
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
                raise Lost(f'{self.identity} fails after {before:,} rows ({_first_line(e)})') from None
            if before == 0 and window and not set(self.columns) <= window[0].keys():
                raise Unavailable(f'{self.identity} has no field {", ".join(set(self.columns) - window[0].keys())}; it has {", ".join(window[0])}')
            if self.shuffle is not None:
                random.Random(f'{self.shuffle} {before}').shuffle(window)
            for i, row in enumerate(window[done:], done + 1):
                yield {c: row[c] for c in self.columns} if self.columns else row, before + i, (state, before, i)
            before, done = before + len(window), 0
            if len(window) < length:
                return

    def _open(self, commit, shard, num_shards):
        """The stream of rows, its commit, and whether it is this shard's alone (whole files) already."""
        datasets = _quiet_datasets()
        import huggingface_hub
        load = functools.partial(datasets.load_dataset, self.repo, self.subset or None, split=self.split, streaming=True)
        try:
            revision = commit or 'main'
            try:
                stream = load(revision=commit)
            except RuntimeError as e:
                if 'scripts' not in str(e):
                    raise
                revision = self.converted
                stream = load(revision=revision)
                print(f'{self.identity} is a loading script, which is not run; its revision {revision} is read'
                      + ', of which the hub keeps the first 5 GB alone' * (revision == 'refs/convert/parquet'), file=sys.stderr)
            commit = commit or huggingface_hub.HfApi().dataset_info(self.repo, revision=revision).sha
        except Exception as e:
            gone = isinstance(e, (FileNotFoundError, ValueError, RuntimeError)) and 'LocalEntryNotFoundError' not in str(e)
            raise (Unavailable if gone else Lost)(f'{self.identity} cannot be opened ({_first_line(e)})') from None
        info = (stream.info.splits or {}).get(self.split)
        self.size = info.num_bytes or 0 if info else 0
        by_file = num_shards > 1 and stream.num_shards >= num_shards and not self.starts  # what is gathered may go on in the next file
        if by_file:
            stream = stream.shard(num_shards, shard)
        if self.shuffle is not None:  # files here, rows in _rows(), which can go on anywhere
            stream = stream.shuffle(seed=self.shuffle, buffer_size=1, max_buffer_input_shards=1)
        return stream, commit, by_file or num_shards == 1


class Urls:
    """The lines of the .json.gz files whose addresses a file of a dataset repository lists, in an order drawn by seed."""

    def __init__(self, repo, path, seed):
        self.repo, self.path, self.seed, self.identity, self.size = repo, path, seed, f'{repo}, {path}', 0

    def read(self, position=None, shard=0, num_shards=1):
        commit, current, skip = position or (None, 0, 0)
        _quiet_datasets()
        from huggingface_hub import HfApi, errors, hf_hub_download
        try:
            commit = commit or HfApi().dataset_info(self.repo).sha
            with open(hf_hub_download(self.repo, self.path, repo_type='dataset', revision=commit), encoding='utf-8') as f:
                urls = sorted(f.read().split())
        except (errors.RepositoryNotFoundError, errors.RemoteEntryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as e:
            raise Unavailable(f'{self.identity} cannot be opened ({_first_line(e)})') from None
        except Exception as e:
            raise Lost(f'{self.identity} cannot be opened ({_first_line(e)})') from None
        random.Random(self.seed).shuffle(urls)
        for i, url in enumerate(urls[shard::num_shards]):
            if i < current:
                continue
            try:
                with urllib.request.urlopen(url, timeout=60) as response, gzip.open(response) as lines:
                    for number, line in enumerate(lines, 1):
                        if i > current or number > skip:
                            yield line, (url, number), (commit, i, number)
            except Exception as e:  # the network's, the server's, a .gz that ends too early
                raise Lost(f'{url} fails ({_first_line(e)})') from None


def _quiet_datasets():
    """The package datasets, without its retries (ours know where to go on), notices, and requests to other hosts."""
    for name, value in (('HF_UPDATE_DOWNLOAD_COUNTS', '0'), ('HF_HUB_DISABLE_TELEMETRY', '1'), ('HF_HUB_DISABLE_PROGRESS_BARS', '1')):
        os.environ.setdefault(name, value)
    import datasets
    import huggingface_hub
    datasets.config.STREAMING_READ_MAX_RETRIES = datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
    datasets.config.STREAMING_READ_RETRY_INTERVAL = datasets.config.STREAMING_OPEN_RETRY_INTERVAL = 0
    datasets.config.USE_PARQUET_EXPORT = False
    datasets.logging.set_verbosity(50)
    huggingface_hub.logging.set_verbosity(50)
    return datasets


def _first_line(error):
    return f'{type(error).__name__}: {(str(error).splitlines() or [""])[0][:200]}'


class Made:
    """Records that are made: record(0) to record(count - 1)."""

    def __init__(self, identity, count, record):
        self.identity, self.size, self.count, self.record = identity, 0, count, record

    def read(self, position=None, shard=0, num_shards=1):
        for i in range(position or self.count * shard // num_shards, self.count * (shard + 1) // num_shards):
            yield self.record(i), (self.identity, i + 1), i + 1


def tiny_shakespeare(path, val_fraction):
    """Its address, and a source for each split: the text at path (under data/ it is fetched where it is missing), its end being val."""
    url = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
    if not os.path.exists(path) and path.startswith('data/'):
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                content = response.read()
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with replacing(path, 'wb') as f:
                f.write(content)
        except Exception as e:  # no network, no such page, a broken answer, nowhere to write
            raise UserError(f'cannot fetch {url} ({e}); put the text at {path} or name it with --input') from None
    with open(path, 'rb') as f:
        text = f.read().decode(errors='replace')
    cut = int(len(text) * (1 - val_fraction))
    return url, {split: Made(f'{path}, {split}', 1, lambda _, part=part: part) for split, part in (('train', text[:cut]), ('val', text[cut:]))}


def _lines(path, size, start, stop, offset, number):
    """Lines of JSON as bytes, those that begin in [start, stop); a .gz is one piece."""
    packed = path.endswith('.gz')
    if packed:
        if start:
            return
        stop = math.inf
    with (gzip.open if packed else open)(path, 'rb') as f:
        if start and not offset:
            f.seek(start - 1)
            offset = start - 1 + len(f.readline())
            f.seek(0)
            for at in range(0, offset, 1 << 20):
                number += f.read(min(1 << 20, offset - at)).count(b'\n')
        f.seek(offset)
        for line in f:
            if offset >= stop:
                return
            offset, number = offset + len(line), number + 1
            if not line.isspace():
                yield line, number, (offset, number)


def _json(path, size, start, stop, row, number):
    """The records of a JSON list, which is read whole; a .json that holds lines is read as lines."""
    with open(path, 'rb') as f:
        if f.read(4096).lstrip(b'\xef\xbb\xbf \t\r\n')[:1] != b'[':
            yield from _lines(path, size, start, stop, row, number)
            return
        f.seek(0)
        content = f.read()
    try:
        records = json.loads(content)
    except UnicodeDecodeError as e:
        if row == 0 and start == 0:
            yield Skip(REPAIRED), 1 + content[:e.start].count(b'\n'), (0, 0)
        records = json.loads(content.decode(errors='replace'))
    for i in range(max(row, math.ceil(start * len(records) / size)), math.ceil(stop * len(records) / size)):
        yield records[i], i + 1, (i + 1, 0)


def _text(path, size, start, stop, offset, number):
    """A text file; in parts where it is long, cut where no tokenizer joins: word, newline, word."""
    if start:
        return  # it belongs to the slice that it begins in
    with open(path, 'rb') as f:
        if size <= PART_BYTES:
            if not offset:
                yield Text(*_decoded(f.read(), 0)), 1, (size, 0)
            return
        key = f'{size} {f.read(1 << 16)!r}'
        f.seek(offset)
        rest = b''
        while offset < size:
            piece = rest + f.read(PART_BYTES - len(rest))
            cut = len(piece)
            if not piece:
                raise Skip('a text that has become shorter while it was read')
            if offset + cut < size:
                words = [m.start() + 1 for m in re.finditer(rb'[0-9A-Za-z](?=\n[0-9A-Za-z])', piece)]
                character = next((i for i in range(cut - 1, cut - 5, -1) if piece[i] & 0xC0 != 0x80), cut)  # begins the last one
                cut = words[-1] if words else max(piece.rfind(b'\n'), 0) or character
            after = offset + cut, number + piece[:cut].count(b'\n')
            yield Text(*_decoded(piece[:cut], number), key, after[0] >= size), number + 1, after
            (offset, number), rest = after, piece[cut:]


def _decoded(content, number):
    """The text of bytes behind `number` lines, with U+FFFD for what is no UTF-8, and the first line that has it, or 0."""
    try:
        return content.decode(), 0
    except UnicodeDecodeError as e:
        return content.decode(errors='replace'), number + 1 + content[:e.start].count(b'\n')
