"""The held-out loss of a merge as a function of its weights, with its gradient: what a search makes small."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from lightning_t2i.batch import Cond, Records
from lightning_t2i.keys import Keys
from lightning_t2i.range_experts import RangeExperts
from lightning_t2i.streamed import read_header

Data = list[tuple[Records, Cond | None]]


def alone(value: Tensor, reduce_op: str) -> Tensor:
    """The mean over one process."""
    return value


class HeldOut:
    """The loss of theta_0 + sum w tau on each range, at noise and times that stay.

    Memory is that of base and deltas, whole on every process; a gradient needs two more models, and the activations of
    one batch on one range.

    Args:
        module: whose experts are merged; has `each_range` and `range_losses`.
        data: records with their conditions.
        keys: of noise and times.
        reduce: the mean of a tensor over all processes.
    """

    def __init__(self, module: RangeExperts, data: Data, keys: Keys, reduce: Callable[..., Any] = alone):
        self.module: Any = module
        self.data, self.keys, self.reduce, self.network = data, keys, reduce, module.plain()
        self.theta = dict(self.network.named_parameters())
        headers = [read_header(file)[0] for file in module.all_deltas() or []]
        names = [name.removeprefix("backbone.") for name in self.theta]
        self.taus = [[h[name].read().to(module.device, torch.float32) for name in names] for h in headers]

    def merged(self, weights: Sequence[float]) -> tuple[list[Tensor], Callable[..., Any]]:
        """The merged weights, and the network with them."""
        with torch.no_grad():
            found = [
                theta + sum(w * taus[k] for w, taus in zip(weights, self.taus, strict=True))
                for k, theta in enumerate(self.theta.values())
            ]

        def network(*inputs: Any) -> Tensor:
            return functional_call(self.network, dict(zip(self.theta, found, strict=True)), inputs)

        return found, network

    @torch.no_grad()
    def ranges(self, weights: Sequence[float]) -> list[float]:
        """The loss of each range."""
        _, network = self.merged(weights)
        losses = torch.stack([self.module.range_losses(network, r, c, self.keys) for r, c in self.data]).mean(0)
        found: list[float] = self.reduce(losses, reduce_op="mean").tolist()
        return found

    def value(self, weights: Sequence[float]) -> float:
        """The mean over the ranges."""
        found = self.ranges(weights)
        return sum(found) / len(found)

    def gradient(self, weights: Sequence[float]) -> tuple[float, list[float]]:
        """The value and <dJ/dtheta, tau_i> of each expert."""
        found, network = self.merged(weights)
        found = [theta.requires_grad_() for theta in found]
        value = torch.zeros((), device=self.module.device)
        slope = torch.zeros(len(self.taus), device=self.module.device)
        with torch.enable_grad():
            for records, cond in self.data:
                for loss in self.module.each_range(network, records, cond, self.keys):
                    gradients = torch.autograd.grad(loss, found, allow_unused=True)
                    value += loss.detach()
                    slope += torch.stack([_dot(gradients, taus) for taus in self.taus])
        count = len(self.data) * self.module.num_ranges
        value, slope = (self.reduce(x / count, reduce_op="mean") for x in (value, slope))
        return float(value), slope.tolist()


def _dot(gradients: Sequence[Tensor | None], taus: Sequence[Tensor]) -> Tensor:
    """The product of a gradient, None where a weight is not used, with a delta."""
    return torch.stack([(g * tau).sum() for g, tau in zip(gradients, taus, strict=True) if g is not None]).sum()
