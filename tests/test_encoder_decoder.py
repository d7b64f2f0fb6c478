"""The encoder-decoder: against torch's nn.Transformer and transformers' Marian, cache, beams."""

import re

import pytest
import torch
from torch import nn

from encoder_decoder import EncoderDecoder, beam_search, make_model
from fledge import cpu
from fledge.attention import attention_of, draw_attention
from fledge.generation import Batch, Reply, Sampling, generate
from fledge.tokenizer import byte_tokenizer, char_tokenizer
from model import GPT, GPTConfig

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
    for name, p in model.named_parameters():  # far from the small ones of a new model
        is_norm = 'ln_' in name and name.endswith('weight')
        nn.init.normal_(p, mean=1.0 if is_norm else 0.0, std=0.3)
    return model


def sources(lengths, seed=1, vocab_size=41):
    """A row of token ids for each length, filled up with -1."""
    torch.manual_seed(seed)
    source = torch.full((len(lengths), max(lengths)), -1)
    for row, length in zip(source, lengths, strict=True):
        row[:length] = torch.randint(1, vocab_size, (length,))
    return source


@pytest.fixture(scope='module')
def half_trained():
    """A model that is learning to copy, and is still unsure."""
    torch.manual_seed(0)
    model = EncoderDecoder(GPTConfig(**PAPER))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(200):
        lengths = torch.randint(1, 9, (32,)).tolist()
        source = sources(lengths, seed=step)
        idx = torch.zeros(32, 9, dtype=torch.long)
        idx[:, 1 : 1 + source.shape[1]] = source.clamp(min=0)
        targets = torch.full((32, 9), -1)
        for row, (length, of_row) in enumerate(zip(lengths, source, strict=True)):
            targets[row, :length], targets[row, length] = of_row[:length], 0
        model(idx, targets, source=source)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


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


@pytest.fixture(scope='module')
def marian(half_trained):
    """A pair: transformers' Marian, the paper's shape, and ours with the same weights."""
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    config = transformers.MarianConfig(
        vocab_size=41,
        d_model=32,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        activation_function='relu',
        max_position_embeddings=32,
        scale_embedding=True,
        pad_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
        forced_eos_token_id=None,
        bos_token_id=None,
    )
    theirs = transformers.MarianMTModel(config).eval()
    ours = half_trained
    names = {
        'layers.': '',
        'self_attn_layer_norm': 'ln_1',
        'encoder_attn_layer_norm': 'ln_cross',
        'final_layer_norm': 'ln_2',
        'self_attn.out_proj': 'attn.c_proj',
        'encoder_attn.out_proj': 'cross_attn.c_proj',
        'encoder_attn.q_proj': 'cross_attn.q_attn',
        'fc1': 'mlp.c_fc',
        'fc2': 'mlp.c_proj',
    }
    state = ours.state_dict()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if name == 'model.shared.weight':
                p.copy_(ours.lm_head.weight)
            elif name.endswith('embed_positions.weight'):
                p.copy_(ours.sinusoids)  # theirs has all sines first, then all cosines
            else:
                name = name.removeprefix('model.')
                name = name.replace('encoder.layers', 'transformer.encoder', 1)
                name = name.replace('decoder.layers', 'transformer.h', 1)
                part = re.search(r'(self|encoder)_attn\.([qkv])_proj', name)
                for old, new in names.items():
                    name = name.replace(old, new)
                if part and (part[1], part[2]) != ('encoder', 'q'):
                    module = 'attn' if part[1] == 'self' else 'cross_attn'
                    place = 'qkv'.index(part[2]) - (part[1] == 'encoder')
                    name = name.replace(part[0], f'{module}.c_attn')
                    p.copy_(state[name][32 * place : 32 * (place + 1)])
                else:
                    p.copy_(state[name])
    return theirs, ours


@pytest.mark.slow
def test_it_computes_what_marian_computes(marian):
    theirs, ours = marian
    source, idx = sources([9, 5, 9]), sources([7, 7, 7], seed=2)
    inputs = dict(input_ids=source.clamp(min=0), attention_mask=(source >= 0).long())
    with torch.no_grad():
        logits = theirs(**inputs, decoder_input_ids=idx).logits
        assert torch.allclose(ours(idx, idx, source=source)[0], logits, atol=1e-4)


