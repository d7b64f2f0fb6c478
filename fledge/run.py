"""A training run: its state, its clock, its signals, and what it leaves to read."""

import contextlib
import itertools
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields

from fledge import UserError, lock_folder, optimizers, replacing
from fledge.configurator import at_least, one_of

RUN_FILES = ['ckpt.pt', 'best.pt', 'metrics.jsonl', 'train.log', 'settings.json', 'loss.png']
RUN_FILES.append('tokenizer.json')
KEYS = ['step', 'tokens', 'train_loss', 'val_loss', 'val_bpb', 'lr', 'grad_norm']
KEYS += ['tokens_per_second', 'mfu', 'elapsed']
PLOT_POINTS = 2000  # of a curve; a longer one is thinned out


@dataclass
class RunState:
    """What a run goes on with, besides its weights and optimizers. Saved and restored whole."""

    step: int = 0  # steps done
    progress: float = 0.0  # of the run, 0 to 1, in steps or in time, whichever is further
    elapsed: float = 0.0  # seconds, evaluations included
    longest_evaluation: float = 0.0  # seconds; the last one has to fit into max_minutes as well
    evaluated_step: int = -1  # of the last evaluation
    evaluation: dict | None = None  # its numbers (see evaluation.evaluate)
    best_val_loss: float = math.inf
    evaluations_since_best: int = 0

    def metrics(self, tokens_per_step):
        """What metrics.jsonl has of a step by itself: the evaluation too, where one was made."""
        line = dict(step=self.step, tokens=self.step * tokens_per_step, elapsed=self.elapsed)
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
                f'{path} is no checkpoint of a run: start from it with --init_from={path} '
                'and another --out_dir'
            )
        saved = checkpoint.get('run')
        if saved is None:  # nanoGPT's has none, and an older one of ours these two of its fields
            older = ('elapsed', 'evaluations_since_best')
            saved = {name: checkpoint[name] for name in older if name in checkpoint}
        state = cls(**{f.name: saved[f.name] for f in fields(cls) if f.name in saved})
        state.step = checkpoint['iter_num']
        state.best_val_loss = float(checkpoint['best_val_loss'])
        return state

    def note_evaluation(self, evaluation, seconds):
        """Keep an evaluation of the present step; returns whether it is the best so far."""
        self.evaluated_step, self.evaluation = self.step, evaluation
        self.longest_evaluation = max(self.longest_evaluation, seconds)
        is_best = evaluation['loss'] < self.best_val_loss
        self.evaluations_since_best = 0 if is_best else self.evaluations_since_best + 1
        self.best_val_loss = min(self.best_val_loss, evaluation['loss'])
        return is_best


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


class StopSignals:
    """The first SIGINT or SIGTERM asks for a checkpoint and a stop; the next ends the process."""

    def __init__(self, speaks):
        self.speaks, self.asked_at = speaks, None
        signal.signal(signal.SIGINT, self.hear)
        signal.signal(signal.SIGTERM, self.hear)

    def asked(self):
        return self.asked_at is not None

    def hear(self, number, frame):
        now = time.monotonic()
        if self.asked_at is None:
            self.asked_at = now
            if self.speaks:
                words = '\nsaving and stopping after this step; once more stops at once'
                print(words, file=sys.stderr, flush=True)
        # torchrun passes a signal on to its processes, which have heard it from the terminal too
        elif now - self.asked_at > 1 or 'TORCHELASTIC_RUN_ID' not in os.environ:
            os._exit(128 + number)


