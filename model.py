"""GPT: the architecture, its KV cache and generation, in plain torch.

GPTConfig's defaults are GPT-2's (Radford et al. 2019, Language Models are Unsupervised Multitask
Learners), its switches span Llama, Qwen2 and Qwen3, and the parameter names are nanoGPT's.
encoder_decoder.py makes the Transformer of 2017 out of these blocks.
"""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor
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
    n_inner: int = 0  # width of the MLP; 0: 4 n_embd, or 8/3 n_embd where the activation is gated
    position: str = 'learned'  # learned, rope, sinusoidal
    rope_theta: float = 10000.0  # base of RoPE's wavelengths
    rope_scaling: dict | None = None  # as in Hugging Face's config.json; see rope_tables
    norm: str = 'layernorm'  # layernorm, rmsnorm
    norm_eps: float = 1e-5
    norm_first: bool = True  # False: behind attention and MLP, as in 2017
    activation: str = 'gelu'  # a row of ACTIVATIONS
    qkv_bias: bool | None = None  # None: as bias (Qwen2 has biases there alone)
    qk_norm: bool = False  # RMSNorm on each head's queries and keys
    tie_embeddings: bool = True  # the head is the token embedding
    n_encoder_layer: int = 0  # depth of an encoder: see encoder_decoder.py

    def __post_init__(self):
        check_config(self)
        # what is settled here, checkpoint.model_args knows as well
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        if self.qkv_bias is None:
            self.qkv_bias = self.bias
        if self.n_inner == 0:
            gated, _ = ACTIVATIONS[self.activation]
            # a gated MLP has three matrices in place of two, so its 4 n_embd are 8/3
            self.n_inner = math.ceil(self.n_embd * 8 / 3 / 64) * 64 if gated else 4 * self.n_embd


class RMSNorm(nn.RMSNorm):  # Zhang and Sennrich 2019, arXiv:1910.07467
    def forward(self, x: Tensor) -> Tensor:
        # torch's fused kernel wants one type, and under autocast x is in 16 bits, the weight in 32
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def norm(config: GPTConfig) -> nn.Module:
    if config.norm == 'rmsnorm':
        return RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: turn each pair (i, i + head_dim / 2) of x (B, T, heads, head_dim) by an angle.

    cos, sin: (B or 1, T, 1, head_dim), the first half of the sines negative (see rope_tables).
    """
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


@dataclass
class Context:
    """What attention needs to know besides its input."""

    positions: Tensor  # (B or 1, T), of each token in its row
    rope: tuple[Tensor, Tensor] | None = None  # RoPE's cosines and sines there (see rotate)
    mask: Tensor | None = None  # (B or 1, 1, T, keys), True: is seen; None: all before it
    cache: 'KVCache | None' = None  # keys and values of earlier tokens
    source: object = None  # an encoder_decoder.Source, which cross-attention looks at


class CausalSelfAttention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245)."""

    causal = True  # False in an encoder, where each token sees those behind it too

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer  # its place in the KV cache
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim = config.head_dim
        self.qk_norm = config.qk_norm
        n_q, n_kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        self.c_attn = nn.Linear(config.n_embd, n_q + 2 * n_kv, bias=config.qkv_bias)
        self.c_attn.stacked = [n_q, n_kv, n_kv]  # rows of each: Muon takes them one by one
        self.c_proj = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        if config.qk_norm:  # Henry et al. 2020, arXiv:2010.04245
            self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        B, T, _ = x.shape
        qkv = self.c_attn(x).view(B, T, -1, self.head_dim)  # (B, T, all heads, head_dim)
        q, k, v = qkv.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=2)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if context.rope is not None:
            q, k = rotate(q, *context.rope), rotate(k, *context.rope)
        q = q.transpose(1, 2)  # (B, n_head, T, head_dim)
        k = k.transpose(1, 2)  # (B, n_kv_head, T, head_dim)
        v = v.transpose(1, 2)  # (B, n_kv_head, T, head_dim)
        if context.cache is not None:  # (B, n_kv_head, keys, head_dim)
            k, v = context.cache.write(self.layer, k, v, context.positions)
        y = self.attend(q, k, v, context.mask)  # (B, n_head, T, head_dim)
        y = y.transpose(1, 2).reshape(B, T, -1)  # (B, T, n_head * head_dim)
        return self.resid_dropout(self.c_proj(y))  # (B, T, n_embd)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k = q.to(v.dtype), k.to(v.dtype)
        dropout = self.resid_dropout.p if self.training else 0.0
        grouped, causal = self.n_head != self.n_kv_head, self.causal and mask is None
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=grouped
        )