@pytest.mark.slow
def test_the_attention_that_is_drawn_is_marians(marian, tmp_path):
    theirs, ours = marian
    theirs.set_attn_implementation('eager')
    source, idx = sources([9]), sources([7], seed=2)
    with torch.no_grad():
        found = theirs(input_ids=source, decoder_input_ids=idx, output_attentions=True)
    encoder = [block.attn for block in ours.transformer.encoder]
    cross = [block.cross_attn for block in ours.transformer.h]
    for modules, expected in (
        (encoder, found.encoder_attentions),
        (None, found.decoder_attentions),
        (cross, found.cross_attentions),
    ):
        for layer, of_theirs in zip(
            attention_of(ours, idx, modules, source), expected, strict=True
        ):
            assert torch.allclose(layer, of_theirs[0], atol=1e-4)
    path = tmp_path / 'attention.png'
    letters = 'abcdefghijklmnopqrstuvwxyz0123456789.,!?'
    tokenizer = char_tokenizer(letters, ('<|endoftext|>',))
    draw_attention(ours, tokenizer, source[0].tolist(), str(path))
    assert path.read_bytes().endswith(b'IEND\xaeB`\x82')


@pytest.mark.slow
@pytest.mark.parametrize('length_penalty', [1.0, 0.0, 2.5, -0.5])
@pytest.mark.parametrize('num_beams', [2, 5])
def test_beams_are_those_of_transformers(marian, num_beams, length_penalty):
    theirs, ours = marian
    source = sources([9, 3, 12, 7, 5, 1, 8, 2])
    inputs = dict(input_ids=source.clamp(min=0), attention_mask=(source >= 0).long())
    lengths = set()
    for stop in ([0], [0, 7, 9]):
        for n_tokens in (4, 12):
            options = dict(num_beams=num_beams, length_penalty=length_penalty)
            beams = ours.generate([[0]] * 8, n_tokens, stop=stop, source=source, **options)
            options |= dict(eos_token_id=stop, max_new_tokens=n_tokens, do_sample=False)
            found = theirs.generate(**inputs, **options).tolist()
            for beam, expected in zip(beams, found, strict=True):
                assert beam == expected[: len(beam)]
                assert not any(expected[len(beam) :])  # it is filled up with 0
            lengths |= set(map(len, beams))
    assert len(lengths) > 3  # some have ended, and not all alike


def alone(model, source, idx):
    """The logits of a target behind one source, both lists, read without cache or padding."""
    idx = torch.tensor([idx])
    return model(idx, idx, source=torch.tensor([source]))[0][0]


@pytest.mark.parametrize('position', ['sinusoidal', 'learned', 'rope'])
@pytest.mark.parametrize('fast', [False, True])
@torch.no_grad()
def test_padding_packing_and_a_cache_change_nothing(position, fast):
    # today's blocks as well: grouped queries, RMSNorm, gated, norms on queries and keys
    modern = dict(n_kv_head=2, norm='rmsnorm', activation='swiglu', qk_norm=True, norm_first=True)
    changes = {} if position == 'sinusoidal' else dict(position=position, **modern)
    model = paper_model(block_size=300, **changes)
    lengths, target_lengths = (9, 140, 5, 1), (6, 7, 150, 2)
    source, idx = sources(lengths), sources(target_lengths, seed=2).clamp(min=0)
    expected = []
    for row, (length, target_length) in enumerate(zip(lengths, target_lengths, strict=True)):
        pair = source[row, :length].tolist(), idx[row, :target_length].tolist()
        expected.append(alone(model, *pair))
    if fast:
        cpu.speed_up(model)
    padded = model(idx, idx, source=source)[0]
    packed = dict(
        documents=torch.tensor([[n for n, t in enumerate(target_lengths) for _ in range(t)]]),
        source_documents=torch.tensor([[n for n, s in enumerate(lengths) for _ in range(s)]]),
        source=source[source >= 0][None],
    )
    packed_idx = torch.cat([row[:n] for row, n in zip(idx, target_lengths, strict=True)])[None]
    more = torch.full((1, 9), -1)  # rows end in padding
    for name in ('documents', 'source_documents', 'source'):
        packed[name] = torch.cat((packed[name], more), dim=1)
    packed_idx = torch.cat((packed_idx, more * 0), dim=1)
    in_one_row = model(packed_idx, packed_idx, **packed)[0][0]
    # padding of the target alone has no source, and must not become NaN, which a gradient spreads
    target_alone = packed | {name: packed[name][:, :-9] for name in ('source', 'source_documents')}
    assert model(packed_idx, packed_idx, **target_alone)[0].isfinite().all()
    cache, encoded, start = model.make_cache(4, 300), model.encode(source), 0
    for row, of_row in enumerate(expected):
        n = len(of_row)
        assert torch.allclose(padded[row, :n], of_row, atol=1e-4)
        assert torch.allclose(in_one_row[start : start + n], of_row, atol=1e-4)
        start += n
    for place in range(6):
        logits = model(idx[:, place : place + 1], cache=cache, source=encoded)[0][:, 0]
        for row in (0, 1, 2):
            assert torch.allclose(logits[row], expected[row][place], atol=1e-4)


