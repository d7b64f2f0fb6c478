"""LoRA (Hu et al. 2021, arXiv:2106.09685): beside a weight W, two thin matrices, as scale * B A.

In a checkpoint the tensors lie beside NAME.weight as NAME.lora_A (rank, columns) and NAME.lora_B
(rows, rank); config has lora_alpha, and scale is lora_alpha / rank. Where tokens were added to the
vocabulary, NAME.lora_rows (tokens, n_embd) of the embedding, and of a head that is not tied to it,
are added to the last rows of NAME.weight.
"""

import contextlib
import hashlib
import math

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from fledge import UserError
from model import GPT

LAYERS = ('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')  # of a block
CROSS_LAYERS = ('cross_attn.q_attn', 'cross_attn.c_attn', 'cross_attn.c_proj')  # in some
PARTS = ('.lora_A', '.lora_B', '.lora_rows')
EMBEDDING, HEAD = 'transformer.wte', 'lm_head'


def add(
    model: GPT,
    rank: int,
    alpha: float,
    dropout: float,
    targets: str,
    n_new_tokens: int = 0,
    saved: dict[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> GPT:
    """Freeze a GPT and give layers of its blocks adapters, in place; returns the model.

    Before the first step it computes what it did: B is zero. The adapters are float32 parameters,
    applied by hooks on layers of any class, before or after cpu.speed_up. dropout: the share of
    a layer's inputs that its adapter does not see in a training step. targets: comma-separated,
    attn (cross-attention too), mlp or names of layers. n_new_tokens: so many tokens at the end of
    the vocabulary are new, and their rows of the embedding and of the head are trained as well.
    saved: the tensors of a checkpoint's adapters, to go on with. dtype: which the model computes
    in: the blocks' weights, which stay as they are, are kept in it. UserError for targets that the
    model does not have, for a rank above their width, and for saved ones of another shape.
    """
    if saved:
        n_new_tokens = len(saved.get(f'{EMBEDDING}.lora_rows', ()))
    names = layers_of(targets)
    layers = []
    for block in model.blocks:
        for name, layer in block.named_modules():
            if name not in names:
                continue
            layers.append(layer)
            width = min(layer.in_features, layer.out_features)
            if rank > width:
                raise UserError(f'lora_rank={rank} is above the width of {name}, which is {width}')
    if not layers:
        raise UserError(f'lora_targets={targets!r}: the model has no such layers')
    model.requires_grad_(False)
    for block in model.blocks:
        for layer in block.modules():
            if isinstance(layer, nn.Linear) and layer.weight.is_floating_point():
                layer.to(dtype)
    device = model.transformer.wte.weight.device
    for layer in layers:
        a = torch.empty(rank, layer.in_features, device=device)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))  # as peft and nn.Linear begin
        layer.lora_A = nn.Parameter(a)
        layer.lora_B = nn.Parameter(torch.zeros(layer.out_features, rank, device=device))
        layer.lora_scale = alpha / rank
        layer.lora_dropout = nn.Dropout(dropout).train(layer.training)
        layer.register_forward_hook(add_update)
    if n_new_tokens:
        embedding, head = model.get_submodule(EMBEDDING), model.get_submodule(HEAD)
        zeros = torch.zeros(n_new_tokens, model.config.n_embd, device=device)
        embedding.lora_rows = nn.Parameter(zeros)
        head.lora_rows = embedding.lora_rows
        if not model.config.tie_embeddings:
            head.lora_rows = nn.Parameter(zeros.clone())
        embedding.register_forward_hook(add_to_embedding)
        head.register_forward_hook(add_to_logits)
    if saved:
        load(model, saved)
    return model


def layers_of(targets: str) -> list[str]:
    """The names of LAYERS and CROSS_LAYERS that a comma-separated text means."""
    names, known = [], (*LAYERS, *CROSS_LAYERS)
    for target in targets.split(','):
        target = target.strip()
        kinds = {target, f'cross_{target}'} if target == 'attn' else {target}
        found = [name for name in known if kinds & {name, name.partition('.')[0]}]
        if not found:
            choices = ', '.join(('attn', 'mlp', *known))
            raise UserError(f'lora_targets has {target!r}, which is none of {choices}')
        names += [name for name in found if name not in names]
    return names