# name: (gated, function). A gated MLP multiplies function(gate) by a second projection, `up`.
ACTIVATIONS = {
    'gelu': (False, F.gelu),
    'gelu_tanh': (False, lambda x: F.gelu(x, approximate='tanh')),
    'relu': (False, F.relu),
    'relu2': (False, lambda x: F.relu(x).square()),  # So et al. 2021, arXiv:2109.08668
    'swiglu': (True, F.silu),  # Shazeer 2020, arXiv:2002.05202
}


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.activation = config.activation
        gated, _ = ACTIVATIONS[config.activation]
        width = 2 * config.n_inner if gated else config.n_inner  # gate and up in one matrix
        self.c_fc = nn.Linear(config.n_embd, width, bias=config.bias)
        if gated:  # rows of each, as in c_attn
            self.c_fc.stacked = [config.n_inner, config.n_inner]
        self.c_proj = nn.Linear(config.n_inner, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)  # (B, T, n_inner), or twice as wide where it is gated
        x = self.activate(x)  # (B, T, n_inner)
        return self.dropout(self.c_proj(x))  # (B, T, n_embd)

    def activate(self, x: Tensor) -> Tensor:
        gated, function = ACTIVATIONS[self.activation]
        if not gated:
            return function(x)
        gate, up = x.chunk(2, dim=-1)
        return function(gate) * up


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.norm_first = config.norm_first
        self.ln_1 = norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_cross = self.cross_attn = None  # in a decoder that looks at a source
        self.ln_2 = norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if self.norm_first:
            x = x + self.attn(self.ln_1(x), context)
            if self.cross_attn is not None:
                x = x + self.cross_attn(self.ln_cross(x), context)
            return x + self.mlp(self.ln_2(x))
        x = self.ln_1(x + self.attn(x, context))
        if self.cross_attn is not None:
            x = self.ln_cross(x + self.cross_attn(x, context))
        return self.ln_2(x + self.mlp(x))


