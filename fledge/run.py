"""A training run: its state, its clock, its signals, and what may be asked of it."""

import contextlib
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field, fields

from fledge import UserError, depth, optimizers, read_json, saving
from fledge.configurator import one_of
from fledge.log import ASIDE, speak
from model import GPTConfig

# a loss is a spike if it is so many standard deviations above the mean of so many before it
SPIKE_DEVIATIONS, SPIKE_WINDOW = 6, 100
# what a run cannot go on without, besides the shape of its model
FIXED = ['dataset', 'optimizer', 'lora_rank', 'lora_alpha', 'lora_targets']
SAVE_AFTER = 0.2  # seconds from a signal; a step that takes longer is given up


@dataclass
class RunState:
    """What a run goes on with, besides its weights and optimizers. Saved and restored whole."""

    step: int = 0  # steps done
    rows: int = 0  # of the data seen, and where in its order the next step goes on
    tokens: int = 0  # seen, of whatever data; a logged step's are those before it
    lr: float = 0.0  # learning rate of the last step
    grad_norm: float = 0.0  # of the last step
    progress: float = 0.0  # of the run, 0 to 1, in steps or in time, whichever is further
    elapsed: float = 0.0  # seconds, evaluations included
    longest_evaluation: float = 0.0  # seconds; the last one has to fit into max_minutes as well
    evaluated_step: int = -1  # of the last evaluation
    evaluated_at: float = 0.0  # share of max_minutes at that time
    evaluation: dict | None = None  # its numbers (see evaluation.evaluate)
    best_val_loss: float = math.inf
    best_step: int = -1  # of that loss
    evaluations_since_best: int = 0
    recent_losses: list = field(default_factory=list)  # of the steps since the last logged line
    recent_numbers: dict = field(default_factory=dict)  # of the objective, by name: as many
    window: list = field(default_factory=list)  # the last losses, which tell a spike
    skipped_steps: int = 0  # whose loss or gradient was not finite
    bad_steps: int = 0  # of these, the last ones in a row
    went_back: bool = False  # to a checkpoint once, and its data is in another order since
    wandb_id: str = ''  # of the run there

    def metrics(self):
        """What metrics.jsonl has of a step by itself; its evaluation and skipped steps, if any."""
        line = dict(step=self.step, tokens=self.tokens, elapsed=self.elapsed)
        if self.skipped_steps:
            line['skipped_steps'] = self.skipped_steps
        if self.evaluated_step == self.step:
            numbers = dict(self.evaluation)
            if 'bytes' in numbers:  # it is of next_token
                numbers = dict(loss=numbers['loss'], bpb=numbers['bits_per_byte'])
            numbers.pop('tokens', None)
            line |= {f'val_{name}': number for name, number in numbers.items()}
        return line

    def in_checkpoint(self):
        """The entries of a checkpoint; two of them are nanoGPT's."""
        nanogpts = dict(iter_num=self.step, best_val_loss=self.best_val_loss)
        return nanogpts | {'run': asdict(self)}

    @classmethod
    def from_checkpoint(cls, checkpoint, path):
        """The state in a loaded checkpoint, ours or nanoGPT's; UserError where it is of no run."""
        if 'iter_num' not in checkpoint or 'best_val_loss' not in checkpoint:
            raise UserError(
                f'{path} is no checkpoint of a run: start from it with '
                f'--init_from={shlex.quote(path)} and another --out_dir'
            )
        saved = checkpoint.get('run', {})  # nanoGPT's has none
        state = cls(**{f.name: saved[f.name] for f in fields(cls) if f.name in saved})
        state.step = checkpoint['iter_num']
        state.best_val_loss = float(checkpoint['best_val_loss'])
        return state

    def meet_changes(self, checkpoint, changed, settings, data_digest):
        """Go on from a checkpoint under settings, of which `changed` has the values before.

        UserError where its data is not what it was, or its own objective is missing.
        """
        objective = checkpoint['config'].get('objective', 'next_token')
        if 'rows' not in checkpoint.get('run', ()):  # nanoGPT's, or older: all steps were alike
            s = settings | checkpoint['config']
            self.rows = self.step * s['gradient_accumulation_steps'] * s['batch_size']
            self.tokens = self.rows * s['block_size']
        if checkpoint.get('data', data_digest) != data_digest:
            raise UserError(
                f'data/{settings["dataset"]} is not what this run was trained on any more: put it '
                'back, or begin another run from its weights (--init_from=FILE, another --out_dir)'
            )
        if objective == 'own.py' and settings['objective'] == 'next_token':
            raise UserError(
                'this run has an objective of its own: name the config file that defines it again'
            )
        if 'block_size' in changed:  # about as much of the data stays behind
            self.rows = math.ceil(self.rows * changed['block_size'] / settings['block_size'])
        evaluates = {'block_size', 'eval_iters', 'dpo_beta', 'quantize_base'}
        evaluates |= {'batch_size'} if settings['eval_iters'] else set()
        if changed.keys() & evaluates or objective != settings['objective']:
            # evaluations come out differently now, and do not compare with those before
            self.evaluated_step, self.best_step, self.best_val_loss = -1, -1, math.inf
            self.evaluations_since_best = 0

    def note_evaluation(self, evaluation, seconds):
        """Keep an evaluation of the present step; returns whether it is the best so far."""
        self.evaluated_step, self.evaluation = self.step, evaluation
        self.longest_evaluation = max(self.longest_evaluation, seconds)
        is_best = evaluation['loss'] < self.best_val_loss
        if is_best:
            self.best_step = self.step
        self.evaluations_since_best = 0 if is_best else self.evaluations_since_best + 1
        self.best_val_loss = min(self.best_val_loss, evaluation['loss'])
        return is_best

    def note_loss(self, loss):
        """Keep the loss of a step; returns the mean and the standard deviation of those before it.

        Before there are SPIKE_WINDOW of them, infinity: no loss is a spike.
        """
        before = self.window
        self.window = [*before, loss][-SPIKE_WINDOW:]
        if len(before) < SPIKE_WINDOW:
            return math.inf, 0.0
        return statistics.fmean(before), statistics.pstdev(before)


