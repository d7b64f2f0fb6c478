"""One dial: the settings that follow from a model's depth, and the depth that suits a time.

config/depth.py tells a reader what they are.
"""

import math
import os
import time
from types import SimpleNamespace

import torch

from encoder_decoder import make_model
from fledge import UserError, checkpoint, optimizers, plan
from fledge.device import matmul_params
from fledge.tokenizer import find_tokenizer
from fledge.tokens import Tokens, find_data

DEPTHS = [1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32]  # of which a time gets the best
HEAD_DIM = 64
WIDTH_PER_LAYER = 32  # before it is rounded to whole heads
HEADS_PER_KEY = 3  # at least so many query heads share a head for keys and values
TOKENS_PER_PARAMETER = 20  # without a time; Hoffmann et al. 2022, arXiv:2203.15556
# the default run, whose settings were tuned: the rules go through this point
TUNED = SimpleNamespace(n_embd=128, tokens=6e6, tokens_per_step=2048, weight_decay=0.1)
BATCH_EXPONENT = 0.383  # of the tokens; Bergsma et al. 2025, arXiv:2505.13738
RATE_BY_BATCH, RATE_BY_WIDTH = 0.5, -0.5  # exponents; the usual ones, Muon's or AdamW's
MOST_RATE = 2.0  # times what optimizers.RATES has for new weights
MOST_DECAY = 1.0
WARMUP, LEAST_WARMUP = 0.01, 20  # share of the steps; steps
# loss = E + A / parameters ** ALPHA + B / tokens ** BETA, in nats a token, of the parameters in
# matrix products; the form is Hoffmann's
E, A, ALPHA, B, BETA = 1.69, 406.4, 0.34, 410.7, 0.28
FITTED_ON = 'web text'
# Tokens teach less each time that they are seen again. However often, they are worth no more than
# so many times as many new ones besides; Muennighoff et al. 2023, arXiv:2305.16264
REPEATS_ARE_WORTH = 15.4
TRAINING = 0.9  # share of the time that steps have; evaluations and checkpoints take the rest
MEASURED_SECONDS, MEASURED_ROWS = 1.0, 64  # so long, or with so many rows, a speed is measured
MOST_ROWS = 10**5  # at once, however much memory there is
MEMORY = 0.5  # share of the memory that training may take
LEAST_STEPS = 50  # fewer than that teach nothing
SPARE_STEPS = 1.5  # times those that the time allows: it is the time that ends the run
CHOSEN = ['n_layer', 'n_embd', 'head_dim', 'n_head', 'n_kv_head', 'max_minutes', 'max_iters']
CHOSEN += ['batch_size', 'gradient_accumulation_steps']
CHOSEN += ['learning_rate', 'weight_decay', 'warmup_iters']


def settle(settings, given, machine=None):
    """Choose those of CHOSEN that were not given, by n_layer, or by max_minutes.

    settings: train.py's, a dict; given: names of those that the user gave. The processes of
    machine, a device.Machine, measure together and choose the same. None: nothing is measured, and
    there is no time. Returns the chosen settings, and four lines that say what they are and why.
    UserError where there is nothing that they could follow from.
    """
    for name, usual in dict(init_from='scratch', n_encoder_layer=0).items():
        if settings[name] != usual:
            raise UserError(f'config/depth.py makes a new GPT: leave out {name}={settings[name]!r}')
    if given.issuperset(CHOSEN):  # as to the seeds after the first
        return {}, []
    minutes = settings['max_minutes'] if machine and 'max_minutes' in given else 0
    if 'n_layer' not in given and not minutes:
        raise UserError(
            'config/depth.py takes a depth (--n_layer=8) or, to train, a time (--max_minutes=60)'
        )
    began = time.monotonic()
    settings, n_train = with_data(settings, machine)
    runs = []
    for depth in [settings['n_layer']] if 'n_layer' in given else DEPTHS:
        shape = shape_of(settings, given, depth)
        rows = rows_that_fit(shape, machine)
        speed = measure(shape, rows, machine) if machine and rows else (0.0, 0.0)
        seconds, spent = math.inf, 0.0
        if machine:
            (spent,) = machine.largest([time.monotonic() - began])
        if minutes:
            seconds = max(0.0, 60 * minutes - spent) if rows else 0.0
        run = run_of(shape, given, max(rows, 1), speed, seconds, n_train, machine)
        run.minutes += spent / 60
        runs.append(run)
        best = min(runs, key=lambda run: run.loss)
        if len(runs) - runs.index(best) > 2:
            break  # the two after the best were worse, and deeper ones take longer to measure
    if best.loss == math.inf:
        raise UserError(
            f'max_minutes={minutes:g} is too short for depth {best.depth}: here {LEAST_STEPS} '
            'steps take longer, or its memory is more than there is'
        )
    chosen = {name: best.settings[name] for name in CHOSEN if name not in given}
    return chosen, in_words(best, runs, n_train, settings['dataset']) if machine else []


