"""Tokens on disk, and which of them each training step sees.

A .bin is llm.c's: a header of 256 int32 (magic, version, token count), then the tokens. nanoGPT's
headerless uint16 files are read as well. Which rows a step sees is a pure function of (data, seed,
step, batch geometry): no state to save, nothing replayed after a resume, the same global batch for
any number of processes.
"""

import functools
import glob
import hashlib
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np

from fledge import UserError, read_meta, replacing
from fledge.tokenizer import is_gpt2_size

# (magic, version): token type
FORMATS = {(20240520, 1): np.dtype('<u2'), (20240801, 7): np.dtype('<u4')}
HEADER_BYTES = 256 * 4
OFFLINE = ('stdlib', 'stdlib_chat', 'stdlib_pairs', 'copy_task')  # made without a network
# scripts in prepare/ that have no dataset of their name
NO_DATASETS = ('text', 'chat', 'preferences', 'classify', 'translate', 'hub', 'look', 'merge')
CHECKED_AT_ONCE = 50_000_000  # tokens that are checked against the vocabulary in no time


def format_of(vocab_size: int) -> tuple[tuple[int, int], np.dtype]:
    """(magic, version) and token type of a .bin for a vocabulary of this size."""
    return next(
        (key, dtype) for key, dtype in FORMATS.items() if vocab_size <= 2 ** (8 * dtype.itemsize)
    )


def write_header(file: BinaryIO, vocab_size: int, count: int) -> None:
    """Write the header of a .bin of so many tokens at the beginning of an open file."""
    header = np.zeros(256, '<i4')
    header[:2] = format_of(vocab_size)[0]
    header[2] = count
    file.seek(0)
    file.write(header.tobytes())


def write_bin(path: str, ids: np.ndarray, vocab_size: int) -> None:
    """Write ids, an array of int, as one .bin, which takes its name when it is whole."""
    with replacing(path, 'wb') as f:
        write_header(f, vocab_size, len(ids))
        f.write(np.asarray(ids).astype(format_of(vocab_size)[1]).tobytes())


def read_bin(path: str, headerless: bool = False) -> np.ndarray:
    """The tokens of one .bin, a read-only memory map; headerless allows nanoGPT's bare uint16."""
    try:
        size = os.path.getsize(path)
        header = np.fromfile(path, '<i4', count=3).tolist()
    except OSError as e:
        raise UserError(f'{path} cannot be read: {e.strerror}') from None
    if size == 0:
        raise UserError(f'{path} is empty')
    magic, version, count = header + [0] * (3 - len(header))  # a file may be shorter than that
    dtype = FORMATS.get((magic, version))
    if dtype is None:
        looks_headed = count > 0 and size - HEADER_BYTES in (2 * count, 4 * count)
        if looks_headed or not headerless:
            problem = f'a wrong magic or version ({magic}, {version})'
            raise UserError(f'{path} has {problem}: it is no token file, or a broken one')
        if size % 2:
            raise UserError(
                f'{path} is truncated: {size:,} bytes is no whole number of uint16 tokens'
            )
        return np.memmap(path, np.dtype('<u2'), mode='r')
    if count < 0:
        raise UserError(f'{path} has a broken header: {count} tokens')
    expected = HEADER_BYTES + count * dtype.itemsize
    if size < expected:
        raise UserError(f'{path} is truncated: {expected:,} bytes are expected, {size:,} are there')
    if count == 0:
        raise UserError(f'{path} is empty: it holds no tokens')
    return np.memmap(path, dtype, mode='r', offset=HEADER_BYTES, shape=(count,))


def split_files(folder: str, split: str) -> list[str]:
    """folder/split.bin, or its shards folder/split_000000.bin, ...; [] where there are none.

    llm.c and what came of it put a name in front: fineweb_train_000001.bin.
    """
    for name in (split, f'*_{split}'):
        for pattern in (f'{name}.bin', f'{name}_{"[0-9]" * 6}.bin'):
            found = sorted(glob.glob(os.path.join(glob.escape(folder), pattern)))
            if found:
                return found
    return []


def mask_path(path: str) -> str:
    """Where the mask of the tokens at path lies, if there is one: a uint8 each, 1 where learned."""
    return path.removesuffix('.bin') + '.mask.bin'


def read_mask(path: str, n_tokens: int) -> np.ndarray:
    """The mask beside the .bin of n_tokens at path, uint8, a read-only memory map."""
    path = mask_path(path)
    remedy = f'prepare {os.path.dirname(path)} again'
    try:
        size = os.path.getsize(path)
    except FileNotFoundError:
        raise UserError(f'{path} is missing: {remedy}') from None
    if size != n_tokens:
        raise UserError(f'{path} has {size:,} bytes for {n_tokens:,} tokens: {remedy}')
    return np.memmap(path, np.uint8, mode='r')


