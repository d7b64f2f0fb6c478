"""Tokens on disk, and which of them each training step sees.

A .bin is llm.c's: a header of 256 int32 (magic, version, token count), then the tokens. nanoGPT's
headerless uint16 files are read as well. Which rows a step sees is a pure function of (data, seed,
step, batch geometry): no state to save, nothing replayed after a resume, the same global batch for
any number of processes.
"""

import glob
import os

import numpy as np

from fledge import UserError, read_json, replacing

# (magic, version): token type
FORMATS = {(20240520, 1): np.dtype('<u2'), (20240801, 7): np.dtype('<u4')}
HEADER_BYTES = 256 * 4
CHECKED_AT_ONCE = 50_000_000  # tokens that are checked against the vocabulary in no time


def format_of(vocab_size):
    """(magic, version) and token type of a .bin for a vocabulary of this size."""
    return next(
        (key, dtype) for key, dtype in FORMATS.items() if vocab_size <= 2 ** (8 * dtype.itemsize)
    )


def write_header(file, vocab_size, count):
    """Write the header of a .bin of so many tokens at the beginning of an open file."""
    header = np.zeros(256, '<i4')
    header[:2] = format_of(vocab_size)[0]
    header[2] = count
    file.seek(0)
    file.write(header.tobytes())


def write_bin(path, ids, vocab_size):
    """Write ids, an array of int, as one .bin, which takes its name when it is whole."""
    with replacing(path, 'wb') as f:
        write_header(f, vocab_size, len(ids))
        f.write(np.asarray(ids).astype(format_of(vocab_size)[1]).tobytes())


def read_bin(path, headerless=False):
    """The tokens of one .bin, a read-only memory map; headerless allows nanoGPT's bare uint16."""
    try:
        size = os.path.getsize(path)
        header = np.fromfile(path, '<i4', count=3)
    except OSError as e:
        raise UserError(f'{path} cannot be read: {e.strerror}') from None
    dtype = FORMATS.get(tuple(int(v) for v in header[:2]))
    if dtype is None:
        count = int(header[2]) if len(header) == 3 else 0
        looks_headed = count > 0 and size - HEADER_BYTES in (2 * count, 4 * count)
        if size == 0:
            raise UserError(f'{path} is empty')
        if looks_headed or not headerless:
            found = ', '.join(str(v) for v in header[:2])
            no_tokens = f'a wrong magic or version ({found}): it is no token file, or a broken one'
            raise UserError(f'{path} has {no_tokens}')
        if size % 2:
            raise UserError(
                f'{path} is truncated: {size:,} bytes is no whole number of uint16 tokens'
            )
        return np.memmap(path, np.dtype('<u2'), mode='r')
    if len(header) == 3 and header[2] < 0:
        raise UserError(f'{path} has a broken header: {header[2]} tokens')
    expected = HEADER_BYTES + int(header[2]) * dtype.itemsize if len(header) == 3 else HEADER_BYTES
    if size < expected:
        raise UserError(f'{path} is truncated: {expected:,} bytes are expected, {size:,} are there')
    if header[2] == 0:
        raise UserError(f'{path} is empty: it holds no tokens')
    return np.memmap(path, dtype, mode='r', offset=HEADER_BYTES, shape=(int(header[2]),))


def read_meta(folder):
    """meta.json of a prepared dataset, or {} where there is none (nanoGPT's folders)."""
    path = os.path.join(folder, 'meta.json')
    return read_json(path) if os.path.exists(path) else {}


def split_files(folder, split):
    """folder/split.bin, or its shards folder/split_000000.bin, ...; [] where there are none."""
    whole = os.path.join(folder, f'{split}.bin')
    return (
        [whole]
        if os.path.exists(whole)
        else sorted(glob.glob(os.path.join(glob.escape(folder), f'{split}_{"[0-9]" * 6}.bin')))
    )


