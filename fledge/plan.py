"""What a run will take, before it is begun: memory by part, time and price, on one GPU or several.

The plan of --world_size is computed from the settings alone, on a model without memory (torch's
meta device), so that it can be made on any machine. What two real steps take here is measured.
"""

import math
import os
import time
from collections.abc import Callable, Sequence

import psutil
import torch

from encoder_decoder import make_model
from fledge import UserError, checkpoint, optimizers
from fledge.device import DATA_SHEETS, Machine
from fledge.tokenizer import load_tokenizer
from fledge.tokens import find_data
from model import ACTIVATIONS, GPT, GPTConfig

UTILISATION = 0.4  # assumed share of a data sheet's FLOP/s: well-tuned runs have 0.3 to 0.5
# Of each: its memory in GB, and bytes a second to its neighbours in one machine, in one direction
# (NVLink, or 16 lanes of PCIe 4), from the vendors' data sheets.
GPUS = {
    'RTX 3060': (12, 32e9),
    'L4': (24, 32e9),
    'A100': (80, 300e9),
    'H100': (80, 450e9),
}
NETWORK = 1.25e9  # bytes a second where it is none of these: 10 Gbit/s
MEMORY_SIZES = (8, 12, 16, 24, 32, 40, 48, 80, 141, 192)  # GB, of GPUs that there are
OVERHEAD = 1e9  # bytes that CUDA, its libraries and torch's allocator take besides


def plan_report(settings: dict) -> str:
    """The plan for world_size GPUs, two tables in Markdown; settings: train.py's.

    All of it is computed. UserError for a run that is none of a new model's, by steps or tokens.
    """
    for name, usual in dict(init_from='scratch', lora_rank=0, n_encoder_layer=0).items():
        if settings[name] != usual:
            raise UserError(f'--world_size plans a new GPT: leave out {name}={settings[name]!r}')
    if settings['target_epochs'] and not settings['target_tokens']:
        raise UserError('--world_size plans without the data: give target_tokens or max_iters')
    n_gpus, price = settings['world_size'], settings['price_per_hour']
    model = shape_of_model(settings)
    n_params = model.get_num_params(non_embedding=False)
    tokens_per_step = rows_per_step(settings) * settings['block_size']
    n_steps = settings['max_iters']
    if settings['target_tokens']:
        n_steps = math.ceil(settings['target_tokens'] / tokens_per_step)
    size = f'{n_params / 1e6:.0f}M' if n_params < 1e9 else f'{n_params / 1e9:.2f}B'
    ways = [(1, '')]
    if n_gpus > 1:
        ways += [(n_gpus, 'DDP'), (n_gpus, 'FSDP')]

    memory_rows = []
    time_rows = [('GPUs', 's a step', 'on links', 'tokens/s', 'hours', 'days', 'price')]
    for n, parallel in ways:
        parts = memory(model, settings, n, parallel)
        needed = sum(parts.values())
        gigabytes = [f'{each / 1e9:.2f}' for each in (*parts.values(), needed)]
        name = f'{size}, {n} {parallel}'.rstrip()
        memory_rows.append((name, *gigabytes, smallest_gpu(needed)))
        for gpu, (gb, link) in GPUS.items():
            name = f'{size}, {n} x {gpu} {parallel}'.rstrip()
            if needed + OVERHEAD > gb * 1e9:
                time_rows.append((name, 'does not fit', '', '', '', '', ''))
                continue
            computing = hours_6nd(n_params, tokens_per_step, gpu) * 3600 / n
            sending = bytes_sent(n_params, settings, n, parallel) / link
            seconds = computing + sending
            cost = time_and_price(seconds, n_steps, tokens_per_step, n, price)
            time_rows.append((name, f'{seconds:.3f}', f'{sending:.3f}', *cost))
    memory_head = ('GB on each GPU', *parts, 'all', 'fits in')
    tokens = n_steps * tokens_per_step
    lines = [
        f'the plan of {n_params:,} parameters and {tokens:,} tokens, '
        f'{6 * n_params * tokens:.3g} FLOPs (6ND); all of it is computed, nothing measured',
        *markdown([memory_head, *memory_rows]),
        '',
        *markdown(time_rows),
        f"by 6ND at {UTILISATION:.0%} of the data sheets' FLOP/s, and what the links take, added",
    ]
    return '\n'.join(lines)


def smallest_gpu(n_bytes: float) -> str:
    """The memory of the smallest GPU that holds a training process of n_bytes, in words."""
    for gb in MEMORY_SIZES:
        if n_bytes + OVERHEAD <= gb * 1e9:
            return f'{gb} GB'
    return 'none'