class GPT(nn.Module):
    LOSS_ROWS = 2048  # tokens whose logits exist at once where nobody asked for logits

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # True: the backward pass computes each block again
        self.transformer = nn.ModuleDict(self.parts(config))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:  # Press and Wolf 2016, arXiv:1608.05859
            self.transformer.wte.weight = self.lm_head.weight
        if config.position == 'rope':
            for name, table in zip(('rope_cos', 'rope_sin'), rope_tables(config), strict=True):
                self.register_buffer(name, table, persistent=False)
        if config.position == 'sinusoidal':
            self.register_buffer('sinusoids', sinusoidal_table(config), persistent=False)
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith('c_proj.weight'):  # GPT-2: more layers add no more variance
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))

    def parts(self, config: GPTConfig) -> dict[str, nn.Module]:
        """What the model is made of besides its head, by name."""
        parts = {'wte': nn.Embedding(config.vocab_size, config.n_embd)}
        if config.position == 'learned':
            parts['wpe'] = nn.Embedding(config.block_size, config.n_embd)
        parts['drop'] = nn.Dropout(config.dropout)
        parts['h'] = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        # without norm_first the last block has ended in a norm
        parts['ln_f'] = norm(config) if config.norm_first else nn.Identity()
        return parts

    @property
    def blocks(self) -> list[Block]:
        """All blocks, of which an encoder-decoder has two kinds."""
        return list(self.transformer.h)

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        return_logits: bool = True,
        cache: 'KVCache | None' = None,
        lengths: Tensor | None = None,
        documents: Tensor | None = None,
        reduction: str = 'mean',
        **source,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits and mean cross entropy (nats a token): a pair (logits, loss).

        idx: (B, T) int64. targets: (B, T) int64, -1 where nothing is to be predicted. With targets,
        logits are (B, T, vocab_size), or None with return_logits=False: the loss then never holds
        all of them. Without, they are the last token's, (B, 1, vocab_size), and the loss is None.
        cache: a KVCache; idx goes on from what it holds. lengths: (B,) int64, how many of a row's T
        tokens are real where rows are padded on the right. documents: (B, T) int64, the number of
        the document that each token is in: none sees another, and positions begin with each.
        reduction: 'none' leaves the loss of each token, (B, T). source: of an encoder-decoder, see
        EncoderDecoder.hidden. ValueError for T beyond block_size.
        """
        x = self.hidden(idx, cache, lengths, documents, **source)  # (B, T, n_embd)
        if targets is None:
            last = -1 if lengths is None else lengths - 1
            x = x[torch.arange(len(x), device=x.device), last][:, None]  # (B, 1, n_embd)
            return self.logits(x), None  # (B, 1, vocab_size)
        logits, flat = None, targets.flatten()
        if return_logits:
            logits = self.logits(x)  # (B, T, vocab_size)
            each = logits.flatten(0, 1).float()
            loss = F.cross_entropy(each, flat, ignore_index=-1, reduction=reduction)
        else:
            loss = self.loss(x.flatten(0, 1), flat, reduction)
        return logits, loss.view_as(targets) if reduction == 'none' else loss

    def hidden(
        self,
        idx: Tensor,
        cache: 'KVCache | None' = None,
        lengths: Tensor | None = None,
        documents: Tensor | None = None,
        source: object = None,
    ) -> Tensor:
        """What the head reads: (B, T, n_embd), after the final norm. For arguments see forward."""
        T = idx.shape[1]
        positions, mask = torch.arange(T, device=idx.device)[None], None  # (1, T)
        if cache is not None:
            positions, mask = cache.place(T)  # (B or 1, T) and (B or 1, 1, T, keys)
        elif documents is not None:
            positions, mask = place_documents(documents)  # (B, T) and (B, 1, T, T)
        context = Context(positions, mask=mask, cache=cache, source=source)
        x = self.run(self.transformer.h, idx, context)  # (B, T, n_embd)
        if cache is not None:
            cache.advance(T, lengths)
        return self.transformer.ln_f(x)

    def run(self, blocks: Iterable[Block], idx: Tensor, context: Context) -> Tensor:
        """Embed tokens (B, T) and take them through blocks: (B, T, n_embd)."""
        length, positions = idx.shape[1], context.positions
        if length > self.config.block_size:
            limit = self.config.block_size
            raise ValueError(f'{length} tokens are longer than block_size={limit}')
        x = self.embed(idx, positions)
        if self.config.position == 'rope':
            cos, sin = self.rope_cos[positions], self.rope_sin[positions]  # (B or 1, T, head_dim)
            context.rope = cos[:, :, None].to(x.dtype), sin[:, :, None].to(x.dtype)
        for block in blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, context, use_reentrant=False)
            else:
                x = block(x, context)
        return x

    def embed(self, idx: Tensor, positions: Tensor) -> Tensor:
        x = self.transformer.wte(idx)
        if self.config.position == 'learned':
            x = x + self.transformer.wpe(positions)
        if self.config.position == 'sinusoidal':
            x = x * math.sqrt(self.config.n_embd) + self.sinusoids[positions]
        return self.transformer.drop(x)

    def logits(self, x: Tensor) -> Tensor:
        return self.lm_head(x)  # (..., vocab_size)

    def loss(self, x: Tensor, targets: Tensor, reduction: str = 'mean') -> Tensor:
        """Cross entropy of the logits of x (N, n_embd): a float32 scalar, or (N,) with 'none'.

        Logits exist for LOSS_ROWS tokens at a time, and the backward pass makes them again: all of
        them may take more memory than the rest of a step. (fledge/cpu.py has a twin of this.)
        """
        chunks = zip(x.split(self.LOSS_ROWS), targets.split(self.LOSS_ROWS), strict=True)
        nats = torch.cat([checkpoint(self.nats, *chunk, use_reentrant=False) for chunk in chunks])
        return nats if reduction == 'none' else nats.sum() / (targets >= 0).sum().clamp(min=1)

    def nats(self, x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(x).float(), targets, ignore_index=-1, reduction='none')

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters; non_embedding leaves out learned positions, as nanoGPT counts."""
        n_params = sum(p.numel() for p in self.parameters())
        if non_embedding and self.config.position == 'learned':
            n_params -= self.transformer.wpe.weight.numel()
        return n_params

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor | list[list[int]],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        stop: int | Iterable[int] | None = None,
        seed: int | None = None,
        repetition_penalty: float = 1.0,
        source: object = None,
        **filters,
    ) -> Tensor | list[list[int]]:
        """Continue prompts by up to max_new_tokens tokens each; call it in eval mode.

        idx: (B, T) int64, and (B, T + n) comes back, rows that stopped early filled up with their
        stop token; or B lists of token ids, of any lengths, and such a list comes back.
        temperature, top_k and filters (top_p, min_p): see sample_token; repetition_penalty: see
        penalize. stop: a token id or several, kept as a row's last. seed: of the draws; None goes
        on with torch's. source: an encoder_decoder.Source of B rows.
        Once a row fills the context, its last block_size tokens are read again for each new one, as
        a plain forward would: exact, at the price of a forward pass a token.
        Raises ValueError for an empty prompt, and for logits that are not finite.
        """
        rows = idx.tolist() if torch.is_tensor(idx) else [list(map(int, row)) for row in idx]
        if not all(rows):
            raise ValueError('a prompt is empty: it needs one token at least')
        limit, device = self.config.block_size, self.transformer.wte.weight.device
        stop_tokens = {stop} if isinstance(stop, int) else set(stop or ())
        stopped = [False] * len(rows)
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        seen = torch.zeros(len(rows), self.config.vocab_size, dtype=torch.bool, device=device)
        for row, seen_row in zip(rows, seen, strict=True):
            seen_row[row] = True
        cache_length = min(max(map(len, rows)) + max_new_tokens, limit)
        cache, token = None, None
        n_cached = limit  # tokens of the longest row in the cache; limit: the rows are read anew
        for _ in range(max_new_tokens):
            if n_cached < limit:
                logits = self(token[:, None], cache=cache, source=source)[0][:, -1]
                n_cached += 1
            else:
                cache, logits = self.prefill([row[-limit:] for row in rows], cache_length, source)
                n_cached = min(max(map(len, rows)), limit)
            logits = penalize(logits.float(), seen, repetition_penalty)
            draws = torch.rand(len(rows), 1, generator=generator, device=device)
            token = sample_token(logits, draws, temperature, top_k, **filters)
            seen.scatter_(1, token[:, None], True)
            for i, new in enumerate(token.tolist()):
                if not stopped[i]:  # a row that has stopped runs on unheard beside the others
                    rows[i].append(new)
                    stopped[i] = new in stop_tokens
            if all(stopped):
                break
        return pad(rows, device) if torch.is_tensor(idx) else rows

    def prefill(
        self, rows: list[list[int]], cache_length: int, source: object = None
    ) -> 'tuple[KVCache, Tensor]':
        """Read lists of token ids, equal ones once: a KVCache of all, logits (B, vocab_size)."""
        rows = list(map(tuple, rows))
        unique = list(dict.fromkeys(rows)) if source is None else rows
        device = self.transformer.wte.weight.device
        padded = pad(unique, device, filler=0)
        lengths = torch.tensor([len(row) for row in unique], device=device)
        cache = self.make_cache(len(unique), cache_length)
        logits = self(padded, cache=cache, lengths=lengths, source=source)[0][:, -1]
        if source is not None:  # equal ones may look at different sources
            return cache, logits
        places = {row: i for i, row in enumerate(unique)}
        chosen = torch.tensor([places[row] for row in rows], device=device)
        cache.select(chosen)
        return cache, logits[chosen]

    def make_cache(self, batch_size: int, length: int) -> 'KVCache':
        """An empty KVCache, in the type and on the device that this model computes in."""
        weight = self.transformer.wte.weight
        dtype = weight.dtype
        if torch.is_autocast_enabled(weight.device.type):
            dtype = torch.get_autocast_dtype(weight.device.type)
        return KVCache(self.config, batch_size, length, dtype, weight.device)


