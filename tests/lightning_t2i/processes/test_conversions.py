"""Conversions between predictions: round trips, closed-form scores, precision."""

from __future__ import annotations

import itertools

import pytest
import torch
from closed_forms import PROCESSES, Gaussian, TwoModes, inner_times

from lightning_t2i.processes import DDPM, PREDICTIONS, convert

PAIRS = list(itertools.permutations(PREDICTIONS, 2))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exact(process, kind: str, x0, eps, t):
    alpha, sigma = (c.view(-1, 1) for c in process.alpha_sigma(t, torch.float64))
    return {
        "x0": x0,
        "eps": eps,
        "v": alpha * eps - sigma * x0,
        "velocity": eps - x0,
        "score": -eps / sigma,
    }[kind]


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_every_conversion_gives_the_definition_and_returns(process):
    t = inner_times(process)
    x0, eps = normal(5, 7), normal(5, 7, seed=1)
    x_t = process.add_noise(x0, eps, t)
    alpha, sigma = process.alpha_sigma(t, torch.float64)
    for source, target in PAIRS:
        given, wanted = exact(process, source, x0, eps, t), exact(process, target, x0, eps, t)
        there = convert(given, x_t, alpha, sigma, source, target)
        torch.testing.assert_close(there, wanted, rtol=1e-11, atol=1e-11)
        back = convert(there, x_t, alpha, sigma, target, source)
        torch.testing.assert_close(back, given, rtol=1e-12, atol=1e-12 * float(1 / sigma.min()))


@pytest.mark.parametrize("data", [Gaussian(), TwoModes()], ids=["gaussian", "two modes"])
@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_the_score_of_an_exact_denoiser_is_the_gradient_of_the_log_density(process, data):
    t = inner_times(process)
    x = normal(5, 9).requires_grad_()
    wanted = torch.autograd.grad(data.log_density(process, x, t).sum(), x)[0]
    alpha, sigma = process.alpha_sigma(t, torch.float64)
    score = convert(data.x0(process, x, t), x, alpha, sigma, "x0", "score")
    torch.testing.assert_close(score.detach(), wanted, rtol=1e-9, atol=1e-9)


def test_half_precision_inputs_are_converted_in_float32():
    """At the last time x0 = (x - sigma eps) / 0.068: the arithmetic must add nothing to the rounding of the inputs."""
    process = DDPM()
    x_t, eps = normal(4, 100).bfloat16(), normal(4, 100, seed=1).bfloat16()
    alpha, sigma = process.alpha_sigma(torch.tensor([999] * 4), torch.float64)
    wanted = convert(eps.double(), x_t.double(), alpha, sigma, "eps", "x0")
    got = convert(eps, x_t, alpha, sigma, "eps", "x0")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


def test_the_schedule_keeps_its_precision_near_data():
    """In bfloat16, 1 - abar_20 would be 0.01953."""
    _, sigma = DDPM().alpha_sigma(torch.tensor([20]))
    assert abs(sigma.item() ** 2 - 0.01869) < 1e-5


def test_unknown_kinds_are_refused():
    with pytest.raises(KeyError):
        convert(normal(1, 1), normal(1, 1), torch.ones(1), torch.ones(1), "eps", "noise")
