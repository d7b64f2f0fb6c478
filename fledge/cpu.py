"""What a CPU does faster. speed_up(model) makes a plain GPT's parts into the classes below.

Each is the plain class with a step of it computed in another way: parameters and their names stay,
results stay to rounding. Four things are written out a second time (the norm, attention, the
loss, the KV cache): where somebody has edited one of them in model.py, speed_up() leaves it to
model.py. The figures here were measured on two cores of an AMD EPYC with AVX512-BF16.
"""

import contextlib
import hashlib
import inspect
import math
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import encoder_decoder
import model as plain
from fledge import cpu_generation

# From this many elements on, what is cheap to compute is computed again in the backward pass.
LARGE = 1 << 20


def speed_up(model: plain.GPT, packed: bool = False) -> plain.GPT:
    """Make the parts of a GPT on a CPU what is faster there, in place; returns it.

    Set model.gradient_checkpointing before. packed: for generation alone, with weights that no
    longer change: they are copied into the layout that is read fastest.
    """
    edited = [name for name, methods in STEPS.items() if digest(methods) != AS_WRITTEN[name]]
    faster = {plain.GPT: GPT, encoder_decoder.EncoderDecoder: EncoderDecoder}
    if packed:
        faster |= {
            plain.GPT: cpu_generation.GPT,
            encoder_decoder.EncoderDecoder: cpu_generation.EncoderDecoder,
            nn.Linear: cpu_generation.PackedLinear,
            nn.LayerNorm: cpu_generation.PackedLayerNorm,
            nn.Dropout: cpu_generation.NoDropout,
        }
    else:
        faster[nn.Dropout] = Dropout
        if not model.gradient_checkpointing:  # else all is computed again anyway
            faster |= {nn.LayerNorm: LayerNorm, plain.MLP: MLP, nn.Linear: Linear}
    if 'RMSNorm.forward' not in edited:
        faster[plain.RMSNorm] = cpu_generation.PackedRMSNorm if packed else RMSNorm
    if 'CausalSelfAttention.attend' not in edited:
        faster[plain.CausalSelfAttention] = CausalSelfAttention
        faster[encoder_decoder.CrossAttention] = CrossAttention
    for module in model.modules():
        kind = type(module)
        if kind.__module__ in (__name__, cpu_generation.__name__):  # sped up before
            kind = kind.__base__
        twin = faster.get(kind, kind)
        if kind is plain.RMSNorm and module.eps is None:
            twin = kind  # torch's default is another number for each type
        # the parameters stay where they are: only the methods are another class's
        module.__class__ = twin
        if packed and kind in (nn.LayerNorm, plain.RMSNorm):
            module.float()  # as the residual stream of a decode step is
        if packed and kind is nn.Linear:
            module.few_rows = rows_in_float16(module.weight)
        if packed:  # as plain attributes: nn.Module looks these up ten times more slowly
            vars(module).update(module._parameters | module._modules)
    model.has_plain_loss = 'GPT.loss' in edited
    attentions = [getattr(block, 'attn', None) for block in model.blocks]
    # the cache here leaves out a mask that the attention here does without, and no other
    is_ours = all(type(attention) is CausalSelfAttention for attention in attentions)
    model.has_plain_cache = 'KVCache' in edited or not is_ours
    if packed:
        is_known = digest(RECORDED) == AS_RECORDED and all(map(can_be_recorded, model.modules()))
        model.can_record = is_known and model.config.n_encoder_layer == 0
    if edited:
        print(
            f'{", ".join(edited)} of model.py is edited, and runs as it is there', file=sys.stderr
        )
    return model


def has_avx512() -> bool:
    """Whether torch uses AVX512 here (ATEN_CPU_CAPABILITY=avx2 makes it a CPU without)."""
    return torch.backends.cpu.get_cpu_capability() == 'AVX512'


def has_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16."""
    supported = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return has_avx512() and supported


def kind() -> str:
    """What this CPU multiplies by: AMX, AVX512-BF16, AVX512, AVX2, or torch's own name for it."""
    if has_bfloat16():
        return 'AMX' if torch.cpu._is_amx_tile_supported() else 'AVX512-BF16'
    return torch.backends.cpu.get_cpu_capability()


