"""A run's checkpoints: ckpt.pt, the ones before it as ckpt_step_000500.pt, and best.pt."""

import glob
import os
import threading
import time
from collections.abc import Callable

import torch

from fledge import UserError
from fledge.checkpoint import NotFinite, load, save

RETRY_SECONDS = 30  # until what could not be written is tried again


def older_files(out_dir: str) -> list[tuple[int, str]]:
    """[(step, path)] of a run's checkpoints before the latest, the newest first."""
    found = []
    for path in glob.glob(os.path.join(glob.escape(out_dir), 'ckpt_step_*.pt')):
        number = os.path.basename(path).removeprefix('ckpt_step_').removesuffix('.pt')
        if number.isdecimal():
            found.append((int(number), path))
    return sorted(found, reverse=True)


def files(out_dir: str) -> list[str]:
    """The paths of a run's checkpoints, the newest first; [] where there are none."""
    paths = [os.path.join(out_dir, 'ckpt.pt')]
    paths += [path for _, path in older_files(out_dir)]
    paths.append(os.path.join(out_dir, 'best.pt'))
    return [path for path in paths if os.path.exists(path)]


def newest(
    out_dir: str, say: Callable[[str], None], before_bad_steps: bool = False
) -> tuple[str, dict]:
    """The newest whole checkpoint of a run, as (path, what load gives).

    before_bad_steps: of those alone whose last step was finite. say() tells of each that is
    skipped, and why. UserError where none is whole.
    """
    paths = files(out_dir)
    problems = []
    for path in paths:
        try:
            loaded = load(path)
        except UserError as e:
            problems.append(str(e))
            continue
        if before_bad_steps and loaded.get('run', {}).get('bad_steps'):
            problems.append(f'the last steps of {path} were not finite')
            continue
        for problem in problems:
            say(f'skipped: {problem}')
        return path, loaded
    if not problems:
        load(os.path.join(out_dir, 'ckpt.pt'))  # the UserError for a file that is missing
    raise UserError(f'no checkpoint of {out_dir} is whole: {"; ".join(problems)}')


def snapshot(value: object, copies: dict | None = None) -> object:
    """A copy, on the CPU, of what a checkpoint is to hold; a tensor that is in it twice stays one.

    copies: {what identifies a tensor: its copy} of those met before.
    """
    copies = {} if copies is None else copies
    if torch.is_tensor(value):
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if key not in copies:
            copies[key] = value.detach().to('cpu', copy=True)
        return copies[key]
    if isinstance(value, dict):
        return {name: snapshot(part, copies) for name, part in value.items()}
    if isinstance(value, list):
        return [snapshot(part, copies) for part in value]
    return value


class Saver:
    """Writes a run's checkpoints from a thread of its own, while training goes on.

    ckpt.pt is the latest, ckpt_step_*.pt are those before it, `keep` of them in all. What cannot be
    written waits in memory and is tried again. on_disk: the step of the ckpt.pt that is there and
    whole, which the next save renames to ckpt_step_*.pt; None: what is there is replaced.
    """

    def __init__(self, out_dir: str, keep: int, on_disk: int | None):
        self.out_dir, self.keep, self.on_disk = out_dir, keep, on_disk
        self.latest = self.best = None  # snapshots that are not on the disk yet
        self.thread = None
        self.error, self.failed_at = '', 0.0
        self.told = False  # whether the error has been said

    def save(self, checkpoint: dict, is_best: bool, copy: bool = True) -> None:
        """Begin to write a dict of tensors and plain values, of which a copy is taken now.

        copy=False: none is, for nothing in it will change.
        """
        self.wait()
        self.latest = snapshot(checkpoint) if copy else checkpoint
        if is_best:
            self.best = self.latest
        self.start()

    def drop(self) -> None:
        """Forget what is not on the disk yet."""
        self.wait()
        self.latest, self.best, self.error = None, None, ''

    def start(self) -> None:
        self.thread = threading.Thread(target=self.write)
        self.thread.start()

    def wait(self) -> None:
        """Until what is being written is written, or has failed."""
        if self.thread:
            self.thread.join()

    def write(self) -> None:
        try:
            # the best first: a run that is killed between the two goes on from the checkpoint
            # before, comes to the same weights again, and again finds that they are the best
            if self.best:
                save(os.path.join(self.out_dir, 'best.pt'), self.best)
                self.best = None
            if self.latest:
                self.write_latest()
            self.error = ''
        except NotFinite as e:
            self.latest = self.best = None
            self.note(e)
        except (UserError, OSError) as e:
            self.note(e)
        except Exception as e:  # a mistake in the code: its traceback is shown
            self.note(f'{type(e).__name__}: {e}')
            raise

    def note(self, error: object) -> None:
        self.error, self.failed_at, self.told = str(error), time.monotonic(), False

    def write_latest(self) -> None:
        path, older = os.path.join(self.out_dir, 'ckpt.pt'), None
        step = self.latest['iter_num']
        if self.on_disk not in (None, step) and os.path.exists(path):
            older = os.path.join(self.out_dir, f'ckpt_step_{self.on_disk:06d}.pt')
        save(path, self.latest, older)
        self.on_disk, self.latest = step, None
        # what is of later steps was broken, or is of before the run went back
        before = [path for n, path in older_files(self.out_dir) if n < step]
        for _, path in older_files(self.out_dir):
            if path not in before[: self.keep - 1]:
                os.remove(path)

    def tend(self, say: Callable[[str], None]) -> None:
        """Say what could not be written, and try it again after a while: a call for each step."""
        if not self.error or self.thread.is_alive():
            return
        if not self.told:
            say(f'WARNING: {self.error}; training goes on, and tries again')
            self.told = True
        if time.monotonic() - self.failed_at > RETRY_SECONDS:
            self.start()

    def finish(self) -> None:
        """Until all is written; UserError where that cannot be done."""
        self.wait()
        if self.error and (self.latest or self.best):
            self.start()
            self.wait()
        if self.error:
            raise UserError(self.error)
