"""The state of a training run, which its checkpoints hold."""

import math
import shlex
import statistics
from dataclasses import asdict, dataclass, field, fields

from fledge import UserError

# a loss is a spike if it is so many standard deviations above the mean of so many before it
SPIKE_DEVIATIONS, SPIKE_WINDOW = 6, 100


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

    def metrics(self) -> dict:
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

    def in_checkpoint(self) -> dict:
        """The entries of a checkpoint; two of them are nanoGPT's."""
        nanogpts = dict(iter_num=self.step, best_val_loss=self.best_val_loss)
        return nanogpts | {'run': asdict(self)}

    @classmethod
    def from_checkpoint(cls, checkpoint: dict, path: str) -> 'RunState':
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

    def meet_changes(
        self, checkpoint: dict, changed: dict, settings: dict, data_digest: str
    ) -> None:
        """Go on from a checkpoint under settings, of which `changed` has the values before.

        UserError where its data is not what it was.
        """
        if 'rows' not in checkpoint.get('run', ()):  # nanoGPT's, or older: all steps were alike
            s = settings | checkpoint['config']
            self.rows = self.step * s['gradient_accumulation_steps'] * s['batch_size']
            self.tokens = self.rows * s['block_size']
        if checkpoint.get('data', data_digest) != data_digest:
            raise UserError(
                f'data/{settings["dataset"]} is not what this run was trained on any more: put it '
                'back, or begin another run from its weights (--init_from=FILE, another --out_dir)'
            )
        if 'block_size' in changed:  # about as much of the data stays behind
            self.rows = math.ceil(self.rows * changed['block_size'] / settings['block_size'])
        of_evaluations = {'objective', 'dpo_beta', 'block_size', 'eval_iters', 'quantize_base'}
        if settings['eval_iters']:  # of so many batches
            of_evaluations.add('batch_size')
        if changed.keys() & of_evaluations:
            # evaluations come out differently now, and do not compare with those before
            self.evaluated_step, self.best_step, self.best_val_loss = -1, -1, math.inf
            self.evaluations_since_best = 0

    def note_evaluation(self, evaluation: dict, seconds: float) -> bool:
        """Keep an evaluation of the present step; returns whether it is the best so far."""
        self.evaluated_step, self.evaluation = self.step, evaluation
        self.longest_evaluation = max(self.longest_evaluation, seconds)
        is_best = evaluation['loss'] < self.best_val_loss
        if is_best:
            self.best_step = self.step
        self.evaluations_since_best = 0 if is_best else self.evaluations_since_best + 1
        self.best_val_loss = min(self.best_val_loss, evaluation['loss'])
        return is_best

    def note_step(self, loss: float, numbers: dict[str, float]) -> tuple[float, float] | None:
        """Keep the loss and numbers of a step, which are finite.

        Returns, where the loss is a spike, the mean and the standard deviation of those before it.
        """
        self.bad_steps = 0
        self.recent_losses.append(loss)
        for name, number in numbers.items():
            self.recent_numbers.setdefault(name, []).append(number)
        before = self.window
        self.window = [*before, loss][-SPIKE_WINDOW:]
        if len(before) < SPIKE_WINDOW:
            return None
        mean, deviation = statistics.fmean(before), statistics.pstdev(before)
        return (mean, deviation) if loss > mean + SPIKE_DEVIATIONS * deviation else None
