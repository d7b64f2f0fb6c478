"""Documents in, a prepared dataset out: the one pipeline under every script in prepare/.

One process reads, num_proc workers tokenize, and what they return is written in the order it was read, so the same
command gives the same bytes for any num_proc. Every few seconds what is written is made safe together with the place
it was read from (data/NAME/partial/): killed at any moment, the same command goes on from there.
"""
import collections
import glob
import hashlib
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from types import SimpleNamespace
from typing import Callable, NamedTuple

import numpy as np
from tqdm import tqdm

from fledge import UserError, lock_folder, replacing
from fledge.tokenizer import END_OF_TEXT, IM_END, IM_START, char_tokenizer, load_tokenizer, train_bpe
from fledge.tokens import Seen, SplitWriter, split_files
from prepare import worker
from prepare.sources import REPAIRED, Files, Lost, Skip, Unavailable
from prepare.worker import SPLITS, documents_of, texts_of

tokenizer = 'gpt2'          # gpt2, bytes, chars, a tokenizer.json, a folder that holds one (data/stdlib), or train
vocab_size = 32000          # of --tokenizer=train
train_bytes = 50_000_000    # of text that --tokenizer=train learns from
val_fraction = 0.01         # of the documents, where the source has no validation split; of the text where there is but one
min_length = 0              # characters; shorter documents are left out
target_tokens = 0           # stop when train has this many; 0: the whole source
shard_tokens = 100_000_000  # a split with more becomes train_000000.bin, train_000001.bin, ...
num_proc = 0                # processes that tokenize; 0: one a core
shard = 0                   # prepare this slice of num_shards, to be joined by prepare/merge.py
num_shards = 1              # machines or jobs that share the work
retries = 5                 # of a source that stops answering, after 1, 2, 4, 8, ... seconds
seed = 1337                 # of the split, and of any shuffling


class Stage(NamedTuple):
    """One source of a dataset, and what to make of its records.

    documents(record) runs in the workers and returns the documents of one example, which stay together: each a text, a
    conversation [{'role': ..., 'content': ...}, ...], or pieces [(text, learned), ...]. It raises Skip(why) where a record
    is of no use. Records that are bytes are parsed as JSON first.
    """
    source: object
    documents: Callable
    split: str = ''         # train, val or test; '': val_fraction of the examples, chosen by hash, are val
    limit: int = 0          # examples to take; 0: all
    instead: object = None  # the Stage that takes its place where the source cannot be had


BATCH_BYTES = 1 << 20   # of records, handed to a worker at a time
COMMIT_SECONDS = 2


