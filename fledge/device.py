"""The device and precision that a process computes in, its place among others, and their speed.

What a machine does to a model is applied to a plain one from outside, by Machine.wrap.
"""

import contextlib
import ctypes
import datetime
import itertools
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import TracebackType

import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from fledge import UserError, cpu, usable_cores
from fledge.tokens import Batch
from model import GPT

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


class Machine:
    """What a script computes on: device (a text such as 'cuda:0'), dtype (a torch one), processes.

    rank, world_size: this process's number, and how many torchrun started. main: whether it is the
    one that speaks and writes. parallel: what processes share, the rows of a step alone ('ddp', Li
    et al. 2020, arXiv:2006.15704) or the parameters too ('fsdp', Zhao et al. 2023,
    arXiv:2304.11277). ddp_timeout: seconds that they wait for one another.
    """

    def __init__(
        self,
        device: str = 'auto',
        dtype: str = 'auto',
        backend: str = 'auto',
        parallel: str = 'ddp',
        ddp_timeout: float = 600,
    ):
        self.rank = int(os.environ.get('RANK', 0))
        self.world_size = int(os.environ.get('WORLD_SIZE', 1))
        self.main = self.rank == 0
        if self.world_size > 1 and not {'RANK', 'MASTER_ADDR'} <= os.environ.keys():
            raise UserError('WORLD_SIZE is set, and RANK is not: several processes need torchrun')
        local_rank = int(os.environ.get('LOCAL_RANK', 0))
        if self.world_size > 1 and device.startswith('cuda'):
            device = 'cuda'  # a GPU each
        self.device = choose_device(device, local_rank)
        self.type = self.device.split(':')[0]
        self.dtype = choose_dtype(dtype, self.device)
        self.muon_dtype = self.dtype
        if self.type == 'cpu' and cpu.kind() != 'AMX':
            # without AMX small products are 1.5 to 6 times slower in bfloat16 than in float32
            self.muon_dtype = torch.float32
        self.is_sharded = parallel == 'fsdp' and self.world_size > 1
        if self.is_sharded and self.dtype == torch.float16:
            raise UserError('parallel=fsdp computes in bfloat16 or float32: choose one by --dtype')
        self.compiled_hidden = None
        keep_memory()
        if self.type == 'cuda':
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision('high')  # tf32
        if self.world_size > 1:
            self.connect(backend, ddp_timeout)

    def connect(self, backend: str, ddp_timeout: float) -> None:
        """Meet the other processes."""
        if self.type == 'cpu':
            set_threads()
        if backend == 'auto' or self.type != 'cuda':
            backend = 'nccl' if self.type == 'cuda' else 'gloo'
        self.ddp_timeout = ddp_timeout
        self.is_asked_to_stop = lambda: False  # by a signal; train.py knows
        self.previous_hook = sys.excepthook
        self.store, rank, world_size = next(dist.rendezvous('env://'))
        if os.environ.get('LOCAL_WORLD_SIZE') == str(world_size):
            # torchrun's store still has the addresses of processes that were there before a restart
            attempt = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
            self.store = dist.PrefixStore(f'attempt_{attempt}', self.store)
        place = dict(store=self.store, rank=rank, world_size=world_size)
        seconds = datetime.timedelta(seconds=ddp_timeout)
        # nccl's own timeout ends a process without a word: gloo's, beside it, is to come first
        waits = 2 * seconds if backend == 'nccl' else seconds
        dist.init_process_group(backend, timeout=waits, **place)
        # numbers on the hosts are agreed on without waiting for the GPUs
        self.cpu_group = dist.new_group(backend='gloo', timeout=seconds)
        sys.excepthook = self.fail_together  # torch.distributed has put its own there

    def fail_together(self, kind: type, error: BaseException, trace: TracebackType | None) -> None:
        """sys.excepthook of one of several processes: what ends them all is said once.

        A process that fails tells the store, and says why; the others, whose connections break,
        find it told, and end without a word. Where processes were killed, or do not come along, the
        others find out which those are: all that are alive say so in the store.
        """
        broken = isinstance(error, RuntimeError) and ('gloo' in str(error) or 'NCCL' in str(error))
        with contextlib.suppress(Exception):
            if broken and (self.is_asked_to_stop() or self.store.check(['ended'])):
                os._exit(0)
        if broken:
            names = ' and '.join(map(str, self.missing_processes())) or 'of unknown number'
            why = 'is gone: it was killed, or its connection broke'
            if 'imed out' in str(error):
                why = f'did not come along in {self.ddp_timeout:g} s (ddp_timeout)'
            error = UserError(f'process {names} {why}')
        elif self.is_sharded and 'mixed torch.Tensor and DTensor' in str(error):
            error = UserError(
                'the objective reads parameters, of which parallel=fsdp gives each process a part: '
                'take --parallel=ddp'
            )
        first = str(self.rank)
        with contextlib.suppress(Exception):  # the store ends with torchrun
            first = self.store.compare_set('failed', '', first).decode()
        if first != str(self.rank):
            os._exit(1)
        self.previous_hook(type(error), error, error.__traceback__)
        sys.stderr.flush()
        os._exit(1)  # threads of torch.distributed would hold up a process that returns

    def missing_processes(self) -> list[int]:
        """The ranks of those that do not say in the store, within 2 s, that they are alive."""
        try:
            self.store.set(f'alive/{self.rank}', '')
            self.break_connections()
            ranks = range(self.world_size)
            return [rank for rank in ranks if not self.store.check([f'alive/{rank}'])]
        except Exception:  # the store is gone as well, with the machine of process 0
            return [0]

    def break_connections(self) -> None:
        """Have those that wait for this process give up, and give them 2 s to read the store."""
        # not in this thread, for it may itself wait for one that is gone
        threading.Thread(target=dist.destroy_process_group, daemon=True).start()
        time.sleep(2)

    def autocast(self) -> AbstractContextManager:
        """The context in which a forward pass computes in dtype."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.type, self.dtype)

    def move(self, batch: Batch) -> Batch:
        """A tokens.Batch of numpy arrays as one of tensors on the device."""
        moved = type(batch)()
        for name, array in batch.items():
            tensor = torch.from_numpy(array)
            if self.type == 'cuda':
                tensor = tensor.pin_memory()  # so that the copy does not wait
            moved[name] = tensor.to(self.device, non_blocking=True)
        return moved

    def wrap(
        self,
        model: GPT,
        compile: bool | str = False,
        try_out: Callable | None = None,
        say: Callable = print,
    ) -> nn.Module:
        """Make a plain model on this device what is fastest here; returns what to call.

        compile: True, False or 'auto'; with 'auto' what the compiler cannot do is done without it.
        try_out(network) makes the compiler work. The parameters keep their names; where they are
        sharded, others take their places, so that optimizers are made afterwards.
        """
        compiles = compile is True or (compile == 'auto' and self.type == 'cuda')
        if self.type == 'cpu' and not compiles:
            cpu.speed_up(model)
        if self.is_sharded:
            return self.shard(model, compiles)
        network = model.to(self.device)
        if compiles:
            try:
                network = torch.compile(model)
                try_out(network)
                self.compiled_hidden = torch.compile(model.hidden)
            except torch._dynamo.exc.TorchDynamoException as e:
                if compile is True or 'out of memory' in str(e):
                    raise
                why = str(e).strip().partition('\n')[0][:120]
                say(f'torch.compile failed ({type(e).__name__}: {why}); going on without it')
                network = model
        if self.world_size > 1:  # buffers are the same everywhere
            devices = [self.device] if self.type == 'cuda' else None
            network = DistributedDataParallel(
                network, devices, forward_sync_buffers=False, gradient_as_bucket_view=True
            )
            network.config = model.config  # which an objective may read
        return network

    def shard(self, model: GPT, compiles: bool) -> GPT:
        """Leave each process a part of every parameter of a model, in place; returns the model.

        A block's are gathered while it computes, in dtype. One block at a time goes to the device,
        which never holds a whole model. UserError for weights of few bits.
        """
        # it takes half a second, which no other run and no other script should wait for
        from torch.distributed.fsdp import (
            MixedPrecisionPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        if any(not p.is_floating_point() for p in model.parameters()):
            raise UserError('parallel=fsdp cannot share out weights of 4 or 8 bits: take ddp')
        mesh = dist.init_device_mesh(self.type, (self.world_size,))
        policy = MixedPrecisionPolicy()
        if self.dtype != torch.float32:
            policy = MixedPrecisionPolicy(self.dtype, reduce_dtype=torch.float32)
        for block in model.blocks:
            if compiles:
                block.forward = torch.compile(block.forward)
            if block.cross_attn is not None:  # which reads the source before its block computes
                fully_shard(block.cross_attn, mesh=mesh, mp_policy=policy)
                register_fsdp_forward_method(block.cross_attn, 'read')
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        for name in ('hidden', 'generate'):  # which are called from elsewhere than forward
            register_fsdp_forward_method(model, name)
        return model

    def set_gradient_sync(self, network: nn.Module, is_due: bool) -> None:
        """Whether the next backward pass averages the gradients of all processes."""
        if self.is_sharded:
            network.set_requires_gradient_sync(is_due)
        elif self.world_size > 1:
            network.require_backward_grad_sync = is_due

    def whole(self, state: object) -> object:
        """A state dict, or lists and dicts of such, with each sharded tensor whole on the CPU.

        All processes call it; the first one has it then, the others have None for such tensors.
        """
        if isinstance(state, dict):
            return {name: self.whole(value) for name, value in state.items()}
        if isinstance(state, list):
            return [self.whole(value) for value in state]
        if not is_sharded(state):
            return state
        tensor = state.full_tensor()  # gathered one by one
        return tensor.cpu() if self.main else None

    def hidden(self, model: GPT) -> Callable:
        """model.hidden, compiled where the model that trains is."""
        return self.compiled_hidden or model.hidden

    def share(self, n_rows: int) -> int:
        """How many of a step's rows are this process's; UserError where they do not divide."""
        if n_rows % self.world_size:
            raise UserError(
                f'{n_rows} rows a step (gradient_accumulation_steps x batch_size) do not divide '
                f'among {self.world_size} processes'
            )
        return n_rows // self.world_size

    def batches(
        self, rows: Sequence, batch_size: int, what: str | None = None
    ) -> Iterator[Sequence]:
        """This process's share of rows, in batches of batch_size; what: a bar on a terminal says.

        They are as alike in size as can be.
        """
        n_batches = math.ceil(len(rows) / batch_size)
        if self.is_sharded:  # as many batches each, for a forward pass is of all
            if len(rows) < self.world_size:
                raise UserError(
                    f'parallel=fsdp evaluates a row in each process at least, and {len(rows)} are '
                    f'fewer than {self.world_size}'
                )
            n_each = math.ceil(n_batches / self.world_size)
            n_each = min(n_each, len(rows) // self.world_size)  # a batch may have a row more then
            n_batches = n_each * self.world_size
        bounds = [len(rows) * i // n_batches for i in range(n_batches + 1)]
        mine = list(itertools.pairwise(bounds))[self.rank :: self.world_size]
        hidden = None if self.main else True  # None: unless the output is a terminal
        for start, end in tqdm(mine, what, unit='batch', leave=False, disable=hidden):
            yield rows[start:end]

    def gather(self, value: object) -> list:
        """The values of all processes: numbers, or dicts of them."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, self.cpu_group)
        return values

    def largest(self, numbers: list[float]) -> list[float]:
        """The largest over all processes of each of some numbers."""
        tensor = torch.tensor(numbers, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, self.cpu_group)
        return tensor.tolist()

    def agree(self, what: str, value: object) -> None:
        """UserError where a process's value is not the first one's; what: it is, in words."""
        first, *others = self.gather(value)
        for rank, other in enumerate(others, 1):
            if other != first:
                self.leave()  # together, for all of them know
                raise UserError(f'process {rank} has another {what} than process 0')

    def mean(self, tensor: torch.Tensor) -> float | list[float]:
        """The mean of a tensor over all processes, as a number, or a list of them."""
        if self.type == 'cuda':
            self.wait_for_all()  # gloo names a process that does not come along, and nccl does not
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return (tensor / self.world_size).tolist()

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.type == 'cuda':
            torch.cuda.synchronize()
        elif self.type == 'mps':
            torch.mps.synchronize()

    def wait_for_all(self) -> None:
        """Wait until every process is here."""
        if self.world_size > 1:
            dist.barrier(self.cpu_group)

    def leave(self) -> None:
        """End together: no process hangs up while another still speaks."""
        if self.world_size > 1:
            dist.barrier(self.cpu_group)
            dist.destroy_process_group()

    def end_all(self) -> None:
        """End this process at once with exit code 0; so do the others when they find it gone."""
        if self.world_size > 1:
            self.store.set('ended', '')
            self.break_connections()  # while they can read the store, which may end with this one
        os._exit(0)

    def hardware(self) -> str:
        """The name of the GPU; else the CPU's, and the kind that torch takes it for."""
        if self.type == 'cuda':
            return torch.cuda.get_device_name(self.device)
        return f'{cpu.model_name() or "CPU"} ({cpu.kind()})'

    def peak_memory(self) -> int:
        """Bytes held at most: of the GPU, or of this process where it can be told, else 0."""
        if self.type == 'cuda':
            return torch.cuda.max_memory_allocated()
        with contextlib.suppress(OSError), open('/proc/self/status') as f:
            for line in f:
                if line.startswith('VmHWM'):
                    return int(line.split()[1]) * 1024
        with contextlib.suppress(ImportError):  # Windows has no such module
            import resource

            unit = 1 if sys.platform == 'darwin' else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return getattr(psutil.Process().memory_info(), 'peak_wset', 0)


