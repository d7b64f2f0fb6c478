"""What a run leaves to read: train.log, metrics.jsonl, settings.json, loss.png; and its progress on the terminal."""

import itertools
import json
import math
import os
import sys

from fledge import UserError, lock_folder, replacing

OF_A_RUN = (
    'ckpt.pt',
    'best.pt',
    'metrics.jsonl',
    'train.log',
    'settings.json',
    'tokenizer.json',
    'loss.png',
)
KEYS = (
    'step',
    'tokens',
    'train_loss',
    'val_loss',
    'val_bpb',
    'lr',
    'grad_norm',
    'tokens_per_second',
    'mfu',
    'elapsed',
)


class RunLog:
    """The one voice of a run. Silent in all processes but the first; writes nothing where out_dir is None."""

    def __init__(self, speaks, out_dir=None):
        self.speaks, self.out_dir, self.bar, self.file, self.sinks = (
            speaks,
            out_dir if speaks else None,
            None,
            None,
            [],
        )

    def open(self, settings, resume_step=None):
        """Open the run's files. A run that was in out_dir already is moved to out_dir/previous-N, unless it is resumed
        at resume_step: then only what comes after that step is dropped from metrics.jsonl, for it happens again."""
        if not self.out_dir:
            return
        path = self.path('metrics.jsonl')
        try:
            os.makedirs(self.out_dir, exist_ok=True)
            self.lock = lock_folder(self.out_dir, wait=False)
            lines = []
            if resume_step is None:
                self._keep_previous()
            elif os.path.exists(path):
                lines = [
                    json.dumps(line) + '\n'
                    for line in self.read_metrics()
                    if line['step'] < resume_step
                ]
            with replacing(path) as f:
                f.writelines(lines)
            self.metrics_file = open(path, 'a')
            self.file = open(self.path('train.log'), 'a', encoding='utf-8')
            with replacing(self.path('settings.json')) as f:
                json.dump(settings, f, indent=1)
        except OSError as e:
            raise UserError(f'cannot write to out_dir={self.out_dir}: {e.strerror}') from None

    def path(self, name):
        return os.path.join(self.out_dir, name)

    def _keep_previous(self):
        if not os.path.exists(self.path('ckpt.pt')):
            return
        keep = next(
            p
            for p in (self.path(f'previous-{n}') for n in itertools.count(1))
            if not os.path.exists(p)
        )
        os.makedirs(keep)
        for name in os.listdir(self.out_dir):
            if name in OF_A_RUN or name.startswith('samples_step_'):
                os.replace(self.path(name), os.path.join(keep, name))
        print(f'the run that was in {self.out_dir} is now in {keep}')

    def connect(self, settings, wandb_log, tensorboard):
        """Send the metrics to Weights & Biases or TensorBoard as well."""
        if self.out_dir and wandb_log:
            import wandb

            wandb.init(
                project=settings['wandb_project'],
                name=settings['wandb_run_name'],
                config=settings,
                dir=self.out_dir,
            )
            self.sinks.append(lambda step, metrics: wandb.log(metrics, step=step))
        if self.out_dir and tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(self.path('tensorboard'))
            self.sinks.append(
                lambda step, metrics: [board.add_scalar(k, v, step) for k, v in metrics.items()]
            )

    def start_bar(self, step, total_steps):
        """On a terminal, a progress bar with the time left; elsewhere plain lines serve."""
        if self.speaks and sys.stdout.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total_steps, initial=step, unit='step', dynamic_ncols=True)

    def advance(self, total_steps):
        if self.bar is not None:
            self.bar.total = total_steps
            self.bar.update()

    def close_bar(self):
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def say(self, text):
        """A line to the terminal and train.log."""
        if self.speaks:
            print(text, flush=True) if self.bar is None else self.bar.write(text)
            if self.file:
                print(text, file=self.file, flush=True)

    def metrics(self, total_steps, **values):
        """One line of metrics.jsonl, null where a key of KEYS has no value, and a line of progress for a training step."""
        if not self.out_dir:
            return
        line = {k: values.get(k) for k in KEYS}
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()
        }  # JSON has no infinity
        print(json.dumps(finite), file=self.metrics_file, flush=True)
        for sink in self.sinks:
            sink(line['step'], {k: v for k, v in finite.items() if v is not None})
        if line['train_loss'] is None:
            return
        text = 'loss {train_loss:.4f} | lr {lr:.2e} | norm {grad_norm:.2f} | {tokens_per_second:,.0f} tok/s | mfu {mfu:.1%}'.format(
            **line
        )
        if self.bar is not None:
            self.bar.set_postfix_str(text)
            print(f'step {line["step"]}/{total_steps} | {text}', file=self.file, flush=True)
        else:
            self.say(f'step {line["step"]}/{total_steps} | {text} | {line["elapsed"]:.0f} s')

    def read_metrics(self):
        """The lines of metrics.jsonl, dicts; a line that a crash left broken is passed over."""
        lines = []
        with open(self.path('metrics.jsonl'), errors='replace') as f:
            for line in f:
                try:
                    lines.append(dict.fromkeys(KEYS) | json.loads(line))
                except (ValueError, TypeError):
                    pass
        return lines

    def draw(self):
        """loss.png: the losses against tokens, from metrics.jsonl."""
        import matplotlib

        matplotlib.use('Agg')
        from matplotlib import pyplot

        lines = self.read_metrics()
        figure, axes = pyplot.subplots(figsize=(8, 5))
        for key, style in (('train_loss', '-'), ('val_loss', 'o-')):
            points = [(m['tokens'], m[key]) for m in lines if m[key] is not None]
            if points:
                axes.plot(*zip(*points), style, label=key.replace('_', ' '), alpha=0.8)
        axes.set(xlabel='tokens', ylabel='loss (nats a token)', title=self.out_dir)
        axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(self.path('loss.png'), dpi=120, bbox_inches='tight')
        pyplot.close(figure)
