"""Documents in, a prepared dataset out: the one pipeline under every script in prepare/.

One process reads, num_proc workers tokenize, and what they return is written in the order it was read, so the same
command gives the same bytes for any num_proc. Every few seconds what is written is made safe together with the place
it was read from (data/NAME/partial-*/): killed at any moment, the same command goes on from there.
"""

import collections
import glob
import hashlib
import json
import math
import multiprocessing
import os
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
from fledge.tokenizer import load_tokenizer
from fledge.tokens import Seen, SplitWriter
from prepare import worker
from prepare.finish import meta_of, note, publish, remove, report, share
from prepare.reading import batches, choose_tokenizer, settle, stage_of
from prepare.worker import SPLITS

tokenizer = (
    'gpt2'  # gpt2, bytes, chars, a tokenizer.json, a folder that holds one (data/stdlib), or train
)
vocab_size = 32000  # of --tokenizer=train
train_bytes = 50_000_000  # of text that --tokenizer=train learns from
val_fraction = 0.01  # of the documents, where the source has no validation split; of the text where there is but one
min_length = 0  # characters; shorter documents are left out
target_tokens = 0  # stop when train has this many; 0: the whole source
shard_tokens = 100_000_000  # a split with more becomes train_000000.bin, train_000001.bin, ...
num_proc = 0  # processes that tokenize; 0: one a core
shard = 0  # prepare this slice of num_shards, to be joined by prepare/merge.py
num_shards = 1  # machines or jobs that share the work
retries = 5  # of a source that stops answering, after 1, 2, 4, 8, ... seconds
seed = 1337  # of the split, and of any shuffling


class Stage(NamedTuple):
    """One source of a dataset, and what to make of its records.

    documents(record) runs in the workers and returns the documents of one example, which stay together: each a text, a
    conversation [{'role': ..., 'content': ...}, ...], or pieces [(text, learned), ...]. It raises Skip(why) where a record
    is of no use. Records that are bytes are parsed as JSON first.
    """

    source: object
    documents: Callable
    split: str = ''  # train, val or test; '': val_fraction of the examples, chosen by hash, are val
    limit: int = 0  # examples to take; 0: all
    instead: object = None  # the Stage that takes its place where the source cannot be had


COMMIT_SECONDS = 2  # how often what is written is made safe


def prepare(stages, source, settings, masked=False):
    """Tokenize the stages, one after another, into data/NAME: .bin files, tokenizer.json, meta.json.

    source: what meta.json calls it; settings: what configure() returned. masked: .mask.bin files are written as well,
    and the tokenizer is given the special tokens of chats.
    """
    s = SimpleNamespace(**settings)
    sys.stdout.reconfigure(errors='backslashreplace')  # a terminal that is not UTF-8
    below_data = not os.path.isabs(s.name) and os.path.normpath(s.name).partition(os.sep)[
        0
    ] not in ('.', '..')
    for setting, good, why in (
        ('name', s.name, 'is needed: the folder under data/'),
        ('name', below_data, 'is no folder under data/'),
        ('val_fraction', 0 < s.val_fraction < 1, 'is not between 0 and 1'),
        ('train_bytes', s.train_bytes > 0, 'is too few'),
        ('target_tokens', s.target_tokens >= 0, 'is negative'),
        ('shard_tokens', 1 < s.shard_tokens < 2**31, 'is not between 2 and 2^31'),
        ('num_proc', s.num_proc >= 0, 'is negative'),
        ('num_shards', s.num_shards > 0, 'is not positive'),
        (
            'shard',
            0 <= s.shard < s.num_shards,
            f'is none of the {s.num_shards} shards, which count from 0',
        ),
        ('retries', s.retries >= 0, 'is negative'),
    ):
        if not good:
            raise UserError(f'{setting}={settings[setting]} {why}')
    if s.tokenizer in ('train', 'chars') and s.num_shards > 1:
        raise UserError(
            f'--tokenizer={s.tokenizer}: each of the {s.num_shards} shards would make another one; '
            'make it first (--num_shards=1 --target_tokens=1 --name=mine), then --tokenizer=data/mine'
        )
    folder = os.path.join('data', s.name) + (
        f'/shard_{s.shard:05d}_of_{s.num_shards:05d}' if s.num_shards > 1 else ''
    )
    os.makedirs(folder, exist_ok=True)
    lock = lock_folder(folder, wait=True)
    # the same command finds what an earlier run of it left; a run with other settings leaves that alone
    job = json.dumps(
        settings | dict(num_proc=0, retries=0, sources=[stage.source.identity for stage in stages])
    )
    partial = f'{folder}/partial-{hashlib.blake2b(job.encode(), digest_size=4).hexdigest()}'
    state = _saved_state(partial) or _new_state(partial)
    try:
        if not state['whole']:
            _tokenize_all(s, stages, state, partial, source, masked)
        if s.num_shards > 1 and os.path.exists(f'{partial}/hashes'):
            os.replace(f'{partial}/hashes', f'{folder}/hashes')  # for merge.py
        files = {
            split: [f'{partial}/{split}_{i:06d}.bin' for i in range(len(n['shards']))]
            for split, n in state['splits'].items()
        }
        publish(
            folder,
            files | {'tokenizer.json': f'{partial}/tokenizer.json'},
            meta_of(state, source, settings, masked),
        )
        for path in glob.glob(f'{glob.escape(folder)}/partial-*'):
            remove(path)
    except OSError as e:
        kept = (
            '; what is prepared is kept, and the same command goes on'
            if os.path.exists(f'{partial}/state.json')
            else ''
        )
        raise UserError(f'{folder}: {e.strerror or e}{kept}') from None
    finally:
        if not state['bytes'] and os.path.exists(partial):  # there is nothing to keep
            with suppress(OSError):
                remove(partial)
                os.rmdir(folder)
        os.close(lock)
    report(folder, state, stages)


