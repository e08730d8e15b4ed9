"""Data distributions whose denoiser, score and minimal loss are known in closed form, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_t2i.processes import DDPM, EDM, Process, RectifiedFlow, expand

PROCESSES: list[Process] = [
    DDPM(),
    DDPM("linear", 1e-4, 0.02),
    DDPM("squaredcos_cap_v2"),
    EDM(),
    RectifiedFlow(shift=3.0),
]


def inner_times(process: Process) -> Tensor:
    """Times away from the ends."""
    if process.discrete:
        return torch.tensor([1, 20, 500, 900, 980])
    return {"edm": torch.tensor([0.01, 0.1, 1.0, 10.0, 80.0]), "flow": torch.tensor([0.01, 0.1, 0.5, 0.9, 0.99])}[
        process.name
    ].double()


@dataclass
class Gaussian:
    """x0 ~ N(mean, std^2) in every dimension."""

    mean: float = 0.7
    std: float = 0.5

    def draw(self, z: Tensor) -> Tensor:
        return self.mean + self.std * z

    def variance(self, process: Process, t: Tensor) -> Tensor:
        """Of x_t."""
        alpha, sigma = process.alpha_sigma(t, torch.float64)
        return alpha**2 * self.std**2 + sigma**2

    def x0(self, process: Process, x: Tensor, t: Tensor) -> Tensor:
        """E[x0 | x_t] = mean + alpha std^2 / var(x_t) (x_t - alpha mean)."""
        alpha, _ = process.alpha_sigma(t, torch.float64)
        gain = expand(alpha * self.std**2 / self.variance(process, t), x)
        return self.mean + gain * (x - expand(alpha, x) * self.mean)

    def log_density(self, process: Process, x: Tensor, t: Tensor) -> Tensor:
        """Of x_t [B, N], up to a constant, per element."""
        alpha, _ = process.alpha_sigma(t, torch.float64)
        return -((x - expand(alpha, x) * self.mean) ** 2) / (2 * expand(self.variance(process, t), x))


@dataclass
class TwoModes:
    """x0 ~ 1/2 N(m, std^2) + 1/2 N(-m, std^2) in every dimension, independently."""

    mode: float = 1.0
    std: float = 0.2

    def draw(self, z: Tensor, sign: Tensor) -> Tensor:
        return self.mode * sign + self.std * z

    def x0(self, process: Process, x: Tensor, t: Tensor) -> Tensor:
        """E[x0 | x_t] = gain x_t + (1 - alpha gain) m tanh(alpha m x_t / var(x_t given the mode))."""
        alpha, sigma = process.alpha_sigma(t, torch.float64)
        variance = alpha**2 * self.std**2 + sigma**2
        gain = expand(alpha * self.std**2 / variance, x)
        which = torch.tanh(expand(alpha * self.mode / variance, x) * x)
        return gain * x + (1 - expand(alpha, x) * gain) * self.mode * which

    def log_density(self, process: Process, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = process.alpha_sigma(t, torch.float64)
        variance = expand(alpha**2 * self.std**2 + sigma**2, x)
        centre = expand(alpha, x) * self.mode
        return torch.logaddexp(-((x - centre) ** 2) / (2 * variance), -((x + centre) ** 2) / (2 * variance))

    def minimal_loss(self, process: Process, t: Tensor) -> Tensor:
        """E |x0 - E[x0 | x_t]|^2 = E x0^2 - E (E[x0 | x_t])^2, by quadrature over x_t; float64 [B]."""
        alpha, sigma = process.alpha_sigma(t, torch.float64)
        std = (alpha**2 * self.std**2 + sigma**2).sqrt()
        grid = torch.linspace(-12, 12, 20001, dtype=torch.float64)
        x = alpha[:, None] * self.mode + std[:, None] * grid  # the other mode gives the same by symmetry
        weight = torch.exp(-(grid**2) / 2) * (grid[1] - grid[0]) / (2 * torch.pi) ** 0.5
        second_moment = (weight * self.x0(process, x, t) ** 2).sum(1)
        return self.mode**2 + self.std**2 - second_moment
