"""GPT: the whole architecture, its KV cache and generation, on torch alone.

GPTConfig's defaults are GPT-2's, and the parameter names nanoGPT's; its switches span Llama, Qwen2 and Qwen3.
Sources: GPT-2, Radford et al. 2019, Language Models are Unsupervised Multitask Learners; karpathy/nanoGPT for the
names and the shape of the code; the papers named where each idea is used.
"""

import math
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64
    n_layer: int = 12
    n_head: int = 12  # query heads
    n_embd: int = 768  # width
    dropout: float = 0.0
    bias: bool = True  # in the linear layers and LayerNorms
    # where the families differ
    n_kv_head: int = 0  # key and value heads, each shared by n_head / n_kv_head queries; 0: n_head
    head_dim: int = 0  # 0: n_embd / n_head
    n_inner: int = (
        0  # width of the MLP; 0: 4 n_embd, or 8/3 n_embd up to a multiple of 64 for swiglu
    )
    position: str = 'learned'  # learned, rope
    rope_theta: float = 10000.0  # base of RoPE's wavelengths
    rope_scaling: dict | None = (
        None  # Hugging Face's: {'rope_type': 'linear' or 'llama3', 'factor': ..., ...}
    )
    norm: str = 'layernorm'  # layernorm, rmsnorm
    norm_eps: float = 1e-5
    activation: str = 'gelu'  # gelu, gelu_tanh, swiglu, relu2
    qkv_bias: bool | None = None  # None: as bias (Qwen2 has biases there alone)
    qk_norm: bool = False  # RMSNorm on each head's queries and keys
    tie_embeddings: bool = True  # the head is the token embedding

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.qkv_bias = self.bias if self.qkv_bias is None else self.qkv_bias
        for name in (
            'block_size',
            'vocab_size',
            'n_layer',
            'n_head',
            'n_embd',
            'n_kv_head',
            'head_dim',
            'n_inner',
            'rope_theta',
        ):
            least = 0 if name in ('head_dim', 'n_inner') else 1
            if getattr(self, name) < least:
                raise ValueError(f'{name}={getattr(self, name)} must be at least {least}')
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd} is not divisible by n_head={self.n_head}')
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        swiglu = self.activation == 'swiglu'
        self.n_inner = self.n_inner or (
            math.ceil(self.n_embd * 8 / 3 / 64) * 64 if swiglu else 4 * self.n_embd
        )
        if self.n_head % self.n_kv_head:
            raise ValueError(f'n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}')
        if self.position == 'rope' and self.head_dim % 2:
            raise ValueError(f'head_dim={self.head_dim} is odd, and RoPE turns pairs')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout={self.dropout} is not in [0, 1)')
        for name, known in (
            ('position', ('learned', 'rope')),
            ('norm', ('layernorm', 'rmsnorm')),
            ('activation', ('gelu', 'gelu_tanh', 'swiglu', 'relu2')),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f'{name}={getattr(self, name)!r} is none of {", ".join(known)}')

    def model_args(self):
        """The fields as a dict, those past nanoGPT's own seven only where they depart from GPT-2: nanoGPT reads ours."""
        names = [f.name for f in fields(GPTConfig)]
        nano = {n: getattr(self, n) for n in names[:7]}
        plain = asdict(GPTConfig(**nano)) if self.n_embd % self.n_head == 0 else {}
        if self.activation == 'swiglu':
            plain.pop('n_inner', None)  # 4 n_embd goes without saying for GPT-2 alone
        return {
            n: getattr(self, n)
            for n in names
            if n in nano or n not in plain or getattr(self, n) != plain[n]
        }


class RMSNormFunction(torch.autograd.Function):
    """x over its root mean square, then a scale of shape (n,) or (heads, n).

    By hand, because torch's own has a slow backward on a CPU: 7.2 ms against 2.5 for (8192, 256) bfloat16.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        square = torch.linalg.vector_norm(
            x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)
        ).square()
        r = (square / x.shape[-1] + eps).rsqrt().to(x.dtype)
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight.to(x.dtype))

    @staticmethod
    def backward(ctx, dy):
        x, weight, r = ctx.saved_tensors
        normal, w = x * r, weight.to(x.dtype)
        dw, dn = dy * normal, dy * w
        mean = (dn * normal).mean(dim=-1, keepdim=True)
        dw = dw.flatten(0, -weight.dim() - 1).sum(
            dim=0, dtype=torch.promote_types(x.dtype, torch.float32)
        )
        return dn.addcmul_(normal, mean, value=-1).mul_(r), dw, None


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019, arXiv:1910.07467."""

    def __init__(self, n, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(n)), eps

    def forward(self, x):
        return RMSNormFunction.apply(x, self.weight, self.eps)


