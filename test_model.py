"""The model's tests: run them after you hack the model. python -m pytest test_model.py"""

import copy
import math
import pickle

import pytest
import torch
from torch.nn import functional as F

import model as model_py
from model import (
    GPT,
    CausalAttentionCPU,
    Decoder,
    GPTConfig,
    HeadLoss,
    KVCache,
    RMSNormFunction,
    choose,
    kept,
)

QWEN3 = dict(
    position='rope',
    norm='rmsnorm',
    activation='swiglu',
    qk_norm=True,
    n_kv_head=2,
    head_dim=12,
    bias=False,
    tie_embeddings=False,
)
LLAMA3 = {
    'rope_type': 'llama3',
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 16,
}
FAMILIES = {
    'gpt2': {},
    'gpt2, no biases': dict(bias=False, activation='gelu_tanh'),
    'qwen3': QWEN3,
    'qwen2': dict(
        position='rope', norm='rmsnorm', activation='swiglu', n_kv_head=1, bias=False, qkv_bias=True
    ),
    'llama 3': dict(
        position='rope',
        rope_theta=5e5,
        rope_scaling=LLAMA3,
        norm='rmsnorm',
        activation='swiglu',
        n_kv_head=2,
        bias=False,
    ),
    'linear rope, relu2': dict(
        position='rope',
        rope_scaling={'rope_type': 'linear', 'factor': 2.0},
        activation='relu2',
        n_inner=40,
    ),
}
every_family = pytest.mark.parametrize('switches', FAMILIES.values(), ids=FAMILIES.keys())


def tiny(switches=QWEN3, **more):
    """A model with weights ten times GPT-2's, so that every part of it shows in the logits."""
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(
            **dict(block_size=24, vocab_size=50, n_layer=3, n_head=4, n_embd=32) | switches | more
        )
    ).eval()
    for p in model.parameters():
        if p.dim() == 2:
            p.data *= 5
    return model


def tokens(*shape):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(1))


def all_logits(model, idx):
    return model(idx, targets=idx)[0]


@every_family
@torch.no_grad()
def test_cached_logits_equal_uncached(switches):
    model, idx = tiny(switches), tokens(2, 24)
    expected = all_logits(model, idx)
    cache, at = KVCache(model.config, 2), 0
    for n in (5, 1, 1, 9, 1, 7):  # a prompt, single tokens, several at once
        logits, loss = model(idx[:, at : at + n], cache=cache)
        at += n
        assert logits.shape == (2, 1, 50) and loss is None
        torch.testing.assert_close(logits[:, 0], expected[:, at - 1], atol=1e-5, rtol=1e-5)


@every_family
@torch.no_grad()
def test_rows_of_different_lengths_share_a_cache(switches):
    model, idx, lengths = tiny(switches), tokens(3, 12), torch.tensor([3, 12, 7])
    cache = KVCache(model.config, 3)
    logits, _ = model(
        idx, cache=cache, lengths=lengths
    )  # what stands past a row's length is padding
    rows = [idx[i, :n].tolist() for i, n in enumerate(lengths.tolist())]
    for _ in range(8):
        for i, row in enumerate(rows):
            torch.testing.assert_close(
                logits[i, 0], all_logits(model, torch.tensor([row]))[0, -1], atol=1e-5, rtol=1e-5
            )
        new = logits.argmax(-1)
        rows = [row + [int(t)] for row, t in zip(rows, new)]
        logits, _ = model(new, cache=cache)


@every_family
@torch.no_grad()
def test_generation_goes_on_past_the_context(switches):
    model = tiny(switches)
    prompts = [
        tokens(5).tolist(),
        tokens(30).tolist(),
        tokens(22).tolist(),
    ]  # short, longer than the context, nearly full
    expected = [list(p) for p in prompts]
    margin = math.inf
    for row in expected:
        for _ in range(40):
            logits = all_logits(model, torch.tensor([row[-24:]]))[0, -1]
            best = logits.topk(2).values
            margin = min(margin, float(best[0] - best[1]))
            row.append(int(logits.argmax()))
    assert margin > 1e-5  # else the comparison would hang on rounding
    assert model.generate(prompts, 40, temperature=0) == expected


