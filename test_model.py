"""The model's tests: run them after you hack the model. python -m pytest test_model.py

With FLEDGE_TEST_DEVICE=cuda in the environment they run on a GPU.
"""

import copy
import math
import os
import pickle

import pytest
import torch
from torch.nn import functional as F

import model as model_py
from fledge import checkpoint, cpu
from model import GPT, GPTConfig, penalize, sample_token

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
DEVICE = torch.device(os.environ.get('FLEDGE_TEST_DEVICE', 'cpu'))
if 'FLEDGE_TEST_DEVICE' in os.environ:
    torch.set_default_device(DEVICE)
WAYS = ['plain', 'sped up', 'packed'] if DEVICE.type == 'cpu' else ['plain']


@pytest.fixture(params=WAYS)
def ready(request):
    """What is done to a model before it is used: nothing, as on a GPU, or what speeds up a CPU."""
    if request.param == 'plain':
        return lambda model: model
    return lambda model: cpu.speed_up(model, packed=request.param == 'packed')


@pytest.fixture(params=WAYS[:2])
def trainable(request):
    return cpu.speed_up if request.param == 'sped up' else lambda model: model


def tiny(switches=QWEN3, **more):
    """A model with weights five times GPT-2's, so that every part of it shows in the logits."""
    torch.manual_seed(0)
    sizes = dict(block_size=24, vocab_size=50, n_layer=3, n_head=4, n_embd=32)
    model = GPT(GPTConfig(**sizes | switches | more)).eval()
    for p in model.parameters():
        if p.dim() == 2:
            p.data *= 5
    return model


def tokens(*shape):
    return torch.randint(50, shape, generator=torch.Generator(DEVICE).manual_seed(1))


def all_logits(model, idx):
    return model(idx, targets=idx)[0]


@every_family
@torch.no_grad()
def test_cached_logits_equal_uncached(switches, ready):
    idx = tokens(2, 24)
    expected = all_logits(tiny(switches), idx)
    model = ready(tiny(switches))
    cache, at = model.make_cache(2, 24), 0
    for n in (5, 1, 1, 9, 1, 7):  # a prompt, single tokens, several at once
        logits, loss = model(idx[:, at : at + n], cache=cache)
        at += n
        assert logits.shape == (2, 1, 50) and loss is None
        torch.testing.assert_close(logits[:, 0], expected[:, at - 1], atol=1e-5, rtol=1e-5)


@every_family
@torch.no_grad()
def test_rows_of_different_lengths_share_a_cache(switches, ready):
    model, idx, lengths = ready(tiny(switches)), tokens(3, 12), torch.tensor([3, 12, 7])
    plain = tiny(switches)
    cache = model.make_cache(3, 24)
    # what stands past a row's length is padding
    logits, _ = model(idx, cache=cache, lengths=lengths)
    rows = [idx[i, :n].tolist() for i, n in enumerate(lengths.tolist())]
    for _ in range(8):
        for i, row in enumerate(rows):
            expected = all_logits(plain, torch.tensor([row]))[0, -1]
            torch.testing.assert_close(logits[i, 0], expected, atol=1e-5, rtol=1e-5)
        new = logits.argmax(-1)
        rows = [row + [int(t)] for row, t in zip(rows, new, strict=True)]
        logits, _ = model(new, cache=cache)


@pytest.mark.slow
@every_family
@torch.no_grad()
def test_generation_goes_on_past_the_context(switches, ready):
    model = tiny(switches)
    # short, longer than the context, nearly full
    prompts = [tokens(5).tolist(), tokens(30).tolist(), tokens(22).tolist()]
    expected = [list(p) for p in prompts]
    margin = math.inf
    for row in expected:
        for _ in range(40):
            logits = all_logits(model, torch.tensor([row[-24:]]))[0, -1]
            best = logits.topk(2).values
            margin = min(margin, float(best[0] - best[1]))
            row.append(int(logits.argmax()))
    assert margin > 1e-5  # else the comparison would hang on rounding
    assert ready(model).generate(prompts, 40, temperature=0) == expected


@every_family
@torch.no_grad()
def test_a_future_token_changes_no_earlier_logit(switches, trainable):
    model, idx = trainable(tiny(switches)), tokens(2, 24)
    changed = idx.clone()
    changed[:, 15] = (idx[:, 15] + 1) % 50
    before, after = all_logits(model, idx), all_logits(model, changed)
    assert torch.equal(before[:, :15], after[:, :15])
    assert not torch.allclose(before[:, 15:], after[:, 15:])


@every_family
def test_initial_loss_is_that_of_a_uniform_guess(switches):
    torch.manual_seed(0)
    sizes = dict(block_size=64, vocab_size=1000, n_layer=2, n_head=4, n_embd=64)
    model = GPT(GPTConfig(**sizes | switches))
    idx = torch.randint(1000, (4, 65))
    assert abs(model(idx[:, :-1], idx[:, 1:])[1].item() - math.log(1000)) < 0.1


