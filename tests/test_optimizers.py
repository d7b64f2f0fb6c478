"""Muon against one written out, its state against torch's; the schedules of the learning rate."""

import pytest
import torch

from encoder_decoder import EncoderDecoder
from fledge.optimizers import (
    SCHEDULES,
    Muon,
    learning_rate_at,
    load_state_dict,
    make_optimizers,
    orthogonalize,
    set_learning_rate,
)
from model import GPT, GPTConfig


def written_out(g):
    """Five Newton-Schulz iterations on one matrix in float64, from Jordan's post."""
    x = g.double()
    if x.shape[0] > x.shape[1]:
        x = x.T
    x = x / x.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if g.shape[0] > g.shape[1] else x


@pytest.mark.parametrize('shape', [(3, 16, 40), (3, 40, 16), (1, 24, 24)])
def test_orthogonalize_equals_a_written_out_one(shape):
    torch.manual_seed(0)
    g = torch.randn(shape)
    for ours, one in zip(orthogonalize(g, torch.float32), g, strict=True):
        torch.testing.assert_close(ours.double(), written_out(one), atol=1e-5, rtol=0)
    singular = torch.linalg.svdvals(orthogonalize(g, torch.bfloat16).float())
    assert singular.min() > 0.5 and singular.max() < 1.3  # near orthogonal, in bfloat16 as well
    assert torch.equal(orthogonalize(torch.zeros(1, 4, 4), torch.float32), torch.zeros(1, 4, 4))


def test_a_wide_matrix_with_almost_nothing_in_most_directions_is_orthogonalized_as_well():
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(32, 96), full_matrices=False)
    g = u * torch.logspace(0, -7, 32) @ v
    ours = orthogonalize(g[None], torch.float32)[0]
    torch.testing.assert_close(ours.double(), written_out(g), atol=2e-4, rtol=0)


@pytest.mark.parametrize('together', [1, 1 << 22])  # one by one, and in batches
def test_muons_steps_equal_written_out_ones(together, monkeypatch):
    monkeypatch.setattr(Muon, 'TOGETHER', together)
    torch.manual_seed(0)
    shapes = [(8, 12), (24, 8), (8, 12), (8, 8), (8, 12), (24, 8), (24, 8)]
    lr, decay = 0.02, 0.1
    parameters = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    expected = [p.detach().double() for p in parameters]
    momenta = [torch.zeros(s).double() for s in shapes]
    means = [None for s in shapes]
    stacked = {parameters[2]: [8], parameters[5]: [12, 4, 8], parameters[6]: [4, 10, 10]}
    muon = Muon(parameters, lr, decay, torch.float32, stacked)
    for _ in range(3):
        for i, p in enumerate(parameters):
            p.grad = torch.randn(shapes[i])
            g = p.grad.double()
            momenta[i] = 0.9 * momenta[i] + 0.1 * g
            nesterov = 0.1 * g + 0.9 * momenta[i]
            matrices = nesterov.split(stacked.get(p, [len(p)]))
            update = torch.cat([written_out(each) for each in matrices])
            rows, columns = shapes[i]
            if rows >= columns:
                lengths = (update**2).sum(dim=1, keepdim=True)
            else:
                lengths = (update**2).sum(dim=0, keepdim=True)
            means[i] = lengths if means[i] is None else 0.9 * means[i] + 0.1 * lengths
            update = update * (min(rows, columns) / max(rows, columns) / means[i]) ** 0.5
            update = update * max(1, rows / columns) ** 0.5
            expected[i] = expected[i] * (1 - lr * decay) - lr * update
        muon.step()
        for p, e in zip(parameters, expected, strict=True):
            torch.testing.assert_close(p.detach().double(), e, atol=1e-5, rtol=0)


@pytest.mark.parametrize('n_kv_head', [1, 2])
def test_queries_keys_values_gate_and_up_are_orthogonalized_one_by_one(n_kv_head):
    sizes = dict(n_head=2, n_kv_head=n_kv_head, head_dim=8, n_embd=16, n_inner=24)
    sizes |= dict(block_size=8, vocab_size=10, n_layer=1)
    decoder = EncoderDecoder(GPTConfig(n_encoder_layer=1, activation='swiglu', **sizes))
    [block] = decoder.transformer.h
    n_q, n_kv = 16, 8 * n_kv_head
    muon = make_optimizers(decoder, 'muon', 0.01, 0.1, (0.9, 0.95))[1]
    assert muon.stacked[block.attn.c_attn.weight] == [n_q, n_kv, n_kv]
    assert muon.stacked[block.cross_attn.c_attn.weight] == [n_kv, n_kv]
    assert muon.stacked[block.mlp.c_fc.weight] == [24, 24]
    assert block.cross_attn.q_attn.weight not in muon.stacked
    ungated = GPT(GPTConfig(activation='gelu', **sizes))
    muon = make_optimizers(ungated, 'muon', 0.01, 0.1, (0.9, 0.95))[1]
    assert ungated.transformer.h[0].mlp.c_fc.weight not in muon.stacked