@every_family
@torch.no_grad()
def test_a_future_token_changes_no_earlier_logit(switches):
    model, idx = tiny(switches), tokens(2, 24)
    changed = idx.clone()
    changed[:, 15] = (idx[:, 15] + 1) % 50
    before, after = all_logits(model, idx), all_logits(model, changed)
    assert torch.equal(before[:, :15], after[:, :15])
    assert not torch.allclose(before[:, 15:], after[:, 15:])


@every_family
def test_initial_loss_is_that_of_a_uniform_guess(switches):
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(**dict(block_size=64, vocab_size=1000, n_layer=2, n_head=4, n_embd=64) | switches)
    )
    idx = torch.randint(1000, (4, 65))
    assert abs(model(idx[:, :-1], idx[:, 1:])[1].item() - math.log(1000)) < 0.1


@every_family
def test_one_batch_is_learned_by_heart(switches):
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(**dict(block_size=24, vocab_size=50, n_layer=2, n_head=4, n_embd=32) | switches)
    )
    optimizer, idx = torch.optim.AdamW(model.parameters(), lr=1e-2), tokens(4, 25)
    for _ in range(150):
        loss = model(idx[:, :-1], idx[:, 1:], return_logits=False)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05


def test_four_micro_batches_of_three_equal_one_of_twelve():
    model, idx = tiny(), tokens(12, 25)
    gradients = []
    for size in (12, 3):
        model.zero_grad()
        for part in idx.split(size):
            (model(part[:, :-1], part[:, 1:], return_logits=False)[1] * size / 12).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('n_kv_head', [1, 2, 4])
@pytest.mark.parametrize('length', [7, 128, 300])  # less than a block, one block, blocks and a rest
@pytest.mark.parametrize('cache_bytes', [1, 8 << 20])  # row by row, and all at once
def test_attention_in_blocks_equals_torchs(n_kv_head, length, cache_bytes, monkeypatch):
    monkeypatch.setattr(CausalAttentionCPU, 'CACHE_BYTES', cache_bytes)
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, n, length, 8, dtype=torch.float64, requires_grad=True)
        for n in (4, n_kv_head, n_kv_head)
    )
    ours, theirs = (
        CausalAttentionCPU.apply(q, k, v),
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    )
    torch.testing.assert_close(ours, theirs)
    dy = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), dy), torch.autograd.grad(theirs, (q, k, v), dy)
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('length', [7, 300])
def test_attention_drops_as_it_says(length, monkeypatch):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, length, 8, requires_grad=True) for n in (4, 2, 2))
    masks = []
    monkeypatch.setattr(model_py, 'kept', lambda *args: masks.append(kept(*args)) or masks[-1])
    ours = CausalAttentionCPU.apply(q, k, v, 0.25)
    keep = torch.cat(
        [F.pad(m.view(2, 2, 2, -1, m.shape[-1]), (0, length - m.shape[-1])) for m in masks], dim=3
    ).view(2, 4, length, length)
    p = (
        q @ k.repeat_interleave(2, 1).mT / 8**0.5 + torch.full((length, length), -math.inf).triu(1)
    ).softmax(-1)
    theirs = (p * keep / 0.75) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(ours, theirs)
    dy = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), dy), torch.autograd.grad(theirs, (q, k, v), dy)
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('rate', [0.1, 0.5, 0.999])
def test_dropout_drops_its_share_and_keeps_the_mean(rate):
    torch.manual_seed(0)
    mask = kept((1000, 1001), rate, torch.float32)
    assert set(mask.unique().tolist()) <= {0.0, 1.0} and abs(mask.mean() - (1 - rate)) < 0.002
    for part in (
        mask.flatten()[:1_000_000].view(-1, 4).mean(0)
    ):  # four masks come from one 64-bit draw: none is special
        assert abs(part - (1 - rate)) < 0.004
    x = torch.ones(1000, 1000)
    assert abs(model_py.Dropout(rate)(x).mean() - 1) < 0.1 and torch.equal(
        model_py.Dropout(rate).eval()(x), x
    )