@pytest.mark.slow
@every_family
def test_one_batch_is_learned_by_heart(switches, trainable):
    torch.manual_seed(0)
    sizes = dict(block_size=24, vocab_size=50, n_layer=2, n_head=4, n_embd=32)
    model = trainable(GPT(GPTConfig(**sizes | switches)))
    optimizer, idx = torch.optim.AdamW(model.parameters(), lr=1e-2), tokens(4, 25)
    for _ in range(150):
        loss = model(idx[:, :-1], idx[:, 1:], return_logits=False)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05


@pytest.mark.parametrize('block_size', (24, 300))  # on a CPU attention goes in blocks of 128
@every_family
def test_documents_in_one_row_are_as_each_alone(switches, trainable, block_size):
    model = trainable(tiny(switches, block_size=block_size))
    idx, targets = tokens(2, block_size), tokens(2, block_size) - 1  # a target of -1 is ignored
    ends = [[5, 6, 20, block_size], [block_size - 3, block_size]]  # the last one is padding
    targets[0, 20:] = targets[1, -3:] = -1
    documents = torch.full((2, block_size), -1)
    number, alone, expected, loss = 0, [], [], 0.0
    for row in range(2):
        begin = 0
        for end in ends[row][:-1]:
            documents[row, begin:end] = number
            here = idx[row : row + 1, begin:end], targets[row : row + 1, begin:end]
            logits, nats = model(*here, reduction='none')
            alone.append((row, slice(begin, end)))
            expected.append(logits[0])
            loss = loss + nats.sum()
            begin, number = end, number + 1
    loss = loss / (targets >= 0).sum()
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    logits, loss_with_logits = model(idx, targets, documents=documents)
    _, packed_loss = model(idx, targets, return_logits=False, documents=documents)
    for (row, here), one in zip(alone, expected, strict=True):
        torch.testing.assert_close(logits[row, here], one, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(packed_loss, loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss_with_logits, loss, atol=1e-5, rtol=1e-5)
    packed_loss.backward()
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize('return_logits', (True, False))
def test_the_loss_of_each_token(trainable, return_logits):
    model, idx = trainable(tiny()), tokens(2, 25)
    targets = idx[:, 1:].clone()
    targets[0, :5] = -1
    logits, _ = model(idx[:, :-1], targets)
    _, nats = model(idx[:, :-1], targets, return_logits, reduction='none')
    chosen = logits.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(nats, -chosen * (targets >= 0), atol=1e-5, rtol=1e-5)


def test_four_micro_batches_of_three_equal_one_of_twelve(trainable):
    model, idx = trainable(tiny()), tokens(12, 25)
    gradients = []
    for size in (12, 3):
        model.zero_grad()
        for part in idx.split(size):
            (model(part[:, :-1], part[:, 1:], return_logits=False)[1] * size / 12).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_nothing_is_drawn_from_what_is_not_finite():
    with pytest.raises(ValueError, match='not finite'):
        draws([math.nan, 1.0, 2.0])
    assert draws([1.0, 2.0, 3.0], temperature=1e-44) == {2}


def test_a_float64_model_generates(trainable):
    model = trainable(tiny({}).double())
    assert model.generate(tokens(2, 5), 4, temperature=0).shape == (2, 9)


def test_generation_sees_the_weights_as_they_are_now(trainable):
    model, idx = trainable(tiny().to(torch.bfloat16)), tokens(2, 5)
    before = model.generate(idx, 8, temperature=0).tolist()
    assert model.generate(idx, 8, temperature=0).tolist() == before
    # in place as an optimizer does, and behind autograd's back
    changes = (lambda w: torch.nn.init.normal_(w), lambda w: w.data.normal_())
    for n, change in enumerate(changes):
        torch.manual_seed(n)
        change(model.lm_head.weight)
        after = model.generate(idx, 8, temperature=0).tolist()
        assert after != before
        before = after
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert twin.generate(idx, 8, temperature=0).tolist() == before


@pytest.mark.parametrize('loss_rows', [1, 7, 1 << 20])
def test_the_loss_without_logits_is_that_of_the_logits(loss_rows, monkeypatch):
    monkeypatch.setattr(GPT, 'LOSS_ROWS', loss_rows)
    model, idx, targets = tiny(tie_embeddings=True), tokens(2, 12), tokens(2, 12)
    targets[:, ::3] = -1
    gradients = []
    for return_logits in (True, False):
        model.zero_grad()
        loss = model(idx, targets, return_logits)[1]
        loss.backward()
        gradients.append([loss, *(p.grad for p in model.parameters())])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_targets_of_minus_one_do_not_count(trainable):
    model, idx, targets = trainable(tiny()), tokens(2, 12), tokens(2, 12)
    targets[:, :8] = -1
    logits, loss = model(idx, targets)
    expected = F.cross_entropy(logits[:, 8:].flatten(0, 1), targets[:, 8:].flatten())
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model(idx, targets, return_logits=False)[1], loss)