@pytest.mark.parametrize('n_more', [-4, 4])
def test_rows_that_stacked_does_not_name_are_refused(n_more):
    """Who widens c_attn and forgets what is stacked in it would have rows that never learn."""
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=10))
    attention = model.transformer.h[0].attn
    n_rows = attention.c_attn.out_features + n_more
    attention.c_attn.weight = torch.nn.Parameter(torch.randn(n_rows, 16))
    words = f'attn.c_attn.stacked names {n_rows - n_more} rows, its weight has {n_rows}'
    with pytest.raises(ValueError, match=words):
        make_optimizers(model, 'muon', 0.01, 0.1, (0.9, 0.95))


def test_a_state_of_torchs_muon_is_gone_on_with():
    """Earlier checkpoints have it: momenta alone."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=10, n_layer=1, n_head=1, n_embd=8))
    theirs = torch.optim.Muon([p for p in model.transformer.h.parameters() if p.dim() == 2])
    ours = make_optimizers(model, 'muon', 0.01, 0.1, (0.9, 0.95))
    x = torch.randint(10, (2, 8))
    model(x, x)[1].backward()
    theirs.step()
    load_state_dict(ours, [ours[0].state_dict(), theirs.state_dict()])
    weight = model.transformer.h[0].mlp.c_fc.weight
    momentum = theirs.state[weight]['momentum_buffer']
    assert momentum.any() and torch.equal(ours[1].state[weight]['momentum_buffer'], momentum)
    ours[1].step()
    again = make_optimizers(model, 'muon', 0.01, 0.1, (0.9, 0.95))
    load_state_dict(again, [o.state_dict() for o in ours])
    for name in ('momentum_buffer', 'mean_squares'):
        assert torch.equal(again[1].state[weight][name], ours[1].state[weight][name])


def test_a_frozen_matrix_stays():
    model = GPT(GPTConfig(block_size=8, vocab_size=10, n_layer=1, n_head=1, n_embd=8))
    model.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
    before = model.transformer.h[0].mlp.c_fc.weight.clone()
    x = torch.randint(10, (2, 8))
    model(x, x)[1].backward()
    for o in make_optimizers(model, 'muon', 0.01, 0.1, (0.9, 0.95)):
        o.step()
    assert torch.equal(model.transformer.h[0].mlp.c_fc.weight, before)


def test_the_dtype_of_the_run_is_muons():
    """bfloat16 where the CPU does not multiply in it takes six times as long."""
    model = GPT(GPTConfig(block_size=8, vocab_size=10, n_layer=1, n_head=1, n_embd=8))
    for dtype in (torch.float32, torch.bfloat16):
        muon = make_optimizers(model, 'muon', 0.01, 0.1, (0.9, 0.95), dtype)[1]
        assert muon.dtype == dtype


def test_a_groups_own_rate_survives():
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    groups = [dict(params=parameters[:1], lr_scale=0.1), dict(params=parameters[1:])]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    set_learning_rate([optimizer], 0.5)
    assert [group['lr'] for group in optimizer.param_groups] == [0.05, 0.5]


def rates(schedule, steps, end=1000, short_of_time=1, **changes):
    settings = dict(learning_rate=1.0, min_lr=0.1, warmup_iters=100, decay_lr=True)
    settings |= dict(lr_schedule=schedule) | changes
    return [learning_rate_at(settings, step, short_of_time * step, end) for step in steps]


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_every_schedule_rises_to_the_learning_rate_and_may_be_off(schedule):
    assert rates(schedule, [0, 49, 99, 100]) == [1 / 101, 50 / 101, 100 / 101, 1]
    assert rates(schedule, [0, 50, 5000], decay_lr=False) == [1, 1, 1]
    assert rates(schedule, [0, 1], warmup_iters=0)[0] == 1


def test_schedules_fall_to_min_lr_at_their_end():
    assert rates('linear', [550, 1000, 2000]) == pytest.approx([0.55, 0.1, 0.1])
    assert rates('cosine', [325, 550, 1000]) == pytest.approx([0.55 + 0.45 * 0.5**0.5, 0.55, 0.1])
    assert rates('wsd', [800, 900, 1000]) == pytest.approx([1, 0.55, 0.1])
    # a run that has the time for half of its steps is through in half of them
    assert rates('linear', [275, 500], short_of_time=2) == pytest.approx([0.55, 0.1])


def test_noam_is_the_papers_and_has_no_end():
    width, warmup = 512, 4000

    def of_the_paper(step):  # equation 3
        return width**-0.5 * min(step**-0.5, step * warmup**-1.5)

    height = (width * warmup) ** -0.5
    changes = dict(learning_rate=height, warmup_iters=warmup, min_lr=0.0)
    steps = [4000, 4001, 10_000, 100_000]
    expected = [of_the_paper(step) for step in steps]
    assert rates('noam', steps, end=5000, short_of_time=9, **changes) == pytest.approx(expected)
    # warmup counts from 1, and reaches the top a step later
    assert rates('noam', [999], **changes)[0] == pytest.approx(of_the_paper(1000), rel=1e-3)
    assert rates('noam', [400, 10_000, 10**6]) == [0.5, 0.1, 0.1]
