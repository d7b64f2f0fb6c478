"""What a run says and leaves to read: train.log, metrics.jsonl, samples, loss.png, runs.tsv."""

import contextlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO

import filelock
import numpy as np

from fledge import UserError, chat_template, lock_folder, release_folder, replacing, saving
from fledge.configurator import discard, in_shell
from fledge.report import new_axes
from fledge.state import RunState
from fledge.tokenizer import Tokenizer

RUN_FILES = ['ckpt.pt', 'best.pt', 'metrics.jsonl', 'train.log', 'settings.json', 'loss.png']
RUN_FILES += ['spikes.jsonl', 'tokenizer.json', *chat_template.FILES]
RUN_FILE_BEGINNINGS = ('samples_step_', 'ckpt_step_', 'best-before-step-')
# of each line of metrics.jsonl, null where one has no value; no objective's number is called so,
# nor as others that a line may have: objectives.TAKEN
KEYS = ['step', 'tokens', 'train_loss', 'val_loss', 'val_bpb', 'lr', 'grad_norm']
KEYS += ['tokens_per_second', 'mfu', 'elapsed']
RUNS_COLUMNS = ['folder', 'dataset', 'data', 'settings', 'tokens', 'minutes', 'val_loss', 'val_bpb']
# settings that do not change what a run learns; runs that differ in these alone are alike
ASIDE = {'out_dir', 'seeds', 'auto_resume', 'keep_checkpoints', 'always_save_checkpoint'}
ASIDE |= {'log_interval', 'sample_interval', 'sample_start', 'sample_ask', 'sample_tokens'}
ASIDE |= {'sample_repetition_penalty', 'eval_only', 'dry_run', 'world_size', 'price_per_hour'}
ASIDE |= {'wandb_log', 'wandb_project', 'wandb_run_name', 'tensorboard', 'ddp_timeout', 'one_dial'}
GROUPED_OVER = ASIDE | {'seed'}  # settings in which runs of one group may differ
PLOT_POINTS = 2000  # of a curve at most; a longer one is thinned out
DRAW_SECONDS = 10  # from one drawing of loss.png to the next; the last one comes at the end


def speak(text: str, file: TextIO) -> None:
    """Print; an output that is full, or that nobody reads any more, ends no run."""
    try:
        print(text, file=file, flush=True)
    except BrokenPipeError:
        discard(file)
    except OSError:
        pass