@torch.no_grad()
def test_qk_norm_takes_the_length_of_cross_attentions_queries_and_keys():
    model = paper_model(qk_norm=True)
    source, idx = sources([9, 5]), sources([7, 7], seed=2)
    before = model(idx, idx, source=source)[0]
    for block in model.transformer.h:
        attention = block.cross_attn
        n_keys = attention.n_kv_head * attention.head_dim
        for p in attention.q_attn.parameters():
            p.mul_(10)
        for p in attention.c_attn.parameters():
            p[:n_keys] *= 10
    assert torch.allclose(model(idx, idx, source=source)[0], before, atol=1e-3)


def gradients(model, idx, targets, **source):
    model.zero_grad()
    model(idx, targets, return_logits=False, **source)[1].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize('checkpointing', [False, True])
def test_a_cpu_computes_the_same_gradients(checkpointing):
    model = paper_model(block_size=300).train()
    source, idx = sources((150, 9)), sources((7, 200), seed=2)
    inputs = idx.clamp(min=0), idx.roll(-1, dims=1)
    plain = gradients(model, *inputs, source=source)
    model.gradient_checkpointing = checkpointing
    fast = gradients(cpu.speed_up(model), *inputs, source=source)
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        assert torch.allclose(fast[name], gradient, atol=1e-5, rtol=1e-3), name


def test_one_beam_is_greedy_and_the_engine_says_what_generate_says(half_trained):
    rows = [[0]] * 6
    source = sources([9, 3, 12, 7, 1, 2])
    greedy = half_trained.generate(rows, 12, temperature=0, stop=0, source=source)
    assert len(set(map(len, greedy))) > 2
    encoded = half_trained.encode(source)
    assert beam_search(half_trained, rows, 12, 1, stop=0, source=encoded) == greedy
    assert half_trained.generate(rows, 12, stop=0, source=source, num_beams=1, top_k=1) == greedy
    as_lists = [[token for token in row if token >= 0] for row in source.tolist()]
    for num_beams, length_penalty in ((1, 1.0), (3, 1.0), (5, 4.0)):
        beams = dict(num_beams=num_beams, length_penalty=length_penalty)
        expected = half_trained.generate(rows, 12, stop=0, source=as_lists, temperature=0, **beams)
        sampling = Sampling(12, temperature=0, ends=(0,), **beams)
        tokenizer = byte_tokenizer()
        replies = [Reply(tokenizer, [0], sampling, source) for source in as_lists]
        for size in (1, 4):
            for _ in generate(half_trained, replies, size):
                pass
            assert [[0, *reply.ids] for reply in replies] == expected
            replies = [Reply(tokenizer, [0], sampling, source) for source in as_lists]


def test_a_row_that_fills_the_context_goes_on(half_trained):
    source = sources([9])
    found = half_trained.generate([[0] * 30], 6, temperature=0, source=source)[0]
    row = [0] * 30
    for _ in range(6):
        idx = torch.tensor([row[-32:]])
        row.append(int(half_trained(idx, source=source)[0][0, -1].argmax()))
    assert found == row
    tokenizer, sampling, replies = byte_tokenizer(), Sampling(6, temperature=0), []
    for of_row in (source[0].tolist(), [5, 6]):
        replies.append(Reply(tokenizer, [0] * 30, sampling, of_row))
    for _ in generate(half_trained, replies, 2):
        pass
    assert replies[0].ids == found[30:] and replies[1].ids != found[30:]
    beams = half_trained.generate([[0] * 30], 6, source=source, num_beams=2)[0]
    assert beams[:30] == [0] * 30 and len(beams) == 33  # the last is not read


