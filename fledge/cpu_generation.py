"""Generation on a CPU: the parts of a model whose weights no longer change.

cpu.speed_up(model, packed=True) makes a plain GPT's parts into these classes.
"""

import math
import warnings
from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

import encoder_decoder
import model as plain


class GPT(plain.GPT):
    """A GPT that records a step of one text, and goes on by the record.

    A record is the operations of the plain forward pass, without the Python between them: in a
    small model that is a third of a step. It is made once RECORD_AFTER steps have been taken, as it
    takes as long as it saves in about as many, and by no model that may do more than it did then:
    whose forward pass is edited, or has hooks.
    """

    RECORD_AFTER = 100
    has_plain_cache = can_record = False  # cpu.speed_up sets them
    recorded, n_steps = None, 0
    recorded_weights = None  # where they were in memory, and how often they had been written to

    def __getstate__(self):
        return vars(self) | dict(recorded=None, n_steps=0)  # a record cannot be copied

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        return_logits: bool = True,
        cache: plain.KVCache | None = None,
        *args,
        **kwargs,
    ) -> tuple[Tensor | None, Tensor | None]:
        is_step = idx.numel() == 1 and targets is None
        if is_step and isinstance(cache, KVCache) and cache.can_record and not cache.empty:
            self.n_steps += 1
            if self.n_steps == self.RECORD_AFTER:
                self.recorded = self.record(cache)
            if self.recorded is not None:
                with torch.jit.optimized_execution(False):  # it takes longer than it saves
                    logits = self.recorded(*inputs_of_step(idx, cache))
                cache.advance(1)
                return logits, None
        return super().forward(idx, targets, return_logits, cache, *args, **kwargs)

    @torch.no_grad()
    def record(self, cache: 'KVCache') -> Callable:
        """A function of inputs_of_step() that returns the logits (1, 1, vocab_size)."""
        self.requires_grad_(False)  # what a record holds has no gradient
        forward, n_layer = super().forward, self.config.n_layer

        class Step(nn.Module):
            def forward(self, idx, position, *keys_and_values):
                keys, values = keys_and_values[:n_layer], keys_and_values[n_layer:]
                return forward(idx, cache=StepCache(position, keys, values))[0]

        step = Step()
        for number, module in enumerate(self.modules()):
            for value in vars(module).values():
                if isinstance(value, torch.ScriptObject):  # a record takes its own module's alone
                    setattr(step, f'weight_{number}', value)
        inputs = inputs_of_step(torch.zeros(1, 1, dtype=torch.long), cache)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # it is deprecated, and shapes are the same each time
            return torch.jit.trace(step, inputs, check_trace=False).forward

    def embed(self, idx: Tensor, positions: Tensor) -> Tensor:
        x = super().embed(idx, positions)
        if idx.shape[1] == 1 and x.dtype == torch.bfloat16:
            return x.float()  # one token is little to move, and conversions take time
        return x

    def make_cache(self, batch_size: int, length: int) -> plain.KVCache:
        if self.has_plain_cache:
            return super().make_cache(batch_size, length)
        # of float32: attention of one query takes 116 us, in bfloat16 634 (16 texts, 12 heads)
        cache = KVCache(self.config, batch_size, length)
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in self.modules())
        cache.can_record = self.can_record and not hooked
        weights = [(w.data_ptr(), w._version) for w in (*self.parameters(), *self.buffers())]
        if weights != self.recorded_weights:  # a record holds copies of some
            self.recorded, self.n_steps, self.recorded_weights = None, 0, weights
        return cache


class EncoderDecoder(encoder_decoder.EncoderDecoder, GPT):
    def encode(self, *source) -> encoder_decoder.Source:
        found = super().encode(*source)
        found.keys, found.values = found.keys.float(), found.values.float()  # as the KVCache is
        return found


class StepCache:
    """What a recorded step has for a KVCache: the keys and values up to its own token's."""

    def __init__(self, position: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...]):
        self.position, self.keys, self.values = position, keys, values

    def place(self, T: int) -> tuple[Tensor, None]:
        return self.position, None

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[layer][:, :, -1:] = k
        self.values[layer][:, :, -1:] = v
        return self.keys[layer], self.values[layer]

    def advance(self, T: int, lengths: Tensor | None = None) -> None:
        pass


def inputs_of_step(idx: Tensor, cache: 'KVCache') -> tuple[Tensor, ...]:
    """The token, its position, keys and values of all layers with room for its own."""
    end = cache.longest + 1
    keys_and_values = [tensor[:, :, :end] for tensor in (*cache.keys, *cache.values)]
    return idx, cache.lengths[:, None], *keys_and_values