def choose_device(device: str, index: int = 0) -> str:
    """'auto' is cuda, else mps, else cpu; 'cuda' is GPU number index. UserError where it fails."""
    if device == 'auto':
        if torch.cuda.is_available():
            return f'cuda:{index}'
        return 'mps' if torch.backends.mps.is_available() else 'cpu'
    if device == 'cuda':
        device = f'cuda:{index}'
    try:
        torch.empty(1, device=device).item()  # which the meta device has not
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as e:
        why = str(e).partition('\n')[0]
        raise UserError(
            f'device={device!r} cannot be used here ({why}); --device=cpu always can'
        ) from None
    return device


def choose_dtype(dtype: str, device: str) -> torch.dtype:
    """'auto' is what the hardware multiplies in: bfloat16, float16 (older GPUs), else float32."""
    kind = device.split(':')[0]
    if dtype not in ('auto', 'float32', 'bfloat16', 'float16'):
        raise UserError(f'dtype={dtype!r} is none of auto, float32, bfloat16, float16')
    if kind == 'cpu' and dtype == 'float16':
        return torch.float32  # nanoGPT's default where there is no GPU, which its CPU runs ignore
    if dtype != 'auto':
        return getattr(torch, dtype)
    if kind == 'cuda':
        new = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if new else torch.float16
    if kind == 'cpu' and cpu.has_bfloat16():
        return torch.bfloat16
    return torch.float32