def test_what_was_read_beside_one_source_is_not_taken_for_another():
    model, tokenizer, prompt = paper_model(), byte_tokenizer(), [1, 5, 9, 3]
    sampling = Sampling(1, n_logprobs=0, temperature=0)

    def answer(batch, source):
        reply = Reply(tokenizer, prompt, sampling, source)
        batch.add(reply)
        return reply.logprobs[0][1]

    batch = Batch(model, 2)
    for source in ([7, 8, 9, 10], [30, 2], [30, 2, 17]):
        assert answer(batch, source) == pytest.approx(answer(Batch(model, 2), source), abs=1e-5)


def test_a_beam_search_of_a_decoder_alone_finds_no_less_than_greedy():
    torch.manual_seed(0)
    model = GPT(GPTConfig(32, 17, 2, 2, 16, tie_embeddings=False)).eval()
    for name, p in model.named_parameters():
        if not name.endswith('bias'):
            nn.init.normal_(p, std=0.5)

    def log_probability(row):
        idx = torch.tensor([row])
        logs = model(idx, idx)[0].log_softmax(dim=-1)[0, 1:-1]
        return logs.gather(1, idx[0, 2:, None]).sum().item()

    greedy = model.generate([[3, 4], [5, 6]], 8, temperature=0)
    beams = beam_search(model, [[3, 4], [5, 6]], 8, 6)
    assert all(log_probability(b) >= log_probability(g) for b, g in zip(beams, greedy, strict=True))
    assert beams != greedy


def test_beams_are_the_same_alone_and_beside_others_and_end_where_each_was_told_to():
    torch.manual_seed(0)
    model = GPT(GPTConfig(24, 259, 2, 2, 16, tie_embeddings=False)).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    tokenizer = byte_tokenizer()

    def answers(prompts, limits):
        replies = []
        for prompt, limit in zip(prompts, limits, strict=True):
            replies.append(Reply(tokenizer, prompt, Sampling(limit, num_beams=2)))
        for _ in generate(model, replies, 4):
            pass
        return [reply.ids for reply in replies]

    prompts = [[65, 66], list(range(70, 92)), [67, 68]]
    together = answers(prompts, (10, 10, 4))
    assert [len(ids) for ids in together] == [10, 3, 4]  # the second fills the context
    assert together == [answers([p], [n])[0] for p, n in zip(prompts, (10, 10, 4), strict=True)]


def test_beams_of_nothing(half_trained):
    source = sources([3])
    assert half_trained.generate([[0]], 0, source=source, num_beams=2) == [[0]]
    everything = list(range(41))
    assert len(half_trained.generate([[0]], 5, source=source, num_beams=2, stop=everything)[0]) == 2
    with pytest.raises(ValueError, match='a source is empty'):
        half_trained.generate([[0]], 5, source=[[]])


def test_without_a_source_it_says_so(half_trained):
    with pytest.raises(ValueError, match='needs a source'):
        half_trained(torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match='40 tokens are longer than block_size=32'):
        half_trained(torch.zeros(1, 3, dtype=torch.long), source=torch.ones(1, 40).long())
    with pytest.raises(ValueError, match='n_encoder_layer'):
        GPTConfig(n_encoder_layer=-1)
    with pytest.raises(ValueError, match='n_embd=9 is odd'):
        GPTConfig(position='sinusoidal', n_embd=9, n_head=1)
    assert type(make_model(GPTConfig(**PAPER))) is EncoderDecoder
    assert type(make_model(GPTConfig(**PAPER | dict(n_encoder_layer=0)))) is GPT


@pytest.mark.slow
def test_a_step_and_a_decode_step_compile_in_one_piece(half_trained):
    model = paper_model()
    source, idx = sources([9, 5]), sources([7, 7], seed=2)
    expected = model(idx, idx, source=source)
    step = torch.compile(model, fullgraph=True, backend='aot_eager')
    logits, loss = step(idx, idx, source=source)
    assert torch.allclose(logits, expected[0], atol=1e-4)
    encoded, cache = model.encode(source), model.make_cache(2, 32)
    with torch.no_grad():
        for place in range(3):
            found = step(idx[:, place : place + 1], cache=cache, source=encoded)[0][:, 0]
            assert torch.allclose(found, expected[0][:, place], atol=1e-4)
