"""Records in, a prepared dataset out: the one pipeline under every script in prepare/.

One process reads, num_proc workers tokenize, and what they return is written in the order it was
read, so the same command gives the same bytes for any num_proc. Every few seconds what is written
is made safe together with the place it was read from (data/NAME/partial-*/): killed at any moment,
the same command goes on from there.
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
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from fledge import UserError, lock_folder, release_folder, replacing, usable_cores
from fledge.corpus import encoding, writing
from fledge.corpus.encoding import SPLITS, Example, Note, Stage, end_of
from fledge.corpus.sources import read
from fledge.tokenizer import load_tokenizer

# The settings that all scripts share; a script may have defaults of its own.
tokenizer = 'gpt2'  # gpt2, bytes, chars, train, or a tokenizer.json or a folder with one
vocab_size = 32000  # of --tokenizer=train
train_bytes = 50_000_000  # of text that --tokenizer=train learns from
val_fraction = 0.01  # of the documents, where the source has no val; of the text where it is one
min_length = 0  # characters; shorter documents are left out
target_tokens = 0  # stop when train has this many; 0: the whole source
shard_tokens = 100_000_000  # a split with more becomes train_000000.bin, train_000001.bin, ...
num_proc = 0  # processes that tokenize; 0: one a core
shard = 0  # prepare this slice of num_shards, to be joined by prepare/merge.py
num_shards = 1  # machines or jobs that share the work
retries = 5  # of a source that stops answering, after 1, 2, 4, 8, ... seconds
seed = 1337  # of the split, and of any shuffling


class Batch(NamedTuple):
    """Records that are read and handed to a worker together."""

    stage: int  # its number
    records: list  # of (record, place)
    size: int  # bytes, about
    position: object  # behind them in the stage's source


BATCH_BYTES = 1 << 20  # of records, in a batch
COMMIT_SECONDS = 2  # how often what is written is made safe
GOES_ON = 'what is prepared is kept, and the same command goes on'


def prepare(
    settings: dict,
    source: str,
    stages: list[Stage],
    masked: bool = False,
    pairs: bool = False,
    separator: str = '',
) -> None:
    """Tokenize the stages, one after another, into the .bin files of data/NAME.

    settings: what configure() returned; source: what meta.json calls it. masked: .mask.bin files
    are written as well, and the tokenizer is given the special tokens of chats. pairs: each example
    is two documents, chosen and rejected, which meta.json says to training. separator: what ends
    the sources of documents that translated() made; meta.json has it, and so says what they are.
    """
    s = SimpleNamespace(**settings)
    _check(settings)
    folder = os.path.join('data', s.name)
    if s.num_shards > 1:
        folder += f'/shard_{s.shard:05d}_of_{s.num_shards:05d}'
    # the same command finds what an earlier run of it left; other settings leave that alone
    identities = [stage.source.identity for stage in stages]
    job = json.dumps(settings | dict(num_proc=0, retries=0, stages=identities))
    partial = f'{folder}/partial-{hashlib.blake2b(job.encode(), digest_size=4).hexdigest()}'
    try:
        os.makedirs(folder, exist_ok=True)
        lock = lock_folder(folder, wait=True)
        state = _saved_state(partial) or _begin(partial)
    except OSError as e:
        raise UserError(f'{folder} is no folder to write to ({e.strerror or e})') from None
    try:
        if not state['whole']:
            Run(s, source, stages, state, partial, masked).tokenize()
        files = {}
        for split, n in state['splits'].items():
            numbers = range(len(n['shards']))
            files[split] = [f'{partial}/{split}_{i:06d}.bin' for i in numbers]
        if s.num_shards == 1:
            writing.share(partial, files, state, s.val_fraction, source)
        elif os.path.exists(f'{partial}/hashes'):
            os.replace(f'{partial}/hashes', f'{folder}/hashes')  # for merge.py
        meta = writing.meta_of(state, files, source, settings, masked, pairs, separator)
        writing.publish(folder, files, f'{partial}/tokenizer.json', meta)
        for path in glob.glob(f'{glob.escape(folder)}/partial-*'):
            writing.remove(path)
    except OSError as e:
        kept = f'; {GOES_ON}' if os.path.exists(f'{partial}/state.json') else ''
        raise UserError(f'{folder}: {e.strerror or e}{kept}') from None
    finally:
        if not state['bytes'] and os.path.exists(partial):  # there is nothing to keep
            with suppress(OSError):
                writing.remove(partial)
        release_folder(lock)
        with suppress(OSError):
            os.rmdir(folder)  # which is empty where nothing was kept
    writing.report(folder, meta)


def _check(settings):
    """UserError for a setting that cannot be."""
    s = SimpleNamespace(**settings)
    if not s.name:
        raise UserError('name= is needed: the folder under data/')
    if os.path.isabs(s.name) or os.path.normpath(s.name).split(os.sep)[0] in ('.', '..'):
        raise UserError(f'name={s.name} is no folder under data/')
    if not 0 <= s.shard < s.num_shards:
        which = f'none of the {s.num_shards} slices, which count from 0'
        raise UserError(f'shard={s.shard} is {which}')
    if s.tokenizer in ('train', 'chars') and s.num_shards > 1:
        problem = f'each of the {s.num_shards} slices would make another one'
        first = 'make it first (--num_shards=1 --target_tokens=1 --name=mine)'
        raise UserError(
            f'--tokenizer={s.tokenizer}: {problem}; {first}, then --tokenizer=data/mine'
        )


def _saved_state(partial):
    """What an earlier run of this job made safe, or None."""
    try:
        with open(f'{partial}/state.json', encoding='utf-8') as f:
            state = json.load(f)
    except (OSError, ValueError):
        return None
    if state.keys() != _new_state().keys():
        print(f'{partial} is of another version of this script: begun anew', file=sys.stderr)
        return None
    documents = sum(n['documents'] for n in state['splits'].values())
    goes_on = f'goes on behind the {documents:,} documents that are prepared'
    print(f'{os.path.dirname(partial)}: {goes_on}', file=sys.stderr)
    return state


def _begin(partial):
    """Make an empty folder for a run that begins; returns its state."""
    if os.path.exists(partial):
        writing.remove(partial)
    others = glob.glob(f'{glob.escape(os.path.dirname(partial))}/partial-*')
    if others:
        stays = 'is of an unfinished run with other settings; it stays until this run is whole'
        print(f'{others[0]} {stays}', file=sys.stderr)
    os.makedirs(partial)
    return _new_state()


def _new_state():
    splits = {}
    for split in SPLITS:
        counts = dict(tokens=0, bytes=0, documents=0)
        # shards: the tokens of each file; last: the counts of the last example
        splits[split] = dict(**counts, learned=0, shards=[], last=counts)
    return dict(
        vocab_size=0,  # this and begin: the tokenizer's
        begin=[],
        stage=0,  # that is read
        position=None,  # in its source
        taken=0,  # examples of it
        bytes=0,  # read of all
        hashes=0,  # in the file that Seen keeps
        splits=splits,
        repaired={},  # {why: dict(count=..., first=[places])}
        lost={},
        dropped={},
        spelled_out={},
        replaced={},
        whole=False,  # all files are written
    )


class Run:
    """A run that tokenizes: `state` is what a killed run needs to go on; all else is made of it."""

    def __init__(
        self,
        s: SimpleNamespace,
        source: str,
        stages: list[Stage],
        state: dict,
        partial: str,
        masked: bool,
    ):
        self.s, self.source, self.stages, self.state = s, source, stages, state
        self.partial, self.masked = partial, masked
        self.failure: UserError | None = None  # of a source
        if os.path.exists(f'{partial}/state.json'):
            self.encoder = load_tokenizer(partial)
        else:
            self.encoder, why_chatml = encoding.choose_tokenizer(s, stages, masked)
            if why_chatml:
                state['replaced'][why_chatml] = dict(count=1, first=[])
            self.encoder.save(f'{partial}/tokenizer.json')
        state.update(vocab_size=self.encoder.vocab_size, begin=self.encoder.begin)
        self.writers = {}
        for split, n in state['splits'].items():
            self.writers[split] = writing.SplitWriter(
                partial, split, self.encoder.vocab_size, s.shard_tokens, masked, n['shards']
            )
        self.seen = writing.Seen(f'{partial}/hashes', state['hashes'])

    def tokenize(self) -> None:
        """Read, tokenize and write from where state stands; then the files in partial are whole."""
        s, state = self.s, self.state
        num_proc = s.num_proc or len(usable_cores())
        os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # the workers are the parallelism
        tqdm.monitor_interval = 0  # no thread, while processes fork
        workers = _workers(num_proc, s, self.stages, self.encoder, self.masked)
        bar = tqdm(initial=state['bytes'], unit='B', unit_scale=True, disable=None)
        stopped = _signals()
        batches, pending = self.batches(), collections.deque()
        saved = shown = time.monotonic()
        try:
            batch = next(batches, None)
            while batch or pending:
                if batch:
                    task = workers.submit(encoding.tokenize, batch.stage, batch.records)
                    pending.append((batch, task))
                while pending and (not batch or len(pending) > 2 * num_proc):
                    oldest, task = pending.popleft()
                    self.write(oldest, task.result())
                self.show(bar)
                now = time.monotonic()
                if bar.disable and now - shown > 60:  # no terminal: a line a minute
                    shown = now
                    print(f'{state["bytes"] / 1e6:,.0f} MB read, {bar.postfix}', file=sys.stderr)
                if now - saved > COMMIT_SECONDS:
                    self.commit()
                    saved = now
                batch = None if stopped else next(batches, None)
            kept = ''
            if (self.failure or stopped) and state['bytes']:
                self.commit()
                kept = f'; {GOES_ON}'
            if self.failure:
                raise UserError(f'{self.failure}{kept}')
            if stopped:
                raise KeyboardInterrupt if signal.SIGINT in stopped else SystemExit(143)
            if s.num_shards == 1 and not any(n['tokens'] for n in state['splits'].values()):
                state['bytes'] = 0
                notes = [writing.note(why, **n) for why, n in state['dropped'].items()]
                raise UserError('; '.join([f'{self.source} gives no documents', *notes]))
            for writer in self.writers.values():
                writer.close()
            state['whole'] = True
            self.commit()
        except BrokenProcessPool:
            killed = 'a process that tokenizes was killed, for want of memory perhaps'
            raise UserError(f'{killed}; {GOES_ON}') from None
        finally:
            bar.close()
            workers.shutdown(cancel_futures=True)

    def batches(self) -> Iterator[Batch]:
        """Every Batch from where state stands, read ahead of what is written.

        Where a source fails, the last one holds what was read before that, and self.failure says
        why there are no more.
        """
        s, state = self.s, self.state
        begun = state['stage']
        for index, stage in enumerate(self.stages):
            if index < state['stage']:  # the writer has all that it wants of it
                continue
            position = state['position'] if index == begun else None
            records, size = [], 0
            try:
                found = read(stage.source, position, s.shard, s.num_shards, s.retries)
                for record, place, position in found:
                    if index < state['stage']:
                        break
                    records.append((record, place))
                    size += _size_of(record)
                    if size >= BATCH_BYTES:
                        yield Batch(index, records, size, position)
                        records, size = [], 0
            except UserError as e:
                self.failure = e
            if records:
                yield Batch(index, records, size, position)
            if self.failure:
                return

    def write(self, batch: Batch, results: list) -> None:
        """Write what tokenize() made of a batch, up to a limit and but for what came before."""
        state = self.state
        if batch.stage < state['stage']:  # a limit was reached before
            return
        if batch.stage > state['stage']:
            state.update(stage=batch.stage, taken=0)
        hashes = [r.hash for r in results if isinstance(r, Example) and r.hash is not None]
        fresh = iter(self.seen.fresh(np.array(hashes, np.uint64)).tolist())
        added, next_stage = [], batch.stage
        for result in results:
            if isinstance(result, Note):
                self.count_note(result)
                continue
            if result.hash is not None:
                if not next(fresh):
                    self.count_note(Note('dropped', 'a duplicate', None))
                    continue
                added.append(result.hash)
            self.append(result)
            state['taken'] += 1
            next_stage = self.next_stage(batch.stage)
            if next_stage > batch.stage:
                if not result.documents:  # the limit lies within a long text, which ends there
                    end = end_of(self.encoder)
                    learned = np.ones(len(end), np.uint8)
                    self.append(Example(None, result.split, end, learned, size=0, documents=1))
                break
        self.seen.add(np.array(added, np.uint64))
        for writer in self.writers.values():
            writer.flush()
        state['bytes'] += batch.size
        state['position'] = batch.position
        if next_stage > batch.stage:
            state.update(stage=next_stage, position=None, taken=0)

    def next_stage(self, stage: int) -> int:
        """The stage that is read next: the same one, or where a limit is reached a later one."""
        s, state = self.s, self.state
        train = state['splits']['train']['tokens']
        if s.target_tokens and train >= s.target_tokens / s.num_shards:
            return len(self.stages)
        limit = self.stages[stage].limit
        if limit and state['taken'] >= math.ceil(limit / s.num_shards):
            return stage + 1
        return stage

    def count_note(self, note: Note) -> None:
        """Count a note, and keep the first three places of its kind."""
        counted = self.state[note.kind].setdefault(note.why, dict(count=0, first=[]))
        counted['count'] += note.times
        if note.place and len(counted['first']) < 3:
            path, line = note.place
            name = f'{path}:{line}' if line else path
            if name not in counted['first']:
                counted['first'].append(name)

    def append(self, example: Example) -> None:
        """Append an example to its split."""
        n, ids, learned = self.state['splits'][example.split], example.ids, example.learned
        self.writers[example.split].write(ids, learned)
        n['learned'] += len(ids) if learned is None else int(learned.sum())
        if n['last']['documents']:  # it has ended, and this one begins another
            n['last'] = dict(tokens=0, bytes=0, documents=0)
        counts = dict(tokens=len(ids), bytes=example.size, documents=example.documents)
        for key, count in counts.items():
            n[key] += count
            n['last'][key] += count

    def commit(self) -> None:
        """Make what is written safe, together with the place it was read from."""
        for split, writer in self.writers.items():
            self.state['splits'][split]['shards'] = writer.sync()
        self.state['hashes'] = self.seen.sync()
        with replacing(f'{self.partial}/state.json') as f:
            json.dump(self.state, f)
            f.flush()
            os.fsync(f.fileno())

    def show(self, bar: tqdm) -> None:
        """Bring the progress bar up to date: bytes read of the whole, and tokens so far."""
        s, state = self.s, self.state
        tokens = sum(n['tokens'] for n in state['splits'].values())
        bar.total = sum(stage.source.size for stage in self.stages) // s.num_shards or None
        if s.target_tokens and tokens:
            bar.total = int(state['bytes'] * max(1, s.target_tokens / s.num_shards / tokens))
        bar.set_postfix_str(f'{tokens:,} tokens', refresh=False)
        bar.update(state['bytes'] - bar.n)


def _workers(number, *job):
    """A pool of processes that tokenize; of threads where a fork is not possible, or not safe.

    Windows has none, and macOS's own libraries do not survive it. The longest part of the work, to
    look tokens up, holds up no other thread.
    """
    if 'fork' not in multiprocessing.get_all_start_methods() or sys.platform == 'darwin':
        encoding.set_job(*job)
        return ThreadPoolExecutor(number)
    fork = multiprocessing.get_context('fork')
    pool = ProcessPoolExecutor(number, fork, encoding.start_worker, job)
    pool.submit(int)  # starts them all, before the source starts threads
    return pool


def _signals():
    """A list that Ctrl-C and SIGTERM add their numbers to; the second one ends the process."""
    stopped = []
    ends = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}

    def stop(number, _):
        stopped.append(number)
        signal.signal(number, ends[number])

    for number in ends:
        with suppress(ValueError):  # not every system, nor every thread, may listen
            signal.signal(number, stop)
    return stopped


def _size_of(record):
    """About how many bytes a record is."""
    if isinstance(record, dict):
        record = list(record.values())
    if isinstance(record, (list, tuple)):
        return 8 + sum(map(_size_of, record))
    return len(record) if isinstance(record, (str, bytes)) else 8
