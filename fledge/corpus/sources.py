"""Where records come from: local files, the Hugging Face hub, and what is made.

A source has `identity`, a JSON value that says what it is; `size`, its bytes, 0 where nobody knows;
and read(position, slice_index, num_slices), which yields (record, place, position): a record, the
file and line to name it by, and the JSON value from which another read() goes on behind it.
read(None) starts at the beginning. Slice i of n is the part of one machine; all n are the whole.
"""

import codecs
import collections
import filecmp
import functools
import gzip
import io
import itertools
import json
import math
import os
import random
import re
import sys
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from fledge import UserError, replacing

REPAIRED = 'invalid UTF-8'  # such text is kept, with U+FFFD in place of the bytes
LOST = 'characters are lost of files that are not UTF-8'
NO_TEXT = 'no text, for it has NUL characters'  # a file of another kind, with the name of a text
PART_BYTES = 4 << 20  # a text file above this is read, and tokenized, in parts
LONGEST = 256 << 20  # bytes between two separators
RECORDS = ('.jsonl', '.jsonl.gz', '.json', '.parquet')  # files that hold many records
TEXTS = ('.txt', '.md', *RECORDS)
TABLES = ('.tsv', '.tab', '.txt', *RECORDS)  # and those with columns between tabs
SHUFFLED = 10_000  # rows of the hub held at a time where they are shuffled
WINDOW = 256  # and where they are not
CONVERTED = 'refs/convert/parquet'  # where the hub keeps a dataset as Parquet
SCRIPT = 'Dataset scripts are no longer supported'  # what datasets says of a loading script


class Skip(Exception):
    """In place of a record: it cannot be used, and why."""

    kind = 'dropped'  # a field of the pipeline's state that counts such notes


class Replaced(Skip):
    """In place of a record: another source is read from here on, and why."""

    kind = 'replaced'


class Repaired(Skip):
    """In place of a record: what is wrong with the next ones, which are used all the same."""

    kind = 'repaired'


class Unavailable(UserError):
    """A source that cannot be had at all, so that another may take its place."""


class Lost(UserError):
    """A source that stopped answering: worth another try, from the last position."""


class Text(NamedTuple):
    """A text file, or a part of a long one."""

    text: str
    broken: int = 0  # the first line that was no valid UTF-8 and now has U+FFFD in it, or 0
    key: str = ''  # of a part: the same for all parts of a text
    last: bool = True  # the end of the text
    first: bool = True  # the beginning of the text


def read(
    source: 'Made | OrElse | Files | Hub | Urls',
    position: Sequence | int | None,
    slice_index: int,
    num_slices: int,
    retries: int,
) -> Iterator[tuple]:
    """What source.read() yields, tried again where it stops answering; UserError after so many."""
    failures = 0
    while True:
        try:
            for record, place, after in source.read(position, slice_index, num_slices):
                failures, position = 0, after
                yield record, place, position
            return
        except Unavailable as e:
            raise UserError(str(e)) from None
        except Lost as e:
            if failures == retries:
                raise UserError(str(e)) from None
            print(f'{e}; again in {2**failures} s', file=sys.stderr)
            time.sleep(2**failures)
            failures += 1