def with_data(settings, machine):
    """The settings with vocab_size and optimizer as they will be, and the tokens of train."""
    name, size = settings['dataset'], settings['vocab_size']
    folder, n_train = os.path.join('data', name), 0
    if machine and machine.main:
        find_data(name, size, make_default=not settings['dry_run'])
    if machine:
        machine.wait_for_all()
    size = size or checkpoint.padded_vocab_size(find_tokenizer(folder))
    if machine:
        n_train = Tokens(folder, 'train', settings['block_size'], size).n_tokens
    optimizer = 'muon' if settings['optimizer'] == 'auto' else settings['optimizer']
    return settings | dict(vocab_size=size, optimizer=optimizer), n_train


def follow(settings, given, **values):
    """Settings with these values, but for those that were given."""
    return settings | {name: value for name, value in values.items() if name not in given}


def shape_of(settings, given, depth):
    """The settings with the shape of a model of so many layers."""
    s = follow(settings, given, n_layer=depth, head_dim=HEAD_DIM, max_minutes=0.0)
    n_heads = max(1, round(WIDTH_PER_LAYER * depth / HEAD_DIM))
    s = follow(s, given, n_embd=HEAD_DIM * n_heads)
    s = follow(s, given, n_head=max(1, s['n_embd'] // (s['head_dim'] or HEAD_DIM)))
    most = max(1, s['n_head'] // HEADS_PER_KEY)
    n_kv_head = max(n for n in range(1, most + 1) if s['n_head'] % n == 0)
    return follow(s, given, n_kv_head=n_kv_head)


def rows_that_fit(settings, machine):
    """How many rows the memory holds at once beside the model."""
    if machine is None:
        return MOST_ROWS
    one_row = settings | dict(batch_size=1, gradient_accumulation_steps=1)
    parts = plan.memory(plan.shape_of_model(settings), one_row)
    row = parts.pop('activations') * (2 if machine.dtype == torch.float32 else 1)
    missing = sum(parts.values()) - MEMORY * plan.memory_of(machine)
    fewest = -machine.largest([missing / row])[0]  # of all processes
    return int(min(max(0, fewest), MOST_ROWS))


def measure(settings, most_rows, machine):
    """Time a model's steps on random tokens: seconds of a step of no rows, and of a row.

    It is not compiled, which would take longer than all of this.
    """
    s = settings
    model = make_model(checkpoint.config_of(s, None))
    model.gradient_checkpointing = s['gradient_checkpointing']
    network = machine.wrap(model)
    rates = (0.0, 0.0, (s['beta1'], s['beta2']))
    opts = optimizers.make_optimizers(model, s['optimizer'], *rates, machine.dtype)

    def seconds_of_step(n_rows):
        ids = torch.randint(s['vocab_size'], (n_rows, s['block_size']), device=machine.device)
        times = []
        while len(times) < 4 and sum(times) < MEASURED_SECONDS:  # the first one warms up
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
        return min(times)

    one = seconds_of_step(1)
    if most_rows == 1 or one > MEASURED_SECONDS:
        return 0.0, one
    n_rows = min(most_rows, max(2, int(MEASURED_SECONDS / 4 / one)), MEASURED_ROWS)
    row = max(seconds_of_step(n_rows) - one, 0.01 * one) / (n_rows - 1)
    return max(0.0, one - row), row


def run_of(shape, given, most_rows, speed, seconds, n_train, machine):
    """A run of a shape in so many seconds: its settings, tokens, steps and predicted loss.

    speed: seconds of a step of no rows, and of a row. The loss is infinite where the time is for
    too few steps.
    """
    s, model = shape, plan.shape_of_model(shape)
    n_params = matmul_params(model)
    run = SimpleNamespace(depth=s['n_layer'], n_params=model.get_num_params(non_embedding=False))
    n_processes = machine.world_size if machine else 1
    most_rows = s['batch_size'] if 'batch_size' in given else most_rows
    run.tokens, allowed = TOKENS_PER_PARAMETER * n_params, math.inf
    for _ in range(10):  # the batch follows from the tokens, and these from its speed
        rows = TUNED.tokens_per_step * (run.tokens / TUNED.tokens) ** BATCH_EXPONENT
        rows /= s['block_size']
        n = n_processes * max(1, math.ceil(round(rows / n_processes) / most_rows))
        s = follow(s, given, gradient_accumulation_steps=n)
        n = s['gradient_accumulation_steps']
        s = follow(s, given, batch_size=max(1, round(rows / n)))
        rows = s['batch_size'] * n
        run.step_tokens = rows * s['block_size']
        run.step_seconds = speed[0] + speed[1] * rows / n_processes
        asked = s['target_tokens'] or s['target_epochs'] * n_train
        if 'max_iters' in given:
            asked = asked or s['max_iters'] * run.step_tokens
        run.tokens = asked or run.tokens
        if seconds < math.inf:
            allowed = TRAINING * seconds / run.step_seconds * run.step_tokens
            run.tokens = min(asked or allowed, allowed)
    run.steps = max(1, round(run.tokens / run.step_tokens))
    run.minutes = run.steps * run.step_seconds / TRAINING / 60
    run.loss = predicted_loss(n_params, run.tokens, n_train)
    if allowed < LEAST_STEPS * run.step_tokens:
        run.loss = math.inf
    if not asked:
        spare = SPARE_STEPS if seconds < math.inf else 1
        s = follow(s, given, max_iters=math.ceil(run.steps * spare))
    run.settings = with_rates(s, given, run)
    return run


def with_rates(settings, given, run):
    """Learning rate, warmup and weight decay of a run.

    A run of any length decays away the same share of its weights (Wang and Aitchison 2024,
    arXiv:2405.13698).
    """
    usual = optimizers.RATES[settings['optimizer'], 'new weights']
    rate = usual * (run.step_tokens / TUNED.tokens_per_step) ** RATE_BY_BATCH
    rate *= (settings['n_embd'] / TUNED.n_embd) ** RATE_BY_WIDTH
    s = follow(settings, given, learning_rate=float(f'{min(rate, MOST_RATE * usual):.3g}'))
    rate = usual if s['learning_rate'] == 'auto' else s['learning_rate']
    forgotten = TUNED.weight_decay * usual * TUNED.tokens / TUNED.tokens_per_step
    decay = min(MOST_DECAY, forgotten / max(rate * run.steps, 1e-9))
    warmup = max(LEAST_WARMUP, round(WARMUP * run.steps))
    return follow(s, given, weight_decay=float(f'{decay:.3g}'), warmup_iters=warmup)


def predicted_loss(n_params, tokens, n_train):
    """The loss by the law, in nats a token; n_train: how many tokens there are, 0: enough."""
    repeats = max(0.0, tokens / n_train - 1) if n_train else 0.0
    if repeats:
        tokens = n_train * (1 + REPEATS_ARE_WORTH * (1 - math.exp(-repeats / REPEATS_ARE_WORTH)))
    return E + A / n_params**ALPHA + B / max(tokens, 1) ** BETA


def in_words(best, runs, n_train, dataset):
    """Four lines: the model, its tokens, its rates, and why these."""
    s, epochs = best.settings, best.tokens / n_train
    data = f'data/{dataset} has {n_train / 1e6:,.1f}M'
    if epochs > 1:
        data += f', fewer than that: each is seen {epochs:.1f} times'
    found = [
        f'depth {run.depth} at {run.step_tokens / run.step_seconds:,.0f} tokens/s to {run.loss:.3f}'
        for run in runs
        if run.loss < math.inf
    ]
    return [
        f'depth {best.depth}, width {s["n_embd"]}, query heads {s["n_head"]}, key and value '
        f'heads {s["n_kv_head"]}: {best.n_params / 1e6:.2f}M parameters',
        f'{best.tokens / 1e6:,.1f}M tokens in {best.steps:,} steps of {best.step_tokens:,} '
        f'({s["gradient_accumulation_steps"]} x {s["batch_size"]} rows); {data}',
        f'learning rate {s["learning_rate"]:g}, weight decay {s["weight_decay"]:g}, '
        f'warmup {s["warmup_iters"]:,} steps',
        f'{best.minutes:,.1f} minutes with evaluations; speed as measured here, and loss by a law '
        f'fitted on {FITTED_ON}: {", ".join(found)}',
    ]
