"""How straight the paths of a flow are, along its own simulated ODE (arXiv 2209.03003, section 2; 2309.06380, eq. 6).

    S = mean over i of |v_i - (Z_1 - Z_0)|^2 / d,   v_i = N (Z_(i + 1) - Z_i),   Z_0 ... Z_N by Euler's method

0 if and only if every path is a line at constant speed. Paths that are not straight give values that depend on N:
compare equal N alone. d is the number of values of one sample, so S is per value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_t2i.batch import Cond
from lightning_t2i.networks.denoiser import Predictor, Reexpressed
from lightning_t2i.processes import RectifiedFlow, guided, solve


@torch.no_grad()
def trajectory(
    denoiser: Predictor, z: Tensor, cond: Cond | None = None, steps: int = 100, scale: float = 1.0
) -> Tensor:
    """The points of N Euler steps from unit Gaussian noise z [B, ...] to data: [N + 1, B, ...].

    Args:
        denoiser: of any process; one that is no rectified flow is re-expressed as one, exactly.
        scale: of guidance.
    """
    flow = denoiser
    if not isinstance(denoiser.process, RectifiedFlow) or denoiser.process.shift != 1:
        flow = Reexpressed(denoiser, "velocity", RectifiedFlow())
    times, points = flow.process.timesteps(steps), [z]
    for i in range(steps):
        points.append(
            solve(lambda x, t: guided(flow.x0, x, t, cond, scale), flow.process, points[-1], times[i : i + 2], "euler")
        )
    return torch.stack(points)


class Straightness(Metric):
    """S over all paths that were added; on several ranks over those of all."""

    full_state_update = False
    higher_is_better = False
    name = "straightness"

    total: Tensor
    paths: Tensor

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("paths", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, points: Tensor) -> None:
        """Adds paths [N + 1, B, ...], see `trajectory`."""
        points = points.flatten(2).double()
        bend = (len(points) - 1) * points.diff(dim=0) - (points[-1] - points[0])
        self.total += bend.square().mean((0, 2)).sum()
        self.paths += points.shape[1]

    def compute(self) -> Tensor:
        return (self.total / self.paths).float()
