"""Which device and precision to compute in, and how fast this machine multiplies matrices."""

import ctypes
import math
import time

import torch

from fledge import UserError

# Dense FLOP/s of 16-bit matmuls with float32 accumulation, from the vendors' data sheets.
DATA_SHEETS = {
    'B200': 2250e12,
    'H200': 989e12,
    'H100 PCIe': 756e12,
    'H100': 989e12,
    'A100': 312e12,
    'L40S': 362e12,
    'L40': 181e12,
    'L4': 121e12,
    'A10': 125e12,
    'V100': 125e12,
    'T4': 65e12,
    'RTX 5090': 210e12,
    'RTX 4090': 165e12,
    'RTX 3090': 71e12,
    'RTX 3060': 25.5e12,
}


def choose_device(device, index=0):
    """'auto' is cuda, else mps, else cpu, and 'cuda' is GPU number index; what is asked for is tried (UserError where it cannot be used)."""
    if device == 'auto':
        return (
            f'cuda:{index}'
            if torch.cuda.is_available()
            else 'mps'
            if torch.backends.mps.is_available()
            else 'cpu'
        )
    device = f'cuda:{index}' if device == 'cuda' else device
    try:
        torch.empty(1, device=device).item()  # which the meta device has not
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as e:
        raise UserError(
            f'device={device!r} cannot be used here ({str(e).partition(chr(10))[0]}); --device=cpu always can'
        ) from None
    return device


def choose_dtype(dtype, device):
    """'auto' is bfloat16 where the hardware computes in it, float16 on older GPUs, float32 elsewhere; returns a torch.dtype."""
    kind = device.split(':')[0]
    if dtype not in ('auto', 'float32', 'bfloat16', 'float16'):
        raise UserError(f'dtype={dtype!r} is none of auto, float32, bfloat16, float16')
    if kind == 'cpu' and dtype == 'float16':
        return torch.float32  # nanoGPT's default where there is no GPU, which its CPU runs ignore
    if dtype != 'auto':
        return getattr(torch, dtype)
    if kind == 'cuda':
        return (
            torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
        )
    if kind == 'cpu' and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    ):
        return torch.bfloat16
    return torch.float32


def autocast_to(dtype, device):
    """The context in which a forward pass computes in dtype; float32 is left as it is."""
    return torch.autocast(device.split(':')[0], dtype, enabled=dtype != torch.float32)


def keep_memory():
    """Have glibc keep what it frees, so that a step on a CPU does not get its memory from the system, page by page, anew.

    Measured on a 70M model, 2 x 1,024 tokens: 830 tokens/s become 1,360. Elsewhere than on glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):
        return
    for parameter, value in (
        (-4, 0),
        (-1, -1),
        (-2, 64 << 20),
    ):  # M_MMAP_MAX, M_TRIM_THRESHOLD (never), M_TOP_PAD
        mallopt(parameter, value)


def peak_flops(device, dtype):
    """Dense matmul FLOP/s: the data sheet's where the GPU is known, else measured here (a tenth of a second)."""
    if device.startswith('cuda') and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for known, peak in DATA_SHEETS.items():
            if known in name:
                return peak
    n, best = 1024 if device == 'cpu' else 4096, math.inf
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    for _ in range(20):
        t = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for an accelerator
        best = min(best, time.perf_counter() - t)
    return 2 * n**3 / best


def read_bandwidth(device):
    """Bytes a second that a sum over a gigabyte reads, the best of five."""
    x, best = (
        torch.ones(1 << 28, device=device),
        math.inf,
    )  # zeros would be one page of memory, read over and over
    for _ in range(5):
        t = time.perf_counter()
        x.sum().item()
        best = min(best, time.perf_counter() - t)
    return x.numel() * 4 / best
