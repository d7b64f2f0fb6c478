"""What each head of a model looks at: the attention of a text, and a picture of it."""

import math
import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fledge import UserError, replacing
from fledge.tokenizer import Tokenizer
from model import GPT, CausalSelfAttention

MOST_TOKENS = 64  # in a picture
MOST_INCHES = 30  # of a picture's longer side
TOKEN_INCHES = 0.16  # of each token, where there is room
LABEL_INCHES = 0.1  # of its label, which is left out where tokens are closer
LABEL_CHARACTERS = 12
GAP_INCHES = 1.6  # between the parts of a picture
FONT = 'DejaVu Sans Mono'  # matplotlib's own, at hand everywhere


@dataclass
class Maps:
    """The attention of some layers, as one part of a picture."""

    title: str
    layers: list[Tensor]  # probabilities, each (n_head, len(queries), len(keys))
    queries: list[bytes]  # the tokens that read
    keys: list[bytes]  # the tokens that are read


@torch.no_grad()
def attention_of(
    model: GPT,
    idx: Tensor,
    modules: list[CausalSelfAttention] | None = None,
    source: Tensor | None = None,
) -> list[Tensor]:
    """The attention probabilities of a text: n_layer tensors (n_head, T, T), on idx's device.

    idx: (1, T) int64. Entry [h, i, j] is how much of token j the head h reads at token i; each row
    sums to 1. They are those of the forward pass itself, by whatever attention model.py has. Call
    it in eval mode. modules: of which attention, None: self-attention; source: (1, S) int64, of an
    encoder-decoder, whose cross-attention is (n_head, T, S) and whose encoder's (n_head, S, S).
    ValueError for T or S beyond block_size.
    """
    layers = []

    def keep_probabilities(attention):
        attend = attention.attend

        def attend_and_keep(q, k, v, mask):
            # attention gives probabilities @ values: of an identity matrix the probabilities
            identity = torch.eye(k.shape[2], device=k.device).expand(*k.shape[:2], -1, -1)
            probabilities = CausalSelfAttention.attend(attention, q, k, identity, mask)
            layers.append(probabilities[0])
            return attend(q, k, v, mask)

        attention.attend = attend_and_keep  # this one's, in front of its class's

    attentions = modules or [block.attn for block in model.transformer.h]
    for attention in attentions:
        keep_probabilities(attention)
    try:
        model.hidden(idx, source=source)
    finally:
        for attention in attentions:
            del attention.attend
    return layers


def draw_attention(model: GPT, tokenizer: Tokenizer, ids: list[int], path: str) -> None:
    """Write the attention of token ids as a PNG at path: see attention_of and draw.

    A long text's first MOST_TOKENS are drawn, which it says in one line: they see no later ones. Of
    an encoder-decoder ids are the source: its greedy target is drawn with it, and what of the
    source each token of the target reads. UserError where path cannot be written, and for a token
    that the model does not have.
    """
    n_most = min(MOST_TOKENS, model.config.block_size)
    if len(ids) > n_most:
        print(f'{path}: the first {n_most} of {len(ids)} tokens', file=sys.stderr)
    if max(ids) >= model.config.vocab_size:
        raise UserError(f'token {max(ids)} is beyond the vocabulary of the model')
    device = model.transformer.wte.weight.device
    tokens = [tokenizer.token_bytes.get(i, b'') for i in ids[:n_most]]
    if not model.config.n_encoder_layer:
        idx = torch.tensor([ids[:n_most]], device=device)
        draw([Maps('', attention_of(model, idx), tokens, tokens)], path)
        return
    source = torch.tensor([ids], device=device)  # all of it: an encoder sees what is not drawn
    start, options = [[tokenizer.end_of_text]], dict(temperature=0, stop=tokenizer.end_of_text)
    target = model.generate(start, n_most, source=source, **options)[0][:-1]  # what was read
    idx = torch.tensor([target], device=device)
    said = [tokenizer.token_bytes.get(i, b'') for i in target]
    encoder = [block.attn for block in model.transformer.encoder]
    cross = [block.cross_attn for block in model.transformer.h]
    parts = []
    for title, modules, queries, keys in (
        ('self-attention of the encoder', encoder, tokens, tokens),
        ('self-attention of the decoder', None, said, said),
        ('cross-attention', cross, said, tokens),
    ):
        layers = attention_of(model, idx, modules, source)
        shown = [layer[:, : len(queries), : len(keys)] for layer in layers]
        parts.append(Maps(title, shown, queries, keys))
    draw(parts, path)


