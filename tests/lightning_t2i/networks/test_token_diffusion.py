"""The diffusion of one token in closed form: its tables, its loss on Gaussian data, and the variance of its samples."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_t2i.networks.token_diffusion import Prediction, TokenDiffusion, discretized

COSINE = TokenDiffusion.cosine()


def best(diffusion: TokenDiffusion, variance: float = 1.0, mean: float = 0.0) -> Callable[[Tensor, int], Prediction]:
    """The optimal estimate of eps for data N(mean, variance), with v = 0 where the variance is learned."""

    def predict(x: Tensor, j: int) -> Prediction:
        abar = diffusion.abar[j]
        eps = (1 - abar) ** 0.5 * (x - abar**0.5 * mean) / (abar * variance + 1 - abar)
        return eps, torch.zeros_like(eps) if diffusion.variance == "learned" else None

    return predict


def sampled_variance(diffusion: TokenDiffusion, temperature: float) -> float:
    """Exact: the sample is linear in the noise, so unit vectors give its coefficients."""
    basis = torch.eye(len(diffusion.times), dtype=torch.float64)[:, :, None]
    return float(diffusion.sample(best(diffusion), basis, temperature).square().sum())


def test_tables_are_those_of_the_cosine_schedule() -> None:
    found = [COSINE.abar[t] for t in (0, 1, 499, 998, 999)]
    golden = [0.999958716, 0.999912576, 0.493843590, 2.42877e-6, 2.42877e-9]
    assert found == pytest.approx(golden, rel=3e-6)
    assert found[:3] == pytest.approx(golden[:3], abs=6e-10)
    assert COSINE.betas[-3:] == pytest.approx([0.55555, 0.75, 0.999], abs=6e-6)
    assert sum(COSINE.abar) / 1000 == pytest.approx(0.4955775, abs=6e-8)
    assert COSINE.log_small[0] == COSINE.log_small[1] < COSINE.log_large[1]


def test_times_are_spaced_from_first_to_last_and_keep_their_noise_levels() -> None:
    assert COSINE.respaced(10).times == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    few = COSINE.respaced(100)
    assert few.times[1:4] == [10, 20, 30] and few.times[-1] == 999 and len(set(few.times)) == 100
    assert few.abar == [COSINE.abar[t] for t in few.times]
    assert math.prod(1 - b for b in few.betas) == pytest.approx(COSINE.abar[-1], rel=1e-9)
    assert COSINE.respaced(1000).times == COSINE.times and COSINE.respaced(1).times == [999]


@pytest.mark.parametrize(("variance", "floor"), [(1.0, 0.4956), (0.25, 0.3277)])
def test_P2_the_floor_of_the_loss_on_gaussian_data(variance: float, floor: float) -> None:
    t = torch.arange(1000).expand(400, -1)
    x, noise = variance**0.5 * torch.randn(400, 1, 1), torch.randn(400, 1000, 1)
    x_t = COSINE.add_noise(x, noise, t)
    abar = torch.tensor(COSINE.abar)[None, :, None]
    eps = (1 - abar).sqrt() * x_t / (abar * variance + 1 - abar)
    exact = (abar * variance / (abar * variance + 1 - abar)).mean()
    assert float(exact) == pytest.approx(floor, abs=6e-5)
    assert float((eps - noise).square().mean()) == pytest.approx(floor, abs=0.006)


@pytest.mark.parametrize(("v", "bits"), [(1.0, 0.0087), (-1.0, 0.0094)])
def test_P2_bits_of_the_optimal_estimate(v: float, bits: float) -> None:
    t = torch.arange(1000).expand(500, -1)
    x, noise = torch.randn(500, 1, 1, dtype=torch.float64), torch.randn(500, 1000, 1, dtype=torch.float64)
    x_t = COSINE.add_noise(x, noise, t)
    eps = (1 - torch.tensor(COSINE.abar, dtype=torch.float64)).sqrt()[None, :, None] * x_t
    found = COSINE.bits(x, x_t, t, eps, torch.full_like(eps, v))
    assert float(found.mean()) == pytest.approx(bits, abs=5e-4)


@pytest.mark.parametrize("steps", [10, 25, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.9])
def test_P3_the_large_variance_gives_the_temperature_squared(steps: int, temperature: float) -> None:
    diffusion = TokenDiffusion.cosine(variance="large").respaced(steps)
    assert sampled_variance(diffusion, temperature) == pytest.approx(temperature**2, abs=1e-3)


@pytest.mark.parametrize(
    ("steps", "temperature", "expected"),
    [(10, 1.0, 0.656), (25, 1.0, 0.838), (100, 1.0, 0.954), (1000, 1.0, 0.995), (100, 0.9, 0.773)],
)
def test_P3_the_small_variance_loses_some(steps: int, temperature: float, expected: float) -> None:
    diffusion = TokenDiffusion.cosine(variance="small").respaced(steps)
    assert sampled_variance(diffusion, temperature) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_P3_no_temperature_gives_no_variance(variance: str) -> None:
    assert sampled_variance(TokenDiffusion.cosine(variance=variance).respaced(100), 0.0) < 1e-6


def test_a_learned_variance_lies_between_the_two() -> None:
    small, between, large = (
        sampled_variance(TokenDiffusion.cosine(variance=v).respaced(10), 1.0) for v in ("small", "learned", "large")
    )
    assert small < between < large
    diffusion = COSINE.respaced(10)
    for v, expected in ((1.0, large), (-1.0, small)):
        basis = torch.eye(10, dtype=torch.float64)[:, :, None]
        predict = best(diffusion)
        found = diffusion.sample(lambda x, j, v=v, predict=predict: (predict(x, j)[0], torch.full_like(x, v)), basis)
        assert float(found.square().sum()) == pytest.approx(expected, rel=1e-9)


def test_a_bound_of_the_estimate_bounds_the_sample() -> None:
    diffusion, noise = TokenDiffusion.cosine(variance="small").respaced(5), torch.randn(5, 20, 3)

    def nothing(x: Tensor, j: int) -> Prediction:
        return torch.zeros_like(x), None

    assert float(diffusion.sample(nothing, noise, 1.0).std()) == pytest.approx(2.0e4, rel=0.2)
    assert float(diffusion.sample(nothing, noise, 1.0, clip=3.0).abs().max()) <= 3.0


def test_the_likelihood_of_bins_sums_to_one_and_reaches_to_infinity() -> None:
    bins = torch.linspace(-1, 1, 256, dtype=torch.float64)
    mean, log_deviation = torch.tensor(0.3, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64)
    assert float(discretized(bins, mean, log_deviation).exp().sum()) == pytest.approx(1, abs=1e-9)
    outside, around = torch.tensor([-5.0, 5.0]), torch.tensor([-4.0, 4.0])
    tail = math.log(0.5 - math.erf((1 - 1 / 255) / 2**0.5) / 2)
    assert discretized(outside, around, torch.tensor(0.0)).tolist() == pytest.approx([tail, tail], rel=1e-5)


def test_the_density_replaces_the_bins_at_the_first_time_alone() -> None:
    dense, t = TokenDiffusion.cosine(first="gaussian"), torch.tensor([[0, 1, 500]])
    x, noise, v = torch.randn(1, 1, 4), torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    x_t = COSINE.add_noise(x, noise, t)
    binned, found = (d.bits(x, x_t, t, noise, v) for d in (COSINE, dense))
    assert torch.equal(found[:, 1:], binned[:, 1:]) and not torch.isclose(found[:, 0], binned[:, 0])
    variance = ((v[0, 0] + 1) / 2 * COSINE.log_large[0] + (1 - v[0, 0]) / 2 * COSINE.log_small[0]).exp()
    likelihood = torch.distributions.Normal(x[0, 0], variance.sqrt()).log_prob(x[0, 0]).mean()  # eps is exact
    assert float(found[0, 0]) == pytest.approx(-float(likelihood) / math.log(2), rel=1e-3)
