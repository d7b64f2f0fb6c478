"""One dial: the settings that follow from a model's depth, and the depth that suits a time.

config/depth.py tells a reader what they are.
"""

import math
import os
import statistics
import time
from dataclasses import dataclass

import torch

from encoder_decoder import make_model
from fledge import UserError, checkpoint, optimizers, plan
from fledge.device import Machine, matmul_params, peak_flops
from fledge.documents import open_split
from fledge.tokenizer import find_tokenizer
from fledge.tokens import find_data

DEPTHS = [1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32]  # of which a time gets the best
HEAD_DIM = 64
WIDTH_PER_LAYER = 32  # before it is rounded to whole heads
HEADS_PER_KEY = 3  # at least so many query heads share a head for keys and values
TOKENS_PER_PARAMETER = 20  # without a time; Hoffmann et al. 2022, arXiv:2203.15556
# The default run, whose settings were tuned on two CPU cores: the rules go through this point.
TUNED_WIDTH, TUNED_TOKENS, TUNED_TOKENS_PER_STEP, TUNED_DECAY = 128, 4.5e6, 2048, 0.1
BATCH_EXPONENT = 0.383  # of the tokens; Bergsma et al. 2025, arXiv:2505.13738
RATE_BY_BATCH, RATE_BY_WIDTH = 0.5, -0.5  # exponents; the usual ones, Muon's or AdamW's
MOST_RATE = 2.0  # times what optimizers.RATES has for new weights
MOST_DECAY = 1.0
WARMUP, LEAST_WARMUP = 0.01, 20  # share of the steps; steps
# loss = E + A / parameters ** EXPONENT + B / tokens ** EXPONENT, in nats a token, of millions of
# parameters in matrix products and of tokens. Fitted, within 4%, to nine runs of the rules here on
# data/stdlib: 1 to 8 layers, 0.3M to 6.7M parameters, 1.2M to 7.8M tokens. With one exponent for
# both, a longer time has as many tokens a parameter: 5.
E, A, B, EXPONENT = 1.615, 0.659, 2.026, 0.7
# Tokens teach less each time that they are seen again. However often, they are worth no more than
# so many times as many new ones besides; Muennighoff et al. 2023, arXiv:2305.16264
REPEATS_ARE_WORTH = 15.4
EVALUATIONS = 7  # or more: at the start, five times, and the time of one is kept for the end
TRAINING = 0.95  # share of the rest of the time that steps have; checkpoints and samples take some
MEASURING = 0.1  # share of the time after which no deeper model is measured
MEASURED_SECONDS, MEASURED_ROWS = 1.0, 64  # so long, or with so many rows, a speed is measured
MEMORY, MOST_ROWS = 0.5, 10**5  # share of it that training may take; rows at once, however much
LEAST_STEPS = 50  # fewer than that teach nothing
SPARE_STEPS = 10  # times those that the time allows: it is the time that ends the run
# what is chosen, unless it was given
CHOSEN = ['n_layer', 'n_embd', 'head_dim', 'n_head', 'n_kv_head', 'max_minutes', 'max_iters']
CHOSEN += ['batch_size', 'gradient_accumulation_steps']
CHOSEN += ['learning_rate', 'weight_decay', 'warmup_iters', 'one_dial']


@dataclass
class Run:
    """What a depth comes to."""

    settings: dict
    n_params: int  # all of them
    tokens: float
    steps: int
    step_seconds: float
    loss: float  # that the law predicts, in nats a token; infinite in too short a time

    @property
    def step_tokens(self) -> int:
        """Tokens of a step."""
        return plan.rows_per_step(self.settings) * self.settings['block_size']


