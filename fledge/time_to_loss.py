"""nanoGPT's own model and training, and the seconds that it and train.py take to a loss."""

import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from fledge import UserError
from fledge.device import Machine
from fledge.evaluation import evaluate
from fledge.log import read_metrics
from fledge.optimizers import learning_rate_at, set_learning_rate
from fledge.report import new_axes, save
from fledge.tokens import Batch, Tokens

# What nanoGPT's README gives for a CPU, on top of its config/train_shakespeare_char.py.
SIZES = dict(block_size=64, n_layer=4, n_head=4, n_embd=128, dropout=0.0, bias=False)
RATES = dict(learning_rate=1e-3, min_lr=1e-4, decay_lr=True, lr_schedule='cosine', warmup_iters=100)
ADAMW = dict(weight_decay=0.1, beta1=0.9, beta2=0.99, grad_clip=1.0)
BATCH_SIZE, MAX_ITERS = 12, 2000
EVAL_INTERVAL = 125  # steps of nanoGPT between two points of its curve
POINTS = 15  # of ours

Curve = list[tuple[float, float]]  # (seconds of training, val loss) of each evaluation of a run


def load_nanogpt(path: str, sizes: dict, device: str) -> nn.Module:
    """A new GPT of nanoGPT's own model.py; UserError where path is no checkout of it.

    sizes: the fields of its GPTConfig, a dict.
    """
    try:
        where = os.path.join(path, 'model.py')
        spec = importlib.util.spec_from_file_location('nanogpt_model', where)
        module = importlib.util.module_from_spec(spec)
        sys.modules['nanogpt_model'] = module
        spec.loader.exec_module(module)
        return module.GPT(module.GPTConfig(**sizes)).to(device)
    except (OSError, AttributeError, TypeError) as e:
        raise UserError(f'compare={path} is no nanoGPT checkout ({e})') from None


def nanogpts_machine(device: str, dtype: str) -> Machine:
    """A Machine that computes in nanoGPT's precision: on a CPU it has float32 alone."""
    return Machine(device, 'float32' if device == 'cpu' else dtype)


def nanogpts_step(
    model: nn.Module, network: nn.Module, machine: Machine, settings: dict
) -> Callable:
    """A step as nanoGPT's train.py takes it: step(x, y, learning_rate).

    network: the model, or compiled. settings: a dict with those of ADAMW.
    """
    betas = (settings['beta1'], settings['beta2'])
    optimizer = model.configure_optimizers(settings['weight_decay'], 0.0, betas, machine.type)
    scaler = torch.amp.GradScaler(machine.type, enabled=machine.dtype == torch.float16)

    def step(x, y, learning_rate):
        set_learning_rate([optimizer], learning_rate)
        with machine.autocast():
            loss = network(x, y)[1]
        scaler.scale(loss).backward()
        if settings['grad_clip']:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings['grad_clip'])
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def nanogpts_curve(
    path: str, dataset: str, vocab_size: int, device: str, dtype: str, compiles: bool, seed: int
) -> Curve:
    """Train nanoGPT as its README does on a CPU, with its random rows of train.

    compiles: by torch.compile, whose time is not counted, as it is not in train.py. Returns its
    Curve, of the loss over all of val. UserError where path is no checkout, or a loss is not
    finite.
    """
    machine = nanogpts_machine(device, dtype)
    torch.manual_seed(seed)
    model = load_nanogpt(path, SIZES | dict(vocab_size=vocab_size), machine.device)
    network = torch.compile(model) if compiles else model
    step = nanogpts_step(model, network, machine, ADAMW)
    folder, length = os.path.join('data', dataset), SIZES['block_size']
    ids = Tokens(folder, 'train', length, vocab_size).shards[0]
    val = Tokens(folder, 'val', length, vocab_size)

    def random_rows():
        starts = torch.randint(len(ids) - length, (BATCH_SIZE,)).tolist()
        rows = np.stack([ids[start : start + length + 1] for start in starts]).astype(np.int64)
        inputs, targets = rows[:, :-1].copy(), rows[:, 1:].copy()  # which nanoGPT views as one row
        return machine.move(Batch(inputs=inputs, targets=targets))

    def val_loss():
        def loss_of(model, batch):
            return model(batch['inputs'], batch['targets'])[1]

        loss = evaluate(model, val, machine, 64, 0, None, loss_of)['loss']
        if not math.isfinite(loss):
            raise UserError(f"nanoGPT's val loss is {loss}: there is no loss to reach")
        return loss

    if compiles:
        step(*random_rows(), learning_rate=0.0)  # which changes no weight
    curve, seconds = [(0.0, val_loss())], 0.0
    for first in range(0, MAX_ITERS, EVAL_INTERVAL):
        began = time.perf_counter()
        for n in range(first, first + EVAL_INTERVAL):
            step(*random_rows(), learning_rate_at(RATES, n, n, MAX_ITERS))
        machine.synchronize()
        seconds += time.perf_counter() - began
        curve.append((seconds, val_loss()))
    return curve


