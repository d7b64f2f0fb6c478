"""Linear layers with 8-bit weights: half the bytes of bfloat16, so that generation, which reads them all for each token, takes half the time."""

import warnings

import torch
import torch.nn as nn
from torch.nn import functional as F


class Int8Linear(nn.Module):
    """A linear layer whose weight is int8 with a float32 scale a row; weight (rows, columns), round to nearest.

    On a CPU, a few rows of input (a step of generation) are rounded to 8 bits as well, by their own range, and multiplied as
    integers; more of them, or another device, multiply by the weight turned back into the input's type.
    """

    FEW = 16  # rows of input

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp(min=1e-8) / 127
        self.register_buffer('weight', (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer('scale', scale)
        self.bias = linear.bias
        self.packed = None

    def forward(self, x):
        dtype = x.dtype
        if x.device.type != 'cpu' or x.shape[:-1].numel() > self.FEW:
            weight = self.weight.to(x.dtype) * self.scale.to(x.dtype)[:, None]
            return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))
        x = x.float()
        widest = (
            x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-8) if x.shape[:-1].numel() > 1 else None
        )  # each row has its own range
        y = torch.ops.quantized.linear_dynamic(x if widest is None else x / widest, self.pack())
        y = y if widest is None else y * widest
        return (y if self.bias is None else y + self.bias).to(dtype)

    def _apply(self, fn, recurse=True):
        scale = self.scale  # stays float32 when a model is turned to bfloat16
        super()._apply(fn, recurse)
        self.scale = scale.to(self.weight.device)
        return self

    def pack(self):
        """The weight as torch's integer kernel reads it, made once."""
        key = (
            self.weight.data_ptr(),
            self.weight._version,
            self.scale.data_ptr(),
            self.scale._version,
        )
        if self.packed is None or self.packed[0] != key:
            warnings.filterwarnings(
                'ignore', message='torch.quantize_per', category=UserWarning
            )  # deprecated, and nothing as fast in its place yet
            weight = torch._make_per_channel_quantized_tensor(
                self.weight, self.scale.double(), torch.zeros(len(self.scale), dtype=torch.long), 0
            )
            self.packed = key, torch.ops.quantized.linear_prepack(weight, None)
        return self.packed[1]


def is_quantized(model):
    return any(isinstance(module, Int8Linear) for module in model.modules())


def quantize(model):
    """Turn all of a model's linear layers to int8, in place; embeddings, norms and a tied embedding's own copy stay."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))
    return model