def set_threads() -> None:
    """Give each process of torchrun on a node its share of the cores.

    torchrun itself gives them a thread each (OMP_NUM_THREADS=1) where nobody says how many.
    """
    n_here = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    if os.environ.get('OMP_NUM_THREADS') in (None, '1'):
        torch.set_num_threads(max(1, len(usable_cores()) // n_here))


def is_sharded(tensor: object) -> bool:
    """Whether something is a DTensor, of which this process has a part.

    Told by a method of it, for to import its class takes half a second.
    """
    return hasattr(tensor, 'full_tensor')


def sharded_as(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor as `like` is: where that is sharded, this process's part of it."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # each process has the whole, and takes its part without a word
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def keep_memory() -> None:
    """Have glibc keep what it frees, and Linux give it out in pages of 2 MB where it can.

    A step on a CPU then asks the system for no page anew: 830 tokens/s of a 70M model in training,
    2 x 1,024 tokens a step, become 1,360. From large pages a 124M model's weights are read in three
    quarters of the time. Elsewhere it does nothing.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt = libc.mallopt
    except (AttributeError, TypeError, OSError):
        return
    mallopt(-4, 0)  # M_MMAP_MAX
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
    mallopt(-2, 64 << 20)  # M_TOP_PAD
    # half of the machine's memory is given back at once, before any of it is in use
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = psutil.virtual_memory().total // 2
    start = libc.malloc(size)
    if start is not None:
        page = 2 << 20
        libc.madvise(math.ceil(start / page) * page, size - page, 14)  # MADV_HUGEPAGE
        libc.free(start)


def matmul_params(model: GPT) -> int:
    """Number of parameters that multiply each token: all but embeddings and vectors."""
    in_blocks = [p for block in model.blocks for p in block.parameters()]
    return model.lm_head.weight.numel() + sum(p.numel() for p in in_blocks if p.dim() == 2)


def flops_per_token(model: GPT, row_length: int) -> int:
    """FLOPs of training on a token (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).

    Of an encoder-decoder, on a token of the target and one of the source.
    """
    c = model.config
    n_attention = c.n_layer
    if c.n_encoder_layer:
        n_attention += c.n_encoder_layer + c.n_layer  # the encoder's, and cross-attention
    attention = 12 * n_attention * c.n_head * c.head_dim * row_length
    return 6 * matmul_params(model) + attention


def peak_flops(device: str, dtype: torch.dtype) -> float:
    """Dense matmul FLOP/s: a data sheet's where the GPU is known, else measured in a moment."""
    if device.startswith('cuda') and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for known, peak in DATA_SHEETS.items():
            if known in name:
                return peak
    sizes = {256: 0.02, 1024: 0.1} if device == 'cpu' else {4096: 0.1}  # and seconds
    for n, seconds in sizes.items():
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        (a @ b)[0, 0].item()  # not timed: it may load kernels, or a library
        best, end = math.inf, time.perf_counter() + seconds
        while best == math.inf or time.perf_counter() < end:
            start = time.perf_counter()
            (a @ b)[0, 0].item()  # waits for an accelerator
            best = min(best, time.perf_counter() - start)
        if best > 5e-3:  # this CPU emulates the type: the larger products would take a minute
            break
    return 2 * n**3 / best


def read_bandwidth(device: str) -> float:
    """Bytes a second that a sum over a gigabyte reads, the best of five."""
    x = torch.ones(1 << 28, device=device)  # zeros would be one page of memory, read over and over
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        x.sum().item()
        best = min(best, time.perf_counter() - start)
    return x.numel() * 4 / best
