"""Rectified flow (arXiv 2209.03003): x_t = (1 - t) x0 + t eps, t = 0 data and t = 1 noise, velocity dx/dt = eps - x0.

InstaFlow's paper counts time the other way round (its t is our 1 - t) and its velocity is minus ours; SD3 and FLUX use
the convention here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_t2i.processes.base import ContinuousProcess


class RectifiedFlow(ContinuousProcess):
    """Rectified flow.

    Args:
        shift: t -> shift t / (1 + (shift - 1) t) on grids and logit-normal draws (SD3, arXiv 2403.03206, eq. 23);
            above 1 it spends more steps at high noise. FLUX's resolution-dependent shift is shift = exp(mu).
    """

    name = "flow"
    t_min, t_max = 0.0, 1.0

    def __init__(self, shift: float = 1.0):
        self.shift = shift

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.to(torch.float64)
        return 1 - t, t

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-0.5 * log_snr.to(torch.float64))

    def warp(self, t: Tensor) -> Tensor:
        """Applies the shift to times in [0, 1]."""
        return self.shift * t / (1 + (self.shift - 1) * t)

    def timesteps(self, steps: int, device: torch.device | str | None = None) -> Tensor:
        """float64 [steps + 1]: shifted equal steps from 1 to 0."""
        return self.warp(torch.linspace(1, 0, steps + 1, dtype=torch.float64, device="cpu")).to(device)

    def to_config(self) -> dict[str, Any]:
        return {"name": self.name, "shift": self.shift}
