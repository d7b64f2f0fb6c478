"""A GPT as an ONNX graph: of any batch and length, with or without the KV cache."""

import logging
import warnings
from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor

from model import GPT


class Graph(nn.Module):
    """GPT.forward as ONNX has it: a function of the tokens, and of the cache if there is one.

    idx: (batch, T) int64; past: the keys and values of each layer in turn, (batch, n_kv_head, past,
    head_dim) float32. Returns logits (batch, T, vocab_size) and, if there was a past, keys and
    values with the new ones behind it.
    """

    def __init__(self, model: GPT):
        super().__init__()
        self.model = model

    def forward(self, idx: Tensor, past: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
        cache = AppendedCache(past) if past else None
        logits = self.model.logits(self.model.hidden(idx, cache))
        return (logits, *cache.present) if past else (logits,)


class AppendedCache:
    """What model.KVCache is to a GPT, for a graph, in which nothing is written in place."""

    def __init__(self, past: Sequence[Tensor]):
        self.past, self.present = past, []

    def place(self, T: int) -> tuple[Tensor, Tensor]:
        n_past = self.past[0].shape[2]
        keys = torch.arange(n_past + T)
        positions = keys[None, n_past:]
        return positions, keys <= positions[:, None, :, None]

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        k = torch.cat((self.past[2 * layer], k), dim=2)
        v = torch.cat((self.past[2 * layer + 1], v), dim=2)
        self.present += [k, v]
        return k, v

    def advance(self, T: int, lengths: Tensor | None) -> None:
        pass


def write(path: str, model: GPT, kv_cache: bool) -> None:
    """Write path (and, for weights beyond a protobuf's 2 GB, path.data).

    input_ids int64 (batch, length) in, logits out. kv_cache: past_key_values.0.key, ... in and
    present.0.key, ... out as well. model: a plain GPT.
    """
    import onnxruntime  # noqa: F401  torch would say that it misses another package
    import onnxscript  # noqa: F401

    c = model.config
    batch, length, past = (torch.export.Dim(name) for name in ('batch', 'length', 'past'))
    inputs = [torch.zeros(2, 5, dtype=torch.long)]
    shapes = [{0: batch, 1: length}]
    names = []
    if kv_cache:
        names = [f'{layer}.{kind}' for layer in range(c.n_layer) for kind in ('key', 'value')]
        inputs.append([torch.zeros(2, c.n_kv_head, 3, c.head_dim) for _ in names])
        shapes.append([{0: batch, 2: past} for _ in names])
    # it warns of torchvision, which is not needed
    logging.getLogger('torch.onnx').setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        program = torch.onnx.export(
            Graph(model).eval(),
            tuple(inputs),
            dynamo=True,
            verbose=False,
            dynamic_shapes=tuple(shapes),
            input_names=['input_ids', *(f'past_key_values.{name}' for name in names)],
            output_names=['logits', *(f'present.{name}' for name in names)],
        )
        n_bytes = sum(t.numel() * 4 for t in (*model.parameters(), *model.buffers()))
        program.save(path, external_data=n_bytes > 1.9e9)


def run(path: str, ids: Tensor, kv_cache: bool) -> Tensor:
    """The logits (batch, length, vocab_size) of ids (batch, length) by onnxruntime.

    With kv_cache the first token is read first, and then the rest.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    if not kv_cache:
        return torch.from_numpy(session.run(['logits'], {'input_ids': ids.numpy()})[0])
    past = {}
    for cached in session.get_inputs()[1:]:
        shape = len(ids), cached.shape[1], 0, cached.shape[3]
        past[cached.name] = torch.zeros(shape).numpy()
    logits = []
    for part in ids.split((1, ids.shape[1] - 1), dim=1):
        if part.shape[1]:
            new, *present = session.run(None, {'input_ids': part.numpy(), **past})
            logits.append(torch.from_numpy(new))
            past = dict(zip(past, present, strict=True))
    return torch.cat(logits, dim=1)
