"""8- and 4-bit weights, applied to a model from outside.

8 bits are half the bytes of bfloat16, and generation, which reads all weights for each token, takes
half the time. A frozen base of either, by bitsandbytes, leaves memory for adapters to be trained
(QLoRA, Dettmers et al. 2023, arXiv:2305.14314).
"""

import logging
import warnings
from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from fledge import UserError, cpu
from model import GPT

# Without VNNI products of 8-bit numbers are summed in 16 bits, which overflow unless one has but 7.
SEVEN_BITS = not cpu.has_vnni()


def apply(model: nn.Module) -> nn.Module:
    """Give all linear layers of a model 8-bit weights, in place; returns it.

    Embeddings and norms stay as they are, and so does the embedding that was tied to the head.
    """
    replace_linear_layers(model, Int8Linear)
    return model


def replace_linear_layers(model: nn.Module, make: Callable) -> None:
    """Put make(layer) in the place of each linear layer of a model or of a part of one."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, make(child))


def is_quantized(model: nn.Module) -> bool:
    """Whether a model has the 8-bit weights of apply."""
    return any(isinstance(module, Int8Linear) for module in model.modules())


def quantize_base(model: GPT, kind: str, device: torch.device | str = 'cpu') -> GPT:
    """Freeze the linear layers of a model's blocks in few bits, in place; returns the model.

    One layer after the other goes to device and is quantized there; all else stays where it is, to
    be moved afterwards. kind: nf4 (4.1 bits a weight) or int8. Adapters may be added then, and
    layers compute in the type of their input, or autocast's. UserError for another kind,
    ModuleNotFoundError where bitsandbytes is missing.
    """
    if kind not in ('nf4', 'int8'):
        raise UserError(f'quantize_base={kind!r} is none of nf4, int8')
    # it warns of kernels that are not there, and of types that it turns into others
    logging.getLogger('bitsandbytes').setLevel(logging.ERROR)
    for block in model.blocks:
        replace_linear_layers(block, lambda linear: frozen_linear(linear, kind, device))
    return model


def frozen_linear(linear: nn.Linear, kind: str, device: torch.device | str) -> nn.Module:
    """A layer of bitsandbytes on device, made of a linear layer whose weight nobody else has."""
    from bitsandbytes import nn as bitsandbytes

    shape = linear.in_features, linear.out_features, linear.bias is not None
    weight = linear.weight.detach().cpu()  # from where bitsandbytes quantizes 8 bits alone
    if kind == 'nf4':
        types = dict(compute_dtype=torch.float32, quant_type='nf4')
        layer = bitsandbytes.Linear4bit(*shape, **types, device='meta')
        layer.weight = bitsandbytes.Params4bit(weight, quant_type='nf4')
        # else the first evaluation on some CPUs puts the weight into a layout that has no backward
        layer.support_avx512bf16_for_cpu = False
    else:
        layer = bitsandbytes.Linear8bitLt(*shape, has_fp16_weights=False, device='meta')
        layer.weight = bitsandbytes.Int8Params(weight, requires_grad=False)
    layer.bias = linear.bias
    layer.to(device).requires_grad_(False)  # here it is quantized
    layer.register_forward_pre_hook(cast_input)
    return layer


def cast_input(layer: nn.Module, inputs: tuple) -> Tensor:
    """The input in the type to compute in: autocast does not reach into bitsandbytes."""
    x = inputs[0]
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    layer.compute_dtype = x.dtype  # of Linear4bit, which would stay with its first input's
    return x


class Int8Linear(nn.Module):
    """A linear layer whose weight (rows, columns) is int8, with a float32 scale a row.

    On a CPU a few rows of input, as in a step of generation, are rounded to 8 bits as well, each by
    its own range, and multiplied as integers. More of them, or another device, multiply by the
    weight in the input's type.
    """

    FEW = 16  # rows of input

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp(min=1e-8) / 127
        self.register_buffer('weight', (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer('scale', scale)
        self.bias = linear.bias
        self.packed, self.packed_version = None, None

    def forward(self, x: Tensor) -> Tensor:
        n_rows = x.shape[:-1].numel()
        if x.device.type != 'cpu' or n_rows > self.FEW:
            weight = self.weight.to(x.dtype) * self.scale.to(x.dtype)[:, None]
            return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))
        rows = x.float()
        if n_rows == 1:
            y = torch.ops.quantized.linear_dynamic(rows, self.pack(), SEVEN_BITS)
        else:  # the product rounds all rows by one range: each is brought to the same first
            largest = rows.abs().amax(dim=-1, keepdim=True).clamp(min=1e-8)
            y = torch.ops.quantized.linear_dynamic(rows / largest, self.pack(), SEVEN_BITS)
            y = y * largest
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def pack(self) -> object:
        """The weight in the layout of torch's integer product, made again when it changes."""
        weight, scale = self.weight, self.scale
        version = weight.data_ptr(), weight._version, scale.data_ptr(), scale._version
        if self.packed_version != version:
            # torch.quantize_per_channel is deprecated, and nothing as fast has taken its place
            warnings.filterwarnings('ignore', message='torch.quantize_per', category=UserWarning)
            zeros = torch.zeros(len(scale), dtype=torch.long)
            weight = torch._make_per_channel_quantized_tensor(weight, scale.double(), zeros, 0)
            self.packed = torch.ops.quantized.linear_prepack(weight, None)
            self.packed_version = version
        return self.packed

    def _apply(self, fn, recurse=True):
        scale = self.scale  # stays float32 where a model is turned to bfloat16
        super()._apply(fn, recurse)
        self.scale = scale.to(self.weight.device)
        return self
