"""Where documents come from: local files, and what is made (the hub: prepare/streams.py).

A source has `identity`, a JSON value that says what it is; `size`, its bytes, 0 where nobody knows; and
read(position, shard, num_shards), which yields (record, place, position): a record, the file and line to name it by,
and the JSON value from which another read() goes on behind it. read(None) starts. Shard i of n is a slice of the
source; all n are the whole.
"""

import collections
import filecmp
import gzip
import json
import math
import os
import re
import urllib.request
import zlib
from typing import NamedTuple

from fledge import UserError, replacing

REPAIRED = 'invalid UTF-8'  # such text is kept, with U+FFFD in place of the bytes
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

    def __init__(
        self,
        paths,
        extensions=('.txt', '.md', '.jsonl', '.jsonl.gz', '.json', '.parquet'),
        columns=None,
        without=(),
    ):
        self.files, self.columns, self.empty = [], columns, []
        for path in paths:
            if not os.path.exists(path):
                raise UserError(f'{path} does not exist')
            found = [path]
            if os.path.isdir(path):
                found = sorted(
                    os.path.join(d, n)
                    for d, folders, names in os.walk(path)
                    for n in names
                    if n.endswith(extensions)
                    and not set(os.path.relpath(d, path).split(os.sep)) & set(without)
                )
                self.empty += [path] * (not found)
            self.files += [
                (f, os.path.getsize(f) if os.path.exists(f) else 0)
                for f in found
                if f.endswith(extensions)
            ]
        sizes = collections.Counter(size for _, size in self.files)
        large = [
            f for f, size in self.files if size > PART_BYTES and sizes[size] > 1
        ]  # too large to be known again by the hash of their text
        self.twins = {
            b
            for i, b in enumerate(large)
            if any(filecmp.cmp(a, b, shallow=False) for a in large[:i])
        }
        if not self.files:
            raise UserError(
                f'{", ".join(paths)}: no {", ".join(extensions[:-1])}{" or " * (len(extensions) > 1)}{extensions[-1]} files there'
            )
        self.size = sum(size for _, size in self.files)
        self.identity = [[f, size, os.stat(f).st_mtime_ns if size else 0] for f, size in self.files]

    def read(self, position=None, shard=0, num_shards=1):
        if position is None and shard == 0:
            yield from (
                (Skip('a folder without text files'), (path, 0), (0, 0, 0)) for path in self.empty
            )
        current, offset, number = position or (0, 0, 0)
        low, high, begin = self.size * shard // num_shards, self.size * (shard + 1) // num_shards, 0
        for i, (path, size) in enumerate(self.files):
            start, stop = (
                max(low - begin, 0),
                min(high - begin, size),
            )  # this slice's bytes of the file
            begin += size
            here = (
                start < stop
                or size == 0
                and low <= begin
                and (begin < high or shard == num_shards - 1)
            )
            if i < current or not here:
                continue
            read = next(
                (
                    r
                    for end, r in (
                        ('.jsonl', _lines),
                        ('.gz', _lines),
                        ('.parquet', self._parquet),
                        ('.json', _json),
                    )
                    if path.endswith(end)
                ),
                _text,
            )
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
            except (
                OSError,
                EOFError,
                ValueError,
                RecursionError,
                zlib.error,
            ) as e:  # of a broken file; what came before it is kept
                yield (
                    Skip(
                        f'a file that cannot be read any further ({getattr(e, "strerror", None) or first_line(e)})'
                    ),
                    (path, 0),
                    (i + 1, 0, 0),
                )

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
                    for record in rows[: max(0, stop - row)]:
                        row += 1
                        yield record, row, (row, 0)
            begin = end


class Made:
    """Records that are made: record(0) to record(count - 1)."""

    def __init__(self, identity, count, record):
        self.identity, self.size, self.count, self.record = identity, 0, count, record

    def read(self, position=None, shard=0, num_shards=1):
        for i in range(
            position or self.count * shard // num_shards, self.count * (shard + 1) // num_shards
        ):
            yield self.record(i), (self.identity, i + 1), i + 1


def tiny_shakespeare(path, val_fraction):
    """Its address, and a source for each split: the text at path (under data/ it is fetched where it is missing), its end being val."""
    url = (
        'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
    )
    if not os.path.exists(path) and path.startswith('data/'):
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                content = response.read()
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with replacing(path, 'wb') as f:
                f.write(content)
        except Exception as e:  # no network, no such page, a broken answer, nowhere to write
            raise UserError(
                f'cannot fetch {url} ({e}); put the text at {path} or name it with --input'
            ) from None
    with open(path, 'rb') as f:
        text = f.read().decode(errors='replace')
    cut = int(len(text) * (1 - val_fraction))
    return url, {
        split: Made(f'{path}, {split}', 1, lambda _, part=part: part)
        for split, part in (('train', text[:cut]), ('val', text[cut:]))
    }


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
            yield Skip(REPAIRED), 1 + content[: e.start].count(b'\n'), (0, 0)
        records = json.loads(content.decode(errors='replace'))
    for i in range(
        max(row, math.ceil(start * len(records) / size)), math.ceil(stop * len(records) / size)
    ):
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
                words = [
                    m.start() + 1 for m in re.finditer(rb'[0-9A-Za-z](?=\n[0-9A-Za-z])', piece)
                ]
                character = next(
                    (i for i in range(cut - 1, cut - 5, -1) if piece[i] & 0xC0 != 0x80), cut
                )  # begins the last one
                cut = words[-1] if words else max(piece.rfind(b'\n'), 0) or character
            after = offset + cut, number + piece[:cut].count(b'\n')
            yield Text(*_decoded(piece[:cut], number), key, after[0] >= size), number + 1, after
            (offset, number), rest = after, piece[cut:]


def _decoded(content, number):
    """The text of bytes behind `number` lines, with U+FFFD for what is no UTF-8, and the first line that has it, or 0."""
    try:
        return content.decode(), 0
    except UnicodeDecodeError as e:
        return content.decode(errors='replace'), number + 1 + content[: e.start].count(b'\n')


def first_line(error):
    """What an error is and the first line of what it says."""
    return f'{type(error).__name__}: {(str(error).splitlines() or [""])[0][:200]}'
