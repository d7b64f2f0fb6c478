"""The Transformer of 2017, of model.py's blocks: an encoder reads a source, a decoder looks at it.

Vaswani et al. 2017, Attention Is All You Need, arXiv:1706.03762. With position='sinusoidal',
norm='layernorm', activation='relu', bias=True and norm_first=False it is the paper's own; with
GPTConfig's other switches it is what today's blocks make of it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from model import (
    GPT,
    Block,
    CausalSelfAttention,
    Context,
    GPTConfig,
    KVCache,
    norm,
    pad,
    place_documents,
)


def make_model(config: GPTConfig) -> GPT:
    """A new model: an EncoderDecoder where config has n_encoder_layer, else a GPT."""
    return EncoderDecoder(config) if config.n_encoder_layer else GPT(config)


@dataclass
class Source:
    """What the decoder looks at, so that the encoder runs once for all tokens that are generated.

    keys, values: (layers of the decoder, B, n_kv_head, S, head_dim). mask: (B, 1, T or 1, S) bool,
    True where a token of the source is seen.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor

    def select(self, rows: Tensor) -> 'Source':
        """A Source of these rows, (n,) int64, in this order."""
        return Source(self.keys[:, rows], self.values[:, rows], self.mask[rows])


def join(sources: list[Source]) -> Source:
    """One Source of those of several texts, all (1, 1, 1, S) in mask."""
    longest = max(source.mask.shape[-1] for source in sources)
    keys, values, masks = [], [], []
    for source in sources:
        n_more = longest - source.mask.shape[-1]
        keys.append(F.pad(source.keys, (0, 0, 0, n_more)))
        values.append(F.pad(source.values, (0, 0, 0, n_more)))
        masks.append(F.pad(source.mask, (0, n_more)))
    return Source(torch.cat(keys, dim=1), torch.cat(values, dim=1), torch.cat(masks))


