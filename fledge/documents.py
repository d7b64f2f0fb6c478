"""Documents with masks, packed whole into rows: what fine-tuning and preferences train on.

Tokens reads a stream, whose rows begin and end anywhere. Here each document is whole in one row,
the mask says which of its tokens are learned, and `documents` of a batch tells the model which
positions belong together. The rows are packed when the data is loaded, so a prepared dataset
serves any block_size; packing decides who shares a row, and each epoch takes the rows in another
order. Which rows a step sees is a pure function of (data, seed, step), as there.
"""

import bisect
import os
from collections.abc import Sequence

import numpy as np

from fledge import UserError, read_meta
from fledge.tokenizer import find_tokenizer
from fledge.tokens import (
    Batch,
    Tokens,
    check_ids,
    has_masks,
    mask_path,
    read_bin,
    read_mask,
    split_files,
    spread,
    training_rows,
)

TOKENS_AT_ONCE = 1 << 23  # that loading looks at together


def open_split(
    folder: str,
    split: str,
    block_size: int,
    vocab_size: int,
    seed: int | None = None,
    with_sources: bool = False,
) -> 'Tokens | Documents':
    """One split of a prepared dataset: Documents where it has masks, else Tokens.

    with_sources: for an encoder, see Documents. UserError where train has masks and this split has
    none, and where there are no masks to tell a source from its target.
    """
    paths = split_files(folder, split)
    if any(os.path.exists(mask_path(path)) for path in paths):
        return Documents(folder, split, block_size, vocab_size, seed, with_sources)
    if paths and has_masks(folder):
        raise UserError(
            f'{folder} has masks beside train and none beside {paths[0]}: prepare it again'
        )
    if paths and with_sources:
        raise UserError(
            f'{folder} is a text without sources and targets, which an encoder needs: '
            'prepare/copy_task.py and prepare/translate.py make them'
        )
    return Tokens(folder, split, block_size, vocab_size, seed)


