"""Intervals against closed forms, coverage of the bootstrap, and every verdict."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from lightning_t2i.claims.statistics import Interval, bootstrap, judge, paired_interval
from lightning_t2i.keys import Keys


def test_t_interval_of_three_seeds() -> None:
    # mean 2, standard deviation 1, and the tabulated quantile t(.975, 2) = 4.302653
    interval = paired_interval([1.0, 2.0, 3.0])
    assert interval.estimate == 2 and interval.n == 3
    assert interval.high - 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert 2 - interval.low == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
def test_t_interval_is_scipys(level: float) -> None:
    effects = [0.3, -0.1, 0.25, 0.4, 0.05]
    expected = stats.ttest_1samp(effects, 0).confidence_interval(level)
    found = paired_interval(effects, level)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_one_seed_has_no_bounds_and_equal_seeds_no_width() -> None:
    assert paired_interval([0.2]) == Interval(0.2, -math.inf, math.inf, 1)
    assert paired_interval([0.5] * 4) == Interval(0.5, 0.5, 0.5, 4)


@pytest.mark.parametrize("effects", [[], [math.nan, 1.0], [math.inf]])
def test_values_that_are_none_or_not_finite_are_refused(effects: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        paired_interval(effects)
    with pytest.raises(ValueError, match="finite"):
        bootstrap(torch.tensor(effects), Keys(0))


def test_a_level_is_a_probability() -> None:
    with pytest.raises(ValueError, match="level"):
        paired_interval([1.0], 95)


def test_bootstrap_of_a_mean_approaches_its_closed_form() -> None:
    """The resampled mean has standard deviation sd / sqrt(P), sd with divisor P, and is nearly normal."""
    scores = Keys(1).uniform("scores", torch.arange(400), dtype=torch.float64)
    interval = bootstrap(scores, Keys(0), draws=4000)
    half = 1.959964 * float(scores.std(correction=0)) / math.sqrt(400)
    assert interval.estimate == pytest.approx(float(scores.mean()), rel=1e-12) and interval.n == 400
    assert interval.high - interval.estimate == pytest.approx(half, rel=0.08)
    assert interval.estimate - interval.low == pytest.approx(half, rel=0.08)


def test_bootstrap_covers_the_true_mean_as_often_as_it_says() -> None:
    trials = Keys(3).normal("trials", torch.arange(300), (60,), torch.float64)
    for level in (0.8, 0.95):
        found = [bootstrap(row, Keys(i), draws=300, level=level) for i, row in enumerate(trials)]
        covered = sum(i.low <= 0 <= i.high for i in found) / len(found)
        assert covered == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / 300))


def test_bootstrap_depends_on_its_keys_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.arange(50.0)
    first = bootstrap(scores, Keys(0), draws=100)
    torch.rand(7)
    assert bootstrap(scores, Keys(0), draws=100) == first
    assert bootstrap(scores, Keys(1), draws=100) != first
    assert bootstrap(scores, Keys(0), draws=100, stream="other") != first
    monkeypatch.setattr("lightning_t2i.claims.statistics._CHUNK", 50 * 7)  # seven resamples at a time
    assert bootstrap(scores, Keys(0), draws=100) == first


def test_bootstrap_of_pairs_is_narrower_than_of_its_arms() -> None:
    """Difficulty that two arms share cancels in differences per prompt."""
    difficulty, noise = (Keys(5).normal(n, torch.arange(200), dtype=torch.float64) for n in ("d", "e"))
    arm, baseline = difficulty + 0.1 * noise + 0.2, difficulty
    paired = bootstrap(arm - baseline, Keys(0), draws=500)
    single = bootstrap(arm, Keys(0), draws=500)
    assert paired.high - paired.low < 0.2 * (single.high - single.low)
    assert paired.estimate == pytest.approx(0.2, abs=0.03)


def test_bootstrap_of_another_statistic_on_rows_of_several_values() -> None:
    scores = torch.stack([torch.arange(20.0), 2 * torch.arange(20.0)], 1)
    ratio = bootstrap(scores, Keys(0), lambda rows: rows[..., 1].sum(1) / rows[..., 0].sum(1), draws=50)
    assert (ratio.estimate, ratio.low, ratio.high) == (2, 2, 2)


@pytest.mark.parametrize(
    ("effects", "threshold", "direction", "verdict"),
    [
        ([0.2, 0.3, 0.25], 0.1, "higher", "reproduced"),
        ([-0.2, -0.3, -0.25], -0.1, "lower", "reproduced"),
        ([0.1, 0.1, 0.1], 0.1, "higher", "reproduced"),  # the threshold itself is enough
        ([0.9, 0.9, -0.01], 0.1, "higher", "inconclusive"),  # the mean meets it, one seed has the other sign
        ([0.9, 0.9, 0.0], 0.1, "higher", "inconclusive"),  # no effect is not the claimed sign
        ([0.05, 0.2, 0.02], 0.1, "higher", "inconclusive"),  # right sign, mean short of it, interval reaches it
        ([0.011, 0.010, 0.012], 0.1, "higher", "contradicted"),  # surely smaller than claimed
        ([-0.2, -0.21, -0.19], 0.1, "higher", "contradicted"),
        ([0.2, 0.21, 0.19], -0.1, "lower", "contradicted"),
        ([-0.5], 0.1, "higher", "inconclusive"),  # one seed contradicts nothing
        ([0.2, 0.3, 0.25], None, "higher", "reported-only"),
        ([-0.01, 0.0, -0.01], -0.02, "higher", "reproduced"),  # not worse by more than .02
        ([-0.03, 0.03, 0.0], -0.02, "higher", "inconclusive"),  # one seed is
    ],
)
def test_verdicts(effects: list[float], threshold: float | None, direction: str, verdict: str) -> None:
    judged = judge(effects, threshold, direction)
    assert judged.verdict == verdict
    assert judged.passed == (verdict == "reproduced")
    assert judged.interval == paired_interval(effects)


def test_a_number_without_a_baseline_may_be_the_threshold_itself() -> None:
    assert judge([0.0, 0.0, 0.0], 0.0, "lower", paired=False).passed
    assert judge([0.0, 0.0, 0.0], 0.0, "lower").verdict == "inconclusive"  # a difference of 0 has no sign
    assert judge([0.0, 0.0, 1.0], 0.0, "lower", paired=False).verdict == "inconclusive"
    assert judge([0.9, 0.9, 0.0], 0.1, "higher", paired=False).verdict == "inconclusive"


def test_an_unknown_direction_is_refused() -> None:
    with pytest.raises(KeyError):
        judge([0.1], 0.1, "up")