class Made:
    """Records that are made: record(0) to record(count - 1)."""

    def __init__(self, identity: str, count: int, record: Callable):
        self.identity, self.size, self.count, self.record = identity, 0, count, record

    def read(
        self, position: int | None = None, slice_index: int = 0, num_slices: int = 1
    ) -> Iterator:
        start = position or self.count * slice_index // num_slices
        for i in range(start, self.count * (slice_index + 1) // num_slices):
            yield self.record(i), (self.identity, i + 1), i + 1


class OrElse:
    """A source, and another one that is read in its place where it cannot be had at all."""

    def __init__(self, source: 'Files | Hub | Urls', other: 'Made | Hub'):
        self.source, self.other = source, other
        self.identity = [source.identity, other.identity]
        self.why = ''  # the source cannot be had

    @property
    def size(self) -> int:
        return (self.other if self.why else self.source).size

    def read(
        self, position: Sequence | None = None, slice_index: int = 0, num_slices: int = 1
    ) -> Iterator:
        # a position: whether it is one of the other source, and the position in that source
        replaced, inner = position or (False, None)
        begun = position is not None
        if not replaced and not self.why:
            try:
                for record, place, after in self.source.read(inner, slice_index, num_slices):
                    begun = True
                    yield record, place, (False, after)
                return
            except Unavailable as e:
                if begun:
                    raise
                self.why = str(e)
                print(f'{e}; {self.other.identity} takes its place', file=sys.stderr)
        if not begun:
            why = f'{self.other.identity} took the place of {self.source.identity}: {self.why}'
            yield Replaced(why), (self.source.identity, 0), (True, None)
        for record, place, after in self.other.read(inner, slice_index, num_slices):
            yield record, place, (True, after)


# ---- local files


def fetch(url: str, path: str) -> str:
    """The text at path; where it is missing under data/, it is fetched from url first."""
    if not os.path.exists(path) and path.startswith('data/'):
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                content = response.read()
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with replacing(path, 'wb') as f:
                f.write(content)
        except Exception as e:  # no network, no such page, a broken answer, nowhere to write
            other = f'put the text at {path} or name it with --input'
            raise UserError(f'cannot fetch {url} ({e}); {other}') from None
    try:
        with _opened(path) as f:
            return f.read().decode('utf-8-sig', errors='replace')
    except OSError as e:
        raise UserError(f'{path} cannot be read ({e.strerror}): --input is one file') from None


def split_paths(text: str) -> list[str]:
    """The existing paths in a text, between commas; a path may have commas in it, too."""
    paths, missing, pieces = [], [], text.split(',')
    while pieces:
        path, n = _longest_path(pieces)
        if path and missing:
            break
        if path:
            paths.append(path)
        elif pieces[0].strip():
            missing.append(pieces[0])
        pieces = pieces[n:]
    if missing:
        raise UserError(f'{",".join(missing).strip()} does not exist')
    return paths


def _longest_path(pieces):
    """The longest path that the first n of some pieces make, and n; '' and 1 if none exists."""
    for n in range(len(pieces), 0, -1):
        path = ','.join(pieces[:n])
        for name in (path, path.strip()):
            if os.path.exists(name):
                return name, n
    return '', 1


class Files:
    """The records of files and of folders of them, in the order of their names.

    A .jsonl (.jsonl.gz) gives its lines, a .parquet its rows, a .json the items of its list, any
    other file is one record, or where it has separators in it, what stands between them is one.
    extensions: of the files that are read, in small letters. columns: which of a .parquet's are
    wanted, None for all. without: names of folders that are passed over.
    """

    def __init__(
        self,
        paths: list[str],
        extensions: tuple[str, ...] = TEXTS,
        columns: list[str] | None = None,
        without: Sequence[str] = (),
        separator: str = '',
    ):
        self.columns, self.separator = columns, separator.encode()
        self.left_out = []  # (path, why) of what lies in the folders and is not read
        found, empty = [], []
        known = ' or '.join(', '.join(extensions).rsplit(', ', 1))
        if not any(paths):
            raise UserError(f'--input is needed: {known} files or folders, separated by commas')
        for path in paths:
            if os.path.isdir(path):
                inside, others = _files_in(path, extensions, without)
                found += inside
                self.left_out += others
                if not inside:
                    empty.append((path, 'a folder without text files'))
            elif path.lower().endswith(extensions):
                found.append(path)
            else:
                raise UserError(f'{path} cannot be read: it is no {known} file')
        if not found:
            others = [path for path, _ in self.left_out]
            first = ', '.join(others[:3]) + (', ...' if len(others) > 3 else '')
            there = f', but {len(others):,} hidden or of another kind ({first})' if others else ''
            raise UserError(f'{", ".join(paths)}: no {known} files there{there}')
        self.left_out += empty
        # a broken link has no size, and is named when it is opened
        self.files = [(f, os.path.getsize(f) if os.path.exists(f) else 0) for f in found]
        # an empty file counts as a byte, so that it lies in a slice
        self.size = sum(max(size, 1) for _, size in self.files)
        self.identity = [[f, size, os.stat(f).st_mtime_ns if size else 0] for f, size in self.files]
        self.twins = _twins(self.files)

    def read(
        self, position: Sequence | None = None, slice_index: int = 0, num_slices: int = 1
    ) -> Iterator:
        # a position: the number of a file, and where its reader goes on
        if position is None and slice_index == 0:
            for path, why in self.left_out:
                yield Skip(why), (path, 0), (0, 0, 0)
        current, *at = position or (0, 0, 0)
        low = self.size * slice_index // num_slices
        high = self.size * (slice_index + 1) // num_slices
        end = 0
        for i, (path, size) in enumerate(self.files):
            start, stop = max(low - end, 0), min(high - end, max(size, 1))  # this slice's bytes
            end += max(size, 1)
            if i < current or start >= stop:
                continue
            offset, number = at if i == current else (0, 0)
            try:
                for record, line, after in self._records(path, size, start, stop, offset, number):
                    yield record, (path, line), (i, *after)
            except Skip as e:
                yield e, (path, 0), (i + 1, 0, 0)
            except (OSError, EOFError, ValueError, RecursionError, zlib.error) as e:
                # the file is broken; what came before is kept
                why = getattr(e, 'strerror', None) or first_line(e)
                why = f'a file that cannot be read any further ({why})'
                yield Skip(why), (path, 0), (i + 1, 0, 0)

    def _records(self, path, size, start, stop, offset, number):
        """(record, line, (offset, number) behind it) of a file's bytes from start to stop."""
        if size == 0:
            open(path, 'rb').close()
            raise Skip('an empty file')
        name = path.lower()
        if name.endswith('.parquet'):
            return _parquet(path, size, start, stop, offset, self.columns)
        if name.endswith('.gz') or _is_utf16(path):  # one piece: its bytes stand elsewhere
            if start:
                return []
            stop = math.inf
        if name.endswith('.json') and not _has_lines(path):
            return _json(path, size, start, stop, offset)
        if name.endswith(('.json', '.jsonl', '.gz')):
            found = _lines(path, offset, number)
        elif path in self.twins:
            raise Skip('a duplicate')
        elif self.separator:
            found = _separated(path, self.separator, offset, number)
        else:
            found = _text(path, offset, number)
        return _within(found, offset, start, stop)


def _files_in(folder, extensions, without):
    """The files below a folder whose names end in one of extensions, and (path, why) of the rest.

    Both are sorted. The rest is empty where a script looks for a kind of its own, not for texts.
    """
    found, others = [], []

    def unreadable(error):
        others.append((error.filename, f'a folder that cannot be read ({error.strerror})'))

    for directory, folders, names in os.walk(folder, onerror=unreadable):
        for name in names + folders:
            path = os.path.join(directory, name)
            if name.startswith('.'):
                others.append((path, 'a hidden file'))
            elif name in folders:
                if os.path.islink(path):
                    others.append((path, 'a link to a folder'))
            elif path.lower().endswith(extensions):
                found.append(path)
            else:
                others.append((path, 'a file of another kind'))
        folders[:] = [name for name in folders if name[0] != '.' and name not in without]
    return sorted(found), sorted(others) if extensions in (TEXTS, RECORDS, TABLES) else []


def _twins(files):
    """Files that repeat an earlier one, too large to be known again by the hash of their text."""
    sizes = collections.Counter(size for _, size in files)
    large = [path for path, size in files if size > PART_BYTES and sizes[size] > 1]
    twins = set()
    for i, path in enumerate(large):
        if any(filecmp.cmp(earlier, path, shallow=False) for earlier in large[:i]):
            twins.add(path)
    return twins


def _parquet(path, size, start, stop, row, columns):
    """The rows of a .parquet."""
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    names, total, begin = file.schema_arrow.names, file.metadata.num_rows, 0
    missing = [column for column in columns or () if column not in names]
    if missing:
        raise Skip(f'a .parquet without a column {missing[0]!r}; it has {", ".join(names)}')
    row, stop = max(row, math.ceil(start * total / size)), math.ceil(stop * total / size)
    for group in range(file.num_row_groups):
        end = begin + file.metadata.row_group(group).num_rows
        if end > row and begin < stop:
            for batch in file.iter_batches(256, row_groups=[group], columns=columns):
                rows = batch.slice(max(0, row - begin)).to_pylist()
                begin += len(batch)
                for record in rows[: max(0, stop - row)]:
                    row += 1
                    yield record, row, (row, 0)
        begin = end


def _is_utf16(path):
    with open(path, 'rb') as f:
        return f.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def _opened(path):
    """A file of text or JSON that gives UTF-8. UTF-16, which is Windows' own, is held whole."""
    if path.lower().endswith('.gz'):
        return gzip.open(path, 'rb')
    if not _is_utf16(path):
        return open(path, 'rb')
    with open(path, 'rb') as f:
        content = f.read().decode('utf-16', 'surrogatepass')
    return io.BytesIO(content.encode('utf-8', 'surrogatepass'))


def _within(found, offset, start, stop):
    """What is found in a file from offset on, as far as it begins in [start, stop).

    It begins where the one before it ends: so slices agree, which read a file from the end of a
    record, or from its beginning.
    """
    for record, line, (end, number) in found:
        if offset >= stop:
            return
        if offset >= start:
            yield record, line, (end, number)
        offset = end


def _lines(path, offset, number):
    """Lines as bytes, from a line's beginning at offset on."""
    with _opened(path) as f:
        f.seek(offset)
        for line in f:
            offset, number = offset + len(line), number + 1
            if not line.isspace():
                yield line, number, (offset, number)


def _has_lines(path):
    """Whether a .json is one of lines, which need not be held: the first is a value by itself."""
    with _opened(path) as f:
        lines = (line for line in f if not line.isspace())
        first, second = next(lines, b''), next(lines, b'')
    try:
        json.loads(first.removeprefix(codecs.BOM_UTF8) if second else b'')
        return True
    except (ValueError, RecursionError):
        return False


def _json(path, size, start, stop, row):
    """The records of a .json that is one value, which is read whole.

    They are a list's items, those of an object's one list of records, or an object itself.
    """
    with _opened(path) as f:
        text, broken = _decoded(f.read().removeprefix(codecs.BOM_UTF8), 0)
    records = json.loads(text)
    if broken and row == 0 and start == 0:
        yield Repaired(REPAIRED), broken, (0, 0)
    if isinstance(records, dict):
        lists = [value for value in records.values() if _are_records(value)]
        records = lists[0] if len(lists) == 1 else [records]
    row = max(row, math.ceil(start * len(records) / size))
    for i in range(row, math.ceil(min(stop, size) * len(records) / size)):
        yield records[i], i + 1, (i + 1, 0)


def _are_records(value):
    """Whether a value is a list of objects; the messages of a conversation are one record."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(item, dict) and 'role' not in item for item in value)


def _text(path, offset, number):
    """A text file, or the parts of a long one from offset on."""
    with _opened(path) as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(0)
        if size <= PART_BYTES:
            if not offset:
                content = f.read().removeprefix(codecs.BOM_UTF8)
                yield Text(*_decoded(content, 0)), 1, (size, 0)
            return
        key = f'{size} {f.read(1 << 16)!r}'
        f.seek(0)
        if not offset and any(b'\0' in block for block in iter(lambda: f.read(1 << 20), b'')):
            raise Skip(NO_TEXT)
        while offset < size:
            f.seek(offset)
            part = f.read(PART_BYTES)
            if not part:
                raise Skip('a text that has become shorter while it was read')
            if offset + len(part) < size:
                part = part[: _last_cut(part)]
            first, line = offset == 0, number + 1
            offset, number = offset + len(part), number + part.count(b'\n')
            text, broken = _decoded(part.removeprefix(codecs.BOM_UTF8) if first else part, line - 1)
            yield Text(text, broken, key, offset >= size, first), line, (offset, number)


def _separated(path, separator, offset, number):
    """The texts between separators from offset on, without the newlines next to those."""
    rest, end, more = b'', offset, True
    with _opened(path) as f:
        f.seek(offset)
        while more:
            block = f.read(PART_BYTES)
            more = bool(block)
            *texts, rest = (rest + block).split(separator)
            if not more:
                texts.append(rest)
            elif len(rest) > LONGEST:
                raise Skip(f'more than {LONGEST >> 20} MB without a separator')
            for i, text in enumerate(texts):
                begin, line = end, number + 1
                end += len(text) + len(separator)
                number += (text + separator).count(b'\n')
                if not text.strip():
                    continue
                content = text.lstrip(b'\r\n') if begin else text.removeprefix(codecs.BOM_UTF8)
                line += text[: len(text) - len(content)].count(b'\n')
                if more or i + 1 < len(texts):  # what ends the file stays as it is
                    content = content.rstrip(b'\r\n')
                yield Text(*_decoded(content, line - 1)), line, (end, number)


def _last_cut(piece):
    """The last place to cut bytes where no tokenizer joins: between a word and newline, word."""
    up_to_word = re.match(rb'.*[0-9A-Za-z](?=\n[0-9A-Za-z])', piece, re.DOTALL)
    if up_to_word:
        return up_to_word.end()
    newline = piece.rfind(b'\n')
    if newline > 0:
        return newline - piece[:newline].endswith(b'\r')  # \r\n stays together
    for i in range(len(piece) - 1, len(piece) - 5, -1):  # the last character begins here
        if piece[i] & 0xC0 != 0x80:
            return i
    return len(piece)


def _decoded(content, number):
    """The text of bytes behind so many lines, and the first line that is no valid UTF-8, or 0.

    Windows' ends of lines become newlines, as where Python reads a text.
    """
    content = content.replace(b'\r\n', b'\n')
    try:
        return content.decode(), 0
    except UnicodeDecodeError as e:
        return content.decode(errors='replace'), number + 1 + content[: e.start].count(b'\n')


def first_line(error: Exception) -> str:
    """What an error is and the first line of what it says."""
    said, _, _ = str(error).partition('\n')
    return f'{type(error).__name__}: {said[:200]}'


# ---- the Hugging Face hub


class Hub:
    """The rows of a dataset on the Hugging Face hub, streamed: a few hundred are held at a time.

    columns: which fields are wanted (default: all). starts(row, row_before): rows are gathered into
    lists, a new one where this is true. shuffle: a seed, for the order of files and that of rows
    within SHUFFLED of them. Where a revision has but a loading script, CONVERTED is read.
    """

    def __init__(
        self,
        repo: str,
        subset: str = '',
        split: str = 'train',
        columns: Sequence[str] = (),
        starts: Callable | None = None,
        shuffle: int | None = None,
        revision: str = 'main',
    ):
        if not repo:
            raise UserError('--repo is needed: OWNER/NAME on huggingface.co')
        self.repo, self.subset, self.split, self.columns = repo, subset, split, columns
        self.starts, self.shuffle, self.revision = starts, shuffle, revision
        self.identity, self.size = ', '.join(filter(None, (repo, subset, split))), 0

    def read(
        self, position: Sequence | None = None, slice_index: int = 0, num_slices: int = 1
    ) -> Iterator:
        # a position: the commit, where datasets goes on, the rows before that, the rows behind it
        # that are done, the records so far
        commit, state, before, done, count = position or (None, None, 0, 0, 0)
        stream, commit, by_file = self._open(commit, slice_index, num_slices)
        if state:
            stream.load_state_dict(state)
        records = self._rows(stream, state, before, done)
        if self.starts:
            records = self._gathered(records)
        for record, number, place in records:
            count += 1
            if by_file or (count - 1) % num_slices == slice_index:
                yield record, (self.identity, number), (commit, *place, count)

    def _rows(self, stream, state, before, done):
        """(row, its number, where to go on: in datasets, rows before that, rows behind it done)."""
        rows, length = iter(stream), WINDOW if self.shuffle is None else SHUFFLED
        while True:
            try:
                window = list(itertools.islice(rows, length))
            except Exception as e:  # the network's, a server's, a parser's
                why = f'{self.identity} fails after {before:,} rows ({first_line(e)})'
                raise Lost(why) from None
            missing = set(self.columns) - window[0].keys() if window and not before else ()
            if missing:
                has = f'has no field {", ".join(missing)}; it has {", ".join(window[0])}'
                raise Unavailable(f'{self.identity} {has}')
            if self.shuffle is not None:
                random.Random(f'{self.shuffle} {before}').shuffle(window)
            for i, row in enumerate(window[done:], done + 1):
                if self.columns:
                    row = {column: row[column] for column in self.columns}
                yield row, before + i, (state, before, i)
            before, done = before + len(window), 0
            if len(window) < length:
                return
            state = stream.state_dict()  # without a row read, it says nothing of what was loaded

    def _gathered(self, rows):
        """What _rows() gives, rows gathered into lists: (list, and of its last row the rest)."""
        gathered, rest = [], ()
        for row, number, place in rows:
            if gathered and self.starts(row, gathered[-1]):
                yield gathered, *rest
                gathered = []
            gathered.append(row)
            rest = number, place
        if gathered:
            yield gathered, *rest

    def _open(self, commit, slice_index, num_slices):
        """The stream of rows, its commit, and whether all its rows are of this slice."""
        datasets = _quiet_datasets()
        import huggingface_hub

        load = functools.partial(
            datasets.load_dataset, self.repo, self.subset or None, split=self.split, streaming=True
        )
        revision = commit or self.revision
        try:
            try:
                stream = load(revision=revision)
            except RuntimeError as e:
                if not str(e).startswith(SCRIPT):
                    raise
                revision = CONVERTED
                stream = load(revision=revision)
                said = f'a loading script, which is not run; its revision {revision} is read'
                said += ', of which the hub keeps the first 5 GB alone'
                print(f'{self.identity} is {said}', file=sys.stderr)
            if not commit:
                commit = huggingface_hub.HfApi().dataset_info(self.repo, revision=revision).sha
        except Exception as e:
            raise _failure(self.identity, e) from None
        info = (stream.info.splits or {}).get(self.split)
        self.size = info.num_bytes or 0 if info else 0
        # whole files for each slice, but not where what is gathered may go on in the next file
        by_file = num_slices > 1 and stream.num_shards >= num_slices and not self.starts
        if by_file:
            stream = stream.shard(num_slices, slice_index)
        if self.shuffle is not None:  # files here, rows in _rows(), which can go on anywhere
            stream = stream.shuffle(seed=self.shuffle, buffer_size=1, max_buffer_input_shards=1)
        return stream, commit, by_file or num_slices == 1


class Urls:
    """The lines of .json.gz files, shuffled, whose addresses a file of a repository lists."""

    def __init__(self, repo: str, path: str, seed: int):
        self.repo, self.path, self.seed = repo, path, seed
        self.identity, self.size = f'{repo}, {path}', 0

    def read(
        self, position: Sequence | None = None, slice_index: int = 0, num_slices: int = 1
    ) -> Iterator:
        # a position: the commit, the number of a file, the lines of it that are done
        commit, current, done = position or (None, 0, 0)
        _quiet_datasets()
        from huggingface_hub import HfApi, hf_hub_download

        try:
            commit = commit or HfApi().dataset_info(self.repo).sha
            found = hf_hub_download(self.repo, self.path, repo_type='dataset', revision=commit)
            with open(found, encoding='utf-8') as f:
                urls = sorted(f.read().split())
        except Exception as e:
            raise _failure(self.identity, e) from None
        random.Random(self.seed).shuffle(urls)
        for i, url in enumerate(urls[slice_index::num_slices]):
            if i < current:
                continue
            try:
                with (
                    urllib.request.urlopen(url, timeout=60) as response,
                    gzip.open(response) as lines,
                ):
                    for number, line in enumerate(lines, 1):
                        if i > current or number > done:
                            yield line, (url, number), (commit, i, number)
            except Exception as e:  # the network's, the server's, a .gz that ends too early
                raise Lost(f'{url} fails ({first_line(e)})') from None


def _failure(identity, error):
    """Unavailable where an error says that there is no such thing (for this user), else Lost."""
    import datasets
    from huggingface_hub import errors

    not_there = (
        datasets.exceptions.DatasetNotFoundError,  # no repository or revision, or a gated one
        datasets.exceptions.DataFilesNotFoundError,
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.RemoteEntryNotFoundError,
        errors.HFValidationError,  # no name of a repository
    )
    # no such split, no such configuration, none given, a script: known by what datasets says
    said = ('Bad split', 'BuilderConfig', 'Config name is missing', SCRIPT)
    plain = type(error) in (ValueError, RuntimeError) and str(error).startswith(said)
    kind = Unavailable if plain or isinstance(error, not_there) else Lost
    return kind(f'{identity} cannot be opened ({first_line(error)})')


def _quiet_datasets():
    """The package datasets without its retries (ours go on), notices and calls to other hosts."""
    os.environ.setdefault('HF_UPDATE_DOWNLOAD_COUNTS', '0')
    os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')
    os.environ.setdefault('HF_HUB_DISABLE_PROGRESS_BARS', '1')
    import datasets
    import huggingface_hub

    datasets.config.STREAMING_READ_MAX_RETRIES = 1
    datasets.config.STREAMING_OPEN_MAX_RETRIES = 1
    datasets.config.STREAMING_READ_RETRY_INTERVAL = 0
    datasets.config.STREAMING_OPEN_RETRY_INTERVAL = 0
    datasets.config.USE_PARQUET_EXPORT = False
    datasets.logging.set_verbosity(50)
    huggingface_hub.logging.set_verbosity(50)
    return datasets