def prepare(stages, source, settings, masked=False):
    """Tokenize the stages, one after another, into data/NAME: .bin files, tokenizer.json, meta.json.

    source: what meta.json calls it; settings: what configure() returned. masked: .mask.bin files are written as well,
    and the tokenizer is given the special tokens of chats.
    """
    s = SimpleNamespace(**settings)
    for setting, good, why in (('name', s.name, 'is needed: the folder under data/'), ('val_fraction', 0 < s.val_fraction < 1, 'is not between 0 and 1'),
                               ('num_proc', s.num_proc >= 0, 'is negative'), ('num_shards', s.num_shards > 0, 'is not positive'),
                               ('shard', 0 <= s.shard < s.num_shards, f'is none of the {s.num_shards} shards, which count from 0'),
                               ('shard_tokens', 1 < s.shard_tokens < 2 ** 31, 'is not between 2 and 2^31'), ('train_bytes', s.train_bytes > 0, 'is too few'),
                               ('target_tokens', s.target_tokens >= 0, 'is negative'), ('retries', s.retries >= 0, 'is negative')):
        if not good:
            raise UserError(f'{setting}={settings[setting]} {why}')
    if s.tokenizer in ('train', 'chars') and s.num_shards > 1:
        raise UserError(f'--tokenizer={s.tokenizer}: each of the {s.num_shards} shards would make another one; '
                        'make it first (--num_shards=1 --target_tokens=1 --name=mine), then --tokenizer=data/mine')
    folder = os.path.join('data', s.name) + (f'/shard_{s.shard:05d}_of_{s.num_shards:05d}' if s.num_shards > 1 else '')
    os.makedirs(folder, exist_ok=True)
    lock = lock_folder(folder, wait=True)
    # the same command finds what an earlier run of it left; a run with other settings leaves that alone
    job = json.dumps(settings | dict(num_proc=0, retries=0, sources=[stage.source.identity for stage in stages]))
    partial = f'{folder}/partial-{hashlib.blake2b(job.encode(), digest_size=4).hexdigest()}'
    state = _saved_state(partial) or _new_state(partial)
    try:
        if not state['whole']:
            _tokenize_all(s, stages, state, partial, source, masked)
        if s.num_shards > 1 and os.path.exists(f'{partial}/hashes'):
            os.replace(f'{partial}/hashes', f'{folder}/hashes')  # for merge.py
        dropped = {why: dict(count=count, first=places) for why, (count, places) in state['notes'].items()}
        publish(folder, {split: [f'{partial}/{split}_{i:06d}.bin' for i in range(len(n['shards']))] for split, n in state['splits'].items()}
                | {'tokenizer.json': f'{partial}/tokenizer.json'},
                dict(source=source, vocab_size=state['vocab_size'], masked=masked,
                     splits={split: {key: n[key] for key in ('tokens', 'bytes', 'documents', 'learned')} | dict(files=len(n['shards'])) for split, n in state['splits'].items() if n['tokens']},
                     dropped={why: n for why, n in dropped.items() if why != REPAIRED}, repaired=dropped.get(REPAIRED, {}),
                     instead=state['instead'], settings=settings, command=shlex.join(['python', *sys.argv])))
        for path in glob.glob(f'{glob.escape(folder)}/partial-*'):
            shutil.rmtree(path)
    except OSError as e:
        raise UserError(f'{folder}: {e.strerror or e}; what is prepared is kept, and the same command goes on') from None
    finally:
        if not state['bytes']:  # there is nothing to keep
            shutil.rmtree(partial, ignore_errors=True)
            with suppress(OSError):
                os.rmdir(folder)
        os.close(lock)
    for split, n in state['splits'].items():
        if n['tokens']:
            print(f'{folder}/{split}{"_*" * (len(n["shards"]) > 1)}.bin: {n["tokens"]:,} tokens of {n["documents"]:,} documents, {n["bytes"] / n["tokens"]:.2f} bytes a token')
    for why, (count, places) in state['notes'].items():
        print(f'{"repaired" if why == REPAIRED else "left out"}: {_note(why, count, places)}')
    for index, why in state['instead'].items():
        print(f'{stages[int(index)].instead.source.identity} took the place of {stages[int(index)].source.identity}: {why}')


def _note(why, count, places):
    return f'{count:,} x {why}' + (f' ({", ".join(places)}{", ..." * (count > len(places))})' if places else '')


def _saved_state(partial):
    """What an earlier run of this job made safe, or None."""
    with suppress(OSError, ValueError):
        with open(f'{partial}/state.json', encoding='utf-8') as f:
            state = json.load(f)
        print(f'{os.path.dirname(partial)}: goes on behind the {sum(n["documents"] for n in state["splits"].values()):,} documents that are prepared', file=sys.stderr)
        return state


def _new_state(partial):
    shutil.rmtree(partial, ignore_errors=True)
    others = glob.glob(f'{glob.escape(os.path.dirname(partial))}/partial-*')
    if others:
        print(f'{others[0]} is of an unfinished run with other settings; it stays until this run is whole', file=sys.stderr)
    os.makedirs(partial)
    # stage, position, taken: where reading goes on; instead: stages that gave way; last: tokens, bytes, documents of the last example
    return dict(stage=0, position=None, taken=0, instead={}, bytes=0, hashes=0, whole=False, cut=None, notes={}, splits={
        split: dict(tokens=0, bytes=0, documents=0, learned=0, shards=[], last=[0, 0, 0]) for split in SPLITS})


