"""A training run: its clock, its signals, its seeds, and what may be asked of it."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict

from fledge import UserError, depth, optimizers, read_json, saving
from fledge.configurator import one_of
from fledge.log import GROUPED_OVER, speak
from model import GPTConfig

# what a run cannot go on without, besides the shape of its model
FIXED = ['dataset', 'optimizer', 'lora_rank', 'lora_alpha', 'lora_targets']
SAVE_AFTER = 0.2  # seconds from a signal; a step that takes longer is given up


class Clock:
    """The time of a run, and how much of it was not training: evaluations, samples and so on."""

    def __init__(self, elapsed: float):
        self.began = time.monotonic() - elapsed
        self.aside = 0.0  # seconds that were not training
        self.start_interval()

    def elapsed(self) -> float:
        """Seconds since the run began, without those between a stop and a resume."""
        return time.monotonic() - self.began

    @contextlib.contextmanager
    def not_training(self) -> Iterator[None]:
        """Count the time of a `with` block as none of training."""
        began = self.elapsed()
        yield
        self.aside += self.elapsed() - began

    def start_interval(self) -> None:
        """Begin to count training's time, and its steps, anew."""
        self.interval_start, self.interval_aside = self.elapsed(), self.aside
        self.n_steps = 0  # since then; train.py counts them

    def interval(self) -> float:
        """Seconds of training since start_interval()."""
        return self.elapsed() - self.interval_start - (self.aside - self.interval_aside)


class StopSignals:
    """The first SIGINT or SIGTERM asks for a checkpoint and a stop; the next ends the process.

    The loop is asked to stop at the end of its step. Where it has not stopped after SAVE_AFTER
    seconds, for a step of a large batch can take minutes, another thread calls save_now(), if one
    is given.
    """

    def __init__(self, speaks: bool, save_now: Callable | None = None):
        self.speaks, self.save_now, self.asked_at = speaks, save_now, None
        # held where the loop changes the state of the run or saves it, and by save_now()
        self.lock = threading.Lock()
        self.is_whole = True  # False: a change has begun, or failed, and what is there is no state
        self.is_paused = self.can_pause = False
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError, OSError):  # a system may lack one
                signal.signal(number, self.hear)
        with contextlib.suppress(AttributeError, ValueError, OSError):  # nor has Windows this one
            signal.signal(signal.SIGUSR1, self.wait_while_paused)
            self.can_pause = True

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """While the state of the run changes: save_now() comes before it or after it."""
        with self.lock:
            self.is_whole = False
            yield
            self.is_whole = True  # which it is not where an error ends the change

    def pause_loop(self) -> None:
        """Hold the loop where it is, in the middle of a step, so that saving has the processor."""
        self.is_paused = True
        if self.can_pause:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    def wait_while_paused(self, number: int, frame: object) -> None:
        """The handler of SIGUSR1, in the thread of the loop."""
        while self.is_paused:
            time.sleep(0.01)

    def asked(self) -> bool:
        """Whether a signal has come."""
        return self.asked_at is not None

    def hear(self, number: int, frame: object) -> None:
        """The handler of SIGINT and SIGTERM."""
        now = time.monotonic()
        if self.asked_at is None:
            self.asked_at = now
            if self.save_now:
                timer = threading.Timer(SAVE_AFTER, self.save_now)
                timer.daemon = True  # a loop that has ended by itself does not wait for it
                timer.start()
            if self.speaks:
                words = b'\nsaving and stopping after this step; once more stops at once\n'
                with contextlib.suppress(OSError):  # print() may be what the signal interrupts
                    os.write(2, words)
        # one request may come as several signals: from the terminal, a launcher, a scheduler
        elif now - self.asked_at > 1:
            os._exit(128 + number)


def each_seed(settings: dict, given: set[str]) -> int:
    """Run this command once for each of its seeds, one after another, each in out_dir/seed_N.

    The same command again goes on where it was. A signal reaches the run that is going, and the
    rest is not begun. given: names of the settings that the user gave. What follows from one_dial
    for the first seed holds for all. Returns the exit code. UserError where a run is there with
    other settings, and for what is no run in one process.
    """
    folders = {}
    for seed in range(settings['seed'], settings['seed'] + settings['seeds']):
        folders[seed] = os.path.join(settings['out_dir'], f'seed_{seed}')
    check_seeds(settings, given, folders.values())
    child, signals = None, []

    def hear(number, frame):
        signals.append(number)
        if child:
            with contextlib.suppress(ValueError):  # on Windows Ctrl-C reaches it by itself
                child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError, OSError):  # a system may lack one
            signal.signal(number, hear)
    for seed, folder in folders.items():
        own = ['--seeds=1', f'--seed={seed}', f'--out_dir={folder}', '--auto_resume=True']
        if settings['one_dial'] and seed != settings['seed']:
            first = read_json(os.path.join(folders[settings['seed']], 'settings.json'))
            own += [f'--{name}={first[name]}' for name in depth.CHOSEN]
        child = subprocess.Popen([sys.executable, *sys.argv, *own])
        if signals:  # which came before there was a process to send it to
            hear(signals[-1], None)
        code = child.wait()
        if code or signals:
            speak(f'not done with {folder}; the same command goes on there', sys.stderr)
            return code if code >= 0 else 128 - code  # -code: the signal that ended it
    speak(f'all runs are done: python compare.py {shlex.quote(settings["out_dir"])}', sys.stdout)
    return 0