class RunLog:
    """The one voice of a run. Silent in all processes but the first; no files where out_dir is
    None.

    wandb and tensorboard get the metrics as well, where they are asked for.
    """

    def __init__(self, speaks, out_dir=None):
        self.speaks = speaks
        self.out_dir = out_dir if speaks else None
        self.bar = None
        self.is_open = False
        self.sinks = []  # functions of a step and its metrics
        self.curves = {'train_loss': [], 'val_loss': []}  # [(tokens, loss), ...]

    def path(self, name):
        return os.path.join(self.out_dir, name)

    def open(self, settings, resume_step=None):
        """Open the run's files.

        A run that was in out_dir already is moved to out_dir/previous-N, unless it is resumed at
        resume_step: then what comes after that step is dropped from metrics.jsonl, for it happens
        again.
        """
        if not self.out_dir:
            return
        path = self.path('metrics.jsonl')
        try:
            os.makedirs(self.out_dir, exist_ok=True)
            self.lock = lock_folder(self.out_dir, wait=False)
            lines = []
            if resume_step is None:
                self.keep_previous()
            elif os.path.exists(path):
                lines = [m for m in read_metrics(path) if m['step'] < resume_step]
            with replacing(path) as f:
                f.writelines(json.dumps(line) + '\n' for line in lines)
            for line in lines:
                self.add_to_curves(line)
            with replacing(self.path('settings.json')) as f:
                json.dump(settings, f, indent=1)
        except OSError as e:
            raise UserError(f'cannot write to out_dir={self.out_dir}: {e.strerror}') from None
        self.is_open = True
        self.connect(settings)

    def append(self, name, line):
        with open(self.path(name), 'a', encoding='utf-8') as f:
            f.write(line + '\n')

    def keep_previous(self):
        if not os.path.exists(self.path('ckpt.pt')):
            return
        folders = (self.path(f'previous-{n}') for n in itertools.count(1))
        folder = next(path for path in folders if not os.path.exists(path))
        os.makedirs(folder)
        for name in os.listdir(self.out_dir):
            if name in RUN_FILES or name.startswith('samples_step_'):
                os.replace(self.path(name), os.path.join(folder, name))
        print(f'the run that was in {self.out_dir} is now in {folder}')

    def connect(self, settings):
        if settings['wandb_log']:
            import wandb

            project, name = settings['wandb_project'], settings['wandb_run_name']
            wandb.init(project=project, name=name, config=settings, dir=self.out_dir)
            self.sinks.append(lambda step, metrics: wandb.log(metrics, step=step))
        if settings['tensorboard']:
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(self.path('tensorboard'))

            def write(step, metrics):
                for name, value in metrics.items():
                    board.add_scalar(name, value, step)

            self.sinks.append(write)

    def start_bar(self, step, max_iters):
        """On a terminal, a progress bar with the time left; elsewhere plain lines serve."""
        if self.speaks and sys.stdout.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=max_iters, initial=step, unit='step', dynamic_ncols=True)

    def advance(self, state, max_iters):
        """Move the bar on by a step; its end is where the run is expected to end."""
        if self.bar is not None:
            if state.progress > 0:
                self.bar.total = min(max_iters, round(state.step / state.progress))
            self.bar.update()

    def close_bar(self):
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def say(self, text):
        """A line to the terminal and train.log."""
        if not self.speaks:
            return
        if self.bar is None:
            print(text, flush=True)
        else:
            self.bar.write(text)
        if self.is_open:
            self.append('train.log', text)

    def metrics(self, **values):
        """A line of metrics.jsonl: KEYS, null where one has no value, and what else is given."""
        if not self.out_dir:
            return
        line = dict.fromkeys(KEYS) | values
        for name, value in line.items():
            if isinstance(value, float) and not math.isfinite(value):
                line[name] = None  # JSON has no infinity
        self.append('metrics.jsonl', json.dumps(line))
        self.add_to_curves(line)
        known = {name: value for name, value in line.items() if value is not None}
        for sink in self.sinks:
            sink(line['step'], known)

    def progress(self, state, max_iters, line, own_numbers):
        """A line of progress, of a training step's metrics and the objective's own numbers."""
        text = f'loss {line["train_loss"]:.4f} | lr {line["lr"]:.2e}'
        text += f' | norm {line["grad_norm"]:.2f} | {line["tokens_per_second"]:,.0f} tok/s'
        text += f' | mfu {line["mfu"]:.1%}'
        text += ''.join(f' | {name} {line[name]:.4g}' for name in own_numbers)
        if self.bar is None:
            self.say(f'step {state.step}/{max_iters} | {text} | {state.elapsed:.0f} s')
        else:
            self.bar.set_postfix_str(text)
            self.append('train.log', f'step {state.step}/{max_iters} | {text}')

    def add_to_curves(self, line):
        for name, curve in self.curves.items():
            if line[name] is not None:
                curve.append((line['tokens'], line[name]))
            if len(curve) > PLOT_POINTS:
                self.curves[name] = thin_out(curve)

    def draw(self):
        """loss.png: the losses against tokens."""
        if not self.out_dir:
            return
        import matplotlib

        matplotlib.use('Agg')
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(8, 5))
        for name, style in (('train_loss', '-'), ('val_loss', 'o-')):
            if self.curves[name]:
                tokens, losses = zip(*self.curves[name], strict=True)
                axes.plot(tokens, losses, style, label=name.replace('_', ' '), alpha=0.8)
        axes.set(xlabel='tokens', ylabel='loss (nats a token)', title=self.out_dir)
        axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(self.path('loss.png'), dpi=120, bbox_inches='tight')
        pyplot.close(figure)