def _tokenize_all(s, stages, state, partial, source, masked):
    """Read, tokenize and write from where state stands; when it returns, the files in partial are whole."""
    if os.path.exists(f'{partial}/tokenizer.json'):
        encoder = load_tokenizer(partial)
    else:
        encoder = _choose_tokenizer(s, stages, state, masked)
        encoder.save(f'{partial}/tokenizer.json')
    state['vocab_size'] = encoder.vocab_size
    writers = {split: SplitWriter(partial, split, encoder.vocab_size, s.shard_tokens, masked, n['shards']) for split, n in state['splits'].items()}
    seen = Seen(f'{partial}/hashes', state['hashes'])

    def commit():
        for split, writer in writers.items():
            state['splits'][split]['shards'] = writer.sync()
        state['hashes'] = seen.sync()
        with replacing(f'{partial}/state.json') as f:
            json.dump(state, f)
            f.flush()
            os.fsync(f.fileno())

    num_proc = s.num_proc or (len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count())
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # the workers are the parallelism
    workers = ProcessPoolExecutor(num_proc, multiprocessing.get_context('fork'), worker.start, (os.getpid(), s, stages, encoder, masked))
    tqdm.monitor_interval = 0  # no thread, while processes fork
    bar = tqdm(initial=state['bytes'], unit='B', unit_scale=True, disable=None)
    reader, pending, failure, saved, shown, stopped = _batches(s, stages, state), collections.deque(), None, time.monotonic(), time.monotonic(), []

    def stop(number, _):  # Ctrl-C and SIGTERM: what is read is still written; a second one ends at once
        stopped.append(number)
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        batch = True
        while batch:
            try:
                batch = None if stopped else next(reader, None)
            except UserError as e:  # what was read before it is still written
                batch, failure = None, e
            if batch:
                index, records, size, position = batch
                pending.append((index, records and workers.submit(worker.tokenize, index, str(index) in state['instead'], records), size, position))
            while pending and (not batch or len(pending) > 2 * num_proc):
                _write(s, stages, state, writers, seen, *pending.popleft())
            tokens = sum(n['tokens'] for n in state['splits'].values())
            bar.total = sum(stage.source.size for stage in stages) // s.num_shards or None
            if s.target_tokens and tokens:
                bar.total = int(state['bytes'] * max(1, s.target_tokens / s.num_shards / tokens))
            bar.set_postfix_str(f'{tokens:,} tokens', refresh=False)
            bar.update(state['bytes'] - bar.n)
            if bar.disable and time.monotonic() - shown > 60:  # no terminal: a line a minute
                shown = time.monotonic()
                print(f'{state["bytes"] / 1e6:,.0f} MB read, {tokens:,} tokens', file=sys.stderr)
            if time.monotonic() - saved > COMMIT_SECONDS:
                commit()
                saved = time.monotonic()
        if failure or stopped:
            if state['bytes']:
                commit()
                failure = failure and UserError(f'{failure}; what is prepared is kept, and the same command goes on')
            raise failure or (KeyboardInterrupt if signal.SIGINT in stopped else SystemExit(128 + signal.SIGTERM))
        if s.num_shards == 1 and not any(n['tokens'] for n in state['splits'].values()):
            state['bytes'] = 0
            raise UserError(f'{source} gives no documents' + ''.join(f'; {_note(why, *n)}' for why, n in state['notes'].items()))
        if s.num_shards == 1 and not state['cut']:
            _share(s, state, writers, encoder, masked, source)
        commit()
        if state['cut']:
            writers[state['cut'][0]].cut(*state['cut'][1:])
        for writer in writers.values():
            writer.close()
        state['whole'] = True
        commit()
    except BrokenProcessPool:
        raise UserError('a process that tokenizes was killed, for want of memory perhaps; what is prepared is kept, and the same command goes on') from None
    finally:
        bar.close()
        workers.shutdown(wait=False, cancel_futures=True)


def _choose_tokenizer(s, stages, state, masked):
    if s.tokenizer == 'chars':
        return char_tokenizer(sorted(set().union(*_texts(s, stages, state, 0))), (END_OF_TEXT, IM_START, IM_END) if masked else ())
    if s.tokenizer == 'train':
        return train_bpe(_texts(s, stages, state, s.train_bytes), s.vocab_size)
    encoder = load_tokenizer(s.tokenizer)
    return encoder.with_special() if masked else encoder