def draw(parts: list[Maps], path: str) -> None:
    """Write attention as a PNG at path: a row of heat maps a layer, and in it one a head.

    The parts are one below the other. UserError where path cannot be written.
    """
    from matplotlib.figure import Figure  # without pyplot: faster to import, and never a window

    pictures = [in_one_picture(maps.layers) for maps in parts]
    n_rows = sum(len(picture) for picture in pictures)
    n_columns = max(picture.shape[1] for picture in pictures)
    token_inches = min(TOKEN_INCHES, MOST_INCHES / max(n_rows, n_columns))
    width = token_inches * n_columns
    height = token_inches * n_rows + GAP_INCHES * (len(parts) - 1)
    figure, top = Figure((width, height)), height
    for maps, picture in zip(parts, pictures, strict=True):
        part_height, part_width = (token_inches * n for n in picture.shape)
        place = (0, (top - part_height) / height, part_width / width, part_height / height)
        image = draw_part(figure.add_axes(place), maps, picture, token_inches)
        top -= part_height + GAP_INCHES
    bar = figure.add_axes((1 + 0.8 / width, 0, 0.15 / width, 1))
    figure.colorbar(image, cax=bar, label='probability')
    try:
        with replacing(path, 'wb') as f:
            figure.savefig(f, format='png', dpi=100, bbox_inches='tight')
    except OSError as e:
        raise UserError(f'{path} cannot be written: {e.strerror}') from None


def in_one_picture(layers: list[Tensor]) -> np.ndarray:
    """The maps of all layers and heads as one array, with NaN between them."""
    n_head, n_queries, n_keys = layers[0].shape
    picture = np.full((len(layers) * (n_queries + 1), n_head * (n_keys + 1)), np.nan)
    for layer, heads in enumerate(layers):
        for head, probabilities in enumerate(heads.float().cpu().numpy()):
            top, left = layer * (n_queries + 1), head * (n_keys + 1)
            picture[top : top + n_queries, left : left + n_keys] = probabilities
    return picture[:-1, :-1]  # nothing is behind the last gaps


def draw_part(axes: object, maps: Maps, picture: np.ndarray, token_inches: float) -> object:
    """Draw maps, which in_one_picture() has joined, with names of tokens, heads and layers."""
    from matplotlib.colors import PowerNorm

    n_layer, n_head = len(maps.layers), len(maps.layers[0])
    axes.set_facecolor('silver')  # the colour of the gaps
    # most probabilities are small, and their square roots differ more
    norm = PowerNorm(0.5, vmin=0, vmax=1)
    image = axes.imshow(picture, norm=norm, cmap='Blues', aspect='auto')
    axes.set(xlabel='token that is read', ylabel='token that reads')
    step = math.ceil(LABEL_INCHES / token_inches)  # from a token with a label to the next
    name_tokens(axes.xaxis, maps.keys, n_head, step, rotation=90)
    name_tokens(axes.yaxis, maps.queries, n_layer, step)
    head_axis, layer_axis = axes.secondary_xaxis('top'), axes.secondary_yaxis('right')
    map_width, map_height = len(maps.keys) + 1, len(maps.queries) + 1  # with the gap behind it
    head_axis.set_xticks((np.arange(n_head) + 0.5) * map_width - 1, range(n_head))
    layer_axis.set_yticks((np.arange(n_layer) + 0.5) * map_height - 1, range(n_layer))
    head_axis.set_xlabel(f'{maps.title}: head' if maps.title else 'head')
    layer_axis.set_ylabel('layer')
    return image


def name_tokens(axis: object, tokens: list[bytes], n_maps: int, step: int, **look) -> None:
    """Put the label of every step-th token at an axis, along each of its n_maps heat maps."""
    shown = range(0, len(tokens), step)
    width = len(tokens) + 1  # of a map and the gap behind it
    places = [number * width + i for number in range(n_maps) for i in shown]
    labels = [label(tokens[i]) for i in shown]
    # a $ is no formula
    axis.set_ticks(places, labels * n_maps, fontsize=7, family=FONT, parse_math=False, **look)


def label(token: bytes) -> str:
    """A token's bytes as a short text: escapes stand for what the font lacks, a space is seen."""
    from matplotlib import font_manager

    known = font_manager.get_font(font_manager.findfont(FONT)).get_charmap()
    text = ''
    for character in token.decode(errors='backslashreplace').replace(' ', '␣'):
        is_known = ord(character) in known
        text += character if is_known else character.encode('unicode_escape').decode()
    return text if len(text) <= LABEL_CHARACTERS else text[: LABEL_CHARACTERS - 1] + '…'