class KVCache:
    """Keys and values of the tokens read so far, so that each is read once.

    Its tensors keep their shape and place: one compiled decode step serves a whole generation.
    keys, values: n_layer tensors (B, n_kv_head, length, head_dim). lengths: (B,) tokens in a row.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        length: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = 'cpu',
    ):
        shape = (batch_size, config.n_kv_head, length or config.block_size, config.head_dim)
        layers = range(config.n_layer)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.length = shape[2]
        self.empty = True

    def place(self, T: int) -> tuple[Tensor, Tensor | None]:
        """The positions (B, T) of T new tokens a row, and the mask (B, 1, T, length) of their keys.

        The mask is None while the cache is empty: the new tokens then see one another alone.
        """
        positions = self.lengths[:, None] + torch.arange(T, device=self.lengths.device)
        if self.empty:
            return positions, None
        key_positions = torch.arange(self.length, device=self.lengths.device)
        return positions, key_positions <= positions[:, None, :, None]

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Put k, v (B, n_kv_head, T, head_dim) at positions; returns all keys and values."""
        row = torch.arange(k.shape[0], device=k.device)[:, None, None]
        head = torch.arange(k.shape[1], device=k.device)[None, :, None]
        keys, values = self.keys[layer], self.values[layer]
        keys[row, head, positions[:, None]] = k.to(keys.dtype)
        values[row, head, positions[:, None]] = v.to(values.dtype)
        return (k, v) if self.empty else (keys, values)

    def advance(self, T: int, lengths: Tensor | None = None) -> None:
        """Count T tokens a row as read, or lengths (B,) of them where the rest was padding."""
        self.lengths += T if lengths is None else lengths
        self.empty = False

    def select(self, rows: Tensor) -> None:
        """Keep these rows (n,) int64, in this order; a row may be taken several times."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]
        self.lengths = self.lengths[rows]

    def rows(self, first: int, last: int) -> 'KVCache':
        """A KVCache of the rows first .. last - 1, which stay in this one's memory."""
        part = copy.copy(self)
        part.keys = [keys[first:last] for keys in self.keys]
        part.values = [values[first:last] for values in self.values]
        part.lengths = self.lengths[first:last]
        part.empty = not part.lengths.any()
        return part


