"""Keyed randomness: known answers, laws, independence, and nothing that depends on call order or grouping."""

import statistics

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from lightning_t2i.keys import Keys, inverse_normal_cdf, philox

POSITIONS = torch.arange(1000)


@pytest.mark.parametrize(
    ("word", "key", "expected"),
    [  # the known answers published with Random123
        (0, 0, ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]),
        (0xFFFFFFFF, 0xFFFFFFFF, ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]),
    ],
)
def test_philox_gives_the_published_words(word, key, expected):
    for counter in (torch.full((4, 1), word), np.full((4, 1), word)):
        words = philox(counter, (key, key))
        assert [f"{int(w):08x}" for w in words[:, 0]] == expected


def test_numpy_and_torch_give_the_same_words():
    counter = torch.arange(4 * 1000).view(4, 1000) * 7_919_111 % 2**32
    assert np.array_equal(philox(counter.numpy(), (5, 2**32 - 1)), philox(counter, (5, 2**32 - 1)).numpy())


def test_inverse_normal_cdf_agrees_with_the_standard_library():
    tails = torch.logspace(-12, -1, 200, dtype=torch.float64)
    u = torch.cat([tails, torch.linspace(0.01, 0.99, 197, dtype=torch.float64), 1 - tails])
    expected = torch.tensor([statistics.NormalDist().inv_cdf(v) for v in u.tolist()], dtype=torch.float64)
    assert (inverse_normal_cdf(u) - expected).abs().max() < 1e-12


def test_normal_and_uniform_have_their_laws():
    keys = Keys(1)
    assert kstest(keys.normal("z", POSITIONS, (16,)).flatten().numpy(), "norm").pvalue > 0.01
    assert kstest(keys.uniform("u", POSITIONS, (16,)).flatten().numpy(), "uniform").pvalue > 0.01


def test_uniform_stays_inside_the_open_interval():
    u = Keys(0).uniform("u", torch.arange(200_000))
    assert u.min() > 0
    assert u.max() < 1


def test_integers_cover_their_range_evenly():
    counts = Keys(2).integers("i", torch.arange(60_000), 3, 9).bincount(minlength=9)
    assert counts[:3].sum() == 0
    assert (counts[3:] - 10_000).abs().max() < 400  # four standard deviations


def test_bernoulli_has_its_rate():
    assert abs(Keys(0).bernoulli("b", torch.arange(40_000), 0.1).float().mean() - 0.1) < 0.006


def test_a_draw_depends_on_its_key_alone():
    keys = Keys(5, step=7)
    together = keys.normal("z", POSITIONS, (3, 5))
    assert torch.equal(keys.normal("z", POSITIONS[100:200].flip(0), (3, 5)), together[100:200].flip(0))
    assert torch.equal(keys.normal("z", POSITIONS, (15,)), together.flatten(1))
    for other in (Keys(6, step=7), Keys(5, step=8), keys.fork("validation").at(7)):
        assert not torch.equal(other.normal("z", POSITIONS, (3, 5)), together)
    assert not torch.equal(keys.normal("y", POSITIONS, (3, 5)), together)


def test_streams_steps_and_positions_are_uncorrelated():
    n = 20_000
    draws = [
        Keys(0).normal("a", torch.arange(n)),
        Keys(0).normal("b", torch.arange(n)),
        Keys(0, step=1).normal("a", torch.arange(n)),
        Keys(0).normal("a", torch.arange(1, n + 1)),
        Keys(1).normal("a", torch.arange(n)),
    ]
    off_diagonal = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert off_diagonal.abs().max() < 5 / n**0.5


def test_negative_and_large_positions_are_distinct():
    positions = torch.tensor([-1, 2**32 - 1, 2**32, 0, -(2**40), 2**62])
    assert len(set(Keys(0).normal("z", positions).tolist())) == len(positions)


def test_keyed_draws_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    Keys(0).normal("z", POSITIONS)
    assert torch.equal(torch.get_rng_state(), before)


def test_seed_globals_repeats_and_separates():
    def draw(keys, *where):
        keys.seed_globals(*where)
        return torch.rand(4)

    assert torch.equal(draw(Keys(0), 1, 2), draw(Keys(0), 1, 2))
    assert not torch.equal(draw(Keys(0), 1, 2), draw(Keys(0), 2, 1))
    assert not torch.equal(draw(Keys(0)), draw(Keys(0, step=1)))