def thin_out(curve):
    """Half of PLOT_POINTS at most of a curve's points, evenly spread over its tokens."""
    distance = 2 * curve[-1][0] / PLOT_POINTS
    kept = curve[:1]
    for point in curve:
        if point[0] - kept[-1][0] >= distance:
            kept.append(point)
    return kept


def read_metrics(path):
    """The lines of a metrics.jsonl, dicts; a line that a crash left broken is passed over."""
    lines = []
    with open(path, encoding='utf-8', errors='replace') as f:
        for line in f:
            with contextlib.suppress(ValueError, TypeError):
                lines.append(dict.fromkeys(KEYS) | json.loads(line))
    return lines


def dry_run_report(train_step, n_params, tokens_per_step, max_iters, opts, machine):
    """What a run will take, told from two real steps."""
    train_step(0, 0.0)[0].item()  # warms up
    began = time.perf_counter()
    train_step(1, 0.0)[0].item()
    seconds = time.perf_counter() - began
    tokens = max_iters * tokens_per_step
    held = 8 * n_params + optimizers.state_bytes(opts)
    peak = machine.peak_memory()
    return (
        f'parameters: {n_params:,}\n'
        f'tokens: {tokens:,}\n'
        f'FLOPs: {6 * n_params * tokens:.3g} (6ND)\n'
        f'memory: {peak / 1e9:.2f} GB at the peak, of which weights, gradients and optimizer '
        f'state are {held / 1e9:.2f} GB\n'
        f'time: {seconds:.2f} s a step, {seconds * max_iters / 3600:.2f} hours in all '
        f'({tokens_per_step / seconds:,.0f} tokens/s)'
    )


def check_settings(settings):
    """UserError for a setting of train.py that no run can have."""
    positive = 'eval_interval log_interval gradient_accumulation_steps batch_size block_size'
    at_least(settings, **dict.fromkeys(positive.split(), 1))
    amounts = 'max_iters target_tokens target_epochs max_minutes eval_iters warmup_iters seed'
    amounts += ' lr_decay_iters learning_rate weight_decay grad_clip sample_interval'
    amounts += ' sample_tokens early_stopping_patience'
    at_least(settings, **dict.fromkeys(amounts.split(), 0))
    one_of(settings, lr_schedule=('linear', 'cosine', 'wsd'))
    one_of(settings, compile=('auto', True, False), backend=('auto', 'nccl', 'gloo'))
    if settings['sample_repetition_penalty'] <= 0:
        raise UserError('sample_repetition_penalty must be above 0')
    if settings['seed'] >= 2**63:
        raise UserError(f'seed={settings["seed"]} must be below 2^63')


def without_effect(settings, given):
    """Those of the given settings that others make idle, in words."""
    s = settings
    idle = [
        (not s['decay_lr'], 'lr_schedule warmup_iters lr_decay_iters min_lr', 'decay_lr=False'),
        (s['target_tokens'], 'max_iters target_epochs', 'target_tokens'),
        (s['target_epochs'], 'max_iters', 'target_epochs'),
        (not s['sample_interval'], 'sample_start sample_tokens', 'sample_interval=0'),
        (not s['sample_interval'], 'sample_repetition_penalty', 'sample_interval=0'),
        (not s['wandb_log'], 'wandb_project wandb_run_name', 'wandb_log=False'),
        (s['position'] != 'rope', 'rope_theta', f'position={s["position"]}'),
    ]
    words = []
    for is_idle, names, why in idle:
        words += [f'{name} ({why})' for name in names.split() if is_idle and name in given]
    return words