def place_documents(documents: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's position in its document, (B, T), and which keys it sees, (B, 1, T, T) bool."""
    place = torch.arange(documents.shape[1], device=documents.device)
    begins = documents.diff(dim=1, prepend=documents[:, :1] - 1) != 0
    first = torch.where(begins, place, 0).cummax(dim=1).values  # where its document begins
    mask = (place >= first[:, None, :, None]) & (place <= place[:, None])
    return place - first, mask


def pad(rows: list[list[int]], device: torch.device | str, filler: int | None = None) -> Tensor:
    """Lists of token ids as one tensor (B, longest); behind a short one filler, None: its last."""
    width = max(map(len, rows))
    padded = []
    for row in rows:
        last = row[-1] if filler is None else filler
        padded.append([*row, *[last] * (width - len(row))])
    return torch.tensor(padded, device=device)


def penalize(logits: Tensor, seen: Tensor, repetition_penalty: float) -> Tensor:
    """Logits of which those of the tokens in seen, bool, of the same shape, are made smaller.

    Positive ones are divided by repetition_penalty (Keskar et al. 2019, arXiv:1909.05858).
    """
    if repetition_penalty == 1.0:
        return logits
    smaller = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
    return torch.where(seen, smaller, logits)


def sample_token(
    logits: Tensor,
    draws: Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """The next token of each row, (B,) int64, drawn from logits (B, vocab_size) float32.

    draws: (B, 1), a uniform random number from [0, 1) for each row. temperature: 0 takes the
    likeliest. top_k: only the k likeliest. top_p: the fewest that together have that probability
    (Holtzman et al. 2019, arXiv:1904.09751). min_p: those with at least that share of the
    likeliest's probability (Nguyen et al. 2024, arXiv:2407.01082). None: no limit. ValueError for
    logits that are not finite.
    """
    largest = logits.amax(dim=-1, keepdim=True)  # NaN where any is
    if not largest.isfinite().all():
        raise ValueError('the logits are not finite: no token can be chosen by them')
    if temperature < 1e-9:  # as good as 0, by which nothing can be divided
        return logits.argmax(dim=-1)
    logits = logits - largest
    ids = None  # of the columns, where they are sorted
    if top_k is not None and top_k < logits.shape[-1]:
        logits, ids = logits.topk(top_k)
    elif top_p is not None and top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True)
    p = (logits / temperature).softmax(dim=-1)
    if top_p is not None and top_p < 1:
        beyond = p.cumsum(dim=-1) - p >= top_p
        beyond[:, 0] = False  # the likeliest stays, whatever its probability
        p = p.masked_fill(beyond, 0)
    if min_p is not None:
        p = p.masked_fill(p < min_p * p.max(dim=-1, keepdim=True).values, 0)
    # one draw a row, looked up in the cumulative probabilities (multinomial takes one a token)
    cumulative = p.cumsum(dim=-1)
    column = torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)
    column = column.clamp(max=p.shape[-1] - 1)
    return (column if ids is None else ids.gather(1, column))[:, 0]


