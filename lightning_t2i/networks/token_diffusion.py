"""Diffusion of one token: the cosine schedule, the loss of mean and variance, ancestral sampling.

    abar(s) = cos^2((s + .008) / 1.008 pi / 2),   beta_t = min(1 - abar((t + 1) / T) / abar(t / T), .999)
    x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps
    L = |eps - eps_hat|^2 + KL(q(x_(t-1) | x_t, x) | N(mean of sg(eps_hat), sigma^2))          bits a dimension
    log sigma^2 = f log beta + (1 - f) log beta~,   f = (v + 1) / 2
    x_(t-1) = c1 x_hat + c2 x_t + tau sigma n,   x_hat = x_t / sqrt(abar_t) - sqrt(1 / abar_t - 1) eps_hat

from improved DDPM (Nichol and Dhariwal, arXiv 2102.09672), as MAR uses it (arXiv 2406.11838, section 3.2). The tables
are float64, rounded once. x_hat is not clipped by default: latents have no bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_t2i.processes.ddpm import squared_cosine_betas

VARIANCES = ("learned", "large", "small")
BIN = 1 / 255  # half the width of a bin of the discretised likelihood at t = 0, whose outer bins begin at .999
Prediction = tuple[Tensor, Tensor | None]
"""eps_hat, and v where the variance is learned."""


class TokenDiffusion:
    """A diffusion in the times that are kept of a longer one.

    Args:
        abar: float64 of the kept times, falling.
        times: the kept times, for the network.
        variance: "learned", "large" (beta) or "small" (beta~).
        first: how the likelihood of t = 0 is counted: "discretized" as MAR does, in bins that only pictures have, or
            "gaussian", the density of x. It teaches the variance at t = 0 alone, where no noise is added.

    Attributes:
        abar, betas: floats. log_large, log_small: logarithms of beta and beta~, beta~_0 replaced by beta~_1.
        mean: (c1, c2) of each time.
    """

    def __init__(self, abar: list[float], times: list[int], variance: str = "learned", first: str = "discretized"):
        self.abar, self.times, self.variance, self.first = abar, times, variance, first
        before = [1.0, *abar[:-1]]
        self.betas = [1 - a / b for a, b in zip(abar, before, strict=True)]
        small = [beta * (1 - b) / (1 - a) for a, b, beta in zip(abar, before, self.betas, strict=True)]
        small[0] = small[1] if len(small) > 1 else self.betas[0]
        self.log_large, self.log_small = [math.log(b) for b in self.betas], [math.log(b) for b in small]
        rows = zip(abar, before, self.betas, strict=True)
        self.mean = [(beta * b**0.5 / (1 - a), (1 - b) * (1 - beta) ** 0.5 / (1 - a)) for a, b, beta in rows]
        self._tables: dict[torch.device, Tensor] = {}

    @classmethod
    def cosine(cls, steps: int = 1000, variance: str = "learned", first: str = "discretized") -> TokenDiffusion:
        """The cosine schedule in `steps` times."""
        abar, kept = [], 1.0
        for beta in squared_cosine_betas(steps):
            kept *= 1 - beta
            abar.append(kept)
        whole = cls(abar, list(range(steps)), variance, first)
        whole.table(torch.device("cpu"))  # now, and not within a graph that is compiled
        return whole

    def respaced(self, count: int) -> TokenDiffusion:
        """The part of `count` times from first to last, equally spaced (halves are rounded to even numbers)."""
        last = len(self.times) - 1
        kept = [round(k * last / (count - 1)) for k in range(count)] if count > 1 else [last]
        return TokenDiffusion([self.abar[k] for k in kept], [self.times[k] for k in kept], self.variance, self.first)

    def table(self, device: torch.device) -> Tensor:
        """float64 [T, 6]: sqrt(abar), sqrt(1 - abar), c1, c2, log beta, log beta~."""
        if device not in self._tables:
            columns = zip(self.abar, self.mean, self.log_large, self.log_small, strict=True)
            rows = [[a**0.5, (1 - a) ** 0.5, *mean, large, small] for a, mean, large, small in columns]
            self._tables[device] = torch.tensor(rows, dtype=torch.float64, device="cpu").to(device)
        return self._tables[device]

    def add_noise(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t of x [M, 1, c], noise [M, m, c] at t int64 [M, m]."""
        alpha, sigma = self.table(t.device)[t].to(noise.dtype)[..., None, :2].unbind(-1)
        return alpha * x + sigma * noise

    def bits(self, x: Tensor, x_t: Tensor, t: Tensor, eps: Tensor, v: Tensor) -> Tensor:
        """What the variance is trained on, bits a dimension [M, m]; eps gets no gradient.

        Args:
            x: [M, 1, c]. x_t, eps, v: [M, m, c]. t: [M, m].
        """
        alpha, sigma, c1, c2, large, small = self.table(t.device)[t].to(eps.dtype)[..., None, :].unbind(-1)
        estimate = (x_t - sigma * eps.detach()) / alpha
        mean, log_variance = c1 * estimate + c2 * x_t, (v + 1) / 2 * large + (1 - v) / 2 * small
        squared = (c1 * x + c2 * x_t - mean) ** 2
        divergence = (log_variance - small + (small - log_variance).exp() - 1 + squared * (-log_variance).exp()) / 2
        if self.first == "gaussian":
            likelihood = (math.log(2 * math.pi) + log_variance + (x - mean) ** 2 * (-log_variance).exp()) / 2
        else:
            likelihood = -discretized(x, mean, log_variance / 2)
        return torch.where(t[..., None] == 0, likelihood, divergence).mean(-1) / math.log(2)

    def sample(
        self,
        predict: Callable[[Tensor, int], Prediction],
        noise: Tensor,
        temperature: float = 1.0,
        clip: float | None = None,
    ) -> Tensor:
        """Ancestral sampling from the last time to data: [M, c].

        Args:
            predict: (x [M, c], index of the time) -> eps_hat, and v where the variance is learned.
            noise: standard normal [T, M, c]: the state at the start, then that of each step but the last.
            temperature: tau, of the steps' noise alone.
            clip: bound of x_hat.
        """
        x = noise[0]
        for step, j in enumerate(reversed(range(len(self.times)))):
            eps, v = predict(x, j)
            (c1, c2), alpha, ratio = self.mean[j], self.abar[j] ** 0.5, (1 / self.abar[j] - 1) ** 0.5
            estimate = x / alpha - ratio * eps
            x = c1 * (estimate if clip is None else estimate.clamp(-clip, clip)) + c2 * x
            if j:
                x = x + temperature * self._deviation(j, v) * noise[step + 1]
        return x

    def _deviation(self, j: int, v: Tensor | None) -> Tensor | float:
        large, small = self.log_large[j], self.log_small[j]
        if v is None:
            return math.exp((large if self.variance == "large" else small) / 2)
        return ((v + 1) * (large / 4) + (1 - v) * (small / 4)).exp()


def discretized(x: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """Log probability of the bin of x among 256 in [-1, 1], of a Gaussian; the outer bins reach to infinity.

    Differences of the distribution function are floored at 1e-12, as in DDPM (arXiv 2006.11239, eq. 13).
    """
    inverse = (-log_deviation).exp()
    upper, lower = torch.special.ndtr((x + BIN - mean) * inverse), torch.special.ndtr((x - BIN - mean) * inverse)
    inside = torch.where(x > 0.999, 1 - lower, upper - lower)
    return torch.where(x < -0.999, upper, inside).clamp(min=1e-12).log()