class RunLog:
    """The one voice of a run: its lines, its files, and what wandb and tensorboard are told.

    speaks: whether it says anything, as the first of several processes does. out_dir: of the files;
    None: there are none. wandb and tensorboard get the metrics as well, where they are asked for.
    """

    def __init__(self, speaks: bool, out_dir: str | None = None):
        self.speaks = speaks
        self.out_dir = out_dir if speaks else None
        self.bar = None
        self.is_open = False
        self.sinks = []  # functions of a step and its metrics
        self.pending = {}  # what a full disk has not taken yet, by the name of its file
        self.failed = set()  # names of files that could not be written
        self.drawn_at = time.monotonic()

    def path(self, name: str) -> str:
        """Where a file of the run is."""
        return os.path.join(self.out_dir, name)

    def open(self, settings: dict, state: RunState, resuming: bool, data_digest: str = '') -> None:
        """Open the run's files.

        A run that was in out_dir already is moved to out_dir/previous-N, unless it is resumed: then
        what comes after its state is dropped from metrics.jsonl, for it happens again.
        data_digest: of what it learns from (see tokens.digest).
        """
        if not self.out_dir:
            return
        try:
            os.makedirs(self.out_dir, exist_ok=True)
            self.lock = lock_folder(self.out_dir, wait=False)
            if not resuming:
                self.keep_previous()
            self.rewind(state.step)
            if (
                resuming
                and state.best_val_loss == math.inf
                and os.path.exists(self.path('best.pt'))
            ):
                kept = f'best-before-step-{state.step}.pt'  # by a measure that has changed
                os.replace(self.path('best.pt'), self.path(kept))
                print(f'evaluations are others from here on: best.pt of before is now {kept}')
            with replacing(self.path('settings.json')) as f:
                json.dump(settings | dict(_data=data_digest), f, indent=1)
        except OSError as e:
            raise UserError(f'cannot write to out_dir={self.out_dir}: {e.strerror}') from None
        self.is_open, self.data_digest = True, data_digest
        self.connect(settings, state)

    def rewind(self, step: int) -> None:
        """Drop what is in metrics.jsonl from a step on: it happens again."""
        if not self.out_dir:
            return
        self.pending.pop('metrics.jsonl', None)
        path, lines = self.path('metrics.jsonl'), []
        if os.path.exists(path):
            lines = [m for m in read_metrics(path) if m['step'] < step]
        with replacing(path) as f:
            f.writelines(json.dumps(line) + '\n' for line in lines)

    def append(self, name: str, line: str) -> None:
        """Add a line to a file; where the disk is full, it and later ones wait for their turn."""
        waiting = self.pending.get(name, '') + line + '\n'
        self.pending[name] = waiting
        with self.disk_may_be_full(name), open(self.path(name), 'ab') as f:
            end = f.tell()
            try:
                f.write(waiting.encode())
                f.flush()
            except OSError:
                f.truncate(end)  # no half a line
                raise
            self.pending[name] = ''

    @contextlib.contextmanager
    def disk_may_be_full(self, name: str) -> Iterator[None]:
        """Go on, and say so once, where a file cannot be written that the run can do without."""
        try:
            yield
        except OSError as e:
            if name not in self.failed:
                self.failed.add(name)
                problem = f'cannot write {self.path(name)}: {e.strerror or e}'
                speak(f'WARNING: {problem}; the run does without', sys.stderr)
        else:
            self.failed.discard(name)

    def keep_previous(self) -> None:
        """Move the files of a run that was in out_dir to out_dir/previous-N."""
        if not saving.files(self.out_dir):
            return
        folders = (self.path(f'previous-{n}') for n in itertools.count(1))
        folder = next(path for path in folders if not os.path.exists(path))
        os.makedirs(folder)
        for name in os.listdir(self.out_dir):
            if name in RUN_FILES or name.startswith(RUN_FILE_BEGINNINGS):
                os.replace(self.path(name), os.path.join(folder, name))
        print(f'the run that was in {self.out_dir} is now in {folder}')

    def connect(self, settings: dict, state: RunState) -> None:
        """Have wandb and tensorboard take the metrics, where the settings ask for them."""
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

    def start_bar(self, step: int, max_iters: int) -> None:
        """On a terminal, a progress bar with the time left; elsewhere plain lines serve."""
        if self.speaks and sys.stdout.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=max_iters, initial=step, unit='step', dynamic_ncols=True)

    def advance(self, state: RunState, max_iters: int) -> None:
        """Move the bar on by a step; its end is where the run is expected to end."""
        if self.bar is not None:
            if state.progress > 0:
                self.bar.total = min(max_iters, round(state.step / state.progress))
            self.bar.update(state.step - self.bar.n)  # back, where the run has gone back

    def close_bar(self) -> None:
        """End the bar; what is said from here on are plain lines."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def say(self, text: str) -> None:
        """A line to the terminal and train.log."""
        if not self.speaks:
            return
        if self.bar is None:
            speak(text, sys.stdout)
        else:
            self.bar.write(text)
        if self.is_open:
            self.append('train.log', text)

    def samples(self, step: int, texts: list[str]) -> None:
        """Write samples_step_*.txt."""
        if self.out_dir:
            name = f'samples_step_{step:06d}.txt'
            with self.disk_may_be_full(name), replacing(self.path(name)) as f:
                f.write('\n---------------\n'.join(texts) + '\n')

    def spike(
        self,
        step: int,
        loss: float,
        mean_before: float,
        deviation: float,
        documents: list[tuple],
        tokenizer: Tokenizer | None,
    ) -> None:
        """Say that a step's loss is far above those before it, and what the step saw.

        documents: [(path, position, ids), ...] of the data. The beginning of each goes to
        spikes.jsonl.
        """
        words = f'{loss:.4f}, and was {mean_before:.4f} ± {deviation:.4f}'
        self.say(f'step {step}: loss spike: {words}; the documents are in spikes.jsonl')
        if not self.out_dir:
            return
        seen = []
        for path, position, ids in documents:
            text = tokenizer.decode(ids[:100].tolist()) if tokenizer else ids[:100].tolist()
            seen.append(dict(file=path, position=position, tokens=len(ids), begins=text))
        numbers = dict(step=step, loss=loss, mean=mean_before, deviation=deviation)
        self.append('spikes.jsonl', json.dumps(numbers | dict(documents=seen)))

    def metrics(self, **values) -> None:
        """Write a line of metrics.jsonl: KEYS, null where one has no value, and what is given."""
        if not self.out_dir:
            return
        line = dict.fromkeys(KEYS) | values
        for name, value in line.items():
            if isinstance(value, float) and not math.isfinite(value):
                line[name] = None  # JSON has no infinity
        self.append('metrics.jsonl', json.dumps(line))
        # a list of losses is nothing for the sinks
        known = {n: v for n, v in line.items() if v is not None and not isinstance(v, list)}
        for sink in self.sinks:
            sink(line['step'], known)

    def progress(self, state: RunState, max_iters: int, line: dict, own_numbers: dict) -> None:
        """Say a line of progress, of a training step's metrics and the objective's own numbers."""
        text = f'loss {line["train_loss"]:.4f} | lr {line["lr"]:.2e}'
        text += f' | norm {line["grad_norm"]:.2f}'
        if 'mfu' in line:
            text += f' | {line["tokens_per_second"]:,.0f} tok/s | mfu {line["mfu"]:.1%}'
        text += ''.join(f' | {name} {line[name]:.4g}' for name in own_numbers)
        if self.bar is None:
            self.say(f'step {state.step}/{max_iters} | {text} | {state.elapsed:.0f} s')
        else:
            val = f'val {state.evaluation["loss"]:.4f} | ' if state.evaluation else ''
            self.bar.set_postfix_str(val + text)
            self.append('train.log', f'step {state.step}/{max_iters} | {text}')

    def list_run(self, settings: dict, defaults: dict, state: RunState) -> None:
        """Add a run that has ended to runs.tsv, beside its folder; where that fails, warn."""
        if not self.out_dir:
            return
        beside, folder = os.path.split(os.path.abspath(self.out_dir))
        path = os.path.join(beside, 'runs.tsv')
        own = []
        for name, value in settings.items():
            if value != defaults[name] and name not in ASIDE and name != 'dataset':
                own.append(f'{name}={in_shell(value)}')
        end = state.metrics()
        bpb = end.get('val_bpb')
        fields = [in_shell(folder), in_shell(settings['dataset']), self.data_digest[:8]]
        fields.append(' '.join(own))
        fields += [str(end['tokens']), f'{end["elapsed"] / 60:.2f}', f'{end["val_loss"]:.5f}']
        fields.append('' if bpb is None else f'{bpb:.5f}')
        line = '\t'.join(fields)  # in_shell() leaves no tab and no newline in them
        lock = filelock.FileLock(f'{path}.lock')  # against runs that end at the same time
        with self.disk_may_be_full(path):
            lock.acquire(timeout=60)
            if not os.path.exists(path) or not os.path.getsize(path):
                line = '\t'.join(RUNS_COLUMNS) + '\n' + line
            self.append(path, line)
            release_folder(lock)

    def draw_now_and_then(self) -> None:
        """Draw loss.png, unless that was done a moment ago: it takes a fifth of a second."""
        if time.monotonic() - self.drawn_at > DRAW_SECONDS:
            self.draw()

    def draw(self) -> None:
        """Draw loss.png: the losses against tokens, and against minutes."""
        if not self.out_dir:
            return
        self.drawn_at = time.monotonic()
        with self.disk_may_be_full('loss.png'):
            figure = _draw_curves(curves_of(read_metrics(self.path('metrics.jsonl'))))
            figure.suptitle(self.out_dir, x=0.98, ha='right')
            with replacing(self.path('loss.png'), 'wb') as f:
                figure.savefig(f, format='png', dpi=120)


def _draw_curves(curves):
    """The Figure of what curves_of() returns."""
    # fixed margins, and a legend above the curves: to find a place takes as long as to draw twice
    both = new_axes((13, 5), ncols=2, sharey=True)
    both[0].figure.subplots_adjust(left=0.06, right=0.98, bottom=0.11, top=0.91, wspace=0.05)
    looks = dict(
        step_loss=dict(color='C0', alpha=0.25, linewidth=0.8, label='a single step'),
        train_loss=dict(color='C0', label='train, mean of some steps'),
        val_loss=dict(color='C1', marker='o', markersize=4, label='val'),
    )
    for place, unit in enumerate(('tokens', 'minutes')):
        axes = both[place]
        for name, look in looks.items():
            if curves[name]:
                points = list(zip(*curves[name], strict=True))
                axes.plot(points[place], points[2], **look)
        axes.set(xlabel=unit)
        axes.grid(alpha=0.3)
    both[0].set(ylabel='loss (nats a token)')
    both[0].legend(loc='lower left', bbox_to_anchor=(0, 1), ncols=3, frameon=False)
    return both[0].figure


def curves_of(lines: Iterable[dict]) -> dict[str, list]:
    """The curves of loss.png, {name: [(tokens, minutes, loss), ...]}, from lines of metrics.jsonl.

    Each has PLOT_POINTS at most. step_loss is of each step, train_loss of the steps since the line
    before, whose middle is its place.
    """
    curves = dict(step_loss=[], train_loss=[], val_loss=[])
    before = np.zeros(2)  # tokens and minutes of the line before
    for line in lines:
        here = np.array([line['tokens'], line['elapsed'] / 60])
        losses = line.get('step_losses') or []
        n = max(1, len(losses))
        for i, loss in enumerate(losses, 1):
            curves['step_loss'].append((*(before + i / n * (here - before)), loss))
        if line['train_loss'] is not None:
            middle = before + (n + 1) / (2 * n) * (here - before)
            curves['train_loss'].append((*middle, line['train_loss']))
        if line['val_loss'] is not None:
            curves['val_loss'].append((*here, line['val_loss']))
        before = here
    for name, curve in curves.items():
        curves[name] = curve[:: len(curve) // PLOT_POINTS + 1]
    return curves


def read_metrics(path: str) -> list[dict]:
    """The lines of a metrics.jsonl; a line that a crash left broken is passed over."""
    lines = []
    with open(path, encoding='utf-8', errors='replace') as f:
        for line in f:
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                values = dict.fromkeys(KEYS) | json.loads(line)
                is_whole = None not in (values['step'], values['tokens'], values['elapsed'])
                if is_whole and all(type(values[k]) in (int, float, type(None)) for k in KEYS):
                    lines.append(values)
    return lines