def markdown(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a Markdown table; the first of rows, tuples of texts, is its head."""
    lines = ['| ' + ' | '.join(row) + ' |' for row in rows]
    return [lines[0], '|---' * len(rows[0]) + '|', *lines[1:]]


def shape_of_model(settings: dict) -> GPT:
    """The new model of train.py's settings, whose tensors have shapes and no memory."""
    tokenizer = None
    if not settings['vocab_size']:
        tokenizer = load_tokenizer(os.path.join('data', settings['dataset']))
    with torch.device('meta'):
        return make_model(checkpoint.config_of(settings, tokenizer))


def rows_per_step(settings: dict) -> int:
    """How many rows a step has, over all processes."""
    return settings['gradient_accumulation_steps'] * settings['batch_size']


def rows_of(settings: dict, n_gpus: int) -> tuple[int, int]:
    """How many rows of a step each GPU has, and how many at once; UserError: they do not divide."""
    rows = rows_per_step(settings)
    if rows % n_gpus:
        raise UserError(
            f'{rows} rows a step (gradient_accumulation_steps x batch_size) do not divide among '
            f'{n_gpus} GPUs'
        )
    return rows // n_gpus, min(settings['batch_size'], rows // n_gpus)


def memory(model: GPT, settings: dict, n_gpus: int = 1, parallel: str = '') -> dict[str, float]:
    """Bytes on each GPU by part; the matrix products are in 16 bits.

    model may be on the meta device. parallel: 'DDP', 'FSDP' (Zhao et al. 2023, arXiv:2304.11277),
    or '' for one GPU.
    """
    c = model.config
    rows, batch_size = rows_of(settings, n_gpus)
    n_params = sum(p.numel() for p in model.parameters())
    in_blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    weights = gradients = 4 * n_params  # float32
    state = 0
    for optimizer in optimizers.make_optimizers(model, settings['optimizer'], 0.0, 0.0, (0.9, 0.9)):
        held = [p for group in optimizer.param_groups for p in group['params']]
        if isinstance(optimizer, optimizers.Muon):  # a momentum, and a mean of each row or column
            state += 4 * sum(p.numel() + max(p.shape) for p in held)
        else:
            state += 4 * 2 * sum(p.numel() for p in held)
    # autocast makes 16-bit copies of the matrices, which the backward pass needs as well
    copies = 2 * sum(p.numel() for p in model.parameters() if p.dim() == 2)
    if parallel == 'FSDP':
        weights, state = weights / n_gpus, state / n_gpus
        # micro-batches before the last one of a step leave their sum whole on each GPU
        gradients = gradients / n_gpus + (gradients if rows > batch_size else 0)
        outside_blocks = n_params - sum(in_blocks)
        copies = 2 * 2 * (max(in_blocks) + outside_blocks)  # whole weights, and their gradients

    n_tokens = batch_size * settings['block_size']
    of_block = bytes_of_block(c)
    kept = len(in_blocks) * of_block
    if settings['gradient_checkpointing']:  # the inputs of all blocks, and all of one of them
        kept = len(in_blocks) * 4 * c.n_embd + of_block
    around = 8 * c.n_embd + (c.n_embd if c.dropout else 0)  # the last norm, the embeddings' dropout
    # of each logit its log-probability, the gradient of that, and its own, in float32
    logits = 12 * min(model.LOSS_ROWS, n_tokens) * c.vocab_size
    return dict(
        weights=weights,
        gradients=gradients,
        optimizer=state,
        copies=copies,
        activations=n_tokens * (kept + around),
        logits=logits,
    )


def bytes_of_block(config: GPTConfig) -> int:
    """Bytes that a token leaves in a block of model.py for the backward pass.

    On a GPU under autocast: the residual stream is in float32, what a matrix product reads or
    makes in 16 bits. Attention keeps no probabilities (Dao et al. 2022, arXiv:2205.14135), a norm
    no copy of its input. torch.compile may keep less.
    """
    c = config
    norms = 2 * (4 + 2) * c.n_embd  # their inputs, and outputs for the matrix products
    qkv = 2 * (c.n_head + 2 * c.n_kv_head) * c.head_dim
    if c.position == 'rope' or c.qk_norm:  # queries and keys before it, and behind it
        qkv += 2 * (c.n_head + c.n_kv_head) * c.head_dim
    attended = 2 * c.n_head * c.head_dim + 4 * c.n_head  # and each softmax's sum
    gated, _ = ACTIVATIONS[c.activation]
    # before and behind the activation; gated: gate, up, the activated gate, their product
    mlp = 2 * c.n_inner * (4 if gated else 2)
    dropout = 2 * c.n_embd if c.dropout else 0  # a byte each says what was dropped
    return norms + qkv + attended + mlp + dropout


def hours_6nd(
    n_params: float, n_tokens: float, gpu: str, utilisation: float = UTILISATION
) -> float:
    """Hours that one GPU, a name in DATA_SHEETS, takes to train n_params on n_tokens.

    6 FLOPs a parameter and token (Kaplan et al. 2020, arXiv:2001.08361); attention's own are left
    out. utilisation: the share of the data sheet's FLOP/s that a run has.
    """
    return 6 * n_params * n_tokens / (DATA_SHEETS[gpu] * utilisation) / 3600


def bytes_sent(n_params: int, settings: dict, n_gpus: int, parallel: str) -> float:
    """Bytes that each GPU sends in a step, in a ring of n_gpus."""
    rows, batch_size = rows_of(settings, n_gpus)
    others = (n_gpus - 1) / n_gpus  # each sends all but its own share
    if parallel == 'FSDP':  # each micro-batch 16-bit weights twice, the step float32 gradients
        n_micro_batches = math.ceil(rows / batch_size)
        return others * (4 * n_micro_batches + 4) * n_params
    return others * 2 * 4 * n_params  # sums of float32 gradients, then the sums to all


def time_and_price(
    seconds: float, n_steps: int, tokens_per_step: int, n_gpus: int, price_per_hour: float
) -> tuple[str, str, str, str]:
    """Tokens a second, hours, days and price of a run by the seconds of a step."""
    hours = seconds * n_steps / 3600
    speed = tokens_per_step / seconds
    price = hours * n_gpus * price_per_hour
    return f'{speed:,.0f}', f'{hours:.1f}', f'{hours / 24:.2f}', f'{price:,.2f}'


def why_not_measured(settings: dict, machine: Machine) -> str:
    """Why no real step of the settings can be taken here, in words; '' where one can."""
    try:
        find_data(settings['dataset'], settings['vocab_size'], make_default=False)
    except UserError as e:
        return str(e)
    needed = sum(memory(shape_of_model(settings), settings).values())
    there = memory_of(machine)
    if needed > there:
        return f'it takes {needed / 1e9:.1f} GB, and there are {there / 1e9:.1f}'
    return ''


def memory_of(machine: Machine) -> int:
    """Bytes of memory of the GPU, or of the computer for each of its processes."""
    if machine.type == 'cuda':
        return torch.cuda.get_device_properties(machine.device).total_memory
    return psutil.virtual_memory().total // int(os.environ.get('LOCAL_WORLD_SIZE', 1))


def dry_run_report(
    train_step: Callable,
    model: GPT,
    settings: dict,
    tokens_per_step: int,
    max_iters: int,
    opts: list[torch.optim.Optimizer],
    machine: Machine,
) -> str:
    """What a run will take here, told from two real steps, and on world_size such machines."""
    for step in (0, 1):  # the first one warms up
        began = time.perf_counter()
        train_step(step, 0.0)
        machine.synchronize()
    seconds = time.perf_counter() - began
    tokens = max_iters * tokens_per_step
    n_params = model.get_num_params(non_embedding=False)
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    held = sum(p.nbytes for p in model.parameters()) + gradients + optimizers.state_bytes(opts)
    peak = machine.peak_memory()
    lines = [
        f'parameters: {n_params:,}',
        f'tokens: {tokens:,}',
        f'FLOPs: {6 * n_params * tokens:.3g} (6ND)',
        f'memory: {peak / 1e9:.2f} GB at the peak, of which weights, gradients and optimizer '
        f'state are {held / 1e9:.2f} GB',
        f'time: {seconds:.2f} s a step, {seconds * max_iters / 3600:.2f} hours in all '
        f'({tokens_per_step / seconds:,.0f} tokens/s)',
    ]
    n = settings['world_size']
    if n:
        computing = seconds * machine.world_size / n  # each has its share of the rows
        name, link = link_of(machine)
        sending = bytes_sent(n_params, settings, n, settings['parallel'].upper()) / link
        cost = (max_iters, tokens_per_step, n, settings['price_per_hour'])
        speed, hours, days, price = time_and_price(computing + sending, *cost)
        lines.append(
            f'{n} x {name}, from the step measured here: {computing:.2f} s a step, and '
            f'{sending:.2f} s for gradients on links of {link / 1e9:g} GB/s; {speed} tokens/s, '
            f'{hours} hours or {days} days, price {price}'
        )
    return '\n'.join(lines)


def link_of(machine: Machine) -> tuple[str, float]:
    """What this machine is called, and bytes a second from it to another of its kind."""
    name = torch.cuda.get_device_name(machine.device) if machine.type == 'cuda' else machine.device
    for known, (_, link) in GPUS.items():
        if known in name:
            return name, link
    return name, NETWORK