@pytest.mark.parametrize('shape', [(8,), (3, 8)])  # over the width, and a scale a head
def test_rmsnorm_equals_torchs(shape):
    torch.manual_seed(0)
    x, weight = torch.randn(5, 7, 3, 8, requires_grad=True), torch.randn(shape, requires_grad=True)
    ours, theirs = RMSNormFunction.apply(x, weight, 1e-5), F.rms_norm(x, (8,), eps=1e-5) * weight
    torch.testing.assert_close(ours, theirs)
    dy = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, (x, weight), dy), torch.autograd.grad(theirs, (x, weight), dy)
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('switches', [{}, QWEN3], ids=['gpt2', 'qwen3'])
def test_what_the_backward_pass_makes_again_changes_nothing(switches, monkeypatch):
    model, idx = (
        tiny(switches, block_size=512, n_layer=1, n_embd=128),
        tokens(16, 513),
    )  # 2^20 elements: large enough
    gradients, calls, checkpoint = [], [], model_py.checkpoint
    monkeypatch.setattr(
        model_py,
        'checkpoint',
        lambda *args, **options: calls.append(1) or checkpoint(*args, **options),
    )
    for f in (model_py.remade, lambda f, x: f(x)):
        monkeypatch.setattr(model_py, 'remade', f)
        model.zero_grad()
        model(idx[:, :-1], idx[:, 1:], return_logits=False)[1].backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert len(calls) == 3  # the input of attention, of the MLP and of its second matrix
    for a, b in zip(*gradients):
        assert torch.equal(a, b)


@every_family
@torch.no_grad()
def test_a_step_in_bfloat16_is_as_exact_as_bfloat16(switches):
    model, idx = tiny(switches), tokens(3, 20)
    for p in model.parameters():
        p.data = p.data.bfloat16().float()  # so that only the arithmetic differs
    exact = all_logits(model, idx)[:, -1]
    model.to(torch.bfloat16)
    for rows in (1, 3):  # a text alone has a path of its own
        cache = KVCache(model.config, rows)
        model(idx[:rows, :-1], cache=cache)
        logits = Decoder(model, alone=rows == 1).step(idx[:rows, -1], cache)
        assert logits.dtype == torch.float32 and cache.longest == 20
        assert (logits - exact[:rows]).abs().max() < 0.03 * exact.abs().max()


def test_a_text_alone_survives_what_float16_does_not():
    model, idx = tiny().to(torch.bfloat16), tokens(1, 5)
    with torch.no_grad():
        for block in model.transformer.h:
            block.mlp.c_fc.weight.mul_(2000)
    cache = KVCache(model.config, 1)
    with torch.no_grad():
        model(idx, cache=cache)
        assert not Decoder(model, alone=True).step(idx[:, 0], cache).isfinite().all()
    assert (
        model.generate(idx, 8, temperature=0).tolist()
        == model.generate(idx.expand(2, -1), 8, temperature=0)[:1].tolist()
    )


def test_nothing_is_drawn_from_what_is_not_finite():
    with pytest.raises(ValueError, match='not finite'):
        draws([math.nan, 1.0, 2.0])
    assert draws([1.0, 2.0, 3.0], temperature=1e-44) == {2}


def test_a_float64_model_generates():
    model = tiny({}).double()
    assert model.generate(tokens(2, 5), 4, temperature=0).shape == (2, 9)


