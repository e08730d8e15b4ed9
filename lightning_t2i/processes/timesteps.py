"""Laws of the training time t, as quantile functions: t = Q(u), u uniform in (0, 1) and keyed by global position.

    antithetic: positions 2j and 2j + 1 share one draw, u and 1 - u

so a pair is a fact about the global batch, whichever ranks hold its halves, and each sample alone keeps the law.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lightning_t2i.keys import Keys, inverse_normal_cdf
from lightning_t2i.processes.base import Process
from lightning_t2i.processes.edm import EDM
from lightning_t2i.processes.flow import RectifiedFlow

P = TypeVar("P", bound=Process)


@dataclass(frozen=True, kw_only=True)
class TimeLaw(ABC):
    """A law of t; call it with a process, keys and the global positions [B] of the samples.

    Returns native times [B]: int64 for DDPM, float32 for continuous processes.
    """

    antithetic: bool = False

    def __call__(self, process: Process, keys: Keys, positions: Tensor, stream: str = "t") -> Tensor:
        if self.antithetic:
            u = keys.uniform(stream, positions.div(2, rounding_mode="floor"), dtype=torch.float64)
            u = torch.where(positions % 2 == 1, 1 - u, u)
        else:
            u = keys.uniform(stream, positions, dtype=torch.float64)
        t = self.quantile(process, u)
        return t if process.discrete else t.to(torch.float32)

    @abstractmethod
    def quantile(self, process: Process, u: Tensor) -> Tensor:
        """The native time below which a fraction u of draws lies; float64, or int64 for a discrete process."""


@dataclass(frozen=True, kw_only=True)
class Uniform(TimeLaw):
    """Uniform in native time over [low, high); integers for DDPM, with the defaults 0 and T.

    DMD's 0.02 T ... 0.98 T with both ends is `Uniform(low=20, high=981)`; DeMe's range i of N is
    `Uniform(low=i * T / N, high=(i + 1) * T / N)`.
    """

    low: float | None = None
    high: float | None = None

    def quantile(self, process: Process, u: Tensor) -> Tensor:
        low = process.t_min if self.low is None else self.low
        high = (process.t_max + 1 if process.discrete else process.t_max) if self.high is None else self.high
        t = low + u * (high - low)
        return t.floor().long() if process.discrete else t


@dataclass(frozen=True, kw_only=True)
class LogitNormal(TimeLaw):
    """t = sigmoid(mean + std n) of a rectified flow, then its shift (SD3, arXiv 2403.03206, section 3.1)."""

    mean: float = 0.0
    std: float = 1.0

    def quantile(self, process: Process, u: Tensor) -> Tensor:
        flow = _require(process, RectifiedFlow, self)
        return flow.warp(torch.sigmoid(self.mean + self.std * inverse_normal_cdf(u)))


@dataclass(frozen=True, kw_only=True)
class LogNormal(TimeLaw):
    """sigma = exp(mean + std n), EDM's training law (arXiv 2206.00364, table 1)."""

    mean: float = -1.2
    std: float = 1.2

    def quantile(self, process: Process, u: Tensor) -> Tensor:
        _require(process, EDM, self)
        return torch.exp(self.mean + self.std * inverse_normal_cdf(u))


@dataclass(frozen=True, kw_only=True)
class Karras(TimeLaw):
    """Uniform over the indices low ... high - 1 of Karras' grid of `count` noise levels, index 0 the smallest (DMD)."""

    count: int = 1000
    low: int = 0
    high: int | None = None

    def quantile(self, process: Process, u: Tensor) -> Tensor:
        edm = _require(process, EDM, self)
        high = self.count if self.high is None else self.high
        index = (self.low + u * (high - self.low)).floor()
        return edm.grid(index / (self.count - 1))


@dataclass(frozen=True, kw_only=True)
class UShaped(TimeLaw):
    """p(t) proportional to exp(a t) + exp(a (1 - t)) on [0, 1], for reflow (arXiv 2405.20320, section 3.2)."""

    a: float = 4.0

    def quantile(self, process: Process, u: Tensor) -> Tensor:
        _require(process, RectifiedFlow, self)
        # The distribution function is 1/2 + sinh(a (t - 1/2)) / (2 sinh(a / 2)).
        return 0.5 + torch.asinh((2 * u - 1) * math.sinh(self.a / 2)) / self.a


def _require(process: Process, kind: type[P], law: TimeLaw) -> P:
    if not isinstance(process, kind):
        raise TypeError(f"{type(law).__name__} draws times of {kind.__name__}, not of {type(process).__name__}")
    return process
