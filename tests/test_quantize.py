"""8-bit weights: how far they are from the real ones, and that a model of them works as well."""

import math

import pytest
import torch

from fledge import quantize
from fledge.quantize import Int8Linear
from model import GPT, GPTConfig


@torch.no_grad()
def test_a_layer_is_within_its_rounding():
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48)
    layer = Int8Linear(linear)
    step = linear.weight.abs().amax(1) / 127
    assert (
        (layer.weight * layer.scale[:, None] - linear.weight).abs() <= step[:, None] / 2 + 1e-7
    ).all()
    for rows in (1, 16, 17, 100):  # integers, and beyond a few rows the weight turned back
        x = torch.randn(2 if rows == 100 else 1, rows, 64)
        exact, ours = linear(x), layer(x)
        assert ours.dtype == x.dtype and ours.shape == exact.shape
        assert (ours - exact).abs().max() < 0.03 * exact.abs().max()
        assert layer(x.bfloat16()).dtype == torch.bfloat16


@torch.no_grad()
def test_a_row_does_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    layer, x = Int8Linear(torch.nn.Linear(64, 48)), torch.randn(3, 64)
    before = layer(x)
    x[1] *= 1000
    torch.testing.assert_close(layer(x)[[0, 2]], before[[0, 2]], atol=1e-3, rtol=0)
    layer.weight.neg_()  # as load_state_dict writes
    torch.testing.assert_close(
        layer(x) - layer.bias,
        -(before - layer.bias) * torch.tensor([[1.0], [1000], [1]]),
        rtol=0.01,
        atol=0.05,
    )


@pytest.mark.slow
def test_perplexity_is_within_half_a_percent():
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(
            block_size=32,
            vocab_size=64,
            n_layer=2,
            n_head=2,
            n_embd=64,
            position='rope',
            norm='rmsnorm',
            activation='swiglu',
            bias=False,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = (torch.cumsum(torch.randint(0, 3, (64, 33)), 1)) % 64  # each token is one of three
    for _ in range(120):
        loss = model(text[:, :-1], text[:, 1:])[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()

    @torch.no_grad()
    def perplexities():
        """Of whole rows, and token by token through the cache as generation reads them."""
        cache, logits = model.make_cache(8, 32), []
        for t in range(32):
            logits.append(model(text[:8, t : t + 1], cache=cache)[0])
        by_token = torch.nn.functional.cross_entropy(
            torch.cat(logits, 1).flatten(0, 1), text[:8, 1:].flatten()
        )
        return math.exp(model(text[:, :-1], text[:, 1:])[1]), math.exp(by_token)

    before = perplexities()
    greedy = model.generate(text[:1, :8], 12, temperature=0)
    assert before[0] < 8  # it has learned something to lose
    quantize.apply(model)
    assert not any(isinstance(m, torch.nn.Linear) for m in model.modules())
    with torch.no_grad():
        losses = [model(text[:, :-1], text[:, 1:], return_logits=r)[1] for r in (True, False)]
    torch.testing.assert_close(losses[0], losses[1])
    for a, b in zip(perplexities(), before, strict=True):
        assert abs(a / b - 1) < 0.005
    assert model.generate(text[:1, :8], 12, temperature=0).shape == greedy.shape
    assert model.to(torch.bfloat16).generate(text[:3, :8], 4, seed=1).shape == (3, 12)
