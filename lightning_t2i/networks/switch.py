"""Experts that take turns: a denoiser that asks, at time t, the one whose range holds t."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_t2i.batch import Cond
from lightning_t2i.networks.denoiser import Predictor
from lightning_t2i.processes.base import Time


class Switch(Predictor):
    """Several denoisers of one process and prediction, of which each answers for its own range of times.

    Args:
        experts: in the order of their ranges, the lowest times first.
        ends: where each range but the last ends: range i holds ends[i - 1] <= t < ends[i].
    """

    def __init__(self, experts: Sequence[Predictor], ends: Sequence[float]):
        super().__init__(experts[0].process, experts[0].prediction, experts[0].sigma_data)
        if len(ends) != len(experts) - 1:
            raise ValueError(f"{len(experts)} experts need {len(experts) - 1} ends, not {len(ends)}")
        self.experts, self.ends = nn.ModuleList(experts), list(ends)

    def range_of(self, t: Time) -> Tensor:
        """Index of the range that holds each time."""
        t = torch.as_tensor(t)
        return torch.bucketize(t, torch.tensor(self.ends, dtype=t.dtype, device=t.device), right=True)

    def predict(self, x_t: Tensor, t: Time, cond: Cond | None = None) -> Tensor:
        t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        chosen = self.range_of(t)
        found = chosen.unique().tolist()
        if len(found) == 1:
            return self.experts[found[0]].predict(x_t, t, cond)
        out = torch.empty_like(x_t, dtype=torch.promote_types(x_t.dtype, torch.float32))
        for i in found:
            rows = (chosen == i).nonzero()[:, 0]
            out[rows] = self.experts[i].predict(x_t[rows], t[rows], cond and cond.index(rows)).to(out)
        return out