def test_generation_sees_the_weights_as_they_are_now():
    model, idx = tiny().to(torch.bfloat16), tokens(2, 5)
    for prompts in (idx, idx[:1]):
        before = model.generate(prompts, 8, temperature=0).tolist()
        assert model.generate(prompts, 8, temperature=0).tolist() == before
        for n, change in enumerate(
            (lambda w: torch.nn.init.normal_(w), lambda w: w.data.normal_())
        ):  # in place as an optimizer does, and behind autograd's back
            torch.manual_seed(10 * len(prompts) + n)
            change(model.lm_head.weight)
            after = model.generate(prompts, 8, temperature=0).tolist()
            assert after != before
            before = after
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert twin.generate(prompts, 8, temperature=0).tolist() == before


@pytest.mark.parametrize('chunk_bytes', [1, 4000, 1 << 20])
def test_the_loss_in_chunks_equals_cross_entropy(chunk_bytes, monkeypatch):
    monkeypatch.setattr(HeadLoss, 'CHUNK_BYTES', chunk_bytes)
    torch.manual_seed(0)
    x, weight = torch.randn(30, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    targets = torch.randint(50, (30,))
    targets[::3] = -1
    ours, theirs = (
        HeadLoss.apply(x, weight, targets, True),
        F.cross_entropy(x @ weight.T, targets, ignore_index=-1),
    )
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(HeadLoss.apply(x, weight, targets, False), theirs)
    for a, b in zip(
        torch.autograd.grad(3 * ours, (x, weight)), torch.autograd.grad(3 * theirs, (x, weight))
    ):
        torch.testing.assert_close(a, b)


def test_the_loss_in_chunks_takes_float32_under_autocast():
    torch.manual_seed(0)  # on a GPU the residual stream stays float32
    x, weight, targets = (
        torch.randn(30, 8, requires_grad=True),
        torch.randn(50, 8, requires_grad=True),
        torch.randint(50, (30,)),
    )
    with torch.autocast('cpu', torch.bfloat16):
        loss = HeadLoss.apply(x, weight, targets, True)
    exact = F.cross_entropy(x @ weight.T, targets)
    torch.testing.assert_close(loss, exact, atol=0.03, rtol=0)
    for a, b in zip(
        torch.autograd.grad(loss, (x, weight)), torch.autograd.grad(exact, (x, weight))
    ):
        assert a.dtype == torch.float32 and (a - b).abs().max() < 0.05 * b.abs().max()


def test_targets_of_minus_one_do_not_count():
    model, idx, targets = tiny(), tokens(2, 12), tokens(2, 12)
    targets[:, :8] = -1
    logits, loss = model(idx, targets)
    torch.testing.assert_close(
        loss, F.cross_entropy(logits[:, 8:].flatten(0, 1), targets[:, 8:].flatten())
    )
    torch.testing.assert_close(model(idx, targets, return_logits=False)[1], loss)


def test_gradient_checkpointing_changes_no_gradient():
    model, idx = tiny(dropout=0.1).train(), tokens(4, 25)
    gradients = []
    for on in (False, True):
        model.gradient_checkpointing = on
        model.zero_grad()
        torch.manual_seed(3)
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients):
        assert torch.equal(a, b)


def test_generate_returns_what_it_was_given():
    model, idx = tiny(), tokens(2, 5)
    out = model.generate(idx, 6, seed=1)
    assert out.shape == (2, 11) and torch.equal(out[:, :5], idx)
    assert model.generate(idx.tolist(), 6, seed=1) == out.tolist()
    assert model.generate(idx, 6, seed=2).tolist() != out.tolist()
    with pytest.raises(ValueError, match='empty'):
        model.generate([[1], []], 3)


def test_filters_at_their_strictest_are_greedy():
    model, idx = tiny(), tokens(2, 5)
    greedy = model.generate(idx, 12, temperature=0).tolist()
    for strict in (dict(top_k=1), dict(top_p=1e-6), dict(min_p=1.0), dict(temperature=1e-4)):
        assert model.generate(idx, 12, seed=5, **strict).tolist() == greedy
    assert model.generate(idx, 12, seed=5).tolist() != greedy


