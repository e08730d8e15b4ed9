"""Improved reflow: times where they matter, a robust loss, compared pictures, another sampler (arXiv 2405.20320).

    p(t)   in proportion to exp(a t) + exp(-a t) on [0, 1] and its mirror image, a = 4                     section 3.2
    L      = (1 - t) h(v - (z - x)) + w(t) D(x_t - t v, x)                                                 section 3.3
    h(e)   = (sqrt(|e|^2 + c^2) - c) / d,   c = .00054 d
    w(t)   = 1 / t ("over_t", their configuration F), 1 ("plain", E) or 0 ("none")
    sample   x_s = (1 - s) (x_t - t v) + s z, the first noise again ("renoise"), or Euler's step

    t, v   this repository's time and velocity, which are this paper's: noise at t = 1, v = z - x
    d      values of one x;   D  a distance of pictures;   z, x, x_t  as in lightning_modules/instaflow.py

Deviations: the network is a raw velocity head that begins `converted`, where theirs keeps EDM's preconditioning around
it; t stays within 1e-5 of both ends as theirs. On latents D compares decoded pictures, which they did not need.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, Literal

from torch import Tensor

from lightning_modules.instaflow import Points, Reflow
from lightning_t2i.batch import Cond, Records
from lightning_t2i.keys import Keys
from lightning_t2i.networks.denoiser import Predictor
from lightning_t2i.processes import TimeLaw, UShaped, guided
from lightning_t2i.processes.weights import squares

EDGE = 1e-5  # least distance of t from 0 and 1
HUBER = 0.00054  # c of one value


def pseudo_huber(difference: Tensor, c: float) -> Tensor:
    """h of each sample's difference [B, ...] -> [B]; c is the width of the parabola times the number of values."""
    e = difference.flatten(1)
    return ((e.square().sum(1) + c**2).sqrt() - c) / e.shape[1]


class RFpp(Reflow):
    """Reflow with the improvements; each can be taken back.

    Args:
        teacher: see `InstaFlow`.
        law: distribution of the times; null is p.
        huber: c of one value; null takes mean squares, without the weight 1 - t.
        perceptual: w(t).
        metric, metric_weights: D, see `OneStep`.
        sampler: how the student samples.
        options: those of `Reflow`.
    """

    def __init__(
        self,
        teacher: str,
        law: TimeLaw | None = None,
        huber: float | None = HUBER,
        perceptual: Literal["over_t", "plain", "none"] = "over_t",
        metric: Literal["perceptual", "lpips", "lpips_alex"] = "lpips",
        metric_weights: str | None = None,
        sampler: Literal["renoise", "euler"] = "renoise",
        **options: Any,
    ):
        super().__init__(teacher, law=law or UShaped(), **options)
        self.huber, self.perceptual, self.sampler = huber, perceptual, sampler
        self.metric_kind, self.metric_weights = metric, metric_weights

    def configure_model(self) -> None:
        super().configure_model()
        if self.perceptual != "none":
            self.add_metric(self.metric_kind, self.metric_weights)

    @property
    def sees_pictures(self) -> bool:
        return self.perceptual != "none"

    def points(self, pairs: Records, keys: Keys) -> Points:
        at = super().points(pairs, keys)
        t = at.t.clamp(EDGE, 1 - EDGE)
        return at._replace(t=t, x_t=self.process.add_noise(at.x, at.z, t))

    def errors(self, network: Predictor, at: Points) -> Tensor:
        v = network(at.x_t, at.t, at.cond)
        if self.huber is None:
            errors = squares(v, at.z - at.x)
        else:
            errors = (1 - at.t) * pseudo_huber(v - (at.z - at.x), self.huber * math.prod(self.shape))
        if not self.sees_pictures:
            return errors
        distance = self.picture_errors(network.convert(v, at.x_t, at.t, "x0"), at.x)
        return errors + (distance / at.t if self.perceptual == "over_t" else distance)

    def solve(self, z: Tensor, cond: Cond | None, steps: int, scale: float) -> Tensor:
        if self.sampler == "euler":
            return super().solve(z, cond, steps, scale)
        x = z
        for t, s in pairwise(self.process.timesteps(steps, z.device)):
            x = self.process.add_noise(guided(self.generator_of("student").x0, x, t, cond, scale), z, s)
        return x
