"""Muon: its update against one written out, and its state against torch's."""

import pytest
import torch

from fledge import optimizers
from fledge.optimizers import Muon, orthogonalize
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
    for ours, one in zip(orthogonalize(g, torch.float32), g):
        torch.testing.assert_close(ours.double(), written_out(one), atol=1e-5, rtol=0)
    singular = torch.linalg.svdvals(orthogonalize(g).float())
    assert singular.min() > 0.5 and singular.max() < 1.3  # near orthogonal, in bfloat16 as well
    assert torch.equal(
        orthogonalize(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4, dtype=torch.bfloat16)
    )


@pytest.mark.parametrize('together', [1, 1 << 22])  # one by one, and in batches
def test_muons_steps_equal_written_out_ones(together, monkeypatch):
    monkeypatch.setattr(Muon, 'TOGETHER', together)
    monkeypatch.setattr(optimizers, 'orthogonalize', lambda x: orthogonalize(x, torch.float32))
    torch.manual_seed(0)
    shapes, lr, decay = [(8, 12), (24, 8), (8, 12), (8, 8), (8, 12)], 0.02, 0.1
    parameters = [torch.nn.Parameter(torch.randn(s)) for s in shapes]
    expected, momenta = (
        [p.detach().double() for p in parameters],
        [torch.zeros(s).double() for s in shapes],
    )
    muon = Muon(parameters, lr=lr, weight_decay=decay)
    for _ in range(3):
        for i, p in enumerate(parameters):
            p.grad = torch.randn(shapes[i])
            g = p.grad.double()
            momenta[i] = 0.95 * momenta[i] + 0.05 * g
            update = (
                written_out(0.05 * g + 0.95 * momenta[i])
                * max(1, shapes[i][0] / shapes[i][1]) ** 0.5
            )
            expected[i] = expected[i] * (1 - lr * decay) - lr * update
        muon.step()
        for p, e in zip(parameters, expected):
            torch.testing.assert_close(p.detach().double(), e, atol=1e-5, rtol=0)


def test_torchs_own_muon_reads_the_state_and_does_the_same():
    torch.manual_seed(0)
    ours, theirs = (
        [torch.nn.Parameter(p) for p in ps]
        for ps in zip(*[(x, x.clone()) for x in torch.randn(3, 8, 12).unbind()])
    )
    a, b = (
        Muon(ours, lr=0.02, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1),
    )
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(8, 12)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, atol=2e-3, rtol=0)  # both orthogonalize in bfloat16
    b.load_state_dict(a.state_dict())
    assert torch.equal(b.state[theirs[1]]['momentum_buffer'], a.state[ours[1]]['momentum_buffer'])


def test_a_frozen_matrix_stays():
    model = GPT(GPTConfig(block_size=8, vocab_size=10, n_layer=1, n_head=1, n_embd=8))
    model.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
    before = model.transformer.h[0].mlp.c_fc.weight.clone()
    x = torch.randint(10, (2, 8))
    model(x, x)[1].backward()
    for o in optimizers.make_optimizers(model, 'muon', 0.01, 0.1, (0.9, 0.95)):
        o.step()
    assert torch.equal(model.transformer.h[0].mlp.c_fc.weight, before)