def our_curve(train: str, settings: dict) -> Curve:
    """Run train.py, whose path is train, with all of its settings; returns its Curve.

    The loss is over all of val here as well. UserError where the run fails.
    """
    interval = max(1, settings['max_iters'] // POINTS)
    with tempfile.TemporaryDirectory() as folder:
        out_dir, path = os.path.join(folder, 'out'), os.path.join(folder, 'settings.json')
        own = dict(out_dir=out_dir, seeds=1, sample_interval=0, eval_iters=0)
        own |= dict(eval_interval=interval, log_interval=interval)
        with open(path, 'w', encoding='utf-8') as f:
            json.dump(settings | own, f)
        done = subprocess.run([sys.executable, train, path], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f'train.py: {(done.stderr.splitlines() or [""])[-1]}')
        lines = read_metrics(os.path.join(out_dir, 'metrics.jsonl'))
    rows_per_step = settings['gradient_accumulation_steps'] * settings['batch_size']
    return curve_of(lines, rows_per_step * settings['block_size'])


def curve_of(lines: list[dict], tokens_per_step: int) -> Curve:
    """The Curve of a run of train.py, told from the lines of its metrics.jsonl."""
    tokens, seconds = [0], [0.0]
    for line in lines:
        if line['tokens_per_second']:  # of the steps since the line before, evaluations left out
            trained = len(line['step_losses']) * tokens_per_step
            tokens.append(tokens[-1] + trained)
            seconds.append(seconds[-1] + trained / line['tokens_per_second'])
    curve = []
    for line in lines:
        if line['val_loss'] is not None:
            curve.append((float(np.interp(line['tokens'], tokens, seconds)), line['val_loss']))
    return curve


def seconds_to(loss: float, curve: Curve) -> float:
    """When a curve first comes to a loss, on the straight lines between its points, or infinity."""
    for (earlier, higher), (later, lower) in itertools.pairwise(curve):
        if lower <= loss:
            return float(np.interp(loss, [lower, higher], [later, earlier]))
    return math.inf


def draw(curves: dict[str, list[Curve]], loss: float, title: str, path: str) -> None:
    """Draw val losses over seconds as a PNG at path.

    curves: {label in the legend: those of its runs}; loss: the one to reach.
    """
    axes = new_axes((8, 4.5))
    for number, (label, runs) in enumerate(curves.items()):
        for curve in runs:
            (line,) = axes.plot(*zip(*curve, strict=True), f'C{number}.-', linewidth=1.2)
        line.set_label(label)  # in the legend once
    axes.axhline(loss, color='grey', linewidth=0.8, linestyle='--')
    lowest = min(y for runs in curves.values() for curve in runs for _, y in curve)
    axes.set(xlim=(0, None), ylim=(lowest - 0.05, loss + 1.2))  # the first losses are far above
    axes.set(xlabel='seconds of training, evaluations not counted')
    axes.set(ylabel='val loss (nats a token)')
    axes.set_title(title, fontsize='medium')
    axes.grid(alpha=0.3)
    axes.legend()
    save(axes.figure, path)