def check_seeds(settings: dict, given: set[str], folders: Iterable[str]) -> None:
    """UserError where each_seed() cannot make its runs in these folders."""
    single = [f'--{name}' for name in ('dry_run', 'eval_only') if settings[name]]
    if settings['init_from'] == 'resume':
        single.append('--init_from=resume')
    if 'RANK' in os.environ:
        single.append('torchrun')
    if single:
        raise UserError(
            f'--seeds={settings["seeds"]} makes several runs, each in one process, and goes on '
            f'with them by itself: not with {", ".join(single)}'
        )
    for folder in folders:
        if not saving.files(folder):
            continue
        before = read_json(os.path.join(folder, 'settings.json'))
        names = given if settings['one_dial'] else set(before)  # the dial chooses the others
        for name in sorted(names & settings.keys() - GROUPED_OVER):
            was, now = before.get(name, settings[name]), settings[name]
            if was != now and now != 'auto':
                raise UserError(
                    f'{folder} has a run with {name}={was!r}, and runs with {name}={now!r} do not '
                    'go beside it: name another --out_dir'
                )


def settings_of(checkpoint: dict) -> dict:
    """The settings of the run of a loaded checkpoint, but for those that are of each start."""
    of_a_start = ('init_from', 'auto_resume', 'out_dir', 'eval_only', 'dry_run')
    return {name: v for name, v in checkpoint['config'].items() if name not in of_a_start}


def changes_since(checkpoint: dict, settings: dict) -> dict:
    """{setting: its value in a loaded checkpoint} of those that are others now."""
    before = dict(objective='next_token') | settings_of(checkpoint)  # nanoGPT's has no other
    return {name: v for name, v in before.items() if settings.get(name, v) != v}


def check_resume(path: str, start: dict, changed: dict, settings: dict) -> None:
    """UserError for settings that the run of a loaded checkpoint cannot go on with, naming each.

    changed: those that differ from the run's own, whose values it has.
    """
    shape, problems = {}, []
    # a run that began from other weights has their shape, whatever it was told
    if start['config'].get('init_from', 'scratch') == 'scratch':
        with contextlib.suppress(ArithmeticError, TypeError, ValueError):  # load_model says why
            shape = asdict(GPTConfig(**start['model_args']))
            del shape['dropout'], shape['block_size']
    for name in sorted(changed):
        before, now = changed[name], settings[name]
        if name in shape:
            before = shape[name]
        elif name not in FIXED:
            continue
        left_open = now == 'auto' or (name in shape and now is not False and now == 0)
        if now != before and not left_open:
            problems.append(f'{name}={now!r} (it has {before!r})')
    if problems:
        raise UserError(
            f'{path} cannot go on with {", ".join(problems)}: leave that out, or begin another run '
            f'from its weights (--init_from={shlex.quote(path)}, another --out_dir)'
        )


def check_settings(settings: dict) -> None:
    """UserError for a setting of train.py that no run can have."""
    known = dict.fromkeys(name for name, _ in optimizers.RATES)  # each once
    one_of(
        settings,
        lr_schedule=optimizers.SCHEDULES,
        compile=('auto', True, False),
        backend=('auto', 'nccl', 'gloo'),
        parallel=('ddp', 'fsdp'),
        optimizer=('auto', *known),
        quantize_base=('none', 'nf4', 'int8'),
    )
    if settings['quantize_base'] != 'none' and not settings['lora_rank']:
        raise UserError(
            'quantize_base freezes the weights: adapters beside them learn, by --lora_rank=8'
        )
    if settings['lora_rank'] and settings['init_from'] == 'scratch' and not settings['dry_run']:
        raise UserError('lora_rank adds to weights that are there: name them with --init_from')
    base = settings['init_from']
    if base == 'scratch' or not os.path.exists(base):
        return
    is_folder = os.path.isdir(base)  # of a Hugging Face model, whose files a run would mix with
    folder = base if is_folder else os.path.dirname(base) or '.'
    same = os.path.realpath(folder) == os.path.realpath(settings['out_dir'])
    if same and (is_folder or settings['lora_rank']):
        raise UserError(
            f'{settings["out_dir"]} has the weights that are begun with, and stays as it is: '
            'name another folder with --out_dir'
        )


def without_effect(settings: dict, given: set[str]) -> list[str]:
    """Those of the given settings that others make idle, in words."""
    s = settings
    has_end = s['decay_lr'] and s['lr_schedule'] != 'noam'
    idle = [
        (not s['decay_lr'], 'lr_schedule warmup_iters lr_decay_iters min_lr', 'decay_lr=False'),
        (s['decay_lr'] and not has_end, 'lr_decay_iters', 'lr_schedule=noam'),
        (s['target_tokens'], 'max_iters target_epochs', 'target_tokens'),
        (s['target_epochs'], 'max_iters', 'target_epochs'),
        (not s['sample_interval'], 'sample_start sample_ask sample_tokens', 'sample_interval=0'),
        (s['sample_ask'], 'sample_start', 'sample_ask'),
        (not s['sample_interval'], 'sample_repetition_penalty', 'sample_interval=0'),
        (
            has_end and not s['min_lr'] and 0 < s['lr_decay_iters'] < s['max_iters'],
            'max_iters',
            'the learning rate is 0 from lr_decay_iters on',
        ),
        (not s['lora_rank'], 'lora_alpha lora_dropout lora_targets', 'lora_rank=0'),
        (s['objective'] == 'next_token', 'dpo_beta', 'objective=next_token'),
        (int(os.environ.get('WORLD_SIZE', 1)) == 1, 'parallel ddp_timeout', 'one process'),
        (not s['wandb_log'], 'wandb_project wandb_run_name', 'wandb_log=False'),
        (not s['dry_run'], 'world_size price_per_hour', 'dry_run=False'),
        (not s['world_size'], 'price_per_hour', 'world_size=0'),
        (s['position'] != 'rope', 'rope_theta', f'position={s["position"]}'),
    ]
    words = []
    for is_idle, names, why in idle:
        words += [f'{name} ({why})' for name in names.split() if is_idle and name in given]
    return words