class Documents:
    """One split of a prepared dataset with masks: rows of block_size, packed with whole documents.

    folder/split.bin or its shards, .mask.bin beside each, and the tokenizer.json whose end-of-text
    token ends a document. A document of tokens t0 ... tn has the inputs t0 ... t(n-1) and the
    targets t1 ... tn, as far as its last learned one. One that is longer than a row is cut into
    pieces, which are documents of their own from then on. Where meta.json says `pairs`, a chosen
    document and the rejected one behind it stay together in one row, and are never cut.

    with_sources: what stands in front of a document's first learned token is its source, for an
    encoder, and what follows its target. The inputs are then the end-of-text token and the target;
    batches have `source` and `source_documents` besides. None is cut: those of which either is
    longer than a row are left out.

    vocab_size bounds the ids. seed: of the order of training's rows; None: for evaluation alone.
    UserError where files are missing or broken, or nothing is left to learn.

    n_rows, n_tokens (positions of all rows), n_documents and n_learned (targets) count what is in
    the rows, and `used` is the share of the positions that hold a document. Of the data, n_cut
    documents are cut, and n_left_out documents (or pairs) are in no row: those with nothing to
    learn, and n_too_long pairs, or sources with targets.
    of_documents: {name: float32 (n_documents,)}; each batch carries the values of its documents.
    """

    def __init__(
        self,
        folder: str,
        split: str,
        block_size: int,
        vocab_size: int,
        seed: int | None = None,
        with_sources: bool = False,
    ):
        self.paths = split_files(folder, split)
        if not self.paths:
            raise UserError(f'{folder} has no {split}.bin')
        self.block_size, self.vocab_size, self.seed = block_size, vocab_size, seed
        self.pairs, self.with_sources = bool(read_meta(folder).get('pairs')), with_sources
        if self.pairs and with_sources:
            raise UserError(f'{folder} has preferences, which no encoder-decoder learns from here')
        self.of_documents = {}
        self._open(folder)
        starts, ends = self._find_documents(folder)
        self.n_cut = self.n_too_long = 0
        if self.pairs:
            self._choose_pairs(starts, ends)
        elif with_sources:
            self._choose_targets(starts, ends)
        else:
            self._choose_documents(starts, ends)
        self._pack()
        if self.pairs:  # until objectives.add_reference knows better
            self.of_documents['reference'] = np.zeros(self.n_documents, np.float32)

    def _open(self, folder):
        """Map the shards and their masks. All positions below count through all the shards."""
        headerless = not read_meta(folder)
        self.shards = [read_bin(path, headerless) for path in self.paths]
        lengths = [len(ids) for ids in self.shards]
        self.masks = list(map(read_mask, self.paths, lengths))
        self.first_token = np.concatenate([[0], np.cumsum(lengths)])  # of each shard

    def _find_documents(self, folder):
        """Where each document of the data starts and ends (behind its last token)."""
        tokenizer = find_tokenizer(folder)
        if tokenizer is None or tokenizer.end_of_text is None:
            lack = 'no tokenizer.json' if tokenizer is None else 'a tokenizer without end of text'
            needed = 'documents with masks end with its end-of-text token'
            raise UserError(f'{folder} has {lack}, and {needed}: prepare it again')
        self.end_of_text = end_of_text = tokenizer.end_of_text
        found = []
        for path, ids, before in zip(self.paths, self.shards, self.first_token, strict=False):
            for start in range(0, len(ids), TOKENS_AT_ONCE):
                part = ids[start : start + TOKENS_AT_ONCE]
                check_ids(part, self.vocab_size, path, start)
                found.append(before + start + np.flatnonzero(part == end_of_text) + 1)
        ends = np.concatenate(found)
        # some tokenizers put the same token in front of a document
        in_front = read_meta(folder).get('begin', []).count(end_of_text)
        ends = ends[in_front :: in_front + 1]
        if not len(ends) or ends[-1] < self.first_token[-1]:
            ends = np.append(ends, self.first_token[-1])
        return np.concatenate([[0], ends[:-1]]), ends

    def _choose_documents(self, starts, ends):
        """What is packed: the pieces of the documents that have something to learn.

        A document that fits in a row is one piece. The next piece of a longer one begins with the
        last target of the piece before it, so that every target is predicted once.
        """
        positions = ends - starts - 1  # a document's last token is a target alone
        pieces_of_each = -(-positions // self.block_size)
        document = np.repeat(np.arange(len(starts)), pieces_of_each)  # that each piece is of
        skipped = self.block_size * _count_within(pieces_of_each)  # positions in front of it
        piece_starts = starts[document] + skipped
        lengths = np.minimum(positions[document] - skipped, self.block_size)
        _, lengths, learned = self._find_learned(piece_starts, lengths)
        teaches = learned > 0
        self.n_left_out = len(starts) - len(np.unique(document[teaches]))
        self.n_cut = len(np.unique(document[teaches & (skipped > 0)]))
        self._keep(teaches, piece_starts, lengths, learned)

    def _choose_pairs(self, starts, ends):
        """What is packed: the pairs that fit in a row, both with something to learn."""
        if len(starts) % 2:
            problem = f'{len(starts):,} documents, and pairs are an even number of them'
            raise UserError(f'{self.paths[0]} has {problem}: prepare it again')
        _, lengths, learned = self._find_learned(starts, ends - starts - 1)
        teaches = (learned.reshape(-1, 2) > 0).all(axis=1)
        chosen = self._fitting(teaches, lengths.reshape(-1, 2).sum(axis=1), 'pair')
        self._keep(np.repeat(chosen, 2), starts, lengths, learned)

    def _choose_targets(self, starts, ends):
        """What is packed: the targets that fit in a row and whose sources do."""
        first, lengths, learned = self._find_learned(starts, ends - starts - 1)
        source_lengths = first - starts
        lengths = lengths - source_lengths + 1  # without what is the source's
        longer = np.maximum(source_lengths, lengths)
        chosen = self._fitting(learned > 0, longer, 'source and target')
        # the input in front of the first target is the end of text, in place of the source's last
        self._keep(chosen, first - 1, lengths, learned)
        self.source_starts, self.source_lengths = starts[chosen], source_lengths[chosen]

    def _fitting(self, teaches, sizes, what):
        """Which of those that teach something fit in a row; counts the others.

        sizes: the positions that each takes. what: each is, in words. UserError where none fits.
        """
        fits = sizes <= self.block_size
        self.n_left_out = int(np.count_nonzero(~(teaches & fits)))
        self.n_too_long = int(np.count_nonzero(teaches & ~fits))
        if teaches.any() and not fits[teaches].any():
            raise UserError(
                f'no {what} of {self.paths[0]} fits in a row of block_size={self.block_size}: '
                f'the shortest needs --block_size={sizes[teaches].min()}'
            )
        return teaches & fits

    def _keep(self, chosen, starts, lengths, learned):
        """Keep the chosen documents: where each starts, its positions, its learned targets."""
        if not chosen.any():
            nothing = 'nothing to learn: its mask marks no token behind the first of a document'
            raise UserError(f'{self.paths[0]} has {nothing}; prepare it again')
        self.starts, self.lengths = starts[chosen], lengths[chosen]
        self.learned = learned[chosen]

    def _find_learned(self, starts, lengths):
        """Of each document, where its first learned target is, its length up to the last, how many.

        Of a document without any, the first two mean nothing.
        """
        last_targets = starts + lengths
        first_learned, last_learned = starts.copy(), starts.copy()
        learned = np.zeros(len(starts), np.int64)
        for mask, shard_start in zip(self.masks, self.first_token, strict=False):
            for begin in range(shard_start, shard_start + len(mask), TOKENS_AT_ONCE):
                part = mask[begin - shard_start :][:TOKENS_AT_ONCE]
                places = begin + np.flatnonzero(part)  # of learned tokens
                first = np.searchsorted(last_targets, begin)
                behind = np.searchsorted(starts, begin + len(part))
                here = np.arange(first, behind)  # the documents that may have targets in this part
                before = np.searchsorted(places, starts[here], side='right')  # t0 is no target
                up_to = np.searchsorted(places, last_targets[here], side='right')
                teaches = up_to > before
                here, before, up_to = here[teaches], before[teaches], up_to[teaches]
                is_first = learned[here] == 0
                first_learned[here[is_first]] = places[before[is_first]]
                last_learned[here] = places[up_to - 1]
                learned[here] += up_to - before
        return first_learned, last_learned - starts, learned

    def _pack(self):
        """Put the documents, or pairs, into rows."""
        together = 2 if self.pairs else 1
        lengths = self.lengths.reshape(-1, together).sum(axis=1)
        learned = self.learned.reshape(-1, together).sum(axis=1)
        sizes = np.maximum(lengths, self.source_lengths) if self.with_sources else lengths
        row_of_each, self.n_rows = pack(sizes, self.block_size)
        by_row = np.argsort(row_of_each, kind='stable')
        # the numbers of the documents, row by row, and where among them each row begins
        self.packed = (by_row[:, None] * together + np.arange(together)).ravel()
        documents_per_row = np.bincount(row_of_each) * together
        self.first_packed = np.concatenate([[0], np.cumsum(documents_per_row)])
        learned_per_row = np.bincount(row_of_each, learned).astype(np.int64)
        self.weight_per_row = documents_per_row // 2 if self.pairs else learned_per_row
        self.n_tokens = self.n_rows * self.block_size
        self.n_documents, self.n_learned = len(self.lengths), int(self.learned.sum())
        self.used = int(self.lengths.sum()) / self.n_tokens

    def rows(self, first: int, count: int) -> Batch:
        """Rows first .. first + count - 1 of training's endless order, a Batch.

        Each epoch sees every row once, in a fresh permutation.
        """
        return self.evaluation_batch(self._training_rows(first, count))

    def weight(self, first: int, count: int) -> int:
        """What a mean over these rows of training is over: their learned targets, or pairs."""
        return int(self.weight_per_row[self._training_rows(first, count)].sum())

    def documents_seen(self, first: int, count: int) -> list[tuple[str, int, np.ndarray]]:
        """[(path, position, ids)] of the documents in rows of training: where each is, and what."""
        seen = []
        for number in self.documents_of(self._training_rows(first, count)).tolist():
            start = self.source_starts[number] if self.with_sources else self.starts[number]
            end = self.starts[number] + self.lengths[number] + 1
            shard = np.searchsorted(self.first_token, start, side='right') - 1
            position = int(start - self.first_token[shard])
            seen.append(
                (self.paths[shard], position, self._read(self.shards, np.arange(start, end)))
            )
        return seen

    def _training_rows(self, first, count):
        rows, _ = training_rows(self.seed, self.n_rows, first, count)
        return rows

    def evaluation_rows(self, limit: int | None = None) -> list[int]:
        """The numbers of `limit` rows spread evenly, or of all."""
        return spread(range(self.n_rows), limit)

    def documents_of(self, rows: Sequence[int]) -> np.ndarray:
        """The numbers of the documents in these rows, int64, in the order of their batch.

        They count from 0 in the order of the data; of a pair the chosen one is even.
        """
        parts = [self.packed[self.first_packed[i] : self.first_packed[i + 1]] for i in rows]
        return np.concatenate(parts)

    def evaluation_batch(self, rows: Sequence[int]) -> Batch:
        """Some of evaluation_rows as a Batch, with `documents`, int64 (rows, block_size).

        These number the documents of the batch 0, 1, 2, ... through all of its rows. What is left
        at the end of a row has documents -1, inputs 0 and targets -1.
        """
        chosen = self.documents_of(rows)
        n_documents = self.first_packed[np.add(rows, 1)] - self.first_packed[rows]  # of each row
        row_of_each = np.repeat(np.arange(len(rows)), n_documents)
        numbers, lengths = np.arange(len(chosen)), self.lengths[chosen]
        # where in the data each position's input is; its target is the next token
        places = np.repeat(self.starts[chosen], lengths) + _count_within(lengths)
        next_ids = self._read(self.shards, places + 1)
        is_learned = self._read(self.masks, places + 1)
        ids = self._read(self.shards, places)
        if self.with_sources:
            ids[np.cumsum(lengths) - lengths] = self.end_of_text
        used = np.bincount(row_of_each, lengths, len(rows))
        batch = Batch(
            inputs=self._in_rows(ids, used, 0),
            targets=self._in_rows(np.where(is_learned, next_ids, -1), used, -1),
            documents=self._in_rows(np.repeat(numbers, lengths), used, -1),
        )
        if self.with_sources:
            lengths = self.source_lengths[chosen]
            places = np.repeat(self.source_starts[chosen], lengths) + _count_within(lengths)
            ids = self._read(self.shards, places)
            used = np.bincount(row_of_each, lengths, len(rows))
            batch['source'] = self._in_rows(ids, used, -1)
            batch['source_documents'] = self._in_rows(np.repeat(numbers, lengths), used, -1)
        for name, values in self.of_documents.items():
            batch[name] = values[chosen]
        return batch

    def _in_rows(self, values, used, filler):
        """Values of documents that follow one another, as rows; used: (rows,), how many in each."""
        held = np.arange(self.block_size) < used[:, None]  # (rows, block_size)
        rows = np.full(held.shape, filler, np.int64)
        rows[held] = values
        return rows

    def source_and_target(self, number: int) -> tuple[list[int], list[int]]:
        """The token ids of a document's source and of its target, lists; for with_sources."""
        start, first = self.source_starts[number], self.starts[number] + 1
        source = self._read(self.shards, np.arange(start, first))
        target = self._read(self.shards, np.arange(first, first + self.lengths[number]))
        return source.tolist(), target.tolist()

    def _read(self, files, places):
        """What the shards, or their masks, hold at these places; int64."""
        out = np.empty(len(places), np.int64)
        numbers = np.searchsorted(self.first_token, places, side='right') - 1
        for number in np.unique(numbers).tolist():
            here = numbers == number
            out[here] = files[number][places[here] - self.first_token[number]]
        return out

    def summary(self) -> str:
        """What is in the rows, and what is not, in one line for the log."""
        kind, count = 'documents', self.n_documents
        if self.pairs:
            kind, count = 'pairs', count // 2
        tokens = "their targets' tokens" if self.with_sources else 'their tokens'
        learned_share = self.n_learned / int(self.lengths.sum())
        line = (
            f'{count:,} {kind} in {self.n_rows:,} rows of {self.block_size:,}, '
            f'{self.used:.1%} of them used; {learned_share:.1%} of {tokens} are learned'
        )
        notes = []
        if self.n_cut:
            notes.append(f'{self.n_cut:,} cut (longer than a row)')
        if self.n_left_out > self.n_too_long:
            notes.append(f'{self.n_left_out - self.n_too_long:,} left out (nothing to learn)')
        if self.n_too_long:
            longer = 'longer than a row; a longer block_size keeps them'
            notes.append(f'{self.n_too_long:,} left out ({longer})')
        return f'{line}; {", ".join(notes)}' if notes else line


def pack(lengths: np.ndarray, room: int) -> tuple[np.ndarray, int]:
    """The row of each of these lengths, int64, where a row has so much room; and how many rows.

    Best-fit decreasing: longest first, each into the fullest row that it fits in; for language
    models by Ding et al. 2024, "Fewer Truncations Improve Language Modeling".
    """
    order = np.argsort(-lengths, kind='stable')
    rows_with = [[] for _ in range(room + 1)]  # rows_with[n] have n positions free
    free = []  # the n of those that are not empty, in order
    rows, n_rows = [], 0
    for length in lengths[order].tolist():
        i = bisect.bisect_left(free, length)
        if i < len(free):
            before = free[i]
            row = rows_with[before].pop()
            if not rows_with[before]:
                del free[i]
        else:
            before, row = room, n_rows
            n_rows += 1
        after = before - length
        if not rows_with[after]:
            bisect.insort(free, after)
        rows_with[after].append(row)
        rows.append(row)
    row_of_each = np.empty(len(lengths), np.int64)
    row_of_each[order] = rows
    return row_of_each, n_rows


def _count_within(lengths):
    """0 1 2 0 1 for the lengths 3 2."""
    first = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) - np.repeat(first, lengths)