def settle(settings: dict, given: set[str], machine: Machine) -> tuple[dict, list[str]]:
    """Choose those of CHOSEN that were not given, by n_layer, or by max_minutes.

    settings: train.py's; given: names of those that the user gave. The processes of machine measure
    together and choose the same. Returns the chosen settings, and four lines that say what they are
    and why. UserError where there is nothing that they could follow from, or too little time or
    memory.
    """
    for name in ('n_encoder_layer', 'lora_rank', 'world_size', 'init_from'):
        value = settings[name]
        if value and value != 'scratch':
            raise UserError(f'config/depth.py makes a new GPT here: leave out {name}={value!r}')
    given = {name for name in given if settings[name] != 'auto'}
    seconds = 60 * settings['max_minutes'] if 'max_minutes' in given else 0
    if 'n_layer' not in given and not seconds:
        raise UserError('config/depth.py takes a depth (--n_layer=8) or a time (--max_minutes=60)')
    seconds = seconds or math.inf
    settings, n_train, n_val = with_data(settings, machine)
    began, runs = time.monotonic(), []
    (flop,) = machine.largest([1 / peak_flops(machine.device, machine.dtype)])  # seconds
    depths = [settings['n_layer']] if 'n_layer' in given else DEPTHS
    for depth in depths:
        shape = shape_of(settings, given, depth)
        most_rows = rows_that_fit(shape, machine)
        if not most_rows:
            break  # nor do deeper ones fit
        speed = measure(shape, most_rows, flop, machine)
        data = n_train, n_val
        runs.append(run_of(shape, given, most_rows, speed, seconds, data, machine.world_size))
        best = min(runs, key=lambda run: run.loss)
        (spent,) = machine.largest([time.monotonic() - began])
        takes_too_long = spent > MEASURING * seconds
        two_were_worse = len(runs) - runs.index(best) > 2
        if takes_too_long or two_were_worse:
            break
    if not runs:
        raise UserError(
            f'depth {depth} does not fit: training may take half of the '
            f'{plan.memory_of(machine) / 1e9:.1f} GB of memory here'
        )
    if best.loss == math.inf:
        raise UserError(
            f'max_minutes={settings["max_minutes"]:g} is too short for depth '
            f'{best.settings["n_layer"]}: {LEAST_STEPS} steps and the evaluations take longer here'
        )
    chosen = {name: best.settings[name] for name in CHOSEN if name not in given}
    reasons = in_words(best, runs, n_train)
    if takes_too_long and best is runs[-1] and depth != depths[-1]:
        reasons[-1] += f'; deeper ones would take more than {MEASURING:.0%} of the time to measure'
    return chosen | dict(one_dial=False), reasons


def with_data(settings: dict, machine: Machine) -> tuple[dict, int, int]:
    """The settings with vocab_size and optimizer as they will be; the tokens of train and val."""
    name, size = settings['dataset'], settings['vocab_size']
    folder = os.path.join('data', name)
    if machine.main:
        find_data(name, size, make_default=not settings['dry_run'])
    machine.wait_for_all()
    size = size or checkpoint.padded_vocab_size(find_tokenizer(folder))
    train, val = (
        open_split(folder, split, settings['block_size'], size) for split in ('train', 'val')
    )
    optimizer, *_ = optimizers.choose(dict(settings), None)
    return settings | dict(vocab_size=size, optimizer=optimizer), train.n_tokens, val.n_tokens


def unless_given(settings: dict, given: set[str], **values) -> dict:
    """Settings with these values, but for those that were given."""
    return settings | {name: value for name, value in values.items() if name not in given}


