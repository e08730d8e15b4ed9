"""Optimizers that treat matrices and vectors apart: LAMB (arXiv 1904.00962), and AdamW without decay of vectors.

    m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,  r = m^ / (sqrt(v^) + eps) + wd w         ^: bias corrected
    w = w - lr phi(|w|) / |r| r       phi: identity up to 10; the ratio is 1 where a norm is 0, and for vectors

Vectors are tensors of one dimension and none: biases, norms, class tokens, scales. They have no decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_t2i.state_io import local_tensor

LARGEST_NORM = 10.0  # phi's end, algorithm 2


def _split(params: Iterable[Any], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of parameters, the second without decay; a group without parameters is left out."""
    found = list(params)
    parts = ([p for p in found if p.ndim > 1], weight_decay), ([p for p in found if p.ndim <= 1], 0.0)
    return [{"params": part, "weight_decay": decay} for part, decay in parts if part]


class MatrixDecayAdamW(torch.optim.AdamW):
    """AdamW that decays matrices alone.

    Args:
        params: parameters.
        lr, betas, eps, weight_decay: as of `torch.optim.AdamW`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.05,
    ):
        super().__init__(_split(params, weight_decay), lr=lr, betas=betas, eps=eps)


class LAMB(torch.optim.Optimizer):
    """LAMB; norms are those of whole tensors, also of sharded ones (DTensors): one collective for all of them.

    Args:
        params: parameters.
        lr: learning rate.
        betas: b1 and b2.
        eps: added to the root of v.
        weight_decay: wd, of matrices.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ):
        super().__init__(_split(params, weight_decay), {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Updates the weights; a closure is not called."""
        for group in self.param_groups:
            held = [p for p in group["params"] if p.grad is not None]
            updates = [self._direction(p, group) for p in held]
            matrices = bool(held) and held[0].ndim > 1
            ratios = trust_ratios(held, updates) if matrices else [1.0] * len(held)
            for parameter, update, ratio in zip(held, updates, ratios, strict=True):
                parameter.sub_(update * (group["lr"] * ratio))

    def _direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        (b1, b2), step = group["betas"], state["step"]
        state["exp_avg"].lerp_(gradient, 1 - b1)
        state["exp_avg_sq"].mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        root = (state["exp_avg_sq"].sqrt() / math.sqrt(1 - b2**step)).add_(group["eps"])
        update = state["exp_avg"] / root / (1 - b1**step)
        return update.add_(parameter, alpha=group["weight_decay"]) if group["weight_decay"] else update


def trust_ratios(weights: list[Tensor], updates: list[Tensor]) -> list[Tensor]:
    """phi(|w|) / |r| of each tensor, scalars; 1 where one of the norms is 0."""
    both = _squares([*weights, *updates]).sqrt()
    w, r = both[: len(weights)], both[len(weights) :]
    return list(torch.where((w > 0) & (r > 0), w.clamp(max=LARGEST_NORM) / r.clamp(min=1e-38), 1.0))


def _squares(tensors: list[Tensor]) -> Tensor:
    """The sum of squares of each whole tensor [n]; a collective where they are sharded."""
    sums = torch.stack([local_tensor(t).float().square().sum() for t in tensors])
    first = tensors[0]
    if isinstance(first, DTensor):
        mesh = first.device_mesh
        for dim, placement in enumerate(first.placements):
            if placement.is_shard():
                torch.distributed.all_reduce(sums, group=mesh.get_group(dim))
    return sums