def _saved_state(partial):
    """What an earlier run of this job made safe, or None."""
    with suppress(OSError, ValueError):
        with open(f'{partial}/state.json', encoding='utf-8') as f:
            state = json.load(f)
        print(
            f'{os.path.dirname(partial)}: goes on behind the {sum(n["documents"] for n in state["splits"].values()):,} documents that are prepared',
            file=sys.stderr,
        )
        return state


def _new_state(partial):
    if os.path.exists(partial):
        remove(partial)
    others = glob.glob(f'{glob.escape(os.path.dirname(partial))}/partial-*')
    if others:
        print(
            f'{others[0]} is of an unfinished run with other settings; it stays until this run is whole',
            file=sys.stderr,
        )
    os.makedirs(partial)
    # stage, position, taken: where reading goes on; instead: stages that gave way; last: tokens, bytes, documents of the last example
    return dict(
        stage=0,
        position=None,
        taken=0,
        instead={},
        bytes=0,
        hashes=0,
        whole=False,
        cut=None,
        notes={},
        splits={
            split: dict(tokens=0, bytes=0, documents=0, learned=0, shards=[], last=[0, 0, 0])
            for split in SPLITS
        },
    )


def _tokenize_all(s, stages, state, partial, source, masked):
    """Read, tokenize and write from where state stands; when it returns, the files in partial are whole."""
    if os.path.exists(f'{partial}/state.json'):
        encoder = load_tokenizer(partial)
    else:
        settle(s, stages, state)
        encoder = choose_tokenizer(s, stages, state, masked)
        encoder.save(f'{partial}/tokenizer.json')
    state['vocab_size'] = encoder.vocab_size
    if state['cut']:  # a run was killed right behind share(): its file may be cut already
        state['splits'][state['cut'][0]]['shards'][-1] = state['cut'][1]
    writers = {
        split: SplitWriter(partial, split, encoder.vocab_size, s.shard_tokens, masked, n['shards'])
        for split, n in state['splits'].items()
    }
    seen = Seen(f'{partial}/hashes', state['hashes'])

    def commit():
        for split, writer in writers.items():
            state['splits'][split]['shards'] = writer.sync()
        state['hashes'] = seen.sync()
        with replacing(f'{partial}/state.json') as f:
            json.dump(state, f)
            f.flush()
            os.fsync(f.fileno())

    num_proc = s.num_proc or (
        len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    )
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # the workers are the parallelism
    workers = ProcessPoolExecutor(
        num_proc,
        multiprocessing.get_context('fork'),
        worker.start,
        (os.getpid(), s, stages, encoder, masked),
    )
    tqdm.monitor_interval = 0  # no thread, while processes fork
    bar = tqdm(initial=state['bytes'], unit='B', unit_scale=True, disable=None)
    workers.submit(int)  # starts them all, before the source starts threads
    reader, pending, failure, stopped = batches(s, stages, state), collections.deque(), None, []
    saved = shown = time.monotonic()

    def stop(
        number, _
    ):  # Ctrl-C and SIGTERM: what is read is still written; a second one ends at once
        stopped.append(number)
        signal.signal(
            number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler
        )

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
                pending.append(
                    (
                        index,
                        records
                        and workers.submit(
                            worker.tokenize, index, str(index) in state['instead'], records
                        ),
                        size,
                        position,
                    )
                )
            while pending and (not batch or len(pending) > 2 * num_proc):
                _write(s, stages, state, writers, seen, encoder, *pending.popleft())
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
                failure = failure and UserError(
                    f'{failure}; what is prepared is kept, and the same command goes on'
                )
            raise failure or (
                KeyboardInterrupt if signal.SIGINT in stopped else SystemExit(128 + signal.SIGTERM)
            )
        if s.num_shards == 1 and not any(n['tokens'] for n in state['splits'].values()):
            state['bytes'] = 0
            raise UserError(
                f'{source} gives no documents'
                + ''.join(f'; {note(why, *n)}' for why, n in state['notes'].items())
            )
        if s.num_shards == 1 and not state['cut']:
            share(s, state, writers, encoder, masked, source)
        commit()
        if state['cut']:
            writers[state['cut'][0]].cut(*state['cut'][1:])
        for writer in writers.values():
            writer.close()
        state['whole'] = True
        commit()
    except BrokenProcessPool:
        raise UserError(
            'a process that tokenizes was killed, for want of memory perhaps; what is prepared is kept, and the same command goes on'
        ) from None
    finally:
        bar.close()
        workers.shutdown(cancel_futures=True)


