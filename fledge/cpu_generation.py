"""Generation on a CPU: the parts of a model whose weights no longer change.

cpu.speed_up(model, packed=True) makes a plain GPT's parts into these classes.
"""

import torch
import torch.nn as nn
from torch.nn import functional as F

import encoder_decoder
import model as plain


class GPT(plain.GPT):
    def forward(self, idx, targets=None, return_logits=True, cache=None, *args, **kwargs):
        logits, loss = super().forward(idx, targets, return_logits, cache, *args, **kwargs)
        if cache is not None and idx.numel() == 1 and not logits.isfinite().all():
            # beyond float16's 65,504: this token again, and all that follow, in bfloat16
            for module in self.modules():
                if type(module) is PackedLinear:
                    module.fits_float16 = False
            cache.rewind(1)
            logits, loss = super().forward(idx, targets, return_logits, cache, *args, **kwargs)
        return logits, loss

    def embed(self, idx, positions):
        x = super().embed(idx, positions)
        if idx.shape[1] == 1 and x.dtype == torch.bfloat16:
            return x.float()  # one token is little to move, and conversions take time
        return x

    def make_cache(self, batch_size, length):
        # of float32: attention of one query takes 116 us, in bfloat16 634 (16 texts, 12 heads)
        return KVCache(self.config, batch_size, length)


class EncoderDecoder(encoder_decoder.EncoderDecoder, GPT):
    def encode(self, *source):
        found = super().encode(*source)
        found.keys, found.values = found.keys.float(), found.values.float()  # as the KVCache is
        return found


class KVCache(plain.KVCache):
    """A KVCache that is read no further than its longest row, and written by slices."""

    def __init__(self, config, batch_size, length=None):
        super().__init__(config, batch_size, length)
        self.longest = 0  # tokens of the longest row
        self.even = True  # all rows are as long

    def place(self, T):
        keys = torch.arange(self.longest + T)
        positions = self.lengths[:, None] + keys[:T]
        if self.even:
            positions = keys[None, self.longest :]
        if self.empty or (self.even and T == 1):
            return positions, None
        return positions, keys <= positions[:, None, :, None]

    def write(self, layer, k, v, positions):
        end = self.longest + k.shape[2]
        if self.even:
            self.keys[layer][:, :, self.longest : end] = k
            self.values[layer][:, :, self.longest : end] = v
        else:
            super().write(layer, k, v, positions)
        if self.empty:
            return k, v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, T, lengths=None):
        super().advance(T, lengths)
        self.longest += T
        if lengths is not None:
            self.longest = int(self.lengths.max())
            self.even = int(self.lengths.min()) == self.longest

    def rows(self, first, last):
        part = super().rows(first, last)
        part.longest = int(part.lengths.max())
        part.even = int(part.lengths.min()) == part.longest
        return part

    def rewind(self, T):
        """Forget the last T tokens of each row."""
        self.lengths -= T
        self.longest -= T


# Parts of a decode step, in which calling a module takes as long as what it does: they are called
# without nn.Module's way there, and without its hooks.


class PackedLinear(nn.Linear):
    """A layer whose bfloat16 weight is copied into the layouts that a decode step reads fastest.

    As it is, it is read at 25 GB/s, in oneDNN's layout at 38, in float16 at 43, but that for a
    single row of input alone. Each copy is made at its first use.
    """

    in_float16 = in_mkldnn = None
    fits_float16 = True  # False: an activation was found to be too large for it

    def __call__(self, x):
        if x.dtype != torch.float32 or self.weight.dtype != torch.bfloat16:
            return F.linear(x, self.weight, self.bias)
        if x.numel() == self.in_features and self.fits_float16:
            if self.in_float16 is None:
                bias = None if self.bias is None else self.bias.half()
                self.in_float16 = self.weight.half(), bias
            return F.linear(x.half(), *self.in_float16).float()
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return F.linear(x.bfloat16(), self.weight, self.bias).float()
        if self.in_mkldnn is None:
            self.in_mkldnn = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), 16)
        packed = self.in_mkldnn, self.bias, 'none', [], ''
        return torch.ops.mkldnn._linear_pointwise(x.bfloat16(), *packed).float()


class PackedLayerNorm(nn.LayerNorm):
    __call__ = nn.LayerNorm.forward


class PackedRMSNorm(plain.RMSNorm):
    __call__ = plain.RMSNorm.forward


class NoDropout(nn.Dropout):
    def __call__(self, x):
        return x
