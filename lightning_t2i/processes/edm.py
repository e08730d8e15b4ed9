"""The variance exploding process of EDM (Karras et al., arXiv 2206.00364): x = x0 + sigma eps, native time sigma.

    sigma_i = (sigma_max^(1/rho) + i / (n - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho,  i = 0 ... n - 1   (eq. 5)

The preconditioning of networks trained on it belongs to the Denoiser.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_t2i.processes.base import ContinuousProcess, Time
from lightning_t2i.processes.conversions import expand


class EDM(ContinuousProcess):
    """EDM's process.

    Args:
        sigma_min, sigma_max: the noise levels between which samplers and Karras draws move.
        rho: shape of the grid; 7 puts more steps at low noise.
    """

    name = "edm"

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0):
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho
        self.t_min, self.t_max, self.initial_scale = sigma_min, sigma_max, sigma_max

    def initial(self, z: Tensor, t: Time | None = None) -> Tensor:
        return z * self.initial_scale if t is None else z * expand(torch.as_tensor(t, device=z.device).to(z.dtype), z)

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = t.to(torch.float64)
        return torch.ones_like(sigma), sigma

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-0.5 * log_snr.to(torch.float64))

    def grid(self, fraction: Tensor) -> Tensor:
        """Karras' map from [0, 1] to noise levels, float64: 0 is sigma_min, 1 is sigma_max."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (low + fraction.to(torch.float64) * (high - low)) ** self.rho

    def timesteps(self, steps: int, device: torch.device | str | None = None) -> Tensor:
        """float64 [steps + 1]: Karras' grid from sigma_max to sigma_min, then 0."""
        fraction = torch.linspace(1, 0, steps, dtype=torch.float64, device="cpu")
        return torch.cat([self.grid(fraction), torch.zeros(1, dtype=torch.float64, device="cpu")]).to(device)

    def to_config(self) -> dict[str, Any]:
        return {"name": self.name, "sigma_min": self.sigma_min, "sigma_max": self.sigma_max, "rho": self.rho}
