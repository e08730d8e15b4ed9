"""Intervals and verdicts of claims.

    effect of seed s    d_s = score of the arm - score of its baseline, both trained with seed s
    t-interval          mean(d) +- t(1 - a/2, n - 1) sd(d) / sqrt(n)                       (Student 1908)
    bootstrap           quantiles a/2 and 1 - a/2 of a statistic over resampled prompts    (Efron 1979, percentile)

Seeds say whether a training would come out the same again, prompts whether another set of prompts would: the two
intervals answer different questions and are never pooled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from scipy import stats
from torch import Tensor

from lightning_t2i.keys import Keys

Direction = Literal["higher", "lower"]
Verdict = Literal["reproduced", "contradicted", "inconclusive", "reported-only"]
_CHUNK = 2**22  # resampled values held at a time


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval at confidence `level`; `n` values, in the unit of the scores."""

    estimate: float
    low: float
    high: float
    n: int
    level: float = 0.95


@dataclass(frozen=True)
class Judged:
    """A verdict and the interval over seeds that it rests on; `passed` is true for "reproduced" alone."""

    verdict: Verdict
    interval: Interval

    @property
    def passed(self) -> bool:
        return self.verdict == "reproduced"


def paired_interval(effects: Sequence[float], level: float = 0.95) -> Interval:
    """The t-interval of the mean effect over seeds; without bounds for a single seed.

    Args:
        effects: difference between arm and baseline, one for each seed.
        level: confidence in (0, 1).

    Raises:
        ValueError: no effects, or one is not finite.
    """
    d = torch.tensor(list(effects), dtype=torch.float64)
    _check(d, level)
    n, mean = len(d), float(d.mean())
    if n == 1:
        return Interval(mean, -torch.inf, torch.inf, 1, level)
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * float(d.std()) / n**0.5
    return Interval(mean, mean - half, mean + half, n, level)


def bootstrap(
    scores: Tensor,
    keys: Keys,
    statistic: Callable[[Tensor], Tensor] | None = None,
    draws: int = 2000,
    level: float = 0.95,
    stream: str = "bootstrap",
) -> Interval:
    """The percentile interval of a statistic over prompts.

    For a difference between two arms give the differences per prompt: the prompts are the same, and pairing them takes
    their difficulty out of the interval.

    Args:
        scores: [P] or [P, K], one row for each prompt.
        keys: decide which prompts are drawn; equal keys give equal intervals.
        statistic: resampled rows [R, P] or [R, P, K] -> [R]; the mean over everything but R by default.
        draws: number of resamples.
        level: confidence in (0, 1).
        stream: name of the draw.

    Raises:
        ValueError: no scores, or one is not finite.
    """
    values = torch.as_tensor(scores).detach().cpu().to(torch.float64)
    _check(values, level)
    statistic = statistic or (lambda rows: rows.flatten(1).mean(1))
    n, chunk = len(values), max(1, _CHUNK // values.numel())
    found = [
        statistic(values[keys.integers(stream, torch.arange(start, min(start + chunk, draws)), 0, n, (n,))])
        for start in range(0, draws, chunk)
    ]
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.quantile(torch.cat(found), tails).tolist()
    return Interval(float(statistic(values[None])[0]), low, high, n, level)


def judge(
    effects: Sequence[float],
    threshold: float | None,
    direction: Direction = "higher",
    level: float = 0.95,
    paired: bool = True,
) -> Judged:
    """The verdict on a claim about the effect of an arm against its baseline.

    reproduced      the mean effect meets the threshold, and every single seed has the claimed sign
    contradicted    the whole t-interval over seeds falls short of the threshold
    inconclusive    neither: the effect is too small or too noisy for this number of seeds
    reported-only   there is no threshold: measured, not asserted

    Args:
        effects: arm minus baseline, one for each seed.
        threshold: the effect that was claimed, signed and in the unit of the scores, fixed before the run; null for a
            number that is reported and not asserted. A threshold on the other side of zero claims that the arm is not
            worse by more than that; then that bound, not zero, is what every seed must keep.
        direction: "higher" claims effect >= threshold, "lower" effect <= threshold.
        level: confidence of the t-interval.
        paired: false where effects are numbers without a baseline, as a count is: one that is the threshold itself with
            every seed meets it, where a difference of 0 has no sign.
    """
    interval = paired_interval(effects, level)
    if threshold is None:
        return Judged("reported-only", interval)
    sign = {"higher": 1, "lower": -1}[direction]
    claimed = sign * threshold
    signs = all(sign * d > min(claimed, 0.0) for d in effects) or (not paired and all(d == threshold for d in effects))
    if sign * interval.estimate >= claimed and signs:
        return Judged("reproduced", interval)
    best = interval.high if direction == "higher" else -interval.low
    return Judged("contradicted" if best < claimed else "inconclusive", interval)


def _check(values: Tensor, level: float) -> None:
    if values.numel() == 0 or not bool(values.isfinite().all()):
        raise ValueError(f"effects and scores must be finite and at least one: {values.flatten().tolist()[:10]}")
    if not 0 < level < 1:
        raise ValueError(f"the confidence level {level} is not in (0, 1)")