class CrossAttention(CausalSelfAttention):
    """Queries of the target's tokens; keys and values of the source's.

    It attends as self-attention does, but no token of the source lies in the future.
    """

    causal = False

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__(config, layer)
        # its one matrix for all three gives way: queries are of one text, the others of another
        n_q, n_kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        self.q_attn = nn.Linear(config.n_embd, n_q, bias=config.qkv_bias)
        self.c_attn = nn.Linear(config.n_embd, 2 * n_kv, bias=config.qkv_bias)
        self.c_attn.stacked = [n_kv, n_kv]

    def forward(self, x: Tensor, context: Context) -> Tensor:
        B, T, _ = x.shape
        q = self.q_attn(x).view(B, T, self.n_head, self.head_dim)
        if self.qk_norm:
            q = self.q_norm(q)
        q = q.transpose(1, 2)  # (B, n_head, T, head_dim)
        source = context.source
        k, v = source.keys[self.layer], source.values[self.layer]
        y = self.attend(q, k, v, source.mask)  # (B, n_head, T, head_dim)
        y = y.transpose(1, 2).reshape(B, T, -1)  # (B, T, n_head * head_dim)
        return self.resid_dropout(self.c_proj(y))  # (B, T, n_embd)

    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each (B, n_kv_head, S, head_dim), of what the encoder made of a source.

        x: (B, S, n_embd).
        """
        B, S, _ = x.shape
        k, v = self.c_attn(x).view(B, S, -1, self.head_dim).chunk(2, dim=2)
        if self.qk_norm:
            k = self.k_norm(k)
        return k.transpose(1, 2), v.transpose(1, 2)


class EncoderDecoder(GPT):
    def parts(self, config: GPTConfig) -> dict[str, nn.Module]:
        parts = super().parts(config)
        encoder = [Block(config, layer) for layer in range(config.n_encoder_layer)]
        for block in encoder:
            block.attn.causal = False
        parts['encoder'] = nn.ModuleList(encoder)
        parts['ln_encoder'] = norm(config) if config.norm_first else nn.Identity()
        for layer, block in enumerate(parts['h']):
            block.ln_cross = norm(config)
            block.cross_attn = CrossAttention(config, layer)
        return parts

    @property
    def blocks(self) -> list[Block]:
        return [*self.transformer.encoder, *self.transformer.h]

    def hidden(
        self,
        idx: Tensor,
        cache: KVCache | None = None,
        lengths: Tensor | None = None,
        documents: Tensor | None = None,
        source: Tensor | Source | None = None,
        source_documents: Tensor | None = None,
    ) -> Tensor:
        """GPT.hidden, where source is what the encoder reads: (B, S) int64, -1 where it is padding.

        Or a Source, which encode made of it before. source_documents: (B, S) int64, -1 for padding,
        the number of the document in `documents` whose source each token is in, where rows are
        packed with several. ValueError for S beyond block_size, and where there is no source.
        """
        if source is None:
            raise ValueError('an encoder-decoder needs a source')
        if torch.is_tensor(source):
            source = self.encode(source, source_documents, documents)
        return super().hidden(idx, cache, lengths, documents, source)

    def encode(
        self,
        source: Tensor,
        source_documents: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Source:
        """The Source that the encoder makes of token ids: see hidden."""
        positions = torch.arange(source.shape[1], device=source.device)[None]  # (1, S)
        mask = seen = (source >= 0)[:, None, None]  # (B, 1, 1, S)
        if source_documents is not None:
            positions, _ = place_documents(source_documents)
            of_key = source_documents[:, None, None]  # (B, 1, 1, S)
            mask = source_documents[:, None, :, None] == of_key  # (B, 1, S, S)
            of_query = documents[:, None, :, None]  # (B, 1, T, 1)
            seen = (of_query == of_key) | (of_query < 0)  # what is padding sees all, not nothing
        x = self.run(self.transformer.encoder, source.clamp(min=0), Context(positions, mask=mask))
        x = self.transformer.ln_encoder(x)  # (B, S, n_embd)
        read = [block.cross_attn.read(x) for block in self.transformer.h]
        return Source(*map(torch.stack, zip(*read, strict=True)), seen)

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor | list[list[int]],
        max_new_tokens: int,
        *sampling,
        source: Tensor | Source | list[list[int]],
        num_beams: int = 1,
        length_penalty: float = 1.0,
        stop: int | Iterable[int] | None = None,
        **options,
    ) -> Tensor | list[list[int]]:
        """GPT.generate, where source is as in hidden, or B lists of token ids.

        num_beams: above 1 nothing is drawn, but searched (see beam_search, for length_penalty too).
        """
        if not isinstance(source, Source):
            if not torch.is_tensor(source):
                if not all(source):
                    raise ValueError('a source is empty: it needs one token at least')
                source = pad(source, self.transformer.wte.weight.device, filler=-1)
            source = self.encode(source)
        if num_beams == 1:
            options |= dict(source=source, stop=stop)
            return super().generate(idx, max_new_tokens, *sampling, **options)
        rows = idx.tolist() if torch.is_tensor(idx) else idx
        rows = beam_search(self, rows, max_new_tokens, num_beams, length_penalty, stop, source)
        return pad(rows, idx.device) if torch.is_tensor(idx) else rows


class Beam(NamedTuple):
    """A continuation in a beam search, as far as it has come."""

    score: float  # the sum of its log probabilities
    ids: list[int]  # of its new tokens
    parent: int  # the place among all beams of the one that it goes on from


@torch.no_grad()
def beam_search(
    model: GPT,
    rows: list[list[int]],
    max_new_tokens: int,
    num_beams: int,
    length_penalty: float = 1.0,
    stop: int | Iterable[int] | None = None,
    source: Source | None = None,
) -> list[list[int]]:
    """How each of some lists of token ids goes on best, as far as num_beams at a time can tell.

    A continuation is worth the sum of its log probabilities over its length ** length_penalty; what
    counts, and when to stop, is as in transformers by default. stop: a token id or several, kept as
    the last. source: a Source, of as many rows. Any GPT will do. Returns such lists; ValueError for
    logits that are not finite.
    """
    n, limit, device = num_beams, model.config.block_size, model.transformer.wte.weight.device
    stop_tokens = {stop} if isinstance(stop, int) else set(stop or ())
    prompts = [row[-limit:] for row in rows for _ in range(n)]
    longest = max(map(len, prompts))
    n_tokens = min(max_new_tokens, limit - longest + 1)  # a beam ends where the context does
    if n_tokens < 1:
        return [list(row) for row in rows]
    if source is not None:
        source = source.select(torch.arange(len(rows), device=device).repeat_interleave(n))
    cache, logits = model.prefill(prompts, longest + n_tokens - 1, source)

    def worth(beam):
        return beam.score / len(beam.ids) ** length_penalty

    # the beams of a row are alike still, and one of them counts
    beams = [Beam(-math.inf if i % n else 0.0, [], i) for i in range(len(prompts))]
    ended = [[] for _ in rows]  # the n beams of each row that are worth most, best first
    settled = [False] * len(rows)  # whether no beam of a row can become better than those
    n_candidates = (1 + max(1, len(stop_tokens))) * n  # so that n go on, however many stop
    for length in range(1, n_tokens + 1):
        logs = logits.float().log_softmax(dim=-1)  # (B * n, vocab_size)
        if logs.isnan().any():
            raise ValueError('the logits are not finite: no token can be chosen by them')
        scores = torch.tensor([beam.score for beam in beams], device=device)
        sums = (scores[:, None] + logs).view(len(rows), -1)  # (B, n * vocab_size)
        best = sums.topk(min(n_candidates, sums.shape[1]))  # best first, which the rest relies on
        best_scores, places, going = best.values.tolist(), best.indices.tolist(), []
        for row in range(len(rows)):
            row_going = []
            for rank, place in enumerate(places[row]):
                parent, token = row * n + place // logs.shape[1], place % logs.shape[1]
                beam = Beam(best_scores[row][rank], [*beams[parent].ids, token], parent)
                if token not in stop_tokens and length < n_tokens:
                    row_going.append(beam)
                elif rank < n and not settled[row]:
                    ended[row].append(beam)
            going += row_going[:n]
            ended[row] = sorted(ended[row], key=worth, reverse=True)[:n]
            if row_going and len(ended[row]) == n and worth(row_going[0]) <= worth(ended[row][-1]):
                settled[row] = True
        if length == n_tokens or all(settled) or not going:
            break
        beams = going
        cache.select(torch.tensor([beam.parent for beam in beams], device=device))
        last = torch.tensor([beam.ids[-1] for beam in beams], device=device)
        logits = model(last[:, None], cache=cache, source=source)[0][:, -1]
    return [row + of_row[0].ids for row, of_row in zip(rows, ended, strict=True)]
