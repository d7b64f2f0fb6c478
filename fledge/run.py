"""A training run: its state, its clock, its signals, and what it leaves to read."""

import contextlib
import itertools
import json
import math
import os
import shlex
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields

import torch

from fledge import UserError, chat_template, lock_folder, optimizers, replacing
from fledge.configurator import one_of

RUN_FILES = ['ckpt.pt', 'best.pt', 'metrics.jsonl', 'train.log', 'settings.json', 'loss.png']
RUN_FILES += ['tokenizer.json', *chat_template.FILES]
# of each line of metrics.jsonl, null where one has no value; no objective's number is called so
KEYS = ['step', 'tokens', 'train_loss', 'val_loss', 'val_bpb', 'lr', 'grad_norm']
KEYS += ['tokens_per_second', 'mfu', 'elapsed']
PLOT_POINTS = 2000  # of a curve; a longer one is thinned out


@dataclass
class RunState:
    """What a run goes on with, besides its weights and optimizers. Saved and restored whole."""

    step: int = 0  # steps done
    rows: int = 0  # of the data seen, and where in its order the next step goes on
    tokens: int = 0  # seen, of whatever data; a logged step's are those before it
    lr: float = 0.0  # learning rate of the last step
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
    wandb_id: str = ''  # of the run there

    def metrics(self):
        """What metrics.jsonl has of a step by itself: the evaluation too, where one was made."""
        line = dict(step=self.step, tokens=self.tokens, elapsed=self.elapsed)
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
        saved = checkpoint.get('run')
        if saved is None:  # nanoGPT's has none, and an older one of ours these two of its fields
            older = ('elapsed', 'evaluations_since_best')
            saved = {name: checkpoint[name] for name in older if name in checkpoint}
        state = cls(**{f.name: saved[f.name] for f in fields(cls) if f.name in saved})
        state.step = checkpoint['iter_num']
        state.best_val_loss = float(checkpoint['best_val_loss'])
        return state

    def meet_changes(self, checkpoint, changed, settings, data_digest):
        """Go on from a checkpoint under settings, of which `changed` has the values before.

        UserError where its data is not what it was, or its own objective is missing.
        """
        # an older run says that it has an objective of its own, and not where
        older = 'own.py' if checkpoint.get('objective') is True else 'next_token'
        objective = checkpoint['config'].get('objective', older)
        if 'rows' not in checkpoint.get('run', ()):  # nanoGPT's, or older: all steps were alike
            s = settings | checkpoint['config']
            self.rows = self.step * s['gradient_accumulation_steps'] * s['batch_size']
            self.tokens = self.rows * s['block_size']
        if 'dataset' in changed and checkpoint.get('reference'):
            raise UserError(
                'this run knows what its first model made of its pairs, and not of others: '
                'begin another run from its weights (--init_from=FILE, another --out_dir)'
            )
        if 'dataset' in changed:
            self.rows = 0
        elif checkpoint.get('data', data_digest) != data_digest:
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
        evaluates = {'dataset', 'block_size', 'eval_iters', 'dpo_beta', 'quantize_base'}
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
    """The steps since the last line of progress; losses, numbers: of those before a resume."""

    def __init__(self, losses, numbers, device):
        self.clear()
        self.losses = [torch.tensor(loss, device=device) for loss in losses]
        for name, values in numbers.items():
            self.numbers[name] = [torch.tensor(value, device=device) for value in values]

    def clear(self):
        self.losses, self.numbers, self.n_timed = [], {}, 0

    def add(self, loss, numbers):
        self.losses.append(loss)
        self.n_timed += 1
        for name, number in numbers.items():
            self.numbers.setdefault(name, []).append(number)

    def all_losses(self, machine):
        """The loss of each step, a list: means over the processes."""
        return machine.mean(torch.stack(self.losses)) if self.losses else []

    def all_numbers(self, machine):
        """The objective's own numbers of each step, lists by name: means over the processes."""
        return {name: machine.mean(torch.stack(values)) for name, values in self.numbers.items()}


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
        # of loss.png, [(tokens, minutes, loss), ...]: each step's, and means over log_interval
        self.curves = {'step_loss': [], 'train_loss': [], 'val_loss': []}
        self.logged = (0, 0.0)  # tokens and minutes of the last line

    def path(self, name):
        return os.path.join(self.out_dir, name)

    def open(self, settings, state, resuming):
        """Open the run's files.

        A run that was in out_dir already is moved to out_dir/previous-N, unless it is resumed: then
        what comes after its state is dropped from metrics.jsonl, for it happens again.
        """
        if not self.out_dir:
            return
        path = self.path('metrics.jsonl')
        try:
            os.makedirs(self.out_dir, exist_ok=True)
            self.lock = lock_folder(self.out_dir, wait=False)
            lines = []
            if not resuming:
                self.keep_previous()
            elif os.path.exists(path):
                lines = [m for m in read_metrics(path) if m['step'] < state.step]
            if (
                resuming
                and state.best_val_loss == math.inf
                and os.path.exists(self.path('best.pt'))
            ):
                kept = f'best-before-step-{state.step}.pt'  # by a measure that has changed
                os.replace(self.path('best.pt'), self.path(kept))
                print(f'evaluations are others from here on: best.pt of before is now {kept}')
            with replacing(path) as f:
                f.writelines(json.dumps(line) + '\n' for line in lines)
            for line in lines:
                self.add_to_curves(line)
            with replacing(self.path('settings.json')) as f:
                json.dump(settings, f, indent=1)
        except OSError as e:
            raise UserError(f'cannot write to out_dir={self.out_dir}: {e.strerror}') from None
        self.is_open = True
        self.connect(settings, state)

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
            if name in RUN_FILES or name.startswith(('samples_step_', 'best-before-step-')):
                os.replace(self.path(name), os.path.join(folder, name))
        print(f'the run that was in {self.out_dir} is now in {folder}')

    def connect(self, settings, state):
        if settings['wandb_log']:
            import wandb

            project, name = settings['wandb_project'], settings['wandb_run_name']
            same = dict(id=state.wandb_id or None, resume='allow')  # a resumed run goes on there
            run = wandb.init(project=project, name=name, config=settings, dir=self.out_dir, **same)
            state.wandb_id = run.id
            self.sinks.append(lambda step, metrics: wandb.log(metrics, step=step))
        if settings['tensorboard']:
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(self.path('tensorboard'), purge_step=state.step or None)

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

    def samples(self, step, texts):
        """samples_step_*.txt."""
        if self.out_dir:
            with replacing(self.path(f'samples_step_{step:06d}.txt')) as f:
                f.write('\n---------------\n'.join(texts) + '\n')

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
        # a list of losses is nothing for the sinks
        known = {n: v for n, v in line.items() if v is not None and not isinstance(v, list)}
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
            val = f'val {state.evaluation["loss"]:.4f} | ' if state.evaluation else ''
            self.bar.set_postfix_str(val + text)
            self.append('train.log', f'step {state.step}/{max_iters} | {text}')

    def add_to_curves(self, line):
        tokens, minutes = line['tokens'], (line['elapsed'] or 0) / 60
        tokens_before, minutes_before = self.logged

        def between(share):
            """A place on the way from the last line to this one, 0 to 1."""
            place_in_tokens = tokens_before + share * (tokens - tokens_before)
            return place_in_tokens, minutes_before + share * (minutes - minutes_before)

        losses = line.get('step_losses') or []
        for i, loss in enumerate(losses, 1):
            self.curves['step_loss'].append((*between(i / len(losses)), loss))
        if line['train_loss'] is not None:  # at the middle of its steps
            n = max(1, len(losses))
            self.curves['train_loss'].append((*between((n + 1) / (2 * n)), line['train_loss']))
        if line['val_loss'] is not None:
            self.curves['val_loss'].append((tokens, minutes, line['val_loss']))
        for name, curve in self.curves.items():
            if len(curve) > PLOT_POINTS:
                self.curves[name] = thin_out(curve)
        self.logged = tokens, minutes

    def draw(self):
        """loss.png: the losses against tokens, and against minutes."""
        if not self.out_dir:
            return
        import matplotlib

        matplotlib.use('Agg')
        from matplotlib import pyplot

        figure, both = pyplot.subplots(1, 2, figsize=(13, 5), sharey=True)
        looks = dict(
            step_loss=dict(color='C0', alpha=0.25, linewidth=0.8, label='a single step'),
            train_loss=dict(color='C0', label='train, mean of some steps'),
            val_loss=dict(color='C1', marker='o', markersize=4, label='val'),
        )
        for place, unit in enumerate(('tokens', 'minutes')):
            axes = both[place]
            for name, look in looks.items():
                if self.curves[name]:
                    points = list(zip(*self.curves[name], strict=True))
                    axes.plot(points[place], points[2], **look)
            axes.set(xlabel=unit)
            axes.grid(alpha=0.3)
        both[0].set(ylabel='loss (nats a token)')
        both[0].legend()
        figure.suptitle(self.out_dir)
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


def dry_run_report(train_step, model, tokens_per_step, max_iters, opts, machine):
    """What a run will take, told from two real steps."""
    train_step(0, 0.0)[0].item()  # warms up
    began = time.perf_counter()
    train_step(1, 0.0)[0].item()
    seconds = time.perf_counter() - began
    tokens = max_iters * tokens_per_step
    n_params = model.get_num_params(non_embedding=False)
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    held = sum(p.nbytes for p in model.parameters()) + gradients + optimizers.state_bytes(opts)
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
    one_of(settings, lr_schedule=optimizers.SCHEDULES)
    one_of(settings, compile=('auto', True, False), backend=('auto', 'nccl', 'gloo'))
    one_of(settings, optimizer=('auto', 'muon', 'adamw'), quantize_base=('none', 'nf4', 'int8'))
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
        (not s['wandb_log'], 'wandb_project wandb_run_name', 'wandb_log=False'),
        (s['position'] != 'rope', 'rope_theta', f'position={s["position"]}'),
    ]
    words = []
    for is_idle, names, why in idle:
        words += [f'{name} ({why})' for name in names.split() if is_idle and name in given]
    return words