class Tokens:
    """One split of a prepared dataset, as rows of block_size inputs and the block_size targets that follow them.

    folder/split.bin, or its shards folder/split_000000.bin, ...; vocab_size bounds the ids (UserError beyond it).
    seed: of the order of training's rows; None where the split is only evaluated.
    """

    def __init__(self, folder, split, block_size, vocab_size, seed=None):
        paths = split_files(folder, split)
        if not paths:
            raise UserError(f'{folder} has no {split}.bin')
        self.paths, self.block_size, self.vocab_size, self.seed = (
            paths,
            block_size,
            vocab_size,
            seed,
        )
        self.shards = [read_bin(p, headerless=not read_meta(folder)) for p in paths]
        self.n_tokens = sum(len(s) for s in self.shards)
        # Whole rows of each shard, for any phase of the grid that they are cut on (see rows); no row crosses shards.
        lengths = np.array([len(s) for s in self.shards])
        whole = np.maximum(lengths - 1, 0) // block_size
        self.rows_per_shard = np.where(whole > 1, (lengths - block_size) // block_size, whole)
        self.slack = lengths - 1 - self.rows_per_shard * block_size
        self.n_rows = int(self.rows_per_shard.sum())
        if lengths.max() < 2:
            raise UserError(f'{paths[0]} holds a single token: there is nothing to predict')
        if self.n_rows == 0 and seed is not None:
            raise UserError(
                f'block_size={block_size} is longer than the data: {paths[0]} has {self.n_tokens:,} tokens and a row takes {block_size + 1:,}'
            )
        self.first_row = np.concatenate([[0], np.cumsum(self.rows_per_shard)])
        self._epoch = None
        if len(self.shards[0]) <= CHECKED_AT_ONCE:  # else each row is checked as it is read
            self._check(self.shards[0], 0, 0)

    def _read(self, shard, start, length):
        ids = self.shards[shard][start : start + length]
        self._check(ids, shard, start)
        return ids.astype(np.int64)

    def _check(self, ids, shard, start):
        if ids.max() >= self.vocab_size:
            at = start + int(ids.argmax())
            raise UserError(
                f'{self.paths[shard]} holds token {ids.max():,} at position {at:,}, beyond the vocabulary of {self.vocab_size:,}'
            )

    def rows(self, first, count):
        """Rows first .. first + count - 1 of training's endless order: inputs and targets, int64 (count, block_size).

        Each epoch sees every row once, in a fresh permutation; the grid that the rows are cut on shifts as well,
        so that another epoch cuts the text elsewhere.
        """
        places = np.arange(first, first + count)
        shards, starts = np.empty((2, count), np.int64)
        for epoch in np.unique(places // self.n_rows).tolist():
            if epoch != self._epoch:
                rng = np.random.default_rng([self.seed, epoch])
                self._order, self._phase, self._epoch = (
                    rng.permutation(self.n_rows),
                    int(rng.integers(1 << 62)),
                    epoch,
                )
            here = places // self.n_rows == epoch
            rows = self._order[places[here] % self.n_rows]
            shards[here] = s = np.searchsorted(self.first_row, rows, side='right') - 1
            starts[here] = (rows - self.first_row[s]) * self.block_size + self._phase % (
                self.slack[s] + 1
            )
        out = np.empty((count, self.block_size + 1), np.int64)
        for shard in np.unique(shards).tolist():
            here = shards == shard
            out[here] = self.shards[shard][starts[here, None] + np.arange(self.block_size + 1)]
        if count and out.max() >= self.vocab_size:
            for shard, start in zip(shards.tolist(), starts.tolist()):
                self._read(shard, start, self.block_size + 1)  # names the place
        return out[:, :-1], out[:, 1:]

    def evaluation_rows(self, limit=None):
        """Where evaluation reads: (shard, start) of `limit` rows spread evenly over the split, or of all of it."""
        starts = [
            (s, i)
            for s, data in enumerate(self.shards)
            for i in range(0, len(data) - 1, self.block_size)
        ]
        if limit is None or limit >= len(starts):
            return starts
        return [starts[i * len(starts) // limit] for i in range(limit)]

    def evaluation_batch(self, rows):
        """Inputs and targets of some evaluation_rows; the last row of a shard is short, its missing targets are -1."""
        x = np.zeros((len(rows), self.block_size), np.int64)
        y = np.full((len(rows), self.block_size), -1, np.int64)
        for i, (shard, start) in enumerate(rows):
            ids = self._read(shard, start, self.block_size + 1)
            x[i, : len(ids) - 1], y[i, : len(ids) - 1] = ids[:-1], ids[1:]
        return x, y
