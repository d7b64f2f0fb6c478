"""The encoder-decoder: against torch's nn.Transformer and transformers' Marian, cache, beams."""

import pytest
import torch
from torch import nn

from encoder_decoder import EncoderDecoder
from fledge import cpu
from model import GPTConfig

PAPER = dict(
    block_size=32,
    vocab_size=41,
    n_layer=2,
    n_encoder_layer=3,
    n_head=4,
    n_embd=32,
    n_inner=48,
    position='sinusoidal',
    norm_first=False,
    activation='relu',
)


def paper_model(**changes):
    torch.manual_seed(0)
    model = EncoderDecoder(GPTConfig(**PAPER | changes)).eval()
    for p in model.parameters():  # far from the small ones of a new model, biases too
        nn.init.normal_(p, std=0.15)
    return model


def sources(lengths, seed=1, vocab_size=41):
    """A row of token ids for each length, filled up with -1."""
    torch.manual_seed(seed)
    source = torch.full((len(lengths), max(lengths)), -1)
    for row, length in zip(source, lengths, strict=True):
        row[:length] = torch.randint(1, vocab_size, (length,))
    return source


def attention_weights(query, key_and_value, out):
    """nn.MultiheadAttention's tensors of ours."""
    return {
        'in_proj_weight': torch.cat([query[0], key_and_value[0]]),
        'in_proj_bias': torch.cat([query[1], key_and_value[1]]),
        'out_proj.weight': out.weight,
        'out_proj.bias': out.bias,
    }


def torch_layer(block):
    """The tensors of an nn.TransformerEncoderLayer or DecoderLayer of a Block of ours."""
    n = block.attn.c_attn.in_features
    weight, bias = block.attn.c_attn.weight, block.attn.c_attn.bias
    attention = attention_weights((weight[:n], bias[:n]), (weight[n:], bias[n:]), block.attn.c_proj)
    tensors = {f'self_attn.{name}': tensor for name, tensor in attention.items()}
    norms = [block.ln_1, block.ln_2]
    if block.cross_attn is not None:
        cross = block.cross_attn
        query = cross.q_attn.weight, cross.q_attn.bias
        attention = attention_weights(query, (cross.c_attn.weight, cross.c_attn.bias), cross.c_proj)
        tensors |= {f'multihead_attn.{name}': tensor for name, tensor in attention.items()}
        norms = [block.ln_1, block.ln_cross, block.ln_2]
    for number, norm in enumerate(norms, 1):
        tensors |= {f'norm{number}.weight': norm.weight, f'norm{number}.bias': norm.bias}
    for number, layer in enumerate((block.mlp.c_fc, block.mlp.c_proj), 1):
        tensors |= {f'linear{number}.weight': layer.weight, f'linear{number}.bias': layer.bias}
    return tensors


@pytest.mark.parametrize('fast', [False, True])
@pytest.mark.parametrize('norm_first', [False, True])
def test_it_computes_what_torchs_transformer_computes(norm_first, fast):
    model = paper_model(norm_first=norm_first)
    theirs = nn.Transformer(
        d_model=32,
        nhead=4,
        num_encoder_layers=3,
        num_decoder_layers=2,
        dim_feedforward=48,
        dropout=0.0,
        batch_first=True,
        norm_first=norm_first,
    ).eval()
    for ours, layers in (
        (model.transformer.encoder, theirs.encoder.layers),
        (model.transformer.h, theirs.decoder.layers),
    ):
        for block, layer in zip(ours, layers, strict=True):
            layer.load_state_dict(torch_layer(block))
    if norm_first:
        theirs.encoder.norm.load_state_dict(model.transformer.ln_encoder.state_dict())
        theirs.decoder.norm.load_state_dict(model.transformer.ln_f.state_dict())
    else:  # the paper has no norm behind its last layer's, and torch adds one
        theirs.encoder.norm = theirs.decoder.norm = None
    if fast:
        cpu.speed_up(model)
    source, idx = sources([9, 5, 9]), sources([7, 7, 7], seed=2)
    with torch.no_grad():
        positions = torch.arange(9)[None]
        x = model.embed(source.clamp(min=0), positions)
        y = model.embed(idx, positions[:, :7])
        causal = nn.Transformer.generate_square_subsequent_mask(7)
        padding = source < 0
        hidden = theirs(
            x,
            y,
            tgt_mask=causal,
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )
        assert torch.allclose(model.hidden(idx, source=source), hidden, atol=1e-4)
