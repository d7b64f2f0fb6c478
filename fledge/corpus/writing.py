"""Tokens to files: shards while a run goes on, then val, final names, meta.json, the report."""

import glob
import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Sequence

import numpy as np

from fledge import UserError, chat_template, replacing
from fledge.corpus.encoding import SPLITS, end_of
from fledge.corpus.sources import REPAIRED
from fledge.tokenizer import load_tokenizer
from fledge.tokens import (
    HEADER_BYTES,
    format_of,
    mask_path,
    read_bin,
    split_files,
    write_bin,
    write_header,
)


class SplitWriter:
    """Appends documents to folder/split_000000.bin, split_000001.bin, ...

    A document is whole in one of them, and begins another where it would exceed shard_tokens.
    masked: .mask.bin beside each. shards: the tokens of each file at an earlier sync(), from which
    it goes on; what the files hold beyond is dropped.
    """

    def __init__(
        self,
        folder: str,
        split: str,
        vocab_size: int,
        shard_tokens: int,
        masked: bool,
        shards: Sequence[int] = (),
    ):
        self.prefix = os.path.join(folder, split)
        self.vocab_size, self.shard_tokens = vocab_size, shard_tokens
        # of each kind of file: ending, type, bytes before the first token
        self.kinds = [('.bin', format_of(vocab_size)[1], HEADER_BYTES)]
        if masked:
            self.kinds.append(('.mask.bin', np.dtype(np.uint8), 0))
        self.shards = list(shards)
        self.pending = []  # (ids, learned) of documents of the last shard that are in no file yet
        self.changed = set()  # paths, since the last sync()
        if shards:
            self._drop_what_is_beyond(folder)

    def _drop_what_is_beyond(self, folder):
        for ending, dtype, before in self.kinds:
            path, size = self._path(ending), before + self.shards[-1] * dtype.itemsize
            if not os.path.exists(path) or os.path.getsize(path) < size:
                again = f'remove {folder}, and begin again'
                raise UserError(f'{path} is shorter than when it was left; {again}')
            os.truncate(path, size)

    def _path(self, ending):
        return f'{self.prefix}_{len(self.shards) - 1:06d}{ending}'

    def write(self, ids: np.ndarray, learned: np.ndarray | None = None) -> None:
        """Append a document: its ids, and for each id whether it is learned. flush() is next."""
        if not self.shards or (self.shards[-1] and self.shards[-1] + len(ids) > self.shard_tokens):
            self._begin_shard()
        self.pending.append((ids, learned))
        self.shards[-1] += len(ids)

    def _begin_shard(self):
        self.close()
        self.shards.append(0)
        for ending, _, before in self.kinds:
            with open(self._path(ending), 'wb') as f:
                f.write(bytes(before))

    def flush(self) -> None:
        """Hand what is written to the system."""
        columns = zip(*self.pending, strict=True)
        for (ending, dtype, _), values in zip(self.kinds, columns, strict=False):
            with open(self._path(ending), 'ab') as f:
                f.write(np.concatenate(values).astype(dtype).tobytes())
            self.changed.add(self._path(ending))
        self.pending = []

    def sync(self) -> list[int]:
        """Make what is written safe; returns the tokens of each shard."""
        self.flush()
        for path in self.changed:
            with open(path, 'r+b') as f:
                os.fsync(f.fileno())
        self.changed.clear()
        return list(self.shards)

    def close(self) -> None:
        """Write what is left, and the header of the last shard."""
        self.flush()
        if self.shards:
            with open(self._path('.bin'), 'r+b') as f:
                write_header(f, self.vocab_size, self.shards[-1])
            self.changed.add(self._path('.bin'))


