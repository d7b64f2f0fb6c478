"""What a CPU does faster: each part against the plain one that it stands for."""

import copy
import math
import weakref

import pytest
import torch
from torch.nn import functional as F

import model as plain
from fledge import cpu, cpu_generation, quantize
from fledge.cpu import BlockAttention, Dropout, HeadLoss, RMSNormFunction, dropout_mask
from test_model import QWEN3, all_logits, every_family, tiny, tokens


def assert_same_gradients(ours, theirs, inputs, **tolerance):
    dy = torch.randn_like(ours)
    our_gradients = torch.autograd.grad(ours, inputs, dy)
    their_gradients = torch.autograd.grad(theirs, inputs, dy)
    torch.testing.assert_close(our_gradients, their_gradients, **tolerance)


@pytest.mark.parametrize('n_kv_head', [1, 2, 4])
@pytest.mark.parametrize('length', [7, 128, 300])  # less than a block, one block, blocks and a rest
@pytest.mark.parametrize('cache_bytes', [1, 8 << 20])  # row by row, and all at once
def test_attention_in_blocks_equals_torchs(n_kv_head, length, cache_bytes, monkeypatch):
    monkeypatch.setattr(BlockAttention, 'CACHE_BYTES', cache_bytes)
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, n, length, 8, dtype=torch.float64, requires_grad=True)
        for n in (4, n_kv_head, n_kv_head)
    )
    ours = BlockAttention.apply(q, k, v, 0.0)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(ours, theirs)
    assert_same_gradients(ours, theirs, (q, k, v))