def test_gradient_checkpointing_changes_no_gradient(trainable):
    idx = tokens(4, 25)
    gradients = []
    for on in (False, True):
        model = tiny(dropout=0.1).train()
        model.gradient_checkpointing = on
        trainable(model)
        torch.manual_seed(3)
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
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
    options = dict(temperature=1.0) | settings
    rows = penalize(rows, mask, options.pop('repetition_penalty', 1.0))
    random = torch.rand(len(rows), 1, generator=torch.Generator(DEVICE).manual_seed(0))
    return set(sample_token(rows, random, **options).tolist())


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
    for row, whole, prompt in zip(rows, free, prompts, strict=True):
        end = whole.index(stop, len(prompt)) + 1 if stop in whole[len(prompt) :] else len(whole)
        assert row == whole[:end]
    assert rows[0][-1] == stop


def test_rows_longer_than_the_context_are_refused():
    with pytest.raises(ValueError, match='block_size=24'):
        tiny()(tokens(1, 25))


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
    assert GPTConfig(**checkpoint.model_args(config)) == config
    # Llama 3.2's width, and not what swiglu has by itself
    config = tiny(switches, n_embd=96, n_inner=4 * 96).config
    assert GPTConfig(**checkpoint.model_args(config)) == config
    if switches in ({}, dict(bias=False)):
        nanogpts = 'block_size vocab_size n_layer n_head n_embd dropout bias'
        assert list(checkpoint.model_args(config)) == nanogpts.split()


@torch.no_grad()
def test_bfloat16_weights_generate_and_autocast_agrees_with_float32(ready):
    idx = tokens(2, 24)
    exact = tiny()(idx, idx)[1]
    model = ready(tiny())
    with torch.autocast(DEVICE.type, torch.bfloat16):
        for return_logits in (True, False):
            loss = model(idx, idx, return_logits)[1]
            torch.testing.assert_close(loss, exact, atol=0.05, rtol=0.01)
        assert model.generate(idx, 4, seed=1).shape == (2, 28)
    model = ready(tiny().to(torch.bfloat16))
    assert model.generate(idx[:, :5], 4, seed=1).shape == (2, 9)


@torch.no_grad()
def test_a_prompt_is_read_once_for_all_its_samples(monkeypatch):
    model, prompt, other = tiny(), tokens(9).tolist(), tokens(2, 6)[1].tolist()
    shapes = []
    model.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    rows = model.generate([prompt, other, prompt, prompt], 5, seed=1)
    assert [tuple(shape) for shape in shapes] == [(2, 9), *[(4, 1)] * 4]
    assert rows[0] != rows[2]  # each draws its own
    greedy = model.generate([prompt, other, prompt], 5, temperature=0)
    assert greedy == [model.generate([p], 5, temperature=0)[0] for p in (prompt, other, prompt)]


class OddBlock(model_py.Block):
    """What someone may make of Block, and what no block is."""

    def forward(self, x, context):
        return 0.5 * x - super().forward(x, context)


@torch.no_grad()
def test_generate_follows_an_edited_block(monkeypatch, ready):
    before = tiny().generate(tokens(2, 5), 8, temperature=0)
    monkeypatch.setattr(model_py, 'Block', OddBlock)
    plain, model = tiny(), ready(tiny())
    expected = tokens(2, 5)
    for _ in range(8):
        best = all_logits(plain, expected)[:, -1].argmax(-1)
        expected = torch.cat((expected, best[:, None]), dim=1)
    assert torch.equal(model.generate(tokens(2, 5), 8, temperature=0), expected)
    assert not torch.equal(before, expected)


@pytest.mark.slow
@pytest.mark.parametrize('switches', [{}, QWEN3], ids=['gpt2', 'qwen3'])
def test_one_compiled_decode_step_serves_a_generation(switches):
    """And one compiled training step serves a run."""
    torch._dynamo.reset()
    model, idx = tiny(switches, block_size=64), tokens(2, 8)
    expected = model.generate(idx, 50, temperature=0)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    counters = torch._dynamo.utils.counters
    with torch.no_grad():
        cache, logits = model.prefill(idx.tolist(), 64)
        rows = [idx]
        for n in range(50):
            rows.append(logits.argmax(-1)[:, None])
            logits = compiled(rows[-1], cache=cache)[0][:, -1]
            if n == 0:
                counters.clear()
        assert not counters['stats']  # nothing was compiled after the first token
    assert torch.equal(torch.cat(rows, dim=1), expected)
    model.train()
    for n in range(4):
        loss = compiled(tokens(2, 33)[:, :-1], tokens(2, 33)[:, 1:], return_logits=False)[1]
        loss.backward()
        if n == 0:
            counters.clear()
    assert not counters['stats']