def model_name() -> str:
    """What its maker calls this CPU, '' where that cannot be told."""
    with contextlib.suppress(OSError), open('/proc/cpuinfo', encoding='utf-8') as f:
        for line in f:
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    if sys.platform == 'darwin':
        command = ['sysctl', '-n', 'machdep.cpu.brand_string']
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return platform.processor()


def has_vnni() -> bool:
    """Whether this CPU sums products of 8-bit numbers in 32 bits."""
    return has_avx512() and torch.cpu._is_vnni_supported()


def rows_in_float16(weight: Tensor) -> int:
    """Rows of input up to which a weight is read fastest in float16, by FBGEMM."""
    if 'fbgemm' not in torch.backends.quantized.supported_engines:
        return 0
    if weight.dtype == torch.bfloat16:
        return 1 if has_bfloat16() else 16
    # a CPU with bfloat16 computes in float32 where somebody asks for that
    is_exact = has_bfloat16() or weight.numel() < 1 << 14
    return 0 if is_exact else 16


class GPT(plain.GPT):
    has_plain_loss = has_plain_cache = False  # True: model.py's, for what somebody has edited

    def embed(self, idx: Tensor, positions: Tensor) -> Tensor:
        x = super().embed(idx, positions)
        if torch.is_autocast_enabled('cpu'):
            return x.to(torch.get_autocast_dtype('cpu'))  # the residual stream is half as large
        return x

    def loss(self, x: Tensor, targets: Tensor, reduction: str = 'mean') -> Tensor:
        head = self.lm_head
        is_plain = type(head) in (nn.Linear, Linear) and head.bias is None
        is_plain = is_plain and not (head._forward_hooks or head._forward_pre_hooks)
        if self.has_plain_loss or not is_plain or reduction != 'mean':
            return super().loss(x, targets, reduction)
        return HeadLoss.apply(x, head.weight, targets, torch.is_grad_enabled())

    def make_cache(self, batch_size: int, length: int) -> plain.KVCache:
        if self.has_plain_cache:
            return super().make_cache(batch_size, length)
        return cpu_generation.KVCache(self.config, batch_size, length)


class EncoderDecoder(encoder_decoder.EncoderDecoder, GPT):
    pass