class Clock:
    """The time of a run, and how much of it was not training: evaluations, samples and so on."""

    def __init__(self, elapsed):
        self.began = time.monotonic() - elapsed
        self.aside = 0.0  # seconds that were not training
        self.start_interval()

    def elapsed(self):
        """Seconds since the run began, without those between a stop and a resume."""
        return time.monotonic() - self.began

    @contextlib.contextmanager
    def not_training(self):
        began = self.elapsed()
        yield
        self.aside += self.elapsed() - began

    def start_interval(self):
        self.interval_start, self.interval_aside = self.elapsed(), self.aside

    def interval(self):
        """Seconds of training since start_interval()."""
        return self.elapsed() - self.interval_start - (self.aside - self.interval_aside)


class RecentSteps:
    """The steps since the last line of progress; their losses and numbers are the state's own."""

    def __init__(self, state):
        self.restore(state)

    def restore(self, state):
        """Begin with what a state has of the steps before a resume."""
        self.losses, self.numbers, self.n_timed = state.recent_losses, state.recent_numbers, 0

    def clear(self):
        self.losses.clear()
        self.numbers.clear()
        self.n_timed = 0

    def add(self, loss, numbers):
        self.losses.append(loss)
        self.n_timed += 1
        for name, number in numbers.items():
            self.numbers.setdefault(name, []).append(number)


class StopSignals:
    """The first SIGINT or SIGTERM asks for a checkpoint and a stop; the next ends the process.

    The loop is asked to stop at the end of its step. Where it has not stopped after SAVE_AFTER
    seconds, for a step of a large batch can take minutes, another thread calls save_now(), if one
    is given.
    """

    def __init__(self, speaks, save_now=None):
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
    def changing(self):
        """While the state of the run changes: save_now() comes before it or after it."""
        with self.lock:
            self.is_whole = False
            yield
            self.is_whole = True  # which it is not where an error ends the change

    def pause_loop(self):
        """Hold the loop where it is, in the middle of a step, so that saving has the processor."""
        self.is_paused = True
        if self.can_pause:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)

    def wait_while_paused(self, number, frame):
        while self.is_paused:
            time.sleep(0.01)

    def asked(self):
        return self.asked_at is not None

    def hear(self, number, frame):
        now = time.monotonic()
        if self.asked_at is None:
            self.asked_at = now
            if self.save_now:
                timer = threading.Timer(SAVE_AFTER, self.save_now)
                timer.daemon = True  # a loop that has ended by itself does not wait for it
                timer.start()
            if self.speaks:
                words = '\nsaving and stopping after this step; once more stops at once'
                speak(words, sys.stderr)
        # one request may come as several signals: from the terminal, a launcher, a scheduler
        elif now - self.asked_at > 1:
            os._exit(128 + number)


def each_seed(settings, given):
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


def check_seeds(settings, given, folders):
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
        for name in sorted(names & settings.keys() - ASIDE - {'seed'}):
            was, now = before.get(name, settings[name]), settings[name]
            if was != now and now != 'auto':
                raise UserError(
                    f'{folder} has a run with {name}={was!r}, and runs with {name}={now!r} do not '
                    'go beside it: name another --out_dir'
                )


def settings_of(checkpoint):
    """The settings of the run of a loaded checkpoint, but for those that are of each start."""
    of_a_start = ('init_from', 'auto_resume', 'out_dir', 'eval_only', 'dry_run')
    return {name: v for name, v in checkpoint['config'].items() if name not in of_a_start}


def changes_since(checkpoint, settings):
    """{setting: its value in a loaded checkpoint} of those that are others now."""
    before = settings_of(checkpoint)
    return {name: v for name, v in before.items() if settings.get(name, v) != v}


def check_resume(path, start, changed, settings):
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


def check_settings(settings):
    """UserError for a setting of train.py that no run can have."""
    one_of(settings, lr_schedule=optimizers.SCHEDULES)
    one_of(settings, compile=('auto', True, False), backend=('auto', 'nccl', 'gloo'))
    one_of(settings, parallel=('ddp', 'fsdp'))
    known = dict.fromkeys(name for name, _ in optimizers.RATES)
    one_of(settings, optimizer=('auto', *known), quantize_base=('none', 'nf4', 'int8'))
    if settings['quantize_base'] != 'none' and not settings['lora_rank']:
        raise UserError(
            'quantize_base freezes the weights: adapters beside them learn, by --lora_rank=8'
        )
    if settings['lora_rank'] and settings['init_from'] == 'scratch' and not settings['dry_run']:
        raise UserError('lora_rank adds to weights that are there: name them with --init_from')
    base = settings['init_from']
    is_folder = os.path.isdir(base)  # of a Hugging Face model, whose files a run would mix with
    folder = base if is_folder else os.path.dirname(base) or '.'
    same = os.path.realpath(folder) == os.path.realpath(settings['out_dir'])
    if os.path.exists(base) and same and (is_folder or settings['lora_rank']):
        raise UserError(
            f'{settings["out_dir"]} has the weights that are begun with, and stays as it is: '
            'name another folder with --out_dir'
        )


def without_effect(settings, given):
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
