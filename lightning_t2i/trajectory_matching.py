"""Gradients of trajectory matching: how a synthetic set should change so that training on it ends where experts did.

    g_k  = grad L(theta_k; batch k of the set),   theta_0 = theta*_s,   theta_{k+1} = theta_k - eta g_k,   k < T
    J    = sum_m c_m |theta^m_T - theta*^m_{s+e}|^2                  m: pictures x, texts y; eta_m of each
    c_m  = 1 / d_m (separate) or 1 / (d_x + d_y) (merged),   d_m = |theta*^m_s - theta*^m_{s+e}|^2

    unrolled   dJ by automatic differentiation through all T steps
    tesla      (arXiv 2211.10586) the dependence of theta_k on earlier batches is dropped:
               dJ/dset = sum_k d/dset sum_m <2 c_m (eta_m (theta*_{s+e} - theta*_s) + eta_m^2 G), g_k>,   G = sum_k g_k
               dJ/deta_m = -2 c_m <G, theta*_s - eta_m G - theta*_{s+e}>
               Pass 1 finds G and theta_k, pass 2 takes each g_k again with its graph: memory does not depend on T.

Pass 2 gets the very inputs of pass 1, draws included, since these are functions of keys; `again` may give others, as
the published code does, whose dropout is drawn anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_t2i.networks.projection import Branches, each

Step = Callable[[int, Branches], Tensor]  # inner step k, weights of both branches -> loss


@dataclass(frozen=True)
class Segment:
    """Where an expert was and where it went: weights of the picture and the text branch, [n] each."""

    start: Branches
    target: Branches

    def scales(self, merged: bool) -> Branches:
        """c of both branches."""
        d = [(a - b).square().sum() for a, b in zip(self.start, self.target, strict=True)]
        return (1 / (d[0] + d[1]), 1 / (d[0] + d[1])) if merged else (1 / d[0], 1 / d[1])


@dataclass(frozen=True)
class Matched:
    """loss J; branches: c_m r_m of both; gradients: of J, one for each leaf and then one for the rates [2]."""

    loss: Tensor
    branches: Branches
    gradients: list[Tensor]


def _matched(ends: Sequence[Tensor], segment: Segment, merged: bool) -> Branches:
    scales = zip(ends, segment.target, segment.scales(merged), strict=True)
    first, second = (c * (end - target).square().sum() for end, target, c in scales)
    return first, second


def unrolled(
    step: Step, leaves: Sequence[Tensor], rates: Tensor, segment: Segment, steps: int, merged: bool = False
) -> Matched:
    """J and its whole gradient.

    Args:
        step: the loss L of inner step k, a function of the leaves too.
        leaves: tensors of the set that require gradients.
        rates: eta of both branches, [2].
    """
    eta = rates.detach().requires_grad_()
    theta = each(lambda t: t.detach().requires_grad_(), segment.start)
    with torch.enable_grad():
        for k in range(steps):
            g = torch.autograd.grad(step(k, theta), theta, create_graph=True)
            theta = (theta[0] - eta[0] * g[0], theta[1] - eta[1] * g[1])
        branches = _matched(theta, segment, merged)
        loss = branches[0] + branches[1]
        found = torch.autograd.grad(loss, [*leaves, eta], materialize_grads=True)
    return Matched(loss.detach(), (branches[0].detach(), branches[1].detach()), list(found))


def tesla(
    step: Step,
    leaves: Sequence[Tensor],
    rates: Tensor,
    segment: Segment,
    steps: int,
    merged: bool = False,
    again: Step | None = None,
) -> Matched:
    """J and the truncated gradient; arguments as in `unrolled`, and `again`: the loss of pass 2 where it is another."""
    eta, scales = rates.detach(), segment.scales(merged)
    theta, passed = segment.start, []
    total = [torch.zeros_like(t) for t in segment.start]
    for k in range(steps):
        at = each(lambda t: t.detach().requires_grad_(), theta)
        with torch.enable_grad():
            g = torch.autograd.grad(step(k, at), at)
        passed.append(at)
        total = [sum_ + part for sum_, part in zip(total, g, strict=True)]
        theta = (theta[0] - eta[0] * g[0], theta[1] - eta[1] * g[1])
    branches = _matched(theta, segment, merged)
    weights = [
        2 * c * (rate * (target - start) + rate**2 * sum_)
        for c, rate, target, start, sum_ in zip(scales, eta, segment.target, segment.start, total, strict=True)
    ]
    gradients = [torch.zeros_like(leaf) for leaf in leaves]
    for k, at in enumerate(passed):
        with torch.enable_grad():
            g = torch.autograd.grad((again or step)(k, at), at, create_graph=True)
            value = (weights[0] * g[0]).sum() + (weights[1] * g[1]).sum()
            parts = torch.autograd.grad(value, leaves, materialize_grads=True)
        gradients = [sum_ + part for sum_, part in zip(gradients, parts, strict=True)]
    of_rates = [
        -2 * c * (sum_ * (start - rate * sum_ - target)).sum()
        for c, rate, target, start, sum_ in zip(scales, eta, segment.target, segment.start, total, strict=True)
    ]
    return Matched(branches[0] + branches[1], branches, [*gradients, torch.stack(of_rates)])