class Seen:
    """Which 64-bit hashes have come before, the first `count` of them in the file at path.

    In memory they are 8 bytes each, in sorted arrays no two of which are of like size.
    """

    def __init__(self, path: str, count: int):
        self.path, self.count, self.new = path, count, []
        with open(path, 'ab') as f:
            f.truncate(8 * count)
        self.levels = [np.unique(np.fromfile(path, np.uint64))]

    def fresh(self, hashes: np.ndarray) -> np.ndarray:
        """For each of an array of uint64, whether it is the first of its kind."""
        unique, first = np.unique(hashes, return_index=True)
        new = np.ones(len(unique), bool)
        for level in self.levels:
            if len(level):
                new &= level[np.minimum(np.searchsorted(level, unique), len(level) - 1)] != unique
        fresh = np.zeros(len(hashes), bool)
        fresh[first[new]] = True
        return fresh

    def add(self, hashes: np.ndarray) -> None:
        """Add an array of uint64 that are all fresh."""
        self.levels.append(np.sort(hashes))
        while len(self.levels) > 1 and len(self.levels[-2]) < 2 * len(self.levels[-1]):
            self.levels[-2:] = [np.sort(np.concatenate(self.levels[-2:]), kind='stable')]
        self.new.append(hashes)

    def sync(self) -> int:
        """Add what is new to the file, and make it safe; returns how many hashes it holds."""
        with open(self.path, 'ab') as f:
            for hashes in self.new:
                f.write(hashes.tobytes())
                self.count += len(hashes)
            f.flush()
            os.fsync(f.fileno())
        self.new = []
        return self.count


def share(
    partial: str, files: dict[str, list[str]], state: dict, val_fraction: float, source: str
) -> None:
    """Where the draw left train or val empty, it gets the end of the other one's last document.

    Of data with masks it gets the last example, whole. files: {split: paths}. They and the counts
    in state are changed: the last file is written anew, as two. The old one stays, so that a killed
    run can do it again.
    """
    splits = state['splits']
    sides = [split for split in ('train', 'val') if splits[split]['tokens']]
    if len(sides) != 1:
        return
    full, empty = sides[0], 'val' if sides[0] == 'train' else 'train'
    *earlier, path = files[full]
    masked = os.path.exists(mask_path(path))
    ids, encoder = read_bin(path), load_tokenizer(partial)
    end = end_of(encoder)
    last = splits[full]['last']
    size, documents = last['bytes'], last['documents']
    cut = len(ids) - last['tokens']  # what is behind it moves
    if not masked:
        fraction = val_fraction if empty == 'val' else 1 - val_fraction
        wanted = math.ceil((splits[full]['tokens'] - len(end)) * fraction) + len(end)
        first = max(cut, 2)  # something stays
        cut = max(len(ids) - wanted, first)
        while cut > first and _continues(encoder, ids[cut]):
            cut -= 1
    rest, given = ids[:cut], ids[cut:]
    if len(rest) < 2 or len(given) < 2:
        state['bytes'] = 0  # nothing worth keeping
        left_out = ', '.join(note(why, **n) for why, n in state['dropped'].items())
        left_out = f'; left out: {left_out}' if left_out else ''
        why = f'it is too short for its val_fraction{left_out}'
        raise UserError(f'{source} gives no {empty} text: {why}')
    if len(given) < last['tokens']:  # the document is cut: it ends in both, and begins in both
        text = given[: len(given) - len(end)]
        size = sum(len(encoder.token_bytes.get(int(i), b'')) for i in text)
        documents = 1
        splits[full]['documents'] += 1
        rest = np.append(rest, end)
        given = np.append(np.array(encoder.begin, ids.dtype), given)
    files[empty], files[full] = [f'{partial}/{empty}.bin'], [*earlier, f'{partial}/{full}.bin']
    write_bin(files[empty][0], given, encoder.vocab_size)
    write_bin(files[full][-1], rest, encoder.vocab_size)
    splits[empty].update(tokens=len(given), bytes=size, documents=documents, learned=len(given))
    splits[full]['tokens'] += len(rest) - len(ids)
    splits[full]['bytes'] -= size
    splits[full]['documents'] -= documents
    splits[full]['learned'] += len(rest) - len(ids)
    if masked:
        mask = np.fromfile(mask_path(path), np.uint8)
        mask[:cut].tofile(f'{partial}/{full}.mask.bin')
        mask[cut:].tofile(f'{partial}/{empty}.mask.bin')
        unlearned = int((mask[cut:] == 0).sum())
        splits[empty]['learned'] -= unlearned
        splits[full]['learned'] += unlearned


def _continues(encoder, token):
    """Whether a token begins within a character."""
    return encoder.token_bytes.get(int(token), b'a')[0] & 0xC0 == 0x80


