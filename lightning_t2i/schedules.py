"""Learning-rate schedules in training steps."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class Warmup(LRScheduler):
    """Linear warm-up, then constant, or a half cosine down to a share of the base rate.

    Args:
        optimizer: given by the group.
        steps: training steps until the base rate is reached.
        total: training step at which the cosine ends; null keeps the rate constant.
        final: share of the base rate at `total`.
    """

    def __init__(self, optimizer: Optimizer, steps: int = 0, total: int | None = None, final: float = 0.0):
        self.steps, self.total, self.final = steps, total, final
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        step = self.last_epoch
        factor = min(1.0, (step + 1) / self.steps) if self.steps else 1.0
        if self.total is not None and step >= self.steps:
            progress = min(1.0, (step - self.steps) / max(1, self.total - self.steps))
            factor = self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2
        return [factor * base for base in self.base_lrs]