@pytest.mark.parametrize('length', [7, 300])
def test_attention_drops_as_it_says(length, monkeypatch):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, length, 8, requires_grad=True) for n in (4, 2, 2))
    masks = []

    def recorded(*args):
        masks.append(dropout_mask(*args))
        return masks[-1]

    monkeypatch.setattr(cpu, 'dropout_mask', recorded)
    ours = BlockAttention.apply(q, k, v, 0.25)
    blocks = [m.view(2, 2, 2, -1, m.shape[-1]) for m in masks]
    whole = [F.pad(block, (0, length - block.shape[-1])) for block in blocks]
    kept = torch.cat(whole, dim=3).view(2, 4, length, length)
    future = torch.full((length, length), -math.inf).triu(1)
    p = (q @ k.repeat_interleave(2, 1).mT / 8**0.5 + future).softmax(-1)
    theirs = (p * kept / 0.75) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(ours, theirs)
    assert_same_gradients(ours, theirs, (q, k, v), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('rate', [0.1, 0.5, 0.999])
def test_dropout_drops_its_share_and_keeps_the_mean(rate):
    torch.manual_seed(0)
    mask = dropout_mask((1000, 1001), rate, torch.float32)
    assert set(mask.unique().tolist()) <= {0.0, 1.0} and abs(mask.mean() - (1 - rate)) < 0.002
    # four masks come from one 64-bit draw: none is special
    for part in mask.flatten()[:1_000_000].view(-1, 4).mean(0):
        assert abs(part - (1 - rate)) < 0.004
    x = torch.ones(1000, 1000)
    assert abs(Dropout(rate)(x).mean() - 1) < 0.1
    assert torch.equal(Dropout(rate).eval()(x), x)


def test_rmsnorm_equals_torchs():
    torch.manual_seed(0)
    x, weight = torch.randn(5, 7, 3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    ours, theirs = RMSNormFunction.apply(x, weight, 1e-5), F.rms_norm(x, (8,), weight, 1e-5)
    torch.testing.assert_close(ours, theirs)
    assert_same_gradients(ours, theirs, (x, weight))


@pytest.mark.parametrize('switches', [{}, QWEN3], ids=['gpt2', 'qwen3'])
def test_what_the_backward_pass_computes_again_changes_nothing(switches, monkeypatch):
    idx, gradients = tokens(4, 25), []
    for large in (1, 1 << 40):
        monkeypatch.setattr(cpu, 'LARGE', large)
        model = cpu.speed_up(tiny(switches, n_layer=1))
        loss = model(idx[:, :-1], idx[:, 1:], return_logits=False)[1]
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('large', [1, 1 << 40])
def test_what_is_computed_again_is_not_kept(dtype, large, monkeypatch):
    monkeypatch.setattr(cpu, 'LARGE', large)
    mlp = cpu.speed_up(tiny()).transformer.h[0].mlp
    functions = [
        (cpu.RMSNorm(32, eps=1e-6), mlp.c_fc),
        (cpu.LayerNorm(32), mlp.c_fc),
        (mlp.activate, mlp.c_proj),
    ]
    for function, linear in functions:
        x = torch.randn(4, 25, 32 if linear is mlp.c_fc else 2 * linear.in_features, dtype=dtype)
        x = x.requires_grad_() * 1
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = function(x)
            z = linear(y)
        kept = weakref.ref(y)
        del y
        assert (kept() is None) == (large == 1)
        z.sum().backward()


def test_what_was_changed_in_place_is_not_computed_again(monkeypatch):
    monkeypatch.setattr(cpu, 'LARGE', 1)
    norm, linear = cpu.RMSNorm(8, eps=1e-6), cpu.Linear(8, 3)
    x = torch.randn(5, 8, requires_grad=True)
    changed = norm(x)
    with torch.no_grad():
        changed.mul_(2)
    gradient = torch.autograd.grad(linear(changed).sum(), linear.weight)[0]
    torch.testing.assert_close(gradient, 2 * norm(x).sum(0).expand(3, -1))


@every_family
@torch.no_grad()
def test_a_step_in_bfloat16_is_as_exact_as_bfloat16(switches):
    model, idx = tiny(switches), tokens(3, 20)
    for p in model.parameters():
        p.data = p.data.bfloat16().float()  # so that only the arithmetic differs
    exact = all_logits(model, idx)[:, -1]
    cpu.speed_up(model.to(torch.bfloat16), packed=True)
    for rows in (1, 3):  # a text alone reads float16
        cache = model.make_cache(rows, 24)
        model(idx[:rows, :-1], cache=cache)
        logits = model(idx[:rows, -1:], cache=cache)[0][:, -1]
        assert logits.dtype == torch.float32 and cache.longest == 20
        assert (logits - exact[:rows]).abs().max() < 0.03 * exact.abs().max()


needs_fbgemm = pytest.mark.skipif(
    'fbgemm' not in torch.backends.quantized.supported_engines, reason='for CPUs with AVX2'
)


@pytest.fixture(params=['one thread', 'two threads'])
def threads(request, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(2 if request.param == 'two threads' else 1)
    monkeypatch.setattr(cpu_generation, 'SHARED', 1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@needs_fbgemm
@torch.no_grad()
def test_float16_weights_are_as_exact_as_float16(threads, monkeypatch):
    monkeypatch.setattr(cpu, 'has_bfloat16', lambda: False)
    model, idx = tiny(n_embd=160, bias=True), tokens(17, 20)  # no multiple of FBGEMM's columns
    for name, p in model.named_parameters():
        if name.endswith('bias'):
            p.normal_()
    exact = all_logits(model, idx)[:, -1]
    texts = model.generate(idx[:3], 4, temperature=0)
    cpu.speed_up(model, packed=True)
    mlp = model.transformer.h[0].mlp
    for rows in (17, 1, 3, 16):
        cache = model.make_cache(rows, 24)
        model(idx[:rows, :-1], cache=cache)
        logits = model(idx[:rows, -1:], cache=cache)[0][:, -1]
        assert (mlp.c_fc.in_float16 is None) == (rows == 17)  # made when few rows come
        error = (logits - exact[:rows]).abs().max()
        assert error < 0.002 * exact.abs().max()
        assert (error > 1e-5) == (rows <= 16)
    assert torch.equal(model.generate(idx[:3], 4, temperature=0), texts)


@needs_fbgemm
@torch.no_grad()
@pytest.mark.parametrize('scale', [1e6, 1e-7])
def test_a_weight_too_large_or_too_small_for_float16_stays_as_it_is(scale, monkeypatch):
    monkeypatch.setattr(cpu, 'has_bfloat16', lambda: False)
    for linear in (torch.nn.Linear(160, 128), torch.nn.Linear(160, 128).bfloat16()):
        x = torch.randn(1, 1, 160)
        for p in linear.parameters():
            p.mul_(scale)
        exact = F.linear(x, linear.weight.float(), linear.bias.float())
        model = tiny(bias=True)
        model.lm_head = linear
        y = cpu.speed_up(model, packed=True).lm_head(x)
        assert linear.in_float16 is None
        assert (y - exact).abs().max() < 0.01 * exact.abs().max()


@pytest.fixture
def steps_are_recorded(monkeypatch):
    digest = cpu.digest(cpu.RECORDED)
    assert digest == cpu.AS_RECORDED, f'set AS_RECORDED in fledge/cpu.py to {digest}'
    monkeypatch.setattr(cpu_generation.GPT, 'RECORD_AFTER', 3)


@pytest.mark.slow
@every_family
@torch.no_grad()
def test_a_recorded_step_is_the_forward_pass(switches, threads, steps_are_recorded):
    expected, idx = all_logits(tiny(switches), tokens(1, 24)), tokens(1, 24)
    model = cpu.speed_up(tiny(switches), packed=True)
    for _ in range(2):  # one record serves another text too
        cache = model.make_cache(1, 24)
        model(idx[:, :7], cache=cache)
        for at in range(7, 24):
            logits = model(idx[:, at : at + 1], cache=cache)[0]
            torch.testing.assert_close(logits[:, 0], expected[:, at], atol=1e-4, rtol=1e-4)
    assert model.recorded is not None
    with torch.no_grad():
        several = model.generate(idx[:, :3].expand(2, 3), 9, temperature=0)
    assert several.tolist() == 2 * model.generate(idx[:, :3], 9, temperature=0).tolist()


@torch.no_grad()
def test_what_may_do_more_than_a_record_is_not_recorded(steps_are_recorded, monkeypatch):
    model, seen = cpu.speed_up(tiny(), packed=True), []
    hook = model.transformer.h[0].register_forward_hook(lambda *_: seen.append(1))
    model.generate(tokens(1, 3), 9, temperature=0)
    assert len(seen) == 9 and model.recorded is None
    hook.remove()
    model.generate(tokens(1, 3), 9, temperature=0)
    assert len(seen) == 9 and model.recorded is not None

    def forward(self, x, context):
        seen.append(1)
        return x + self.mlp(x)

    monkeypatch.setattr(plain.Block, 'forward', forward)
    model = cpu.speed_up(tiny(n_layer=1), packed=True)
    model.generate(tokens(1, 3), 9, temperature=0)
    assert len(seen) == 18 and model.recorded is None


def test_a_part_of_somebodys_own_is_not_recorded(steps_are_recorded):
    class Branching(plain.MLP):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else torch.zeros_like(x)

    model, idx = tiny(), tokens(1, 3)
    model.transformer.h[0].mlp = Branching(model.config)
    expected = model.generate(idx, 15, temperature=0)
    assert torch.equal(cpu.speed_up(model, packed=True).generate(idx, 15, temperature=0), expected)
    assert model.recorded is None


def test_8_bit_weights_are_recorded_as_well(steps_are_recorded):
    model = quantize.apply(tiny())
    expected = model.generate(tokens(1, 3), 9, temperature=0)
    cpu.speed_up(model, packed=True)
    assert torch.equal(model.generate(tokens(1, 3), 9, temperature=0), expected)
    assert model.recorded is not None


@pytest.mark.slow
def test_8_bit_weights_that_change_are_recorded_again(steps_are_recorded):
    first, second = quantize.apply(tiny()), quantize.apply(tiny())
    for p in second.buffers():
        if p.dtype == torch.int8:
            p.neg_()
    expected = second.generate(tokens(1, 3), 9, temperature=0)
    cpu.speed_up(first, packed=True).generate(tokens(1, 3), 9, temperature=0)
    copied = copy.deepcopy(first)  # without the record
    for model in (first, copied):
        model.load_state_dict(second.state_dict())
        assert torch.equal(model.generate(tokens(1, 3), 9, temperature=0), expected)


def test_a_head_that_is_no_plain_linear_layer_is_called():
    """Quantization, adapters and hooks live in its forward: its weight is not read."""
    model, idx = cpu.speed_up(tiny()), tokens(2, 12)
    before = model(idx, idx, return_logits=False)[1]
    model.lm_head.register_forward_hook(lambda module, args, logits: logits * 2)
    logits, expected = model(idx, idx)
    assert not torch.allclose(before, expected)
    torch.testing.assert_close(model(idx, idx, return_logits=False)[1], expected)


def test_a_bias_that_somebody_gives_the_head_is_learned():
    model, idx = tiny(), tokens(2, 12)
    model.lm_head = torch.nn.Linear(model.config.n_embd, model.config.vocab_size)
    expected = model(idx, idx)[1]
    loss = cpu.speed_up(model)(idx, idx, return_logits=False)[1]
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert model.lm_head.bias.grad.abs().max() > 0


@pytest.mark.parametrize('chunk_bytes', [1, 4000, 1 << 20])
def test_the_loss_in_chunks_equals_cross_entropy(chunk_bytes, monkeypatch):
    monkeypatch.setattr(HeadLoss, 'CHUNK_BYTES', chunk_bytes)
    torch.manual_seed(0)
    x, weight = torch.randn(30, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    targets = torch.randint(50, (30,))
    targets[::3] = -1
    ours = HeadLoss.apply(x, weight, targets, True)
    theirs = F.cross_entropy(x @ weight.T, targets, ignore_index=-1)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(HeadLoss.apply(x, weight, targets, False), theirs)
    assert_same_gradients(ours, theirs, (x, weight))


def test_the_loss_in_chunks_takes_float32_under_autocast():
    torch.manual_seed(0)
    x, weight = torch.randn(30, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    targets = torch.randint(50, (30,))
    with torch.autocast('cpu', torch.bfloat16):
        loss = HeadLoss.apply(x, weight, targets, True)
    exact = F.cross_entropy(x @ weight.T, targets)
    torch.testing.assert_close(loss, exact, atol=0.03, rtol=0)
    gradients = torch.autograd.grad(loss, (x, weight))
    for a, b in zip(gradients, torch.autograd.grad(exact, (x, weight)), strict=True):
        assert a.dtype == torch.float32 and (a - b).abs().max() < 0.05 * b.abs().max()


def edited_norm(self, x):
    return F.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)


def edited_attend(self, q, k, v, mask):  # a window of 600 tokens
    positions = torch.arange(k.shape[2])
    near = positions[-q.shape[2] :, None] - positions
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=(near >= 0) & (near < 600), enable_gqa=True
    )


def capped_logits(self, x):
    return 5 * torch.tanh(self.lm_head(x) / 5)


def smoothed_loss(self, x, targets):  # in training alone
    smoothing = 0.2 if self.training else 0.0
    return F.cross_entropy(
        self.logits(x), targets, ignore_index=-1, reduction='none', label_smoothing=smoothing
    )


EDITS = {
    'GPT.loss in training': (plain.GPT, 'nats', smoothed_loss),
    'RMSNorm.forward': (plain.RMSNorm, 'forward', edited_norm),
    'CausalSelfAttention.attend': (plain.CausalSelfAttention, 'attend', edited_attend),
    'GPT.loss': (plain.GPT, 'logits', capped_logits),
}


@pytest.mark.slow
@pytest.mark.parametrize('step', EDITS)
def test_what_is_edited_in_model_py_is_followed(step, monkeypatch, capsys):
    digests = {name: cpu.digest(methods) for name, methods in cpu.STEPS.items()}
    hint = f'mend the twin in fledge/cpu.py, then set AS_WRITTEN there to {digests}'
    assert digests == cpu.AS_WRITTEN, hint
    kind, name, edited = EDITS[step]
    config = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, vocab_size=50, block_size=1024)
    config |= dict(position='rope', norm='rmsnorm', qk_norm=True, bias=False)
    torch.manual_seed(0)
    # in float64, as the twin of attention leaves float32 to torch
    model = plain.GPT(plain.GPTConfig(**config)).double()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    idx, targets = torch.randint(50, (2, 1, 1000))

    def computed(model):
        model.zero_grad()
        loss = model(idx, targets, return_logits=False)[1]
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    before = computed(model)
    monkeypatch.setattr(kind, name, edited)
    expected = computed(model)
    assert abs(before[0] - expected[0]) > 1e-5
    for found, wanted in zip(computed(cpu.speed_up(model)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)
    said = f'{step.split()[0]} of model.py is edited, and runs as it is there\n'
    assert capsys.readouterr().err == said


@pytest.mark.parametrize('packed', [False, True])
def test_a_cache_that_is_edited_in_model_py_is_followed(packed, monkeypatch, capsys):
    place, idx = plain.KVCache.place, tokens(2, 12)

    def last_four_keys(self, T):
        positions, mask = place(self, T)
        keys = torch.arange(self.length)
        return positions, mask if mask is None else mask & (keys > positions[:, None, :, None] - 4)

    before = tiny().generate(idx, 12, temperature=0)
    monkeypatch.setattr(plain.KVCache, 'place', last_four_keys)
    expected = tiny().generate(idx, 12, temperature=0)
    assert not torch.equal(before, expected)
    model = cpu.speed_up(tiny(), packed=packed)
    assert torch.equal(model.generate(idx, 12, temperature=0), expected)
    assert capsys.readouterr().err == 'KVCache of model.py is edited, and runs as it is there\n'


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('edited', ['attend', 'a class of its own'])
def test_a_cache_serves_an_attention_of_somebodys_own(edited, packed, monkeypatch):
    attend, idx = plain.CausalSelfAttention.attend, tokens(2, 12)

    def sharper(self, q, k, v, mask):
        return attend(self, q, 1.5 * k, v, mask)

    class Sharper(plain.CausalSelfAttention):
        attend = sharper

    model = tiny()
    before = model.generate(idx, 12, temperature=0)
    if edited == 'attend':
        monkeypatch.setattr(plain.CausalSelfAttention, 'attend', sharper)
    else:
        model.transformer.h[1].attn.__class__ = Sharper
    expected = model.generate(idx, 12, temperature=0)
    assert not torch.equal(before, expected)
    assert torch.equal(cpu.speed_up(model, packed).generate(idx, 12, temperature=0), expected)


def test_what_an_edit_learns_from_nothing_is_learned(monkeypatch, capsys):
    init, forward = plain.RMSNorm.__init__, plain.RMSNorm.forward

    def with_gain(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.gain = torch.nn.Parameter(torch.zeros(1))  # at first the norm is the plain one

    monkeypatch.setattr(plain.RMSNorm, '__init__', with_gain)
    monkeypatch.setattr(
        plain.RMSNorm, 'forward', lambda self, x: forward(self, x) * (1 + self.gain)
    )
    model = cpu.speed_up(tiny(QWEN3))
    assert 'RMSNorm.forward of model.py is edited' in capsys.readouterr().err
    gains = [p for name, p in model.named_parameters() if name.endswith('gain')]
    idx = torch.randint(model.config.vocab_size, (2, 16))
    with torch.autocast('cpu', torch.bfloat16):  # of which the gain makes float32
        loss = model(idx, idx, return_logits=False)[1]
    loss.backward()
    assert gains and all(gain.grad.abs() > 0 for gain in gains)


def test_an_edited_norm_without_a_weight_and_a_second_time(monkeypatch):
    config = dict(n_layer=1, n_head=2, n_embd=32, vocab_size=50, block_size=16, norm='rmsnorm')
    model = plain.GPT(plain.GPTConfig(**config, position='rope', bias=False))
    model.transformer.ln_f = plain.RMSNorm(32, elementwise_affine=False)

    def forward(self, x):
        return F.rms_norm(x, (32,), self.weight, self.eps)

    monkeypatch.setattr(plain.RMSNorm, 'forward', forward)
    idx = torch.randint(50, (1, 8))
    expected = model(idx, idx)[1]
    torch.testing.assert_close(cpu.speed_up(model)(idx, idx)[1], expected)
    again = cpu.speed_up(model.bfloat16().eval(), packed=True).generate(idx, 3)
    assert again.shape == (1, 11)


@pytest.mark.parametrize('packed', [False, True])
def test_a_norm_with_torchs_default_eps(packed):
    model, idx = tiny(QWEN3), tokens(2, 12)
    model.transformer.ln_f = plain.RMSNorm(model.config.n_embd)
    expected = model(idx, idx)[0]
    torch.testing.assert_close(
        cpu.speed_up(model, packed)(idx, idx)[0], expected, rtol=0, atol=0.01
    )


def test_a_step_whose_text_is_nowhere_is_edited(monkeypatch, capsys):
    names = dict(F=F)
    norm = 'F.rms_norm(x, self.normalized_shape, 2 * self.weight, self.eps)'
    exec(f'def forward(self, x):\n    return {norm}', names)
    monkeypatch.setattr(plain.RMSNorm, 'forward', names['forward'])
    cpu.speed_up(tiny(QWEN3))
    assert 'RMSNorm.forward of model.py is edited' in capsys.readouterr().err
