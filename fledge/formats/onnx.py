"""A GPT as an ONNX graph: of any batch and length, with or without the KV cache as inputs and outputs."""

import logging
import warnings

import torch
import torch.nn as nn
from torch.nn import functional as F


class Graph(nn.Module):
    """GPT.forward in operations that ONNX has: without autograd functions, blocks of queries, or a cache written in place.

    idx: (batch, T) int64; past: keys and values of each layer in turn, (batch, n_kv_head, past, head_dim) float32, or none of them.
    Returns logits (batch, T, vocab_size) and, if there was a past, keys and values with the new ones behind it.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, idx, past=()):
        model, c = self.model, self.model.config
        B, T = idx.shape
        H, KV, D = c.n_head, c.n_kv_head, c.head_dim
        start = past[0].shape[2] if past else 0
        positions = torch.arange(start, start + T)
        hidden = torch.arange(start + T)[None] > positions[:, None]
        x = model.transformer.wte(idx)
        if c.position == 'learned':
            x = x + model.transformer.wpe(positions)
        else:
            cos, sin = model.rope_cos[positions][:, None], model.rope_sin[positions][:, None]
        present = []
        for layer, block in enumerate(model.transformer.h):
            attn, mlp = block.attn, block.mlp
            qkv = attn.c_attn(self.norm(block.ln_1, x)).view(B, T, H + 2 * KV, D)
            qk, v = qkv[:, :, : H + KV], qkv[:, :, H + KV :]
            if c.qk_norm:
                qk = F.rms_norm(qk, (D,), eps=c.norm_eps) * attn.qk_scale()
            if c.position == 'rope':
                qk = torch.cat((qk[..., D // 2 :], qk[..., : D // 2]), dim=-1) * sin + qk * cos
            q, k, v = qk[:, :, :H].transpose(1, 2), qk[:, :, H:].transpose(1, 2), v.transpose(1, 2)
            if past:
                k, v = (
                    torch.cat((past[2 * layer], k), dim=2),
                    torch.cat((past[2 * layer + 1], v), dim=2),
                )
                present += [k, v]
            scores = q.reshape(B, KV, H // KV, T, D) @ k[:, :, None].mT * D**-0.5
            y = scores.masked_fill(hidden, float('-inf')).softmax(dim=-1) @ v[:, :, None]
            x = x + attn.c_proj(y.reshape(B, H, T, D).transpose(1, 2).reshape(B, T, H * D))
            x = x + mlp.c_proj(mlp.activate(mlp.c_fc(self.norm(block.ln_2, x))))
        return (model.lm_head(self.norm(model.transformer.ln_f, x)), *present)

    def norm(self, ln, x):
        if self.model.config.norm == 'rmsnorm':
            return F.rms_norm(x, ln.weight.shape, ln.weight, ln.eps)
        return ln(x)


def write(path, model, kv_cache):
    """Write path (and, for weights that do not fit a protobuf's 2 GB, path.data): input_ids int64 (batch, length) in, logits out.

    With kv_cache also past_key_values.0.key, past_key_values.0.value, ... in (length 0 at first) and present.0.key, ... out.
    """
    c = model.config
    batch, length, before = (torch.export.Dim(name) for name in ('batch', 'length', 'past'))
    past = (
        [torch.zeros(2, c.n_kv_head, 3, c.head_dim) for _ in range(2 * c.n_layer)]
        if kv_cache
        else []
    )
    layers = (
        [f'{i}.{kind}' for i in range(c.n_layer) for kind in ('key', 'value')] if kv_cache else []
    )
    inputs, shapes = (
        [torch.zeros(2, 5, dtype=torch.long), past],
        [{0: batch, 1: length}, [{0: batch, 2: before} for _ in past]],
    )
    logging.getLogger('torch.onnx').setLevel(
        logging.ERROR
    )  # it warns of torchvision, which is not needed
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        program = torch.onnx.export(
            Graph(model).eval(),
            tuple(inputs[: 1 + kv_cache]),
            dynamo=True,
            verbose=False,
            dynamic_shapes=tuple(shapes[: 1 + kv_cache]),
            input_names=['input_ids', *(f'past_key_values.{name}' for name in layers)],
            output_names=['logits', *(f'present.{name}' for name in layers)],
        )
        program.model.producer_name = 'fledge'  # export.py replaces no other file
        size = sum(t.numel() * 4 for t in (*model.parameters(), *model.buffers()))
        program.save(path, external_data=size > 1.9e9)


def run(path, ids, kv_cache):
    """The logits (batch, length, vocab_size) of ids (batch, length) by onnxruntime; with kv_cache first the first token, then the rest."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    if not kv_cache:
        return torch.from_numpy(session.run(['logits'], {'input_ids': ids.numpy()})[0])
    past = {
        i.name: torch.zeros(len(ids), i.shape[1], 0, i.shape[3]).numpy()
        for i in session.get_inputs()[1:]
    }
    parts = []
    for part in (ids[:, :1], ids[:, 1:]) if ids.shape[1] > 1 else (ids,):
        out, *present = session.run(None, {'input_ids': part.numpy(), **past})
        parts, past = [*parts, torch.from_numpy(out)], dict(zip(past, present))
    return torch.cat(parts, dim=1)
