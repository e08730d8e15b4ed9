"""Classifier-free guidance: the formula, one call, and no unconditional branch where it is not needed."""

from __future__ import annotations

import pytest
import torch

from lightning_t2i.batch import Cond
from lightning_t2i.processes import DDPM, convert, guided


class Linear:
    """A "network" whose output depends on every argument; records the sizes of its batches."""

    def __init__(self):
        self.calls: list[int] = []

    def __call__(self, x, t, cond):
        self.calls.append(len(x))
        assert len(t) == len(x) == len(cond)
        return x * cond.embeds.mean((1, 2)).view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1)


@pytest.fixture
def cond() -> Cond:
    return Cond(embeds=torch.randn(3, 2, 4).double(), null_embeds=torch.randn(2, 4).double())


X = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
T = torch.tensor([1, 5, 9])


def test_one_call_gives_the_formula(cond):
    network = Linear()
    c, u = network(X, T, cond), network(X, T, cond.null())
    network.calls.clear()
    for scale in (2.5, 0.5, -1.0):
        torch.testing.assert_close(guided(network, X, T, cond, scale), u + scale * (c - u))
    assert network.calls == [6, 6, 6]


def test_scale_one_and_zero_need_one_branch(cond):
    network = Linear()
    c, u = network(X, T, cond), network(X, T, cond.null())
    network.calls.clear()
    assert torch.equal(guided(network, X, T, cond, 1.0), c)
    assert torch.equal(guided(network, X, T, cond, 0), u)
    assert network.calls == [3, 3]
    without_null = Cond(embeds=cond.embeds)
    assert torch.equal(guided(network, X, T, without_null, 1), c)
    with pytest.raises(ValueError, match="null_embeds"):
        guided(network, X, T, without_null, 2.0)
    with pytest.raises(ValueError, match="condition"):
        guided(network, X, T, None, 2.0)


def test_scales_per_sample(cond):
    network = Linear()
    scale = torch.tensor([1.0, 2.0, 4.0])
    whole = guided(network, X, T, cond, scale)
    for i in range(3):
        one = guided(network, X[i : i + 1], T[i : i + 1], cond.index(slice(i, i + 1)), float(scale[i]))
        torch.testing.assert_close(whole[i : i + 1], one)


def test_negative_prompts_replace_the_null_condition(cond):
    network = Linear()
    negative = Cond(embeds=torch.randn(3, 2, 4).double())
    c, n = network(X, T, cond), network(X, T, negative)
    torch.testing.assert_close(guided(network, X, 5, cond, 3.0, null=negative)[1], (n + 3 * (c - n))[1])


def test_guidance_commutes_with_conversions(cond):
    """Guiding eps and guiding x0 are the same, since conversions are affine in the prediction."""
    alpha, sigma = DDPM().alpha_sigma(T, torch.float64)
    network = Linear()

    def x0(x, t, c):
        a, s = DDPM().alpha_sigma(t, torch.float64)
        return convert(network(x, t, c), x, a, s, "eps", "x0")

    eps = guided(network, X, T, cond, 4.5)
    torch.testing.assert_close(guided(x0, X, T, cond, 4.5), convert(eps, X, alpha, sigma, "eps", "x0"))