class KVCache(plain.KVCache):
    """A KVCache that is read no further than its longest row, and written by slices."""

    can_record = False

    def __init__(self, config: plain.GPTConfig, batch_size: int, length: int | None = None):
        super().__init__(config, batch_size, length)
        self.longest = 0  # tokens of the longest row
        self.even = True  # all rows are as long

    def place(self, T: int) -> tuple[Tensor, Tensor | None]:
        keys = torch.arange(self.longest + T)
        positions = self.lengths[:, None] + keys[:T]
        if self.even:
            positions = keys[None, self.longest :]
        if self.empty or (self.even and T == 1):
            return positions, None
        return positions, keys <= positions[:, None, :, None]

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        end = self.longest + k.shape[2]
        if self.even:
            self.keys[layer][:, :, self.longest : end] = k
            self.values[layer][:, :, self.longest : end] = v
        else:
            super().write(layer, k, v, positions)
        if self.empty:
            return k, v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, T: int, lengths: Tensor | None = None) -> None:
        super().advance(T, lengths)
        if lengths is None:
            self.longest += T
        else:
            self.measure()

    def rows(self, first: int, last: int) -> 'KVCache':
        part = super().rows(first, last)
        part.measure()
        return part

    def measure(self) -> None:
        """Find out what the lengths say about longest and even."""
        self.longest = int(self.lengths.max())
        self.even = int(self.lengths.min()) == self.longest


# Parts of a decode step, in which calling a module takes as long as what it does: they are called
# without nn.Module's way there, and without its hooks.


class PackedLinear(nn.Linear):
    """A layer whose weight is copied into the layouts that a decode step reads fastest.

    For few rows of input that is FBGEMM's float16, which is half of float32 and is multiplied by
    the input as it is, in float32. For more of them it is oneDNN's bfloat16. Each copy is made at
    its first use, and stays beside the weight, which longer inputs are multiplied by.
    """

    few_rows = 0  # of input, that are fastest in float16
    in_float16 = in_onednn = None

    def __call__(self, x):
        if x.dtype != torch.float32:
            return F.linear(x, self.weight, self.bias)
        if x.numel() <= self.few_rows * self.in_features:
            if self.in_float16 is None:
                self.in_float16 = pack_float16(self.weight, self.bias)
            if isinstance(self.in_float16, tuple):
                return torch.fbgemm_linear_fp16_weight_fp32_activation(x, *self.in_float16)
            if self.in_float16 is not None:
                return torch.ops.quantized.linear_dynamic_fp16(x, self.in_float16)
            self.few_rows = 0
        if self.weight.dtype == torch.float32:
            return F.linear(x, self.weight, self.bias)
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return F.linear(x.bfloat16(), self.weight, self.bias).float()
        if self.in_onednn is None:
            self.in_onednn = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), 16)
        packed = self.in_onednn, self.bias, 'none', [], ''
        return torch.ops.mkldnn._linear_pointwise(x.bfloat16(), *packed).float()


SHARED = 1 << 19  # elements of a weight for which a second thread is worth its 12 us


def pack_float16(weight: Tensor, bias: Tensor | None) -> object:
    """A weight and a bias as FBGEMM takes them; None where float16 does not hold the weight.

    A pair for the product by one thread, or one object for that by all.
    """
    weight = weight.detach().float()
    bias = None if bias is None else bias.detach().float()
    error = (weight - weight.half()).abs().max()
    if not error <= weight.abs().max() / 1024:  # some are beyond 65,504, or all are tiny
        return None
    if torch.get_num_threads() > 1 and weight.numel() >= SHARED:
        return torch.ops.quantized.linear_prepack_fp16(weight, bias)
    warnings.filterwarnings('ignore', message='fbgemm_', category=UserWarning)  # it is deprecated
    return torch.fbgemm_pack_gemm_matrix_fp16(weight), bias


class PackedLayerNorm(nn.LayerNorm):
    __call__ = nn.LayerNorm.forward


class PackedRMSNorm(plain.RMSNorm):
    """The norm in four calls, where torch's kernel makes nine."""

    scaled_weight = None

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return super().forward(x)
        if self.scaled_weight is None:
            n = self.weight.numel()
            self.scaled_weight = self.weight.detach() * math.sqrt(n)
            self.shortest = torch.tensor(math.sqrt(n * self.eps))
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x * self.scaled_weight).div_(torch.hypot(length, self.shortest))

    __call__ = forward


class NoDropout(nn.Dropout):
    def __call__(self, x):
        return x