def spread(items: Sequence, limit: int | None) -> list:
    """`limit` of a sequence, evenly over it and always the same ones; all of it for None."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]


def digest(paths: list[str]) -> str:
    """A text that changes with the .bin files at paths and their masks: by sizes and samples."""
    paths = [p for path in paths for p in (path, mask_path(path)) if os.path.exists(p)]
    pieces = 1 + 256 // len(paths)  # of a file, spread over it: terabytes are not read
    hasher = hashlib.blake2b(digest_size=16)
    for path in paths:
        size = os.path.getsize(path)
        hasher.update(f'{os.path.basename(path)} {size} '.encode())
        with open(path, 'rb') as f:
            for i in range(pieces):
                f.seek(i * max(size - 4096, 0) // max(pieces - 1, 1))
                hasher.update(f.read(4096))
    return hasher.hexdigest()


def has_masks(folder: str) -> bool:
    """Whether the tokens in folder are not all to be learned."""
    return bool(glob.glob(os.path.join(glob.escape(folder), 'train*.mask.bin')))


def find_data(
    dataset: str, vocab_size: int, make_default: bool, with_sources: bool = False
) -> None:
    """UserError where data/dataset has nothing to train on; it names the command that makes it.

    make_default: what needs no network (OFFLINE) is made on the spot instead. with_sources: it is
    for an encoder.
    """
    folder = os.path.join('data', dataset)
    if split_files(folder, 'train'):
        return
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    script, flags = f'prepare/{dataset}.py', []
    if vocab_size and not is_gpt2_size(vocab_size):
        flags = ['--tokenizer=train', f'--vocab_size={vocab_size}']
    if not os.path.exists(os.path.join(root, script)) or dataset in NO_DATASETS:
        script, flags = 'prepare/text.py', flags or ['--tokenizer=gpt2']
        if with_sources:
            script, flags = 'prepare/translate.py', ['--tokenizer=train']
        flags = ['--input=YOUR_FILES', f'--name={dataset}', *flags]
    command = shlex.join(['python', script, *flags])
    if dataset not in OFFLINE or not make_default:
        others = 'conversations by chat.py, preferences by preferences.py, labels by classify.py'
        others = f' ({others}, pairs by translate.py)' if script == 'prepare/text.py' else ''
        raise UserError(f'{folder} has no train.bin; make it with: {command}{others}')
    if subprocess.run([sys.executable, os.path.join(root, script), *flags]).returncode:
        raise UserError(f'{command} failed; see above')


class Batch(dict):
    """Arrays by name: `inputs` and `targets`, int64 (rows, block_size).

    A target is -1 where nothing is to be predicted. `inputs, targets = batch` unpacks the two.
    Where rows are packed documents, `documents` (rows, block_size) has the number of each
    position's, 0, 1, 2, ... through the batch, and -1 for padding. Where those are pairs, chosen
    ones are even, rejected ones odd, and `reference` (documents,) is float32: see objectives.dpo.
    For an encoder `source` has token ids, -1 for padding, and `source_documents` their documents.
    """

    def context(self) -> dict:
        """What a model is told besides the inputs: keyword arguments of GPT.forward."""
        names = ('documents', 'source', 'source_documents')
        return {name: self[name] for name in names if name in self}

    def __iter__(self):
        return iter((self['inputs'], self['targets']))


def check_ids(ids: np.ndarray, vocab_size: int, path: str, start: int) -> None:
    """UserError where some of ids, which are in the file at path from position `start` on, are
    beyond a vocabulary of this size."""
    if ids.max() >= vocab_size:
        position = start + int(ids.argmax())
        raise UserError(
            f'{path} holds token {ids.max():,} at position {position:,}, beyond the vocabulary of '
            f'{vocab_size:,}: the model has no such tokens, it needs the tokenizer of the data'
        )


@functools.lru_cache(maxsize=1)
def epoch_order(seed: int, epoch: int, n_rows: int) -> tuple[np.ndarray, int]:
    """A permutation of n_rows for an epoch, and a random number for where their grid begins."""
    rng = np.random.default_rng([seed, epoch])
    return rng.permutation(n_rows), int(rng.integers(1 << 62))


def training_rows(seed: int, n_rows: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows first .. first + count - 1 of training's endless order: int64 (count,).

    Each epoch takes all n_rows once. The second array has the random number of each one's epoch.
    """
    places = np.arange(first, first + count)
    rows, shifts = np.empty((2, count), np.int64)
    for epoch in np.unique(places // n_rows).tolist():
        here = places // n_rows == epoch
        order, shift = epoch_order(seed, epoch, n_rows)
        rows[here], shifts[here] = order[places[here] % n_rows], shift
    return rows, shifts


class Tokens:
    """One split of a prepared dataset, as rows of block_size tokens and the tokens behind each.

    folder/split.bin, or its shards folder/split_000000.bin, ... vocab_size bounds the ids
    (UserError beyond it). seed: of the order of training's rows; None: for evaluation alone.
    """

    pairs = False  # as those of documents.Documents may be

    def __init__(
        self, folder: str, split: str, block_size: int, vocab_size: int, seed: int | None = None
    ):
        self.paths = split_files(folder, split)
        if not self.paths:
            raise UserError(f'{folder} has no {split}.bin')
        self.block_size, self.vocab_size, self.seed = block_size, vocab_size, seed
        headerless = not read_meta(folder)
        self.shards = [read_bin(path, headerless) for path in self.paths]
        self.n_tokens = sum(map(len, self.shards))
        # The whole rows of each shard, wherever their grid begins (see rows); none crosses shards.
        lengths = np.array([len(shard) for shard in self.shards])
        if lengths.max() < 2:
            raise UserError(f'{self.paths[0]} holds a single token: there is nothing to predict')
        whole = np.maximum(lengths - 1, 0) // block_size
        rows_per_shard = np.where(whole > 1, (lengths - block_size) // block_size, whole)
        self.slack = lengths - 1 - rows_per_shard * block_size  # how far a grid can be shifted
        self.first_row = np.concatenate([[0], np.cumsum(rows_per_shard)])  # of each shard
        self.n_rows = int(self.first_row[-1])
        if self.n_rows == 0 and seed is not None:
            raise UserError(
                f'block_size={block_size} is longer than the data: {self.paths[0]} has '
                f'{self.n_tokens:,} tokens and a row takes {block_size + 1:,}'
            )
        if len(self.shards[0]) <= CHECKED_AT_ONCE:  # else each row is checked as it is read
            check_ids(self.shards[0], vocab_size, self.paths[0], 0)

    def _read(self, shard, start, length):
        ids = self.shards[shard][start : start + length]
        check_ids(ids, self.vocab_size, self.paths[shard], start)
        return ids.astype(np.int64)

    def rows(self, first: int, count: int) -> Batch:
        """Rows first .. first + count - 1 of training's endless order, a Batch.

        Each epoch sees every row once, in a fresh permutation; the grid that the rows are cut on
        shifts as well, so that another epoch cuts the text elsewhere.
        """
        shards, starts = self._places(first, count)
        out = np.empty((count, self.block_size + 1), np.int64)
        for shard in np.unique(shards).tolist():
            here = shards == shard
            out[here] = self.shards[shard][starts[here, None] + np.arange(self.block_size + 1)]
        if count and out.max() >= self.vocab_size:
            for shard, start in zip(shards.tolist(), starts.tolist(), strict=True):
                self._read(shard, start, self.block_size + 1)  # names the place
        return Batch(inputs=out[:, :-1], targets=out[:, 1:])

    def documents_seen(self, first: int, count: int) -> list[tuple[str, int, np.ndarray]]:
        """[(path, position, ids)] of rows of training: where in the data they are, and what."""
        shards, starts = self._places(first, count)
        seen = []
        for shard, start in zip(shards.tolist(), starts.tolist(), strict=True):
            seen.append((self.paths[shard], start, self._read(shard, start, self.block_size)))
        return seen

    def weight(self, first: int, count: int) -> int:
        """What a mean over these rows of training is over: their targets, all of them learned."""
        return count * self.block_size

    def summary(self) -> str:
        """What is in the rows, in one line for the log; of a stream there is nothing to say."""
        return ''

    def _places(self, first, count):
        """The shards, and the starts in them, of rows of training's endless order."""
        rows, shifts = training_rows(self.seed, self.n_rows, first, count)
        shards = np.searchsorted(self.first_row, rows, side='right') - 1
        in_shard = rows - self.first_row[shards]
        return shards, in_shard * self.block_size + shifts % (self.slack[shards] + 1)

    def evaluation_rows(self, limit: int | None = None) -> list[tuple[int, int]]:
        """Where evaluation reads: (shard, start) of `limit` rows spread evenly, or of all."""
        starts = []
        for shard, ids in enumerate(self.shards):
            starts += [(shard, start) for start in range(0, len(ids) - 1, self.block_size)]
        return spread(starts, limit)

    def evaluation_batch(self, rows: Sequence[tuple[int, int]]) -> Batch:
        """Some of evaluation_rows as a Batch; the last row of a shard may be short."""
        inputs = np.zeros((len(rows), self.block_size), np.int64)
        targets = np.full((len(rows), self.block_size), -1, np.int64)
        for i, (shard, start) in enumerate(rows):
            ids = self._read(shard, start, self.block_size + 1)
            inputs[i, : len(ids) - 1], targets[i, : len(ids) - 1] = ids[:-1], ids[1:]
        return Batch(inputs=inputs, targets=targets)
