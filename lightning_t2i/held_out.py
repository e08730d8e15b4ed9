"""The held-out loss of a merge as a function of its weights, with its gradient: what a search makes small."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from lightning_t2i.batch import Cond, Records
from lightning_t2i.experts import Experts
from lightning_t2i.keys import Keys
from lightning_t2i.merging import read_header

Data = list[tuple[Records, Cond | None]]


def alone(value: Tensor, reduce_op: str) -> Tensor:
    """The mean over one process."""
    return value


class HeldOut:
    """The loss of theta_0 + sum w tau on each range, at noise and times that stay.

    Memory is that of base and deltas, whole on every process.

    Args:
        module: whose experts are merged; has `range_losses`.
        data: records with their conditions.
        keys: of noise and times.
        reduce: the mean of a tensor over all processes.
    """

    def __init__(self, module: Experts, data: Data, keys: Keys, reduce: Callable[..., Any] = alone):
        self.module: Any = module
        self.data, self.keys, self.reduce, self.network = data, keys, reduce, module.plain()
        self.theta = dict(self.network.named_parameters())
        headers = [read_header(file)[0] for file in module.all_deltas() or []]
        names = [name.removeprefix("backbone.") for name in self.theta]
        self.taus = [[h[name].read().to(module.device, torch.float32) for name in names] for h in headers]

    def losses(self, w: Tensor) -> Tensor:
        """The loss of each range, with a gradient by w [N]: [N]."""
        parameters = {
            name: theta + sum(x * taus[k] for x, taus in zip(w, self.taus, strict=True))
            for k, (name, theta) in enumerate(self.theta.items())
        }

        def network(*inputs: Any) -> Tensor:
            return functional_call(self.network, parameters, inputs)

        return torch.stack([self.module.range_losses(network, r, c, self.keys) for r, c in self.data]).mean(0)

    def ranges(self, weights: Sequence[float]) -> list[float]:
        """The loss of each range."""
        with torch.no_grad():
            losses = self.losses(torch.tensor(weights, device=self.module.device, dtype=torch.float32))
        found: list[float] = self.reduce(losses, reduce_op="mean").tolist()
        return found

    def value(self, weights: Sequence[float]) -> float:
        """The mean over the ranges."""
        found = self.ranges(weights)
        return sum(found) / len(found)

    def gradient(self, weights: Sequence[float]) -> tuple[float, list[float]]:
        """The value and <dJ/dtheta, tau_i> of each expert."""
        w = torch.tensor(weights, device=self.module.device, dtype=torch.float32, requires_grad=True)
        with torch.enable_grad():
            loss = self.losses(w).mean()
            (slope,) = torch.autograd.grad(loss, w)
        value, slope = (self.reduce(x.detach(), reduce_op="mean") for x in (loss, slope))
        return float(value), slope.tolist()