def _texts(s, stages, state, budget):
    """The texts of the documents; with a budget, about so many bytes of those to train on, spread over files."""
    chosen = [i for i, stage in enumerate(stages) if not (budget and stage.split in ('val', 'test'))]
    for index in chosen:
        share = budget // len(chosen)
        pieces = 64 if isinstance(stages[index].source, Files) and stages[index].source.size > share > 0 else 1
        slices = stages[index].source.size * pieces // share if pieces > 1 else 1
        size = count = 0
        for piece in range(pieces):
            for record, _, _ in _records(s, stages, index, state, None, piece * slices // pieces, slices):
                with suppress(Skip):
                    for text in [text for document in documents_of(_stage(stages, state, index), record, [], ('', 0)) for text in texts_of(document)]:
                        yield text
                        size += len(text)
                count += 1
                if budget and size * pieces >= share * (piece + 1) or count == stages[index].limit:
                    break


def _records(s, stages, index, state, position, shard, num_shards):
    """(record, place, position) of a stage's source, tried again where it is lost, or of another where it cannot be had."""
    stage, failures = _stage(stages, state, index), 0
    while True:
        try:
            for record, place, position in stage.source.read(position, shard, num_shards):
                failures = 0
                yield record, place, position
            return
        except (Lost, Unavailable) as e:
            if isinstance(e, Lost) and failures < s.retries:
                time.sleep(2 ** failures)
                failures += 1
            elif position is None and stage.instead:
                print(f'{e}; {stage.instead.source.identity} takes its place', file=sys.stderr)
                stage, failures, state['instead'][str(index)] = stage.instead, 0, str(e)
            else:
                raise UserError(str(e)) from None


def _stage(stages, state, index):
    """The stage, or the one that has taken its place."""
    return stages[index].instead if str(index) in state['instead'] else stages[index]


def _batches(s, stages, state):
    """(stage, records, bytes, position behind them) from where state stands; records is None at the end of a stage."""
    for index in range(state['stage'], len(stages)):
        position = state['position'] if index == state['stage'] else None
        batch, size, failure = [], 0, None
        try:
            for record, place, position in _records(s, stages, index, state, position, s.shard, s.num_shards):
                if state['stage'] > index:  # all that was to be taken has been
                    break
                batch.append((record, place))
                size += _size(record)
                if size >= BATCH_BYTES:
                    yield index, batch, size, position
                    batch, size = [], 0
        except UserError as e:
            failure = e
        if batch:
            yield index, batch, size, position
        if failure:
            raise failure
        yield index, None, 0, None


def _size(record):
    if isinstance(record, (dict, list, tuple)):
        return 8 + sum(map(_size, record.values() if isinstance(record, dict) else record))
    return len(record) if isinstance(record, (str, bytes)) else 8


def _write(s, stages, state, writers, seen, index, future, size, position):
    """Write what came of a batch, in the order it was read, without what has come before."""
    if index < state['stage']:
        return
    if future is None:
        state.update(stage=index + 1, position=None, taken=0)
        return
    out = future.result()
    stage = _stage(stages, state, index)
    fresh = out['part'].copy()
    fresh[~out['part']] = seen.add(out['hash'][~out['part']])
    for why, place in out['notes'] + [('a duplicate', None)] * int((~fresh).sum()):
        note = state['notes'].setdefault(why, [0, []])
        note[0] += 1
        if place and len(note[1]) < 3:
            note[1].append(f'{place[0]}:{place[1]}')
    rows, done = np.flatnonzero(fresh), False
    left = math.ceil(stage.limit / s.num_shards) - state['taken']
    if stage.limit and len(rows) >= left:
        rows, done = rows[:left], True
    if s.target_tokens:
        train = rows[out['split'][rows] == 0]
        reached = state['splits']['train']['tokens'] + np.cumsum(out['tokens'][train]) >= s.target_tokens / s.num_shards
        if reached.any():
            rows, index, done = rows[rows <= train[reached.argmax()]], len(stages) - 1, True
    for code, split in enumerate(SPLITS):
        chosen, n = rows[out['split'][rows] == code], state['splits'][split]
        if len(chosen):
            take = np.zeros(len(fresh), bool)
            take[chosen] = True
            ids, learned = (a if take.all() or a is None else a[np.repeat(take, out['tokens'])] for a in (out['ids'], out['learned']))
            writers[split].write(ids, out['tokens'][chosen], learned)
            for row in chosen if out['part'].any() else chosen[-1:]:
                now = [int(out[key][row]) for key in ('tokens', 'bytes', 'documents')]
                n['last'] = [a + b for a, b in zip(n['last'], now)] if out['part'][row] and not n['last'][2] else now
            for key in ('tokens', 'bytes', 'documents'):
                n[key] += int(out[key][chosen].sum())
            n['learned'] += int(learned.sum()) if learned is not None else len(ids)
    state.update(bytes=state['bytes'] + size, position=position, taken=state['taken'] + len(rows))
    if done:
        state.update(stage=index + 1, position=None, taken=0)


def _share(s, state, writers, encoder, masked, source):
    """Where the split left train or val empty, it gets the end of the other's last document; of masked ones the last example."""
    sides = [split for split in ('train', 'val') if state['splits'][split]['tokens']]
    if len(sides) != 1:
        return
    full, empty = sides[0], {'train': 'val', 'val': 'train'}[sides[0]]
    ids, learned = writers[full].last_shard()
    end = [] if encoder.end_of_text is None or masked else [encoder.end_of_text]
    tokens, size, documents = state['splits'][full]['last']
    moved = tokens
    if not masked:
        fraction = s.val_fraction if empty == 'val' else 1 - s.val_fraction
        moved = min(tokens, len(ids), math.ceil((state['splits'][full]['tokens'] - len(end)) * fraction) + len(end))
        while moved < min(tokens, len(ids)) and encoder.token_bytes.get(int(ids[-moved]), b'a')[0] & 0xC0 == 0x80:  # not within a character
            moved += 1
    cut = moved < tokens
    if cut:
        size, documents = sum(len(encoder.token_bytes.get(int(i), b'')) for i in ids[len(ids) - moved:len(ids) - len(end)]), 1
    if moved < 2 or len(ids) - moved < 2:
        state['bytes'] = 0
        raise UserError(f'{source} gives no {empty} text: it is too short for its val_fraction')
    writers[empty].write(ids[-moved:], [moved], learned if learned is None else learned[-moved:])
    n = dict(tokens=moved, bytes=size, documents=documents, learned=int(learned[-moved:].sum()) if masked else moved)
    state['splits'][empty].update(n)
    back = dict(tokens=len(end), learned=len(end), bytes=0, documents=1) if cut else dict.fromkeys(n, 0)  # the document that was cut ends in both
    for key in n:
        state['splits'][full][key] -= n[key] - back[key]
    state['cut'] = [full, len(ids) - moved, end if cut else []]


def publish(folder, source, meta):
    """Move whole files to their final names in folder; done again after a kill, it ends the same.

    source: {split: the paths of its .bin files, beside which .mask.bin files may lie}, and 'tokenizer.json': its path.
    """
    moves = []
    for split in SPLITS:
        paths = source.get(split, [])
        names = [split] if len(paths) == 1 else [f'{split}_{i:06d}' for i in range(len(paths))]
        moves += [(path[:-4] + ending, f'{folder}/{name}{ending}') for path, name in zip(paths, names) for ending in ('.mask.bin', '.bin')[not meta['masked']:]]
        for path in split_files(folder, split) + glob.glob(f'{glob.escape(folder)}/{split}*.mask.bin'):
            if path not in [target for _, target in moves]:
                os.remove(path)  # an older dataset's
    with open(source['tokenizer.json'], encoding='utf-8') as old, replacing(f'{folder}/tokenizer.json') as new:
        shutil.copyfileobj(old, new)
    with replacing(f'{folder}/meta.json') as f:
        json.dump(meta, f, indent=1)
    for path, target in reversed(moves):  # train's first file last of all: what looks prepared is
        if os.path.exists(path):
            os.replace(path, target)