def publish(folder: str, files: dict[str, list[str]], tokenizer: str, meta: dict) -> None:
    """Move whole files to their final names in folder; done again after a kill, it ends the same.

    files: {split: the paths of its .bin files}, beside which .mask.bin files lie if meta['masked'];
    tokenizer: the path of its tokenizer.json, beside which its chat template may be; meta: what
    meta.json says.
    """
    endings = ('.bin', '.mask.bin') if meta['masked'] else ('.bin',)
    moves = []
    for split in SPLITS:
        paths = files.get(split, [])
        for i, path in enumerate(paths):
            target = f'{folder}/{split}' if len(paths) == 1 else f'{folder}/{split}_{i:06d}'
            moves += [(path[:-4] + ending, target + ending) for ending in endings]
        moved = [target for path, target in moves if not os.path.exists(path)]  # before a kill
        for target in moved:
            if not os.path.exists(target):
                raise UserError(f'{target} is nowhere, nor what it is made of; prepare it again')
        masks = glob.glob(f'{glob.escape(folder)}/{split}*.mask.bin')
        for path in split_files(folder, split) + masks:
            if path not in moved and os.path.basename(path).startswith(split):
                os.remove(path)  # an older dataset's
    with open(tokenizer, encoding='utf-8') as old, replacing(f'{folder}/tokenizer.json') as new:
        shutil.copyfileobj(old, new)
    chat_template.write(folder, chat_template.read(os.path.dirname(tokenizer)))
    with replacing(f'{folder}/meta.json') as f:
        json.dump(meta, f, indent=1)
    for path, target in reversed(moves):  # train's first file last of all: what looks prepared is
        if os.path.exists(path):
            os.replace(path, target)


def remove(partial: str) -> None:
    """Remove the folder of an unfinished run, first of all what a run would go on from."""
    if os.path.exists(f'{partial}/state.json'):
        os.remove(f'{partial}/state.json')
    shutil.rmtree(partial)


def meta_of(
    state: dict,
    files: dict[str, list[str]],
    source: str,
    settings: dict,
    masked: bool,
    pairs: bool,
    separator: str,
) -> dict:
    """What meta.json says of a finished run."""
    splits = {}
    for split, n in state['splits'].items():
        if n['tokens']:
            counts = {key: n[key] for key in ('tokens', 'bytes', 'documents', 'learned')}
            splits[split] = counts | dict(files=len(files[split]))
    return dict(
        source=source,
        vocab_size=state['vocab_size'],
        begin=state['begin'],
        masked=masked,
        pairs=pairs,
        separator=separator,
        splits=splits,
        repaired=state['repaired'].get(REPAIRED, {}),
        lost=state['lost'],
        dropped=state['dropped'],
        spelled_out=state['spelled_out'],
        instead=list(state['replaced']),
        settings=settings,
        command=shlex.join(['python', *sys.argv]),
    )


def note(why: str, count: int, first: Sequence[str] = ()) -> str:
    """One reason for which records were left out, how many, and where the first of them are."""
    if not first:
        return f'{count:,} x {why}'
    more = ', ...' if count > len(first) else ''
    return f'{count:,} x {why} ({", ".join(first)}{more})'


def report(folder: str, meta: dict) -> None:
    """Print what was made, left out, repaired, and could not be had."""
    for split, n in meta['splits'].items():
        name = split if n['files'] == 1 else f'{split}_*'
        made = f'{n["tokens"]:,} tokens of {n["documents"]:,} documents'
        print(f'{folder}/{name}.bin: {made}, {n["bytes"] / n["tokens"]:.2f} bytes a token')
    if meta['repaired'].get('count'):
        print(f'repaired: {note(REPAIRED, **meta["repaired"])}')
    for why, n in meta['lost'].items():
        print(f'warning: {n["count"]:,} {why}, such as {", ".join(n["first"])}; convert them first')
    for why, n in meta['dropped'].items():
        print(f'left out: {note(why, **n)}')
    for token, n in meta['spelled_out'].items():
        what = note(f'{token!r} spelled out in the text, where it is plain letters', **n)
        hint = '; --separator splits .txt and .md files there'
        print(f'warning: {what}{hint if "separator" in meta["settings"] else ""}')
    for why in meta['instead']:
        print(why)