def draws(logits, seen=(), **settings):
    """The set of tokens that 500 draws from one row of logits give."""
    rows = torch.tensor([logits]).expand(500, -1)
    mask = torch.zeros(500, len(logits), dtype=torch.bool)
    mask[:, list(seen)] = True
    options = (
        dict(temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0) | settings
    )
    return set(choose(rows, mask, generator=torch.Generator().manual_seed(0), **options).tolist())


def test_each_filter_keeps_the_tokens_it_should():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log().tolist()
    assert draws(logits) == {0, 1, 2, 3}
    assert draws(logits, top_k=2) == {0, 1}
    assert draws(logits, top_p=0.7) == {0, 1}  # 0.5 is not enough, 0.75 is
    assert draws(logits, top_p=0.8) == {0, 1, 2}
    assert draws(logits, min_p=0.25) == {0, 1, 2}  # 0.15 is over a quarter of 0.5, 0.1 is not
    assert draws([1.0, 0.9, -1.0], seen=[0], temperature=0, repetition_penalty=1.2) == {1}
    assert draws([-1.0, -1.1, -9.0], seen=[0], temperature=0, repetition_penalty=1.2) == {1}


def test_stop_ends_a_row_and_keeps_its_token():
    model, prompts = tiny(), [tokens(5).tolist(), tokens(9).tolist()]
    free = model.generate(prompts, 20, temperature=0)
    stop = free[0][8]
    rows = model.generate(prompts, 20, temperature=0, stop=stop)
    for row, whole, prompt in zip(rows, free, prompts):
        end = whole.index(stop, len(prompt)) + 1 if stop in whole[len(prompt) :] else len(whole)
        assert row == whole[:end]
    assert rows[0][-1] == stop


@every_family
@torch.no_grad()
def test_a_shorter_context_changes_nothing_within_it(switches):
    model, idx = tiny(switches), tokens(2, 10)
    before = all_logits(model, idx)
    model.crop_block_size(10)
    assert torch.equal(all_logits(model, idx), before)
    with pytest.raises(ValueError, match='block_size=10'):
        model(tokens(1, 11))


@pytest.mark.parametrize(
    'wrong, words',
    [
        (dict(n_embd=30), 'n_embd=30 is not divisible by n_head=4'),
        (dict(n_kv_head=3), 'not divisible by n_kv_head=3'),
        (dict(n_layer=0), 'n_layer=0'),
        (dict(activation='tanh'), "activation='tanh'"),
        (dict(position='rope', head_dim=7), 'odd'),
        (dict(dropout=1.0), 'dropout'),
        (dict(position='rope', rope_scaling={'rope_type': 'yarn'}), 'yarn'),
    ],
)
def test_a_config_that_cannot_be_says_why(wrong, words):
    with pytest.raises(ValueError, match=words.replace('[', r'\[')):
        tiny({}, **wrong)


@every_family
def test_model_args_make_the_same_config_and_gpt2s_are_nanogpts(switches):
    config = tiny(switches).config
    assert GPTConfig(**config.model_args()) == config
    config = tiny(
        switches, n_embd=96, n_inner=4 * 96
    ).config  # Llama 3.2's width, and not what swiglu has by itself
    assert GPTConfig(**config.model_args()) == config
    if switches in ({}, dict(bias=False)):
        assert list(config.model_args()) == [
            'block_size',
            'vocab_size',
            'n_layer',
            'n_head',
            'n_embd',
            'dropout',
            'bias',
        ]


@torch.no_grad()
def test_bfloat16_weights_generate_and_autocast_agrees_with_float32():
    model, idx = tiny(), tokens(2, 24)
    exact = model(idx, idx)[1]
    with torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(model(idx, idx)[1], exact, atol=0.05, rtol=0.01)
        torch.testing.assert_close(
            model(idx, idx, return_logits=False)[1], exact, atol=0.05, rtol=0.01
        )
        assert model.generate(idx, 4, seed=1).shape == (2, 28)
    assert model.to(torch.bfloat16).generate(idx[:, :5], 4, seed=1).shape == (2, 9)
