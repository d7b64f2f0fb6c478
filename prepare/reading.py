"""Reading in the pipeline: the stages' records, one after another, in batches for the workers and as texts for a tokenizer."""

import itertools
import sys
import time
from contextlib import suppress

from fledge import UserError
from fledge.tokenizer import (
    END_OF_TEXT,
    IM_END,
    IM_START,
    char_tokenizer,
    load_tokenizer,
    train_bpe,
)
from prepare.sources import Files, Lost, Skip, Unavailable
from prepare.worker import documents_of, texts_of

BATCH_BYTES = 1 << 20  # of records, handed to a worker at a time


def settle(s, stages, state):
    """Before anything is read, find out which sources cannot be had, and note in state that others take their place."""
    for index, stage in enumerate(stages):
        if stage.instead:
            try:
                next(records(s, stages, index, state, None, s.shard, s.num_shards), None)
            except UserError as e:
                print(f'{e}; {stage.instead.source.identity} takes its place', file=sys.stderr)
                state['instead'][str(index)] = str(e)


def stage_of(stages, state, index):
    """The stage, or the one that has taken its place."""
    return stages[index].instead if str(index) in state['instead'] else stages[index]


def records(s, stages, index, state, position, shard, num_shards):
    """(record, place, position) of a stage's source, tried again where it stops answering."""
    failures = 0
    while True:
        try:
            for record, place, position in stage_of(stages, state, index).source.read(
                position, shard, num_shards
            ):
                failures = 0
                yield record, place, position
            return
        except (Lost, Unavailable) as e:
            if isinstance(e, Unavailable) or failures == s.retries:
                raise UserError(str(e)) from None
            print(f'{e}; again in {2**failures} s', file=sys.stderr)
            time.sleep(2**failures)
            failures += 1


def batches(s, stages, state):
    """(stage, records, bytes, position behind them) from where state stands; records is None at the end of a stage."""
    for index in range(state['stage'], len(stages)):
        if index < state['stage']:  # the writer has all that it wants
            return
        position = state['position'] if index == state['stage'] else None
        batch, size, failure = [], 0, None
        try:
            for record, place, position in records(
                s, stages, index, state, position, s.shard, s.num_shards
            ):
                if index < state['stage']:
                    break
                batch.append((record, place))
                size += size_of(record)
                if size >= BATCH_BYTES:
                    yield index, batch, size, position
                    batch, size = [], 0
        except UserError as e:  # what was read before is not lost
            failure = e
        if batch:
            yield index, batch, size, position
        if failure:
            raise failure
        yield index, None, 0, None


def size_of(record):
    """About how many bytes a record is."""
    if isinstance(record, (dict, list, tuple)):
        return 8 + sum(map(size_of, record.values() if isinstance(record, dict) else record))
    return len(record) if isinstance(record, (str, bytes)) else 8


def choose_tokenizer(s, stages, state, masked):
    """The tokenizer that the settings ask for; chars and train are made of the stages' own text."""
    if s.tokenizer == 'chars':
        characters = set(itertools.chain.from_iterable(texts(s, stages, state, 0))) | set(
            'system\nuser\nassistant\n' if masked else ''
        )
        return char_tokenizer(sorted(characters), (END_OF_TEXT, IM_START, IM_END) if masked else ())
    if s.tokenizer == 'train':
        return train_bpe(texts(s, stages, state, s.train_bytes), s.vocab_size)
    encoder = load_tokenizer(s.tokenizer)
    return encoder.with_special() if masked else encoder


def texts(s, stages, state, budget):
    """The texts of the documents; with a budget, about so many bytes of those to train on, spread over files."""
    chosen = [
        i for i, stage in enumerate(stages) if not (budget and stage.split in ('val', 'test'))
    ]
    for index in chosen:
        stage, share = stage_of(stages, state, index), budget // len(chosen)
        pieces = (
            64 if isinstance(stage.source, Files) and stage.source.size > share > 0 else 1
        )  # and the beginning of each
        size = count = 0
        for piece in range(pieces):
            for record, _, _ in records(s, stages, index, state, None, piece, pieces):
                with suppress(Skip):
                    for text in [
                        text
                        for document in documents_of(stage, record, [])
                        for text in texts_of(document)
                    ]:
                        yield text
                        size += len(text.encode())
                count += 1
                if budget and size * pieces >= share * (piece + 1) or count == stage.limit:
                    break