class CausalSelfAttention(plain.CausalSelfAttention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        B, n_head, T, head_dim = q.shape
        n_kv_head, n_keys = k.shape[1:3]
        is_whole = n_keys == T if self.causal else T > 1  # not tokens that go on from a cache
        if is_whole or self.training:
            dropout = self.resid_dropout.p if self.training else 0.0
            if v.dtype == torch.float32 and mask is None and not dropout:
                return super().attend(q, k, v, mask)
            # an edited norm may give queries and keys of another type than the values
            q_and_k = q.to(v.dtype), k.to(v.dtype)
            y = BlockAttention.apply(*q_and_k, v, dropout, mask, self.causal)
            return y.to(q.dtype)
        # the queries that share a key become rows of one product, so that keys are not copied
        n_rows = n_head // n_kv_head * T
        if mask is not None:
            mask = mask.expand(B, n_head // n_kv_head, T, n_keys).reshape(B, 1, n_rows, n_keys)
        q_rows = q.reshape(B, n_kv_head, n_rows, head_dim).to(k.dtype)
        y = F.scaled_dot_product_attention(q_rows, k, v, attn_mask=mask)
        return y.view(B, n_head, T, head_dim).to(q.dtype)


class CrossAttention(encoder_decoder.CrossAttention, CausalSelfAttention):
    pass


class BlockAttention(torch.autograd.Function):
    """Attention as matrix products over blocks of queries, causal without those above the diagonal.

    It takes a third of scaled_dot_product_attention's time (15 ms against 46, forward and backward,
    32 x 256 tokens of 4 x 64 in bfloat16), and keeps the probabilities, T^2 / 2 a head. In float32
    that one is no slower (82 ms against 94 for 16 x 256 tokens of 6 x 64, one core with AVX2), but
    with dropout or a mask.
    q: (B, n_head, T, head_dim); k, v: (B, n_kv_head, S, head_dim); dropout: the share of
    probabilities that become 0; mask: None, or (B or 1, 1, T or 1, S) bool, True where a key is
    seen; causal: of those up to the query alone, and S is T. Returns q's shape.
    """

    BLOCK = 128  # queries
    CACHE_BYTES = 8 << 20  # of probabilities in work at once

    @staticmethod
    def blocks(
        q: Tensor, n_keys: int, first_keys: Tensor, causal: bool
    ) -> Iterator[tuple[slice, slice, slice]]:
        """The parts of q (rows, heads of a key, T, head_dim): slices of rows, queries and keys.

        first_keys: (rows, blocks), the first key that any query of a block sees.
        """
        n_rows, n_shared, T, _ = q.shape
        block = BlockAttention.BLOCK
        bytes_per_row = n_shared * block * n_keys * q.element_size()
        step = max(1, BlockAttention.CACHE_BYTES // bytes_per_row)
        for row in range(0, n_rows, step):
            rows = slice(row, row + step)
            for number, query in enumerate(range(0, T, block)):
                end = min(query + block, T)
                begin = int(first_keys[rows, number].min())
                yield rows, slice(query, end), slice(begin, end if causal else n_keys)

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout: float,
        mask: Tensor | None = None,
        causal: bool = True,
    ) -> Tensor:
        B, n_head, T, head_dim = q.shape
        n_kv_head, S = k.shape[1:3]
        n_shared = n_head // n_kv_head
        q = (q * head_dim**-0.5).reshape(B * n_kv_head, n_shared, T, head_dim)
        k = k.reshape(B * n_kv_head, S, head_dim)
        v = v.reshape(B * n_kv_head, S, head_dim)
        if dropout:
            v = v / (1 - dropout)
        y = torch.empty_like(q)
        block = BlockAttention.BLOCK
        future = torch.full((block, block), float('-inf'), dtype=q.dtype).triu(1)
        first_keys = torch.zeros(len(q), math.ceil(T / block), dtype=torch.int64)
        if mask is not None:
            unseen, batch_row = ~mask.expand(B, 1, T, S), torch.arange(len(q)) // n_kv_head
        if mask is not None and causal:
            # a later query's document begins no earlier, so a block's first query says it
            first_keys = mask[:, 0, ::block].int().argmax(dim=-1).expand(B, -1)[batch_row]
        saved = []
        for rows, queries, keys in BlockAttention.blocks(q, S, first_keys, causal):
            n, n_keys = queries.stop - queries.start, keys.stop - keys.start
            scores = q[rows, :, queries].flatten(1, 2) @ k[rows, keys].mT
            by_query = scores.view(-1, n_shared, n, n_keys)
            if mask is None and causal:
                by_query[..., queries] += future[:n, :n]
            elif mask is not None:
                by_query.masked_fill_(unseen[batch_row[rows], :, queries, keys], float('-inf'))
            p = torch.softmax(scores, dim=-1)
            left = p * dropout_mask(p.shape, dropout, p.dtype) if dropout else p
            y[rows, :, queries] = (left @ v[rows, keys]).view_as(y[rows, :, queries])
            if any(ctx.needs_input_grad):
                # one tensor for both: what was dropped is stored as its negative
                saved.append(left.mul_(2).sub_(p) if dropout else p)
        ctx.dropout, ctx.causal = dropout, causal
        ctx.save_for_backward(q, k, v, first_keys, *saved)
        return y.view(B, n_head, T, head_dim)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple:
        q, k, v, first_keys, *saved = ctx.saved_tensors
        B = dy.shape[0]
        dy = dy.reshape(q.shape)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        blocks = BlockAttention.blocks(q, k.shape[1], first_keys, ctx.causal)
        for p, (rows, queries, keys) in zip(saved, blocks, strict=True):
            q_block = q[rows, :, queries].flatten(1, 2)
            dy_block = dy[rows, :, queries].flatten(1, 2)
            dp = dy_block @ v[rows, keys].mT
            left = p.relu() if ctx.dropout else p
            dv[rows, keys] += left.mT @ dy_block
            if ctx.dropout:
                dp *= torch.gt(p, 0, out=torch.empty_like(p))
                p = p.abs()
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq[rows, :, queries] = (ds @ k[rows, keys]).view_as(dq[rows, :, queries])
            dk[rows, keys] += ds.mT @ q_block
        head_dim = q.shape[-1]
        dq = (dq * head_dim**-0.5).view(B, -1, *q.shape[2:])
        dv = dv / (1 - ctx.dropout)
        return dq, dk.view(B, -1, *k.shape[1:]), dv.view(B, -1, *v.shape[1:]), None, None, None


class RMSNorm(plain.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        y = RMSNormFunction.apply(x, self.weight, self.eps)
        return recomputed(y, x, lambda x: RMSNormFunction.apply(x, self.weight, self.eps))


class RMSNormFunction(torch.autograd.Function):
    """torch's RMSNorm with a faster backward: 2.5 ms against 7.2 for (8192, 256) bfloat16."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        precise = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precise)
        scale = (norm.square() / x.shape[-1] + eps).rsqrt().to(x.dtype)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight.to(x.dtype))

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple:
        x, weight, scale = ctx.saved_tensors
        precise = torch.promote_types(x.dtype, torch.float32)
        normal = x * scale
        dweight = None
        if ctx.needs_input_grad[1]:  # adapters leave it frozen
            dweight = (dy * normal).flatten(0, -2).sum(dim=0, dtype=precise)
        dnormal = dy * weight.to(x.dtype)
        mean = (dnormal * normal).mean(dim=-1, keepdim=True)
        return dnormal.addcmul_(normal, mean, value=-1).mul_(scale), dweight, None


class LayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return recomputed(super().forward(x), x, super().forward)


class MLP(plain.MLP):
    def activate(self, x: Tensor) -> Tensor:
        activate = super().activate
        gated, _ = plain.ACTIVATIONS[self.activation]
        if gated and x.requires_grad and x.numel() >= LARGE:  # without what it multiplies
            y = checkpoint(activate, x, use_reentrant=False, preserve_rng_state=False)
        else:
            y = activate(x)
        return recomputed(y, x, activate)


def recomputed(y: Tensor, x: Tensor, function: Callable) -> Tensor:
    """y = function(x), with `not_kept`: the context in which a product of y does not keep it.

    Where y is large a layer behind it keeps x, which is kept anyway, and computes y again: at
    12 x 1,024 tokens and ten layers of 640 that saves 1.2 GB of 6.4, and less memory touched is
    time won.
    """
    if y.requires_grad and y.numel() >= LARGE:
        pointer, size, version = y.data_ptr(), y.numel(), y._version  # not y, which would stay

        def pack(saved):
            is_y = saved.data_ptr() == pointer and saved.numel() == size
            return saved.shape if is_y and saved._version == version else saved

        def unpack(kept):
            if torch.is_tensor(kept):
                return kept
            with torch.no_grad():
                return function(x).view(kept)

        y.not_kept = lambda: torch.autograd.graph.saved_tensors_hooks(pack, unpack)
    return y


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with getattr(x, 'not_kept', contextlib.nullcontext)():
            return super().forward(x)


class Dropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        return x * dropout_mask(x.shape, self.p, x.dtype).div_(1 - self.p)


def dropout_mask(shape: tuple[int, ...], rate: float, dtype: torch.dtype) -> Tensor:
    """0 with probability rate, else 1, from 16 random bits; bernoulli_ takes five times as long."""
    n = math.prod(shape)
    bits = torch.empty(math.ceil(n / 4), dtype=torch.int64).random_(-(2**63), None)
    bits = bits.view(torch.int16)[:n].view(shape)
    threshold = min(round(rate * 65536), 65535) - 32768
    return torch.ge(bits, threshold, out=torch.empty(shape, dtype=dtype))


class HeadLoss(torch.autograd.Function):
    """Mean cross entropy of the head's logits, in chunks, whose gradient the forward pass makes.

    x: (N, n_embd); weight: (vocab_size, n_embd); targets: (N,), -1 is ignored. A float32 scalar.
    """

    CHUNK_BYTES = 128 << 20  # of logits: large products
    CACHE_BYTES = 4 << 20  # of a softmax in float32, which stays in the processor's cache

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, targets: Tensor, with_gradient: bool
    ) -> Tensor:
        with_dweight = with_gradient and ctx.needs_input_grad[1]  # adapters leave it frozen
        if torch.is_autocast_enabled('cpu'):
            x = x.to(torch.get_autocast_dtype('cpu'))
        w = weight.to(x.dtype)
        vocab_size = len(w)
        count = (targets >= 0).sum().clamp(min=1)
        chunk = max(1, HeadLoss.CHUNK_BYTES // (vocab_size * w.element_size()))
        cached = max(1, HeadLoss.CACHE_BYTES // (vocab_size * 4))
        loss = torch.zeros(())
        dx = torch.empty_like(x)
        dweight = None
        targets = targets[:, None]
        for start in range(0, len(x), chunk):
            x_chunk = x[start : start + chunk]
            logits = x_chunk @ w.T
            targets_chunk = targets[start : start + chunk]
            for row in range(0, len(logits), cached):
                part = logits[row : row + cached]
                known = targets_chunk[row : row + cached] >= 0
                target = targets_chunk[row : row + cached].clamp(min=0)
                p = torch.softmax(part.float(), dim=-1)
                loss -= (p.gather(1, target).clamp(min=1e-38).log() * known).sum()
                if with_gradient:
                    minus_one = torch.full_like(target, -1, dtype=p.dtype)
                    part.copy_(p.scatter_add_(1, target, minus_one).mul_(known))
            if with_gradient:
                torch.mm(logits, w, out=dx[start : start + chunk])
            if with_dweight:
                dweight_chunk = logits.T @ x_chunk
                dweight = dweight_chunk.float() if dweight is None else dweight.add_(dweight_chunk)
        ctx.save_for_backward(dx, dweight, count)
        return loss / count

    @staticmethod
    def backward(ctx: FunctionCtx, dloss: Tensor) -> tuple:
        dx, dweight, count = ctx.saved_tensors
        scale = dloss / count
        return dx * scale, None if dweight is None else dweight * scale, None, None


# What is written out a second time, here and in cpu_generation.py, and its methods in model.py.
STEPS = {
    'GPT.loss': {plain.GPT: ('loss', 'nats', 'logits')},
    'CausalSelfAttention.attend': {plain.CausalSelfAttention: ('attend',)},
    'RMSNorm.forward': {plain.RMSNorm: ('forward',)},
    'KVCache': {
        plain.GPT: ('make_cache',),
        plain.KVCache: ('__init__', 'place', 'write', 'advance', 'select', 'rows'),
    },
}
# Their digest() as they came. Who edits a step for good mends its twin as well, and puts in the new
# digest; until then the step runs as it is in model.py.
AS_WRITTEN = {
    'GPT.loss': '8b80721db34d3564',
    'CausalSelfAttention.attend': '2aede37586c56ae5',
    'RMSNorm.forward': 'f697cc1ac7461c7a',
    'KVCache': '11796d5789225bb9',
}

# What a recorded step of generation goes through in model.py, and its digest() there as it came:
# what is edited may do more than a record holds, and is not recorded until that is put in here.
RECORDED = {
    plain.GPT: ('forward', 'hidden', 'run', 'embed', 'logits'),
    plain.Block: ('forward',),
    plain.CausalSelfAttention: ('forward', 'attend'),
    plain.MLP: ('forward', 'activate'),
    plain.RMSNorm: ('forward',),
}
AS_RECORDED = '9ae313f76baebb39'


def can_be_recorded(module: nn.Module) -> bool:
    """Whether a module is none that somebody has written, which may branch by what it computes."""
    kind = type(module)
    return kind in RECORDED or kind.__module__.partition('.')[0] in ('torch', 'fledge')


def digest(methods: dict[type, tuple[str, ...]]) -> str:
    """Changes with the text of methods, {class: names}."""
    texts = []
    for kind, names in methods.items():
        try:
            texts += [inspect.getsource(getattr(kind, name)) for name in names]
        except OSError:  # typed into an interpreter, in place of model.py's
            return ''
    return hashlib.sha256(''.join(texts).encode()).hexdigest()[:16]
