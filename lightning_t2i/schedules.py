"""Schedules in training steps: of learning rates, and of a method's own numbers."""

from __future__ import annotations

import math
from typing import TypeAlias

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_t2i.errors import UserError

Stepwise: TypeAlias = float | dict[int, float]
"""A number, or the numbers that hold from training steps on: {0: 0.98, 74000: 0.5}."""


def value_at(values: Stepwise, step: int) -> float:
    """The number that holds in a training step."""
    return values[max(s for s in values if s <= step)] if isinstance(values, dict) else values


def values_of(values: Stepwise, where: str) -> list[float]:
    """All numbers of a schedule.

    Raises:
        UserError: a schedule that says nothing of step 0.
    """
    if not isinstance(values, dict):
        return [values]
    if 0 not in values or min(values) < 0:
        raise UserError("A schedule begins at training step 0", where=where, given=values, allowed="{0: .98, 1000: .5}")
    return list(values.values())


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
