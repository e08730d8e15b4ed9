"""Laws of t: their quantiles, their ends, antithetic pairs, independence of how a batch is split over ranks."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_t2i.keys import Keys
from lightning_t2i.processes import DDPM, EDM, Karras, LogitNormal, LogNormal, RectifiedFlow, Uniform, UShaped

LAWS = [
    (Uniform, DDPM()),
    (Uniform, RectifiedFlow()),
    (LogitNormal, RectifiedFlow(shift=3.0)),
    (LogNormal, EDM()),
    (Karras, EDM()),
    (UShaped, RectifiedFlow()),
]
ids = [f"{law.__name__}-{process.name}" for law, process in LAWS]
ENDS = torch.tensor([0.5 / 2**32, 1 - 0.5 / 2**32], dtype=torch.float64)


def test_integer_ranges_are_half_open_and_fully_covered():
    t = Uniform(low=20, high=981)(DDPM(), Keys(0), torch.arange(20_000))
    assert t.dtype == torch.int64 and t.min() == 20 and t.max() == 980 and len(t.unique()) == 961
    everything = Uniform()(DDPM(), Keys(0), torch.arange(20_000))
    assert everything.min() == 0 and everything.max() == 999
    assert Uniform(low=250, high=500).quantile(DDPM(), ENDS).tolist() == [250, 499]
    assert Uniform().quantile(DDPM(), ENDS).tolist() == [0, 999]


def test_uniform_integers_are_uniform():
    t = Uniform()(DDPM(), Keys(0), torch.arange(100_000))
    counts = torch.bincount(t // 50, minlength=20).double()
    chi_square = ((counts - 5000) ** 2 / 5000).sum()
    assert chi_square < 43.8  # 0.1 % point for 19 degrees of freedom


@pytest.mark.parametrize(("law", "process"), LAWS, ids=ids)
def test_draws_do_not_depend_on_ranks(law, process):
    positions = torch.arange(100, 132)
    for antithetic in (False, True):
        whole = law(antithetic=antithetic)(process, Keys(5, step=3), positions)
        parts = [law(antithetic=antithetic)(process, Keys(5, step=3), positions[rank::2]) for rank in range(2)]
        assert torch.equal(whole[0::2], parts[0]) and torch.equal(whole[1::2], parts[1])
        assert not torch.equal(whole, law(antithetic=antithetic)(process, Keys(5, step=4), positions))


@pytest.mark.parametrize(("law", "process"), LAWS, ids=ids)
def test_antithetic_pairs_mirror_each_other_and_keep_the_law(law, process):
    n = 20_000
    t = law(antithetic=True)(process, Keys(1), torch.arange(n)).double()
    first, second = t[0::2], t[1::2]
    plain = law()(process, Keys(2), torch.arange(n)).double()
    for q in (0.1, 0.5, 0.9):  # both halves and plain draws have the same quantiles
        u = torch.tensor([q - 0.015, q + 0.015], dtype=torch.float64)
        low, high = law().quantile(process, u).double()
        for draws in (first, second, plain):
            assert low <= draws.quantile(q) <= high
    u = Keys(1).uniform("t", torch.arange(n // 2), dtype=torch.float64)
    torch.testing.assert_close(first, law().quantile(process, u).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(second, law().quantile(process, 1 - u).double(), rtol=1e-6, atol=0)
    if law is Uniform:
        total = 999 if process.discrete else 1.0
        torch.testing.assert_close(first + second, torch.full_like(first, total))


def test_antithetic_means_vary_less():
    """The mean of a uniform pair is exactly the centre of the range."""
    t = Uniform(low=250, high=500, antithetic=True)(DDPM(), Keys(0), torch.arange(64))
    assert t.double().mean() == (250 + 499) / 2


def test_logit_normal():
    law = LogitNormal(mean=0.5, std=2.0)
    u = torch.tensor([0.5, 0.8413447460685429], dtype=torch.float64)
    wanted = torch.sigmoid(torch.tensor([0.5, 2.5], dtype=torch.float64))
    torch.testing.assert_close(law.quantile(RectifiedFlow(), u), wanted)
    torch.testing.assert_close(law.quantile(RectifiedFlow(3.0), u), 3 * wanted / (1 + 2 * wanted))
    with pytest.raises(TypeError, match="RectifiedFlow"):
        law(DDPM(), Keys(0), torch.arange(2))


def test_log_normal_of_edm():
    sigma = LogNormal()(EDM(), Keys(0), torch.arange(50_000))
    assert sigma.dtype == torch.float32
    assert abs(sigma.log().mean() + 1.2) < 0.03 and abs(sigma.log().std() - 1.2) < 0.03


def test_karras_levels():
    assert torch.allclose(Karras().quantile(EDM(), ENDS), torch.tensor([0.002, 80.0]).double())
    assert torch.allclose(
        Karras(low=20, high=981).quantile(EDM(), ENDS), torch.tensor([0.0032320, 72.054]).double(), 1e-3
    )
    sigma = Karras(count=4)(EDM(), Keys(0), torch.arange(1000))
    assert len(sigma.unique()) == 4


def test_u_shaped_density():
    """Differences of quantiles agree with the integral of exp(a t) + exp(a (1 - t))."""
    a = 4.0
    u = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    t = UShaped(a=a).quantile(RectifiedFlow(), u)

    def mass(x):
        return (torch.exp(a * x) - torch.exp(a * (1 - x)) + math.exp(a) - 1) / (2 * (math.exp(a) - 1))

    torch.testing.assert_close(mass(t), u, rtol=1e-10, atol=1e-10)
    assert 0 <= UShaped().quantile(RectifiedFlow(), ENDS)[0] < 1e-6