def sinusoidal_table(config: GPTConfig) -> Tensor:
    """Positions as sines and cosines (Vaswani et al. 2017), (block_size, n_embd) float32.

    Dimensions 2i and 2i + 1 are the sine and cosine of position / 10000 ** (2i / n_embd).
    """
    pairs = torch.arange(0, config.n_embd, 2, dtype=torch.float32)
    frequencies = 10000.0 ** -(pairs / config.n_embd)
    angles = torch.outer(torch.arange(config.block_size, dtype=torch.float32), frequencies)
    return torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1)


def rope_tables(config: GPTConfig) -> tuple[Tensor, Tensor]:
    """RoPE's cosines and signed sines (see rotate), two (block_size, head_dim) float32."""
    frequencies = rope_frequencies(config)
    angles = torch.outer(torch.arange(config.block_size, dtype=torch.float32), frequencies)
    return angles.cos().repeat(1, 2), torch.cat((-angles.sin(), angles.sin()), dim=1)


def rope_frequencies(config: GPTConfig) -> Tensor:
    """The angle by which each pair turns from one position to the next, (head_dim / 2,) float32.

    Su et al. 2021, arXiv:2104.09864. rope_scaling, which stretches the context that a model was
    trained with, has Hugging Face's names: 'rope_type' (linear, llama3), 'factor' and so on.
    """
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    frequencies = config.rope_theta ** -(pairs / config.head_dim)
    scaling = config.rope_scaling or {}
    rope_type = scaling.get('rope_type', scaling.get('type', 'default'))
    if rope_type == 'default':
        return frequencies
    if rope_type == 'linear':
        return frequencies / scaling['factor']
    if rope_type != 'llama3':
        raise ValueError(f'rope_scaling {rope_type!r} is none of linear, llama3')
    # long wavelengths are stretched, short ones kept, those between interpolated
    turns = scaling['original_max_position_embeddings'] * frequencies / (2 * math.pi)
    low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
    kept_share = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept_share + (1 - kept_share) / scaling['factor'])


def check_config(c: GPTConfig) -> None:
    """Raise ValueError for a GPTConfig that no model can have."""
    least = dict(block_size=1, vocab_size=1, n_layer=1, n_head=1, n_embd=1, rope_theta=1)
    least |= dict(n_kv_head=0, head_dim=0, n_inner=0, n_encoder_layer=0)
    for name, bound in least.items():
        if getattr(c, name) < bound:
            raise ValueError(f'{name}={getattr(c, name)} must be at least {bound}')
    choices = dict(position=('learned', 'rope', 'sinusoidal'), norm=('layernorm', 'rmsnorm'))
    choices['activation'] = tuple(ACTIVATIONS)
    for name, known in choices.items():
        if getattr(c, name) not in known:
            raise ValueError(f'{name}={getattr(c, name)!r} is none of {", ".join(known)}')
    if not c.head_dim and c.n_embd % c.n_head:
        raise ValueError(f'n_embd={c.n_embd} is not divisible by n_head={c.n_head}')
    if c.n_kv_head and c.n_head % c.n_kv_head:
        raise ValueError(f'n_head={c.n_head} is not divisible by n_kv_head={c.n_kv_head}')
    head_dim = c.head_dim or c.n_embd // c.n_head
    if c.position == 'rope' and head_dim % 2:
        raise ValueError(f'head_dim={head_dim} is odd, and RoPE turns pairs')
    if c.position == 'sinusoidal' and c.n_embd % 2:
        raise ValueError(f'n_embd={c.n_embd} is odd, and sines and cosines are pairs')
    if not 0 <= c.dropout < 1:
        raise ValueError(f'dropout={c.dropout} is not in [0, 1)')