def _write(s, stages, state, writers, seen, encoder, index, future, size, position):
    """Write what came of a batch, in the order it was read, but for what has come before and what is beyond a limit."""
    if index < state['stage']:
        return
    if future is None:
        state.update(stage=index + 1, position=None, taken=0)
        return
    out, stage, done = future.result(), stage_of(stages, state, index), False
    fresh = out['part'].copy()
    fresh[~out['part']] = seen.fresh(out['hash'][~out['part']])
    rows = np.flatnonzero(fresh)
    left = math.ceil(stage.limit / s.num_shards) - state['taken']
    if stage.limit and len(rows) >= left:
        rows, done = rows[:left], True
    if s.target_tokens:
        train = rows[out['split'][rows] == 0]
        reached = (
            state['splits']['train']['tokens'] + np.cumsum(out['tokens'][train])
            >= s.target_tokens / s.num_shards
        )
        if reached.any():
            rows, index, done = rows[rows <= train[reached.argmax()]], len(stages) - 1, True
    seen.add(out['hash'][rows[~out['part'][rows]]])
    last = len(fresh) if not done else rows[-1] if len(rows) else -1
    for why, place, before in out['notes'] + [
        ('a duplicate', None, row) for row in np.flatnonzero(~fresh)
    ]:
        if before <= last:
            counted = state['notes'].setdefault(why, [0, []])
            counted[0] += 1
            if place and len(counted[1]) < 3:
                counted[1].append(f'{place[0]}:{place[1]}')
    for code, split in enumerate(SPLITS):
        chosen, n = rows[out['split'][rows] == code], state['splits'][split]
        if len(chosen):
            take = np.zeros(len(fresh), bool)
            take[chosen] = True
            ids, learned = (
                a if take.all() or a is None else a[np.repeat(take, out['tokens'])]
                for a in (out['ids'], out['learned'])
            )
            writers[split].write(ids, out['tokens'][chosen], learned)
            for row in chosen if out['part'].any() else chosen[-1:]:
                now = [int(out[key][row]) for key in ('tokens', 'bytes', 'documents')]
                n['last'] = (
                    [a + b for a, b in zip(n['last'], now)]
                    if out['part'][row] and not n['last'][2]
                    else now
                )
            for key in ('tokens', 'bytes', 'documents'):
                n[key] += int(out[key][chosen].sum())
            n['learned'] += int(learned.sum()) if learned is not None else len(ids)
            if (
                done and not n['last'][2]
            ):  # the target is reached within a long text, which ends here
                end = worker.end_of(encoder)
                writers[split].write(end, [len(end)], [1] * len(end))
                for key, more in dict(tokens=len(end), learned=len(end), documents=1).items():
                    n[key] += more
                n['last'] = [n['last'][0] + len(end), n['last'][1], 1]
    state.update(bytes=state['bytes'] + size, position=position, taken=state['taken'] + len(rows))
    if done:
        state.update(stage=index + 1, position=None, taken=0)
