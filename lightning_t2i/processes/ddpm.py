"""The variance preserving process in discrete time (DDPM, arXiv 2006.11239), as diffusers' schedulers define it.

    abar_t = prod_{i <= t} (1 - beta_i),   alpha = sqrt(abar),   sigma = sqrt(1 - abar),   t = 0 ... T - 1

Native time is the integer t that the network was trained with; any negative time is clean data. Betas and abar are
computed in float32 exactly as diffusers does, so that a stock teacher and this process agree to the last bit; all
that follows is float64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_t2i.errors import UserError
from lightning_t2i.processes.base import Process

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def _betas(schedule: str, beta_start: float, beta_end: float, steps: int) -> Tensor:
    if schedule == "linear":
        return torch.linspace(beta_start, beta_end, steps, dtype=torch.float32, device="cpu")
    if schedule == "scaled_linear":
        return torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float32, device="cpu") ** 2

    return torch.tensor(squared_cosine_betas(steps), dtype=torch.float32, device="cpu")


def squared_cosine_betas(steps: int) -> list[float]:
    """Betas of the cosine schedule (Nichol and Dhariwal, arXiv 2102.09672, eq. 17)."""

    def abar(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(1 - abar((i + 1) / steps) / abar(i / steps), 0.999) for i in range(steps)]


def _rescale_to_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas whose last abar is 0 (arXiv 2305.08891, algorithm 1)."""
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    root = (root - last) * (first / (first - last))
    abar = root**2
    return 1 - torch.cat([abar[:1], abar[1:] / abar[:-1]])


class DDPM(Process):
    """DDPM in T = `steps` discrete times.

    Args:
        schedule: "linear" (DDPM, PixArt), "scaled_linear" (Stable Diffusion) or "squaredcos_cap_v2".
        beta_start, beta_end: the first and last beta of the linear schedules.
        steps: T.
        zero_terminal_snr: rescale so that x_{T-1} is pure noise; only v and x0 predictions are defined there.
        trained_betas: explicit betas [T], instead of a schedule.
        clip: bound of x0 estimates while sampling, for models of pictures; null leaves them as they are.
    """

    name = "ddpm"
    discrete = True
    t_min, data_time = 0, -1

    def __init__(
        self,
        schedule: str = "scaled_linear",
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        steps: int = 1000,
        zero_terminal_snr: bool = False,
        trained_betas: list[float] | None = None,
        clip: float | None = None,
    ):
        if trained_betas is None and schedule not in SCHEDULES:
            raise UserError("Unknown noise schedule", where="schedule", given=schedule, allowed=SCHEDULES)
        self.schedule, self.beta_start, self.beta_end, self.steps = schedule, beta_start, beta_end, steps
        self.zero_terminal_snr, self.trained_betas, self.clip = zero_terminal_snr, trained_betas, clip
        self.t_max = steps - 1
        if trained_betas is None:
            betas = _betas(schedule, beta_start, beta_end, steps)
        else:
            betas = torch.tensor(trained_betas, dtype=torch.float32, device="cpu")
        if zero_terminal_snr:
            betas = _rescale_to_zero_terminal_snr(betas)
        self.betas, self.alphas_cumprod = betas, torch.cumprod(1.0 - betas, dim=0)
        abar = torch.cat([torch.ones(1, dtype=torch.float64, device="cpu"), self.alphas_cumprod.to(torch.float64)])
        self._tables = {torch.device("cpu"): torch.stack([abar.sqrt(), (1 - abar).sqrt()])}

    @classmethod
    def from_scheduler(cls, source: Any) -> DDPM:
        """From a diffusers scheduler, its config (a dict) or a folder that holds one.

        Raises:
            UserError: the scheduler is not one of a DDPM process.
        """
        from lightning_t2i.processes.schedulers import from_scheduler

        process, _ = from_scheduler(source)
        if not isinstance(process, cls):
            raise UserError("The scheduler does not describe a DDPM process", where=str(source), given=process.name)
        return process

    def until(self, last: int) -> DDPM:
        """The part of this process whose last time is `last`."""
        betas = self.betas[: last + 1].tolist()
        return DDPM(self.schedule, self.beta_start, self.beta_end, last + 1, trained_betas=betas, clip=self.clip)

    def _table(self, device: torch.device) -> Tensor:
        """alpha and sigma, float64 [2, T + 1]; column 0 is clean data, column t + 1 is time t."""
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device]

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Integer times read the table; fractional ones interpolate log SNR linearly between their neighbours."""
        table = self._table(t.device)
        if not t.is_floating_point():
            alpha, sigma = table[:, t.clamp(min=-1) + 1]
            return alpha, sigma
        t = t.to(torch.float64).clamp(min=-1)
        lower, upper = t.floor().long() + 1, t.ceil().long() + 1
        weight = t - t.floor()
        log_snr = 2 * (table[0].log() - table[1].log())
        between = (1 - weight) * log_snr[lower] + weight * log_snr[upper]
        exact = weight == 0
        alpha = torch.where(exact, table[0][lower], torch.sigmoid(between).sqrt())
        sigma = torch.where(exact, table[1][lower], torch.sigmoid(-between).sqrt())
        return alpha, sigma

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """Fractional time, float64, clamped to [0, T - 1]: the inverse of the interpolation that `alpha_sigma` uses."""
        table = self._table(log_snr.device)[:, 1:]
        grid = 2 * (table[1].log() - table[0].log())  # minus log SNR, rising
        value = -log_snr.to(torch.float64)
        upper = torch.searchsorted(grid, value.contiguous()).clamp(1, self.steps - 1)
        low, high = grid[upper - 1], grid[upper]
        # With a zero terminal SNR the last interval is infinite and holds no fractional time but its ends.
        weight = torch.nan_to_num((value - low) / (high - low), nan=1.0).clamp(0, 1)
        return upper - 1 + weight

    def timesteps(self, steps: int, device: torch.device | str | None = None) -> Tensor:
        """int64 [steps + 1] in trailing spacing: T - 1 first, the last entry -1 is data (arXiv 2305.08891, table 2).

        Equal to diffusers' `timestep_spacing="trailing"`; its DDIM steps to t - T // steps, which is the next entry
        when `steps` divides T, and drifts from its own grid otherwise.
        """
        if not 1 <= steps <= self.steps:
            raise UserError("Impossible number of sampling steps", given=steps, allowed=f"1 to {self.steps}")
        index = torch.arange(steps, dtype=torch.float64, device="cpu")
        times = torch.round(self.steps - index * (self.steps / steps)).long() - 1
        return torch.cat([times, torch.tensor([-1], device="cpu")]).to(device)

    def to_config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "schedule": self.schedule,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "steps": self.steps,
            "zero_terminal_snr": self.zero_terminal_snr,
            "trained_betas": self.trained_betas,
            **({} if self.clip is None else {"clip": self.clip}),  # a fact of its own only where it is one
        }