def shape_of(settings: dict, given: set[str], depth: int) -> dict:
    """The settings with the shape of a model of so many layers."""
    s = unless_given(settings, given, n_layer=depth, head_dim=HEAD_DIM, max_minutes=0.0)
    head_dim = s['head_dim'] or HEAD_DIM
    n_head = s['n_head'] if 'n_head' in given else max(1, round(WIDTH_PER_LAYER * depth / head_dim))
    s = unless_given(s, given, n_embd=head_dim * n_head)
    s = unless_given(s, given, n_head=divisor(s['n_embd'], s['n_embd'] // head_dim))
    return unless_given(s, given, n_kv_head=divisor(s['n_head'], s['n_head'] // HEADS_PER_KEY))


def divisor(n: int, most: int) -> int:
    """The largest divisor of n that is not above most, at least 1."""
    return max(each for each in range(1, max(1, most) + 1) if n % each == 0)


def rows_that_fit(settings: dict, machine: Machine) -> int:
    """How many rows the memory holds at once beside the model; 0: not one."""
    n = machine.world_size
    one_row = settings | dict(batch_size=1, gradient_accumulation_steps=n)
    parallel = 'FSDP' if machine.is_sharded else ''
    parts = plan.memory(plan.shape_of_model(settings), one_row, n, parallel)
    row = parts.pop('activations') * (2 if machine.dtype == torch.float32 else 1)
    missing = sum(parts.values()) - MEMORY * plan.memory_of(machine)
    fewest = -machine.largest([missing / row])[0]  # of all processes
    return int(min(max(0, fewest), MOST_ROWS))


def measure(settings: dict, most_rows: int, flop: float, machine: Machine) -> tuple[float, float]:
    """Time a model's steps on random tokens: seconds of a step of no rows, and of a row.

    flop: seconds of a FLOP at the machine's peak, than which no noise makes a row faster. The model
    is not compiled, which would take longer than all of this.
    """
    s = settings
    model = make_model(checkpoint.config_of(s, None))
    model.gradient_checkpointing = s['gradient_checkpointing']
    network = machine.wrap(model)
    rates = (0.0, 0.0, (s['beta1'], s['beta2']))
    opts = optimizers.make_optimizers(model, s['optimizer'], *rates, machine.muon_dtype)

    def seconds_of_step(n_rows):
        ids = torch.randint(s['vocab_size'], (n_rows, s['block_size']), device=machine.device)
        times = []
        while len(times) < 2 or (len(times) < 4 and sum(times) < MEASURED_SECONDS):
            model.zero_grad(set_to_none=True)
            machine.synchronize()
            began = time.perf_counter()
            with machine.autocast():
                loss = network(ids, ids, return_logits=False)[1]
            loss.backward()
            for opt in opts:
                opt.step()
            machine.synchronize()
            times += machine.largest([time.perf_counter() - began])
        return statistics.median(times[1:])  # the first one warms up

    one = seconds_of_step(1)
    if most_rows == 1:
        return 0.0, one
    n_rows = min(most_rows, max(2, int(MEASURED_SECONDS / 4 / one)), MEASURED_ROWS)
    fastest = 6 * matmul_params(model) * s['block_size'] * flop
    row = max((seconds_of_step(n_rows) - one) / (n_rows - 1), fastest)
    return max(0.0, one - row), row


def run_of(
    shape: dict,
    given: set[str],
    most_rows: int,
    speed: tuple[float, float],
    seconds: float,
    data: tuple[int, int],
    n_processes: int,
) -> Run:
    """The Run of a shape in so many seconds, or math.inf.

    speed: seconds of a step of no rows, and of a row; data: the tokens of train and of val.
    """
    s = shape
    n_train, n_val = data
    overhead, row_seconds = speed
    model = plan.shape_of_model(shape)
    n_matmul = matmul_params(model)
    tokens = TOKENS_PER_PARAMETER * n_matmul
    for _ in range(10):  # the batch follows from the tokens, and these from its speed
        s = with_batch(s, given, tokens, most_rows, n_processes)
        rows = plan.rows_per_step(s)
        step_tokens = rows * s['block_size']
        step_seconds = overhead + row_seconds * rows / n_processes
        val_rows = n_val / s['block_size']
        if s['eval_iters']:
            val_rows = min(val_rows, s['eval_iters'] * s['batch_size'])
        evaluation = val_rows * row_seconds / 3 / n_processes  # forward is a third of a step
        allowed = step_tokens * steps_in(seconds, step_seconds, evaluation, s['eval_interval'])
        if s['target_tokens'] or s['target_epochs']:
            tokens = min(allowed, s['target_tokens'] or s['target_epochs'] * n_train)
        elif 'max_iters' in given:
            tokens = min(allowed, s['max_iters'] * step_tokens)
        elif seconds < math.inf:
            tokens = allowed
    steps = math.ceil(tokens / step_tokens)
    spare = SPARE_STEPS if seconds < math.inf else 1
    s = unless_given(s, given, max_iters=steps * spare)
    loss = predicted_loss(n_matmul, tokens, n_train)
    if allowed < LEAST_STEPS * step_tokens:
        loss = math.inf
    s = with_rates(s, given, step_tokens, steps)
    return Run(s, model.get_num_params(non_embedding=False), tokens, steps, step_seconds, loss)


def steps_in(
    seconds: float, step_seconds: float, evaluation_seconds: float, eval_interval: int
) -> float:
    """How many steps a time allows beside EVALUATIONS, or one every eval_interval: the fewer."""
    beside_the_fewest = (seconds - EVALUATIONS * evaluation_seconds) / step_seconds
    step_and_its_share = step_seconds + evaluation_seconds / eval_interval
    beside_regular_ones = (seconds - 2 * evaluation_seconds) / step_and_its_share
    return TRAINING * max(0, min(beside_the_fewest, beside_regular_ones))


def with_batch(
    settings: dict, given: set[str], tokens: float, most_rows: int, n_processes: int
) -> dict:
    """The settings with the rows of a step, in as few micro-batches as fit."""
    rows = (
        TUNED_TOKENS_PER_STEP * (tokens / TUNED_TOKENS) ** BATCH_EXPONENT / settings['block_size']
    )
    if 'batch_size' in given:
        most_rows = settings['batch_size']
    n_batches = n_processes * max(1, math.ceil(round(rows / n_processes) / most_rows))
    s = unless_given(settings, given, gradient_accumulation_steps=n_batches)
    n_batches = s['gradient_accumulation_steps']
    together = n_processes // math.gcd(n_processes, n_batches)  # each process has as many rows
    batch_size = together * max(1, round(min(rows / n_batches, most_rows) / together))
    return unless_given(s, given, batch_size=batch_size)


def with_rates(settings: dict, given: set[str], step_tokens: int, steps: int) -> dict:
    """The settings with learning rate, warmup and weight decay.

    A run of any length decays away the same share of its weights (Wang and Aitchison 2024,
    arXiv:2405.13698).
    """
    usual = optimizers.RATES[settings['optimizer'], 'new weights']
    rate = usual * (step_tokens / TUNED_TOKENS_PER_STEP) ** RATE_BY_BATCH
    rate *= (settings['n_embd'] / TUNED_WIDTH) ** RATE_BY_WIDTH
    rate = float(f'{min(rate, MOST_RATE * usual):.3g}')
    s = unless_given(settings, given, learning_rate=rate)
    forgotten = TUNED_DECAY * usual * TUNED_TOKENS / TUNED_TOKENS_PER_STEP
    decay = min(MOST_DECAY, forgotten / max(s['learning_rate'] * steps, 1e-9))
    warmup = min(max(LEAST_WARMUP, round(WARMUP * steps)), steps // 5)
    return unless_given(s, given, weight_decay=float(f'{decay:.3g}'), warmup_iters=warmup)


def predicted_loss(n_params: int, tokens: float, n_train: int) -> float:
    """The loss by the law, in nats a token; n_train: how many tokens there are."""
    repeats = max(0.0, tokens / n_train - 1)
    if repeats:
        tokens = n_train * (1 + REPEATS_ARE_WORTH * (1 - math.exp(-repeats / REPEATS_ARE_WORTH)))
    millions = max(tokens, 1) / 1e6
    return E + A / (n_params / 1e6) ** EXPONENT + B / millions**EXPONENT


def in_words(best: Run, runs: list[Run], n_train: int) -> list[str]:
    """Four lines: the model, its tokens, its rates, and why these."""
    s, epochs = best.settings, best.tokens / n_train
    data = f'data/{s["dataset"]} has {n_train:,}'
    if epochs > 1:
        data += f', and each is seen {epochs:.1f} times'
    minutes = best.steps * best.step_seconds / 60
    took = f'{minutes:,.1f} minutes' if minutes < 120 else f'{minutes / 60:,.1f} hours'
    place, found = runs.index(best), []
    for run in runs[max(0, place - 1) : place + 2]:  # the best, and the two beside it
        speed = run.step_tokens / run.step_seconds
        found.append(f'depth {run.settings["n_layer"]} {run.loss:.3f} at {speed:,.0f} tokens/s')
    return [
        f'depth {s["n_layer"]}, width {s["n_embd"]}, query heads {s["n_head"]}, key and value '
        f'heads {s["n_kv_head"] or s["n_head"]}: {best.n_params:,} parameters',
        f'{best.tokens:,.0f} tokens in {best.steps:,} steps of {best.step_tokens:,} (batch_size '
        f'{s["batch_size"]} x {s["gradient_accumulation_steps"]}); {data}',
        f'learning rate {s["learning_rate"]:g}, weight decay {s["weight_decay"]:g}, '
        f'warmup {s["warmup_iters"]:,} steps; the steps take {took}',
        f'predicted loss: {", ".join(found)}, measured here',
    ]