def norm(config):
    if config.norm == 'rmsnorm':
        return RMSNorm(config.n_embd, config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


def rope_frequencies(config):
    """By which angle RoPE (Su et al. 2021, arXiv:2104.09864) turns each pair from one position to the next, (head_dim / 2,) float32."""
    frequency = config.rope_theta ** -(
        torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    )
    scaling = config.rope_scaling or {}
    kind = scaling.get('rope_type', scaling.get('type', 'default'))
    if kind == 'linear':
        frequency = frequency / scaling['factor']
    elif (
        kind == 'llama3'
    ):  # long wavelengths are stretched, short ones kept, those between interpolated
        wavelength = 2 * math.pi / frequency
        low, high, old = (
            scaling['low_freq_factor'],
            scaling['high_freq_factor'],
            scaling['original_max_position_embeddings'],
        )
        keep = ((old / wavelength - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (keep + (1 - keep) / scaling['factor'])
    elif kind != 'default':
        raise ValueError(f'rope_scaling {kind!r} is none of linear, llama3')
    return frequency


def rope_tables(config, frequencies=None):
    """RoPE's angles: cosines and signed sines, two (block_size, head_dim) float32. frequencies: others than the config's own."""
    frequencies = rope_frequencies(config) if frequencies is None else frequencies
    angle = torch.outer(torch.arange(config.block_size, dtype=torch.float32), frequencies)
    return angle.cos().repeat(1, 2), torch.cat((-angle.sin(), angle.sin()), dim=1)


def rotate(x, cos, sin):
    """Turn each pair (i, i + head_dim / 2) of x (..., head_dim) by its angle; the tables broadcast (see rope_tables)."""
    return x.roll(x.shape[-1] // 2, dims=-1).mul_(sin).add_(x * cos)


def kept(shape, rate, dtype):
    """Dropout's mask on a CPU: 1, or 0 with probability rate, from 16 random bits each (bernoulli_ takes five times as long)."""
    bits = (
        torch.empty(math.ceil(math.prod(shape) / 4), dtype=torch.int64)
        .random_(-(2**63), None)
        .view(torch.int16)
    )
    bits = bits[: math.prod(shape)].view(shape)
    return torch.ge(
        bits, min(round(rate * 65536), 65535) - 32768, out=torch.empty(shape, dtype=dtype)
    )


class Dropout(nn.Dropout):
    def forward(self, x):
        if not self.training or not self.p:
            return x
        if x.device.type != 'cpu':
            return super().forward(x)
        return x * kept(x.shape, self.p, x.dtype).div_(1 - self.p)


def remade(f, x):
    """f(x), of which a CPU's training keeps x alone where it is large; the backward pass makes the rest again.

    For a cheap step and the matmul after it: the recomputation stops before the matmul. At 12 x 1,024 tokens and ten layers
    of 640 it saves 1.2 GB of 6.4, and less memory touched is time won.
    """
    if x.device.type == 'cpu' and x.requires_grad and x.numel() >= 1 << 20:
        return checkpoint(f, x, use_reentrant=False, preserve_rng_state=False)
    return f(x)


class CausalAttentionCPU(torch.autograd.Function):
    """Causal attention as plain matmuls over blocks of queries, skipping the blocks above the diagonal.

    On a CPU this takes a third of scaled_dot_product_attention's time (15 ms against 46, forward and backward,
    32 x 256 tokens of 4 x 64 in bfloat16), and keeps the probabilities, T^2 / 2 a head.
    q: (B, n_head, T, head_dim); k, v: (B, n_kv_head, T, head_dim); dropout: the share of probabilities set to 0; returns q's shape.
    """

    BLOCK, CACHE_BYTES = 128, 8 << 20  # queries in a block; the probabilities in work at once

    @staticmethod
    def blocks(q):
        """Slices of rows and of queries, and where the queries' keys end, of q (rows, n_head / n_kv_head, T, head_dim)."""
        R, G, T, _ = q.shape
        size = CausalAttentionCPU.BLOCK
        n = max(1, CausalAttentionCPU.CACHE_BYTES // (G * size * T * q.element_size()))
        return [
            (slice(r, r + n), slice(i, i + size), min(i + size, T))
            for r in range(0, R, n)
            for i in range(0, T, size)
        ]

    @staticmethod
    def forward(ctx, q, k, v, dropout=0.0):
        (B, H, T, D), KV = q.shape, k.shape[1]
        q = (q * D**-0.5).reshape(B * KV, H // KV, T, D)
        k, v = (
            k.reshape(B * KV, T, D),
            (v if not dropout else v / (1 - dropout)).reshape(B * KV, T, D),
        )
        y, saved = torch.empty_like(q), []
        above = torch.full((CausalAttentionCPU.BLOCK,) * 2, float('-inf'), dtype=q.dtype).triu(1)
        for r, i, j in CausalAttentionCPU.blocks(q):
            p = q[r, :, i].flatten(1, 2) @ k[r, :j].mT
            n = j - i.start
            p.view(-1, H // KV, n, j)[..., i.start :] += above[:n, :n]
            p = torch.softmax(p, dim=-1)
            left = p * kept(p.shape, dropout, p.dtype) if dropout else p
            y[r, :, i] = (left @ v[r, :j]).view_as(y[r, :, i])
            if any(ctx.needs_input_grad):
                saved.append(
                    left.mul_(2).sub_(p) if dropout else p
                )  # what was dropped is kept as its negative
        ctx.dropout = dropout
        ctx.save_for_backward(q, k, v, *saved)
        return y.view(B, H, T, D)

    @staticmethod
    def backward(ctx, dy):
        q, k, v, *saved = ctx.saved_tensors
        shape, dy = dy.shape, dy.reshape(q.shape)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for p, (r, i, j) in zip(saved, CausalAttentionCPU.blocks(q)):
            q_i, dy_i = q[r, :, i].flatten(1, 2), dy[r, :, i].flatten(1, 2)
            dp = dy_i @ v[r, :j].mT
            dv[r, :j] += (p.relu() if ctx.dropout else p).mT @ dy_i
            if ctx.dropout:
                dp, p = dp.mul_(torch.gt(p, 0, out=torch.empty_like(p))), p.abs()
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq[r, :, i] = (ds @ k[r, :j]).view_as(dq[r, :, i])
            dk[r, :j] += ds.mT @ q_i
        keys = shape[0], -1, *k.shape[1:]
        return (
            dq.mul_(q.shape[-1] ** -0.5).view(shape),
            dk.view(keys),
            dv.div_(1 - ctx.dropout).view(keys),
            None,
        )


class HeadLoss(torch.autograd.Function):
    """Mean cross entropy of the head's logits, in chunks, with the gradient made in the forward pass.

    Full logits never exist. x: (N, n_embd); weight: (vocab_size, n_embd); targets: (N,), -1 is ignored.
    """

    CHUNK_BYTES, CACHE_BYTES = (
        128 << 20,
        4 << 20,
    )  # of logits: large matmuls, and a softmax in float32 that stays in the cache

    @staticmethod
    def forward(ctx, x, weight, targets, with_gradient):
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        w, count = weight.to(x.dtype), (targets >= 0).sum().clamp(min=1)
        chunk = max(1, HeadLoss.CHUNK_BYTES // (w.shape[0] * w.element_size()))
        rows = max(1, HeadLoss.CACHE_BYTES // (4 * w.shape[0])) if x.device.type == 'cpu' else chunk
        loss, dx, dweight = torch.zeros((), device=x.device), torch.empty_like(x), None
        for x_i, y_i, dx_i in zip(x.split(chunk), targets[:, None].split(chunk), dx.split(chunk)):
            logits = x_i @ w.T
            known = y_i >= 0
            y_i = y_i.clamp(min=0)
            for l, y, is_known in zip(logits.split(rows), y_i.split(rows), known.split(rows)):
                p = torch.softmax(l.float(), dim=-1)
                loss -= (p.gather(1, y).clamp(min=1e-38).log() * is_known).sum()
                if with_gradient:
                    l.copy_(
                        p.scatter_add_(1, y, torch.full_like(y, -1, dtype=p.dtype)).mul_(is_known)
                    )
            if with_gradient:
                torch.mm(logits, w, out=dx_i)
                part = logits.T @ x_i
                dweight = part.float() if dweight is None else dweight.add_(part)
        ctx.save_for_backward(dx, dweight, count)
        return loss / count

    @staticmethod
    def backward(ctx, grad):
        dx, dweight, count = ctx.saved_tensors
        return dx * (grad / count), dweight * (grad / count), None, None


class KVCache:
    """Keys and values of what was read so far, allocated once and written in place; each row has its own length.

    k, v: n_layer tensors (B, n_kv_head, length, head_dim). lengths: (B,) tokens held a row.
    """

    def __init__(self, config, batch_size, length=None, dtype=torch.float32, device='cpu'):
        shape = (
            batch_size,
            config.n_kv_head,
            min(length or config.block_size, config.block_size),
            config.head_dim,
        )
        self.k, self.v = (
            [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
            for _ in range(2)
        )
        self.size = shape[2]
        self.reset()

    def reset(self):
        self.lengths, self.longest = (
            torch.zeros(self.k[0].shape[0], dtype=torch.long, device=self.k[0].device),
            0,
        )
        self.even = (
            True  # all rows have the same length: no positions a row, and no mask for one token
        )

    def plan(self, T):
        """Positions (B, T) or (1, T) of T new tokens a row, and the mask (B or 1, 1, T, keys) over old and new keys; None: all they may see."""
        if self.longest + T > self.size:
            raise ValueError(
                f'{T} more tokens do not fit a cache of {self.size} that holds {self.longest}'
            )
        keys = torch.arange(self.longest + T, device=self.lengths.device)
        positions = keys[None, self.longest :] if self.even else self.lengths[:, None] + keys[:T]
        if self.longest == 0 or (self.even and T == 1):
            return positions, None
        return positions, keys <= positions[:, None, :, None]

    def write(self, layer, k, v, positions):
        """Put k, v (B, n_kv_head, T, head_dim) at positions; returns all keys and values up to the longest row."""
        end = self.longest + k.shape[2]
        if self.even:
            self.k[layer][:, :, self.longest : end], self.v[layer][:, :, self.longest : end] = k, v
        else:
            at = positions[:, None, :, None].expand_as(k)
            self.k[layer].scatter_(2, at, k.to(self.k[layer].dtype))
            self.v[layer].scatter_(2, at, v.to(self.v[layer].dtype))
        return (self.k[layer][:, :, :end], self.v[layer][:, :, :end]) if self.longest else (k, v)

    def advance(self, T, lengths):
        """T tokens a row were read, of which lengths (B,) are real; None: all."""
        self.lengths = self.lengths + (T if lengths is None else lengths)
        self.even = self.even and lengths is None
        self.longest = self.longest + T if lengths is None else int(self.lengths.max())


class CausalSelfAttention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245), with QK-norm (Henry et al. 2020, arXiv:2010.04245)."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim, self.qk_norm = (
            config.n_head,
            config.n_kv_head,
            config.head_dim,
            config.qk_norm,
        )
        heads = config.n_head + 2 * config.n_kv_head
        self.c_attn = nn.Linear(
            config.n_embd, heads * config.head_dim, bias=config.qkv_bias
        )  # queries, keys, values
        self.c_proj = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=config.bias)
        self.resid_dropout = Dropout(config.dropout)
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(config.head_dim, config.norm_eps) for _ in range(2))

    def qk_scale(self):
        """QK-norm's scales, a row (head_dim,) a head of queries and keys."""
        return torch.cat(
            (
                self.q_norm.weight.expand(self.n_head, -1),
                self.k_norm.weight.expand(self.n_kv_head, -1),
            )
        )

    def forward(self, x, ln, rope=None, cache=None, layer=0, positions=None, mask=None):
        B, T, _ = x.shape
        H, KV, D = self.n_head, self.n_kv_head, self.head_dim
        qk, v = (
            remade(lambda x: self.c_attn(ln(x)), x)
            .view(B, T, H + 2 * KV, D)
            .split((H + KV, KV), dim=2)
        )
        if self.qk_norm:
            qk = RMSNormFunction.apply(qk, self.qk_scale(), self.q_norm.eps)
        if rope is not None:
            qk = rotate(qk, *rope)
        q, k = qk.split((H, KV), dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, D)
        if cache is not None:
            k, v = cache.write(layer, k, v, positions)
        dropout = self.resid_dropout.p if self.training else 0.0
        if cache is not None and (
            T == 1 or mask is not None
        ):  # the queries that share a key are one batch of rows: keys are never copied
            mask = (
                None
                if mask is None
                else mask.expand(B, H // KV, T, -1).reshape(B, 1, H // KV * T, -1)
            )
            y = (
                F.scaled_dot_product_attention(
                    q.reshape(B, KV, H // KV * T, D).to(k.dtype), k, v, attn_mask=mask
                )
                .view(B, H, T, D)
                .to(x.dtype)
            )
        elif x.device.type == 'cpu':
            y = CausalAttentionCPU.apply(q, k, v, dropout)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=H != KV
            )
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, H * D)))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.activation = config.activation
        gated = config.activation == 'swiglu'
        self.c_fc = nn.Linear(
            config.n_embd, (2 if gated else 1) * config.n_inner, bias=config.bias
        )  # swiglu: gate, up
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x, ln):
        return self.dropout(
            remade(lambda x: self.c_proj(self.activate(x)), remade(lambda x: self.c_fc(ln(x)), x))
        )

    def activate(self, x):
        if self.activation == 'swiglu':  # Shazeer 2020, arXiv:2002.05202
            gate, up = x.chunk(2, dim=-1)
            return F.silu(gate) * up
        if self.activation == 'relu2':  # So et al. 2021, arXiv:2109.08668
            return F.relu(x).square()
        return F.gelu(x, approximate='tanh' if self.activation == 'gelu_tanh' else 'none')


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = norm(config)
        self.mlp = MLP(config)

    def forward(self, x, *attention):
        x = x + self.attn(x, self.ln_1, *attention)
        return x + self.mlp(x, self.ln_2)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = (
            False  # True: a block's activations are made again in the backward pass
        )
        parts = dict(wte=nn.Embedding(config.vocab_size, config.n_embd))
        if config.position == 'learned':
            parts['wpe'] = nn.Embedding(config.block_size, config.n_embd)
        parts |= dict(
            drop=Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=norm(config),
        )
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:  # Press and Wolf 2016, arXiv:1608.05859
            self.transformer.wte.weight = self.lm_head.weight
        if config.position == 'rope':
            for name, table in zip(('rope_cos', 'rope_sin'), rope_tables(config)):
                self.register_buffer(name, table, persistent=False)
        self.apply(self._init_weights)
        for (
            name,
            p,
        ) in (
            self.named_parameters()
        ):  # GPT-2: the residual stream's variance stays the same at any depth
            if name.endswith('c_proj.weight'):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def get_num_params(self, non_embedding=True):
        """Number of parameters; non_embedding leaves out learned positions, as nanoGPT counts."""
        n = sum(p.numel() for p in self.parameters())
        return n - (
            self.transformer.wpe.weight.numel()
            if non_embedding and 'wpe' in self.transformer
            else 0
        )

    def matmul_params(self):
        """Number of parameters that multiply each token, and that generation reads for each: all but embeddings and vectors."""
        return self.lm_head.weight.numel() + sum(
            p.numel() for n, p in self.named_parameters() if p.dim() == 2 and '.h.' in n
        )

    def flops_per_token(self):
        """Of training: 6 a matmul parameter, 12 a layer, width and position of context (PaLM, arXiv:2204.02311, B)."""
        c = self.config
        return 6 * self.matmul_params() + 12 * c.n_layer * c.n_head * c.head_dim * c.block_size

    def crop_block_size(self, block_size):
        """Shorten the context to block_size, at most the present one."""
        assert block_size <= self.config.block_size, (
            f'{block_size} is longer than the context of {self.config.block_size}'
        )
        self.config.block_size = block_size
        if self.config.position == 'learned':
            self.transformer.wpe.weight = nn.Parameter(
                self.transformer.wpe.weight[:block_size].detach().clone()
            )
        else:
            self.rope_cos, self.rope_sin = self.rope_cos[:block_size], self.rope_sin[:block_size]

    def forward(self, idx, targets=None, return_logits=True, cache=None, lengths=None):
        """Logits and mean cross entropy (nats a token): a pair (logits, loss).

        idx: (B, T) int64. targets: (B, T) int64, -1 where no prediction counts. With targets, logits are
        (B, T, vocab_size) float, or None with return_logits=False (the loss then goes without them: faster,
        smaller); without, they are (B, 1, vocab_size), each row's last position's, and the loss is None.
        cache: a KVCache; idx goes on from what it holds. lengths: (B,) int64, how many of a row's T tokens
        are real where a batch is padded on the right. Raises ValueError for T beyond block_size.
        """
        x = self.hidden(idx, cache, lengths)
        if targets is None:
            x = (
                x[:, -1:]
                if lengths is None
                else x[torch.arange(len(x), device=x.device), lengths - 1][:, None]
            )
            return self.lm_head(self.transformer.ln_f(x)), None
        x = self.transformer.ln_f(x)
        if not return_logits and type(self.lm_head) is nn.Linear:
            return None, HeadLoss.apply(
                x.flatten(0, 1), self.lm_head.weight, targets.flatten(), torch.is_grad_enabled()
            )
        logits = self.lm_head(x)
        return logits if return_logits else None, F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1
        )

    def hidden(self, idx, cache=None, lengths=None):
        """What the last block leaves, (B, T, n_embd): ahead of the final norm and the head. Arguments as of forward."""
        T = idx.shape[1]
        if T > self.config.block_size:
            raise ValueError(f'{T} tokens are longer than block_size={self.config.block_size}')
        positions = mask = None
        if cache is not None:
            positions, mask = cache.plan(T)
        x = self.transformer.wte(idx)
        if self.config.position == 'learned':
            x = x + self.transformer.wpe(
                positions if cache is not None else torch.arange(T, device=idx.device)
            )
        if idx.device.type == 'cpu' and torch.is_autocast_enabled('cpu'):
            x = x.to(
                torch.get_autocast_dtype('cpu')
            )  # the residual stream as well: half the memory traffic
        rope = None
        if self.config.position == 'rope':
            heads = (
                self.config.n_head + self.config.n_kv_head
            )  # one row of a table for each: long loops are fast loops
            rope = [
                (t[:T] if cache is None else t[positions])
                .to(x.dtype)
                .unsqueeze(-2)
                .repeat_interleave(heads, dim=-2)
                for t in (self.rope_cos, self.rope_sin)
            ]
        x = self.transformer.drop(x)
        for layer, block in enumerate(self.transformer.h):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope, cache, layer, positions, mask)
        if cache is not None:
            cache.advance(T, lengths)
        return x

    @torch.no_grad()
    def generate(
        self,
        idx,
        max_new_tokens,
        temperature=1.0,
        top_k=None,
        top_p=None,
        min_p=None,
        repetition_penalty=1.0,
        stop=None,
        seed=None,
    ):
        """Continue prompts by up to max_new_tokens tokens each; call it in eval mode.

        idx: (B, T) int64, and (B, T + n) comes back, n <= max_new_tokens, rows that stopped early filled up with
        their stop token; or a list of B lists of token ids, of any lengths, and such a list comes back.
        temperature: 0 is greedy. top_k: only the k likeliest tokens. top_p: the fewest that together have that
        probability (Holtzman et al. 2019, arXiv:1904.09751). min_p: those with at least that share of the likeliest's
        (Nguyen et al. 2024, arXiv:2407.01082). repetition_penalty: divides the logits of tokens seen (Keskar et al.
        2019, arXiv:1909.05858). stop: a token id or several, kept as a row's last. seed: of a generator of its own;
        None draws from torch's. Each is off at None (or 1.0). Once a row fills the context, the model sees its last
        block_size tokens, as a plain forward would: exact for any model, at the price of a forward pass a token.
        """
        rows = [list(map(int, row)) for row in idx]
        if not all(rows):
            raise ValueError('a prompt is empty: it needs one token at least')
        weight = self.transformer.wte.weight
        device, limit, B = weight.device, self.config.block_size, len(rows)
        stop = {stop} if isinstance(stop, int) else set(stop or ())
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        seen = torch.zeros(B, weight.shape[0], dtype=torch.bool, device=device)
        for i, row in enumerate(rows):
            seen[i, row] = True
        dtype = (
            torch.get_autocast_dtype(device.type)
            if torch.is_autocast_enabled(device.type)
            else weight.dtype
        )
        if device.type == 'cpu':
            dtype = torch.float32  # attention of one query: 116 us against 634 in bfloat16 (16 texts, 12 heads, 80 keys)
        cache = KVCache(self.config, B, max(map(len, rows)) + max_new_tokens, dtype, device)
        decoder = (
            Decoder(self, alone=B == 1) if device.type == 'cpu' and max_new_tokens > 1 else None
        )
        running = range(B)
        for step in range(max_new_tokens):
            if step and cache.longest < limit:
                new, lengths = [row[-1:] for row in rows], None
            else:  # the prompts, or, once the context is full, the last block_size tokens of each row
                cache.reset()
                new = [row[-limit:] for row in rows]
                lengths = [len(row) for row in new]
                lengths = (
                    None if min(lengths) == max(lengths) else torch.tensor(lengths, device=device)
                )
            width = max(map(len, new))
            tokens = torch.tensor([row + [0] * (width - len(row)) for row in new], device=device)
            if decoder and width == 1 and cache.longest:
                logits = decoder.step(tokens[:, 0], cache)
                if B == 1 and not logits.isfinite().all():  # too large for float16
                    decoder = Decoder(self, alone=False)
                    cache.lengths, cache.longest = cache.lengths - 1, cache.longest - 1
                    logits = decoder.step(tokens[:, 0], cache)
            else:
                logits = self(tokens, cache=cache, lengths=lengths)[0][:, -1].float()
            token = choose(
                logits, seen, temperature, top_k, top_p, min_p, repetition_penalty, generator
            )
            seen.scatter_(1, token[:, None], True)
            for i, t in enumerate(token.tolist()):
                rows[i].append(
                    t
                )  # a row that has stopped runs on beside the others, and is cut at the end
            running = [i for i in running if rows[i][-1] not in stop]
            if not running:
                break
        for i, prompt in enumerate(idx):
            end = next(
                (n + 1 for n in range(len(prompt), len(rows[i])) if rows[i][n] in stop), None
            )
            rows[i] = rows[i][:end]
        if torch.is_tensor(idx):
            width = max(map(len, rows))
            return torch.tensor(
                [row + row[-1:] * (width - len(row)) for row in rows], device=idx.device
            )
        return rows


class Decoder:
    """GPT.forward for one more token a row on a CPU, flat: module calls, casts and views add up to a fifth of a small model's step.

    Vectors, the residual stream and attention are float32; see matrix for the rest.
    """

    def __init__(self, model, alone):
        self.config, self.head, self.ln_f = (
            model.config,
            matrix(model.lm_head, alone),
            vectors(model.transformer.ln_f),
        )
        self.wte, self.wpe = (
            model.transformer.wte.weight,
            model.transformer.wpe.weight if 'wpe' in model.transformer else None,
        )
        self.rope = (model.rope_cos, model.rope_sin) if self.wpe is None else None
        self.blocks = [
            (
                vectors(b.ln_1),
                matrix(b.attn.c_attn, alone),
                matrix(b.attn.c_proj, alone),
                vectors(b.ln_2),
                matrix(b.mlp.c_fc, alone),
                matrix(b.mlp.c_proj, alone),
            )
            for b in model.transformer.h
        ]
        self.qk_norms = (
            [b.attn.qk_scale().float() for b in model.transformer.h]
            if self.config.qk_norm
            else [None] * len(self.blocks)
        )
        self.activation = model.transformer.h[0].mlp.activate

    @torch.autocast('cpu', enabled=False)  # matrix has seen to it
    def step(self, tokens, cache):
        """Logits (B, vocab_size) of the next token, after tokens (B,)."""
        c, B, at = self.config, len(tokens), cache.longest
        H, KV, D = c.n_head, c.n_kv_head, c.head_dim
        positions, mask = cache.plan(1)
        if mask is not None:
            mask = mask.expand(B, 1, H // KV, at + 1)
        x = F.embedding(tokens, self.wte).float()
        if self.wpe is not None:
            x = x + self.wpe[positions[:, 0]].float()
        else:
            cos, sin = (t[positions[:, 0], None] for t in self.rope)
        for layer, ((ln_1, c_attn, attn_proj, ln_2, c_fc, mlp_proj), qk_norm) in enumerate(
            zip(self.blocks, self.qk_norms)
        ):
            qkv = c_attn(ln_1(x)).view(B, H + 2 * KV, D)
            qk, v = qkv.split_with_sizes((H + KV, KV), 1)
            if qk_norm is not None:
                qk = F.rms_norm(qk, (D,), eps=c.norm_eps).mul_(qk_norm)
            if self.rope:
                qk = rotate(qk, cos, sin)
            q, k = qk.split_with_sizes((H, KV), 1)
            k, v = cache.write(layer, k[:, :, None], v[:, :, None], positions)
            y = F.scaled_dot_product_attention(q.reshape(B, KV, H // KV, D), k, v, attn_mask=mask)
            x = x + attn_proj(y.view(B, H * D))
            x = x + mlp_proj(self.activation(c_fc(ln_2(x))))
        cache.advance(1, None)
        return self.head(self.ln_f(x))


def vectors(ln):
    """A norm as a function on float32."""
    norm, shape, eps = (
        F.rms_norm if isinstance(ln, RMSNorm) else F.layer_norm,
        (ln.weight.numel(),),
        ln.eps,
    )
    scale = (
        [ln.weight.float()]
        if isinstance(ln, RMSNorm) or ln.bias is None
        else [ln.weight.float(), ln.bias.float()]
    )
    return lambda x: norm(x, shape, *scale, eps=eps)


def matrix(linear, alone):
    """A linear layer as a function from float32 to float32. What counts is how fast its weight is read, here on two cores of an
    AVX512-BF16 server: bfloat16 as it is 25 GB/s, packed once by oneDNN 38, float16 43, but that for a single row alone."""
    dtype = linear.weight.dtype if linear.weight.is_floating_point() else torch.float32
    if (
        type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks
    ):  # quantized, or someone's own
        return lambda x: linear(x.to(dtype)).float()
    dtype = torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else dtype
    dtype = torch.float16 if alone and dtype == torch.bfloat16 else dtype
    weight, bias = (
        linear.weight.detach().to(dtype),
        None if linear.bias is None else linear.bias.detach().to(dtype),
    )
    if (
        dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        packed, product = (
            torch.ops.mkldnn._reorder_linear_weight(weight, 16),
            torch.ops.mkldnn._linear_pointwise,
        )
        return lambda x: product(x.to(dtype), packed, bias, 'none', [], '').float()
    return lambda x: F.linear(x.to(dtype), weight, bias).float()


def choose(logits, seen, temperature, top_k, top_p, min_p, repetition_penalty, generator):
    """The next token of each row, (B,) int64, from logits (B, vocab_size) float32; seen: bool, the tokens so far."""
    if repetition_penalty != 1.0:
        logits = torch.where(
            seen,
            torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty),
            logits,
        )
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits, ids = (logits - logits.max(dim=-1, keepdim=True).values) / temperature, None
    if top_k is not None and top_k < logits.shape[-1]:
        logits, ids = logits.topk(top_k)
    elif top_p is not None and top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True)
    p = logits.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        beyond = p.cumsum(dim=-1) - p >= top_p
        beyond[:, 0] = False  # the first token stays, whatever its probability
        p = p.masked_fill(beyond, 0)
    if min_p is not None:
        p = p.masked_fill(p < min_p * p.max(dim=-1, keepdim=True).values, 0)
    # one uniform draw a row, looked up in the cumulative probabilities: multinomial draws one a token
    edges = p.cumsum(dim=-1)
    if not edges[:, -1].isfinite().all():
        raise ValueError('the logits are not finite: nothing can be drawn from them')
    draw = torch.rand(p.shape[0], 1, generator=generator, device=p.device) * edges[:, -1:]
    place = torch.searchsorted(edges, draw, right=True).clamp(max=p.shape[-1] - 1)
    return (place if ids is None else ids.gather(1, place))[:, 0]
