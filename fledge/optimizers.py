"""AdamW and Muon over the right parameters, and the learning rate of each step."""

import itertools
import math
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from fledge import UserError
from fledge.device import is_sharded, sharded_as
from model import GPT

# The learning rate where none is given, by optimizer (all that make_optimizers makes) and by what
# learns.
RATES = {
    ('muon', 'new weights'): 1.5e-2,
    ('muon', 'weights'): 2e-3,
    ('muon', 'adapters'): 1e-3,
    ('adamw', 'new weights'): 1e-3,
    ('adamw', 'weights'): 1e-4,
    ('adamw', 'adapters'): 1e-3,
}
# what learning_rate_at knows; run.without_effect says which settings some of them leave idle
SCHEDULES = ('linear', 'cosine', 'wsd', 'noam')


def orthogonalize(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest (semi-)orthogonal matrices, roughly, of matrices x (n, rows, columns).

    Five Newton-Schulz iterations in dtype (Jordan et al. 2024, kellerjordan.github.io/posts/muon).
    """
    x = x.to(dtype)
    is_wide = x.shape[1] <= x.shape[2]
    wide = x if is_wide else x.mT
    wide = wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp(min=1e-7)
    is_exact = dtype == torch.float32 and x.device.type == 'cpu'  # a GPU rounds products to TF32
    if is_exact and wide.shape[2] >= 2 * wide.shape[1]:
        wide = iterate_on_gram(wide)
    else:
        for _ in range(5):
            gram = wide @ wide.mT
            polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
            wide = torch.baddbmm(wide, polynomial, wide, beta=3.4445)
    return wide if is_wide else wide.mT


def iterate_on_gram(wide: Tensor) -> Tensor:
    """The same of much wider matrices, in half the time: all is done on the small square ones.

    Each iteration multiplies by a polynomial of the gram matrix, and these commute. In 16 bits it
    would not be stable (dao-lab.ai/blog/2026/gram-newton-schulz, which names the idea).
    """
    gram = wide @ wide.mT
    product = None  # of all polynomials
    for i in range(5):
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        polynomial.diagonal(dim1=1, dim2=2).add_(3.4445)
        product = polynomial if i == 0 else polynomial @ product
        if i < 4:
            gram = polynomial @ gram @ polynomial
    return product @ wide


def orthogonalize_stacked(x: Tensor, dtype: torch.dtype, stacked: list[int]) -> Tensor:
    """orthogonalize where each of x (n, rows, columns) is matrices of `stacked` rows, in order.

    Rows behind them are padding, and come back as 0. One product makes queries, keys and values,
    and another gate and up, but each has a task of its own, and learns sooner with an orthogonal
    update of its own.
    """
    done, first = torch.zeros_like(x, dtype=dtype), 0
    for n_rows, neighbours in itertools.groupby(stacked):  # those of one size go together
        rows = slice(first, first + n_rows * len(list(neighbours)))
        parts = x[:, rows].reshape(-1, n_rows, x.shape[2])
        done[:, rows] = orthogonalize(parts, dtype).reshape_as(done[:, rows])
        first = rows.stop
    return done


def orthogonalize_together(
    x: Tensor, dtype: torch.dtype, stacked: list[int], in_parts: bool
) -> Tensor:
    """orthogonalize_stacked by several processes, each of which has as many of x to do.

    x: (n, rows, columns), the same in all processes, or in_parts: of sharded matrices the rows that
    this process has. Returns x's shape.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size == 1:
        return orthogonalize_stacked(x, dtype, stacked)
    n, own_rows, n_columns = x.shape
    n_each = math.ceil(n / world_size)
    n_more = world_size * n_each - n
    if not in_parts:
        x = F.pad(x.to(dtype), (0, 0, 0, 0, 0, n_more))  # with zeros, which stay zeros
        done = torch.empty_like(x)
        own = orthogonalize_stacked(x.split(n_each)[dist.get_rank()], dtype, stacked)
        dist.all_gather_single(done, own.contiguous())
        return done[:n]
    height = math.ceil(sum(stacked) / world_size)  # of a shard; the last ones may have fewer
    x = F.pad(x.to(dtype), (0, 0, 0, height - own_rows, 0, n_more))
    exchanged = torch.empty_like(x)
    dist.all_to_all_single(exchanged, x)
    shards = exchanged.view(world_size, n_each, height, n_columns)
    whole = shards.transpose(0, 1).flatten(1, 2)  # (n_each, rows and padding, columns)
    own = orthogonalize_stacked(whole, dtype, stacked)
    shards = own.view(n_each, world_size, height, n_columns).transpose(0, 1)
    dist.all_to_all_single(exchanged, shards.contiguous())
    return exchanged.view(-1, height, n_columns)[:n, :own_rows]


def own_part(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process has, in the same memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) whose updates are evened out as NorMuon's (Li et al. 2025).

    An orthogonalized matrix has rows of different lengths where it has more of them than columns,
    and else columns. Each is divided by its mean length over the last steps (arXiv:2510.05491).
    Small matrices of one shape go together, in half the time. Several processes divide the matrices
    among them. dtype: in which they are orthogonalized, device.Machine's muon_dtype. stacked: the
    rows of each of the matrices that a parameter holds one upon another, for those that do.
    """

    TOGETHER = 1 << 22  # elements: larger matrices gain nothing, and copies of them take memory
    MOMENTUM = 0.9  # of the gradients, and of the squares of lengths

    def __init__(
        self,
        parameters: list[nn.Parameter],
        lr: float,
        weight_decay: float,
        dtype: torch.dtype,
        stacked: dict[nn.Parameter, list[int]],
    ):
        super().__init__(parameters, dict(lr=lr, weight_decay=weight_decay))
        self.dtype = dtype
        self.stacked = stacked

    @torch.no_grad()
    def step(self) -> None:
        """Update all parameters that have a gradient."""
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        for group in self.param_groups:
            by_shape = {}
            for p in group['params']:
                if p.grad is not None:
                    stacked = self.stacked.get(p, [len(p)])
                    by_shape.setdefault((p.shape, *stacked), []).append(p)
            for (shape, *stacked), parameters in by_shape.items():
                n = world_size * max(1, self.TOGETHER // shape.numel())
                for first in range(0, len(parameters), n):
                    self.update(parameters[first : first + n], stacked, group)

    def update(self, parameters: list[nn.Parameter], stacked: list[int], group: dict) -> None:
        """Update some parameters of one shape, each of which holds matrices of `stacked` rows."""
        for p in parameters:
            if not self.state[p]:
                self.state[p]['momentum_buffer'] = torch.zeros_like(p)
        momenta = [own_part(self.state[p]['momentum_buffer']) for p in parameters]
        gradients = [own_part(p.grad) for p in parameters]
        weights = [own_part(p) for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - self.MOMENTUM)
        nesterov = torch.stack(gradients).lerp_(torch.stack(momenta), self.MOMENTUM)
        rows, columns = parameters[0].shape
        in_parts = is_sharded(parameters[0])
        directions = orthogonalize_together(nesterov, self.dtype, stacked, in_parts)
        directions = self.evened_out(directions.to(weights[0].dtype), parameters)
        torch._foreach_mul_(weights, 1 - group['lr'] * group['weight_decay'])
        scale = max(1, rows / columns) ** 0.5
        torch._foreach_add_(weights, directions.unbind(), alpha=-group['lr'] * scale)

    def evened_out(self, directions: Tensor, parameters: list[nn.Parameter]) -> Tensor:
        """directions (n, own rows, columns) with each row, or column, brought to one length."""
        rows, columns = parameters[0].shape
        squares = directions.square()
        if rows >= columns:
            squares = squares.sum(2, keepdim=True)
        else:
            squares = squares.sum(1, keepdim=True)
            if is_sharded(parameters[0]):
                dist.all_reduce(squares)
        for p, new in zip(parameters, squares, strict=True):
            if 'mean_squares' not in self.state[p]:
                mean = torch.zeros_like(p[:, :1]) if rows >= columns else torch.zeros_like(new)
                own_part(mean).copy_(new)
                self.state[p]['mean_squares'] = mean
        means = [own_part(self.state[p]['mean_squares']) for p in parameters]
        torch._foreach_lerp_(means, squares.unbind(), 1 - self.MOMENTUM)
        usual = min(rows, columns) / max(rows, columns)  # of an orthogonal matrix, in the mean
        return directions * (usual / torch.stack(means).clamp(min=1e-10)).sqrt()


def trained_by(start: dict) -> str:
    """The optimizer that made the weights of a loaded checkpoint, before any fine-tuning."""
    return start.get('trained_by') or start['config'].get('optimizer', 'adamw')


def choose(settings: dict, start: dict | None) -> tuple[str, float, str]:
    """Settle what the settings leave open ('auto'), in place: the optimizer and learning_rate.

    start: the checkpoint that training begins from, or None. Muon serves the models that it trained
    from scratch; on weights that Adam trained it loses (arXiv:2605.10468), and adapters are trained
    by AdamW everywhere. Returns both, and why that optimizer was taken, '' where it was given.
    """
    optimizer, rate, lora_rank = (settings[n] for n in ('optimizer', 'learning_rate', 'lora_rank'))
    why = ''
    if optimizer == 'auto':
        optimizer, why = 'muon', 'the weights are new'
        if start:
            optimizer = trained_by(start)
            why = f'{optimizer} trained these weights from scratch'
            if 'optimizer' not in start['config']:
                why = 'these weights come from elsewhere'
        if lora_rank:
            optimizer, why = 'adamw', 'adapters learn, the weights stay'
    if rate == 'auto':
        learns = 'adapters' if lora_rank else 'weights' if start else 'new weights'
        rate = RATES[optimizer, learns]
    settings |= dict(optimizer=optimizer, learning_rate=rate)
    return optimizer, rate, why


def make_optimizers(
    model: GPT,
    name: str,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    dtype: torch.dtype = torch.bfloat16,
) -> list[torch.optim.Optimizer]:
    """The optimizers of a model: [AdamW], [AdamW, Muon], or [Muon] where all is Muon's.

    adamw: matrices and embeddings decay, vectors do not (nanoGPT's two groups, in its order: its
    state loads). muon: the blocks' matrices go to Muon, orthogonalized in dtype; embeddings, head
    and vectors stay with AdamW, undecayed. One learning rate serves all; a parameter group may
    have an `lr_scale` by which train.py multiplies it.
    """
    fused = next(model.parameters()).device.type in ('cpu', 'cuda')
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if name == 'adamw':
        decayed = [p for _, p in named if p.dim() >= 2]
        others = [p for _, p in named if p.dim() < 2]
        groups = [
            dict(params=decayed, weight_decay=weight_decay),
            dict(params=others, weight_decay=0.0),
        ]
        return [torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)]
    if name != 'muon':
        raise UserError(f'optimizer={name!r} is none of adamw, muon')
    in_blocks = {p for block in model.blocks for p in block.parameters()}
    matrices = [p for _, p in named if p.dim() == 2 and p in in_blocks]
    others = [p for _, p in named if p.dim() != 2 or p not in in_blocks]
    muon = Muon(matrices, learning_rate, weight_decay, dtype, stacked_in(model))
    if not others:  # adapters are matrices alone
        return [muon]
    adamw = torch.optim.AdamW(others, lr=learning_rate, betas=betas, weight_decay=0.0, fused=fused)
    return [adamw, muon]


def stacked_in(model: GPT) -> dict[nn.Parameter, list[int]]:
    """{weight: rows of each of the matrices in it}, of the layers whose `stacked` says so.

    ValueError where these are not all of its rows: Muon would never move the others.
    """
    stacked = {}
    for name, layer in model.named_modules():
        if hasattr(layer, 'stacked'):
            n_rows, n_named = len(layer.weight), sum(layer.stacked)
            if n_rows != n_named:
                raise ValueError(f'{name}.stacked names {n_named} rows, its weight has {n_rows}')
            stacked[layer.weight] = layer.stacked
    return stacked


def learning_rate_at(settings: dict, step: int, position: float, end: float) -> float:
    """The learning rate of a step, counted from 0, by train.py's settings.

    It rises linearly to learning_rate at warmup_iters, and then falls to min_lr as position, which
    is step in a run that has the time for all of its steps, comes to end. noam (Vaswani et al.
    2017, arXiv:1706.03762) falls with the root of the step and has no end: min_lr is its floor. The
    paper's own height is learning_rate = (n_embd * warmup_iters) ** -0.5.
    """
    highest, lowest = settings['learning_rate'], settings['min_lr']
    warmup, schedule = settings['warmup_iters'], settings['lr_schedule']
    if not settings['decay_lr']:
        return highest
    if step < warmup:
        return highest * (step + 1) / (warmup + 1)
    if schedule == 'noam':  # without warmup as with one step of it
        return max(lowest, highest * math.sqrt(max(1, warmup) / max(1, step)))
    if position >= end:
        return lowest
    begin = max(warmup, 0.8 * end) if schedule == 'wsd' else warmup
    decayed = max(0.0, (position - begin) / (end - begin))  # 0 to 1
    share = 0.5 * (1 + math.cos(math.pi * decayed)) if schedule == 'cosine' else 1 - decayed
    return lowest + share * (highest - lowest)


def set_learning_rate(optimizers: list[torch.optim.Optimizer], learning_rate: float) -> None:
    """Give every parameter group its learning rate for the next step."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = learning_rate * group.get('lr_scale', 1.0)


def gradient_norm(model: nn.Module) -> Tensor:
    """The norm of all gradients of a model, a scalar tensor, the same in all processes."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if is_sharded(norm) else norm


def state_bytes(optimizers: list[torch.optim.Optimizer]) -> int:
    """Bytes of the state that optimizers hold after a step."""
    entries = [entry for opt in optimizers for entry in opt.state.values()]
    return sum(t.nbytes for entry in entries for t in entry.values() if torch.is_tensor(t))


def state_dict(optimizers: list[torch.optim.Optimizer]) -> dict | list[dict]:
    """What a checkpoint keeps: one optimizer's state alone, as nanoGPT's does, or a list of two."""
    states = [o.state_dict() for o in optimizers]
    return states[0] if len(states) == 1 else states


def load_state_dict(
    optimizers: list[torch.optim.Optimizer], saved: dict | list[dict] | None
) -> None:
    """Restore momenta and step counts; rates, betas and decay stay as the settings say."""
    if saved is None:
        print('the checkpoint has no optimizer state: momenta begin at zero', file=sys.stderr)
        return
    states = saved if isinstance(saved, list) else [saved]
    try:
        if len(states) != len(optimizers):
            raise ValueError(f'{len(states)} optimizers were saved, here are {len(optimizers)}')
        for optimizer, state in zip(optimizers, states, strict=True):
            _load_one(optimizer, state)
    except (ValueError, KeyError, IndexError, TypeError) as e:
        raise UserError(
            f"the checkpoint's optimizer state is another optimizer's ({e}); resume with the "
            'settings that it was saved with, or begin another run from its weights '
            '(--init_from=FILE, another --out_dir)'
        ) from None


def _load_one(optimizer, state):
    groups = []
    ours, theirs = optimizer.state_dict()['param_groups'], state['param_groups']
    if len(ours) != len(theirs):
        raise ValueError(f'{len(theirs)} parameter groups were saved, here are {len(ours)}')
    for group, saved in zip(ours, theirs, strict=True):
        groups.append(group | {'params': saved['params']})
    parameters = [p for group in optimizer.param_groups for p in group['params']]
    own = {}
    for i, entry in state['state'].items():
        own[i] = dict(entry)
        for name, tensor in entry.items():
            if torch.is_tensor(tensor) and tensor.dim():
                p = parameters[i]
                if tensor.shape not in (p.shape, (len(p), 1), (1, p.shape[-1])):
                    raise ValueError(f'the state of parameter {i} has another shape')
                if len(tensor) == len(p):  # a row alone, each process has whole
                    own[i][name] = sharded_as(tensor, p)
    optimizer.load_state_dict({'state': own, 'param_groups': groups})
