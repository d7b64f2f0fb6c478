"""Pictures of a model and of how it learns: positions, the learning rate, the gradient by layer."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from fledge import UserError
from fledge.objectives import next_token
from fledge.optimizers import SCHEDULES, learning_rate_at
from fledge.report import new_axes, save
from fledge.tokens import Batch
from model import GPT

MOST_POSITIONS = 256  # in a picture, so that each is a line of its own
# by config.position: what is drawn, its columns, its numbers
POSITIONS = {
    'learned': ('Learned positions, added to the embedding of a token', 'dimension', 'value'),
    'sinusoidal': ('Sinusoids, added to the embedding of a token', 'dimension', 'sine or cosine'),
    'rope': ('RoPE: how far queries and keys are turned', 'pair of dimensions', 'cosine'),
}
OTHER_MATRICES = {
    'transformer.wte': 'token embedding',
    'transformer.wpe': 'learned positions',
    'lm_head': 'head',
}


def position_table(model: GPT) -> Tensor:
    """What a GPT tells positions by, (positions, columns) float32, of the first MOST_POSITIONS.

    The learned vectors, the sinusoids, or RoPE's cosines, one for each pair of dimensions.
    """
    config = model.config
    if config.position == 'learned':
        table = model.transformer.wpe.weight.detach().float()
    elif config.position == 'sinusoidal':
        table = model.sinusoids
    else:
        table = model.rope_cos[:, : config.head_dim // 2]
    return table[:MOST_POSITIONS].cpu()


def likeness(table: Tensor, position: str) -> Tensor:
    """How alike two positions of a position_table are: 1 where they are the same.

    learned: (positions, positions), the cosine of the angle between their vectors. Else it depends
    on their distance alone, and is (positions,), by that: the mean cosine of the angles by which
    they differ. That is a dot product: of two rows of sinusoids, or of a query and a key that are
    all ones before RoPE turns them.
    """
    if position == 'learned':
        unit = F.normalize(table, dim=1)
        return unit @ unit.T
    return table @ table[0] / (table[0] @ table[0])


def draw_positions(model: GPT, path: str) -> None:
    """Draw what a GPT tells positions by, and how alike they are, as a PNG at path."""
    config = model.config
    is_learned = config.position == 'learned'
    table = position_table(model)
    title, columns, unit = POSITIONS[config.position]
    if len(table) < config.block_size:
        title += f' (the first {len(table)} of {config.block_size:,} positions)'
    left, right = new_axes((12, 5), ncols=2, width_ratios=(6, 5))
    figure = left.figure
    figure.set_layout_engine('constrained', wspace=0.05)
    figure.suptitle(title)
    # a few numbers of those that are learned are far beyond the others
    most = table.abs().quantile(0.99).item() if is_learned else 1.0
    sharp = dict(aspect='auto', interpolation='nearest')  # neighbours do not run into each other
    image = left.imshow(table, cmap='RdBu', vmin=-most, vmax=most, **sharp)
    figure.colorbar(image, ax=left, label=unit)
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set(xlabel=columns, ylabel='position')
    right.set_title('how alike two positions are')
    alike = likeness(table, config.position)
    if is_learned:
        image = right.imshow(alike, cmap='RdBu', vmin=-1, vmax=1)
        figure.colorbar(image, ax=right, label='cosine of the angle between their vectors')
        right.set(xlabel='position', ylabel='position')
    else:
        right.plot(alike)
        right.axhline(0, color='grey', linewidth=0.8)
        right.set(xlabel='distance between them', ylabel='dot product (1: the same position)')
        right.grid(alpha=0.3)
    save(figure, path)


def schedule_of(checkpoint: dict, path: str) -> tuple[dict, int]:
    """The settings of a loaded checkpoint's learning rate, and the step at which its schedule ends.

    Where time cuts a run short, that is where the run is expected to end. UserError, which names
    path, where no run of train.py made it.
    """
    settings = {'lr_schedule': 'cosine'} | checkpoint['config']  # nanoGPT's, which has no other
    needed = {'learning_rate', 'min_lr', 'decay_lr', 'warmup_iters', 'lr_decay_iters', 'max_iters'}
    if not needed <= settings.keys():
        raise UserError(
            f'{path} does not say what its learning rate was: no run of train.py made it'
        )
    progress = checkpoint.get('run', {}).get('progress', 0)  # of the run, 0 to 1
    planned = round(checkpoint['iter_num'] / progress) if progress else settings['max_iters']
    return settings, settings['lr_decay_iters'] or planned


def draw_schedule(settings: dict, end: int, used: list[tuple[int, float]], path: str) -> None:
    """Draw the learning rate by step, and what other schedules would make of it, as a PNG at path.

    settings, end: see schedule_of. used: [(step, learning rate)] of the steps that the run logged.
    """
    last = max([end, settings['warmup_iters'], *(step for step, _ in used)])
    steps = np.linspace(0, last, 1001).astype(int)
    steps = np.union1d(steps, settings['warmup_iters']).tolist()  # with that of the highest rate
    own = settings['lr_schedule'] if settings['decay_lr'] else 'constant'
    axes = new_axes((8, 5))
    for other in SCHEDULES:
        if other != own:
            changed = settings | dict(lr_schedule=other, decay_lr=True)
            rates = [learning_rate_at(changed, step, step, end) for step in steps]
            axes.plot(steps, rates, linewidth=1, alpha=0.6, label=other)
    rates = [learning_rate_at(settings, step, step, end) for step in steps]
    axes.plot(steps, rates, color='black', linewidth=2, label=f'{own}: this run')
    if used:
        axes.plot(*zip(*used, strict=True), 'o', color='C3', markersize=4, label='what it used')
    axes.set(xlabel='step', ylabel='learning rate', ylim=(0, None))
    axes.set_title(f'The learning rate of each step: {own}')
    axes.grid(alpha=0.3)
    axes.legend(loc='upper left', bbox_to_anchor=(1, 1))
    save(axes.figure, path)


def gradient_norms(model: GPT, batch: Batch) -> tuple[float, dict[str, float]]:
    """The loss of a batch (nats a token), and the norm of its gradient in each matrix of a model.

    batch: a tokens.Batch of tensors. The norms are a dict by the name of the layer.
    """
    loss = next_token(model, batch)
    loss.backward()
    norms = {}
    for name, p in model.named_parameters():
        if p.dim() == 2 and p.grad is not None:
            norms[name.removesuffix('.weight')] = p.grad.norm().item()
    model.zero_grad(set_to_none=True)
    return loss.item(), norms


@dataclass
class GradientTable:
    """The norms of gradient_norms by layer and kind of matrix."""

    layers: list[str]  # the labels of the rows
    kinds: list[str]  # the labels of the columns
    rows: list[list[float]]  # the norms; NaN where a layer has no matrix of that kind
    others: dict[str, float]  # by label: the norms of what is in no layer


def gradient_table(norms: dict[str, float], tied: bool) -> GradientTable:
    """The table of the norms; tied: whether the token embedding is the head as well."""
    by_layer, others = {}, {}
    for name, norm in norms.items():
        found = re.fullmatch(r'transformer\.(encoder|h)\.(\d+)\.(.+)', name)
        if found:
            stack, layer, kind = found.groups()
            by_layer.setdefault((stack, int(layer)), {})[kind] = norm
        else:
            others[OTHER_MATRICES.get(name, name)] = norm
    if tied:
        others['token embedding = head'] = others.pop('token embedding')
    places = sorted(by_layer)  # an encoder's come first
    kinds = sorted({kind for of_layer in by_layer.values() for kind in of_layer})
    rows = [[by_layer[place].get(kind, math.nan) for kind in kinds] for place in places]
    has_encoder = places[0][0] == 'encoder'
    stacks = {'encoder': 'encoder', 'h': 'decoder' if has_encoder else 'layer'}
    layers = [f'{stacks[stack]} {layer}' for stack, layer in places]
    return GradientTable(layers, kinds, rows, others)


def draw_gradients(norms: dict[str, float], tied: bool, title: str, path: str) -> None:
    """Draw the norms of gradient_norms as a PNG at path; tied: see gradient_table."""
    from matplotlib.colors import LogNorm

    table = gradient_table(norms, tied)
    known = [norm for norm in norms.values() if 0 < norm < math.inf] or [1.0]
    low, high = min(known), max(known)
    middle = math.sqrt(low * high)
    # a factor of 100 at least, so that small differences look small
    scale = LogNorm(min(low, middle / 10), max(high, middle * 10))
    size = (3 + 1.1 * len(table.kinds), 2.5 + 0.35 * len(table.layers))
    top, bottom = new_axes(size, nrows=2, height_ratios=(len(table.layers), 1))
    figure = top.figure
    figure.set_layout_engine('constrained')
    figure.suptitle(
        f'{title}\nmuch smaller in the first layers: it vanishes; much larger: it explodes'
    )
    columns = [kind.replace('.', '\n') for kind in table.kinds]
    draw_numbers(top, table.rows, table.layers, columns, scale)
    others = table.others
    image = draw_numbers(bottom, [list(others.values())], [''], list(others), scale)
    figure.colorbar(image, ax=[top, bottom], label='norm of the gradient')
    save(figure, path)


def draw_numbers(
    axes: object, values: list[list[float]], rows: list[str], columns: list[str], scale: Callable
) -> object:
    """A heat map with the number in each cell, which stays empty where that is NaN."""
    image = axes.imshow(values, norm=scale, cmap='viridis', aspect='auto')
    for i in range(len(rows)):
        for j in range(len(columns)):
            value = values[i][j]
            if not math.isnan(value):
                color = 'black' if value > 0 and scale(value) > 0.5 else 'white'
                axes.text(j, i, f'{value:.3g}', ha='center', va='center', color=color)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    return image