def add_update(layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    """A linear layer's output (..., rows) and its adapter's, in the output's type."""
    x = layer.lora_dropout(inputs[0])
    with getattr(x, 'not_kept', contextlib.nullcontext)():  # see cpu.recomputed
        y = F.linear(x.to(output.dtype), layer.lora_A.to(output.dtype))  # (..., rank)
    y = (y * layer.lora_scale).flatten(0, -2)
    b = layer.lora_B.to(output.dtype)
    return torch.addmm(output.flatten(0, -2), y, b.T).view_as(output)  # one pass over the output


def add_to_embedding(layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    """An embedding's output (B, T, n_embd), changed where inputs (B, T) are new tokens."""
    rows = layer.lora_rows
    table = torch.cat((torch.zeros_like(rows[:1]), rows))  # row 0: of all tokens before them
    first = layer.num_embeddings - len(rows)
    return output + F.embedding((inputs[0] - first + 1).clamp(min=0), table).to(output.dtype)


def add_to_logits(layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
    """A head's logits (..., vocab_size), of which the last are of new tokens."""
    rows = layer.lora_rows.to(output.dtype)
    before, new = output.split((output.shape[-1] - len(rows), len(rows)), dim=-1)
    return torch.cat((before, new + F.linear(inputs[0].to(output.dtype), rows)), dim=-1)


def is_part(name: str) -> bool:
    """Whether a tensor of this name is an adapter's."""
    return name.endswith(PARTS)


def base_of(
    start: dict | None, settings: dict, resuming: bool
) -> tuple[dict | None, dict[str, Tensor]]:
    """What a run's adapters are trained on, as its checkpoints name it, and their saved tensors.

    start: the loaded checkpoint that training begins from, which keeps its base's tensors alone
    where a run goes on; None, {} where there are no adapters. UserError where that run had none, or
    has none any more.
    """
    if resuming and bool(settings['lora_rank']) != bool(start.get('base')):
        trains = 'adapters alone' if start.get('base') else 'all weights'
        raise UserError(f'this run trains {trains}: begin another with --init_from and --out_dir')
    if start is None or not settings['lora_rank']:
        return None, {}
    if not resuming:
        return dict(source=settings['init_from'], digest=digest(start)), {}
    start['model'], saved = split(start['model'])
    return start['base'], saved


def tensors(model: GPT) -> dict[str, Tensor]:
    """{name: tensor} of a model's adapters alone: what a checkpoint of them keeps."""
    return {name: p.detach() for name, p in model.named_parameters() if is_part(name)}


def split(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a checkpoint as two dicts: the base's, and its adapters'."""
    base = {name: tensor for name, tensor in state.items() if not is_part(name)}
    own = {name: tensor for name, tensor in state.items() if is_part(name)}
    return base, own


@torch.no_grad()
def load(model: GPT, saved: dict[str, Tensor]) -> None:
    """Put an adapter checkpoint's tensors into a model that has adapters.

    UserError unless they are of the same names and shapes.
    """
    own = tensors(model)
    for name in sorted(own.keys() ^ saved.keys()):
        where = 'the checkpoint' if name in own else 'the model'
        raise UserError(f'{where} lacks the adapter {name}: its lora_targets are others')
    for name, tensor in saved.items():
        shapes = tuple(tensor.shape), tuple(own[name].shape)
        if shapes[0] != shapes[1]:
            raise UserError(f'{name} is {shapes[0]} in the checkpoint, and {shapes[1]} here')
    for name, tensor in saved.items():
        own[name].copy_(tensor)


def merged(checkpoint: dict, path: str) -> dict[str, Tensor]:
    """A checkpoint's tensors with each adapter added to its weight; path names it in errors."""
    state, alpha = checkpoint['model'], checkpoint.get('config', {}).get('lora_alpha')
    merged = dict(state)
    for name in state:
        if not name.endswith('.lora_A'):
            continue
        base = name.removesuffix('.lora_A')
        a, b = merged.pop(name), merged.pop(f'{base}.lora_B', None)
        weight = merged.get(f'{base}.weight')
        complete = not any(part is None for part in (alpha, b, weight))
        fits = complete and (len(b), a.shape[1]) == weight.shape and b.shape[1] == len(a)
        if not fits or not weight.is_floating_point():
            raise UserError(
                f'{path}: the adapter {base} does not fit a weight, or config lacks lora_alpha'
            )
        merged[f'{base}.weight'] = weight.float() + alpha / len(a) * b.float() @ a.float()
    tied = f'{HEAD}.lora_rows' not in state
    for base in (EMBEDDING, HEAD):
        rows, weight = merged.pop(f'{base}.lora_rows', None), merged.get(f'{base}.weight')
        if rows is None:
            continue
        if weight is None or len(rows) > len(weight) or rows.shape[1:] != weight.shape[1:]:
            raise UserError(f'{path}: the new rows of {base} do not fit its weight')
        before, last = weight.float().split((len(weight) - len(rows), len(rows)))
        merged[f'{base}.weight'] = torch.cat((before, last + rows.float()))
        if tied:
            merged[f'{HEAD}.weight'] = merged[f'{base}.weight']
    return merged


def digest(checkpoint: dict) -> str:
    """A text that changes with the weights of a checkpoint, as huggingface.load returns it.

    It is the same for the same numbers, in whatever file and type they are. Adapters are taken by
    themselves, with their base's digest: merged weights differ a little from machine to machine.
    """
    state, hashed = checkpoint['model'], hashlib.blake2b(digest_size=16)
    if 'base' in checkpoint:
        _, state = split(state)
        alpha = checkpoint['config'].get('lora_alpha')
        hashed.update(f'{checkpoint["base"]["digest"]} {alpha} '.encode())
    head, embedding = state.get(f'{HEAD}.weight'), state.get(f'{EMBEDDING}.weight')
    tied = head is not None and embedding is not None and torch.equal(head, embedding)
    for name in sorted(state):
        if tied and name == f'{HEAD}.weight':  # which some files hold a second time
            continue
        tensor = state[name].float().contiguous()
        hashed.update(f'{name} {tuple(tensor.shape)} '.encode())
        hashed.update(tensor.numpy())
    return hashed.hexdigest()
