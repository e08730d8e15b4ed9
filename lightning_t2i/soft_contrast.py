"""Contrastive objectives with soft targets: how similar picture i and text j of a batch are meant to be.

S      = diag(a) + (alpha / r) L R^T                 low rank (LoRS, arXiv 2406.03793), or dense, or I
wbce   1/2 [mean of e over S > 1/2 + mean of e over the rest]
       e_ij = -S_ij log sigmoid(l_ij) - (1 - S_ij) log sigmoid(-l_ij);   dL/dl_ij = w_ij (sigmoid(l_ij) - S_ij)
ence   -sum_j S_ij log softmax(l)_ij, mean over rows, both ways, halved;   cwcl: the same, rows of S divided by sums
bce    mean of e;   mse: mean (sigmoid(l) - S)^2;   kl: of softmax(l) from softmax(10 S), both ways, halved
infonce  without S

l [..., B, B] logits, S [..., B, B] -> [...].  Targets are not clamped: with S above 1 wbce has no lower bound.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Objective = Callable[[Tensor, Tensor], Tensor]


def contrast(logits: Tensor) -> Tensor:
    """InfoNCE of logits [..., B, B] in both directions: [...]."""
    rows, columns = (logits.log_softmax(d).diagonal(dim1=-2, dim2=-1).mean(-1) for d in (-1, -2))
    return -(rows + columns) / 2


def entropy(logits: Tensor, target: Tensor, epsilon: float = 0.0) -> Tensor:
    """e [..., B, B]; the published code adds an epsilon to the probabilities."""
    if epsilon:
        own, other = (logits.sigmoid() + epsilon).log(), (1 - logits.sigmoid() + epsilon).log()
    else:
        own, other = logsigmoid(logits), logsigmoid(-logits)
    return -target * own - (1 - target) * other


def wbce(logits: Tensor, target: Tensor, epsilon: float = 0.0) -> Tensor:
    """The balanced cross-entropy; which entries are positive is decided without a gradient."""
    e, positive = entropy(logits, target, epsilon), (target.detach() > 0.5).to(logits)
    means = [(e * part).sum((-2, -1)) / part.sum((-2, -1)).clamp_min(1.0) for part in (positive, 1 - positive)]
    return (means[0] + means[1]) / 2


def _soft(logits: Tensor, target: Tensor) -> Tensor:
    return -(target * logits.log_softmax(-1)).sum(-1).mean(-1)


def _kl(logits: Tensor, target: Tensor) -> Tensor:
    goal = (10 * target).log_softmax(-1)
    return (goal.exp() * (goal - logits.log_softmax(-1))).mean((-2, -1))


def _weighted(logits: Tensor, target: Tensor) -> Tensor:
    return _soft(logits, target / (target.sum(-1, keepdim=True) + 1e-6))


def _both(loss: Objective) -> Objective:
    return lambda logits, target: (loss(logits, target) + loss(logits.mT, target.mT)) / 2


OBJECTIVES: dict[str, Objective] = {
    "wbce": wbce,
    "wbce_epsilon": partial(wbce, epsilon=1e-6),
    "infonce": lambda logits, target: contrast(logits),
    "ence": _both(_soft),
    "cwcl": _both(_weighted),
    "bce": lambda logits, target: entropy(logits, target).mean((-2, -1)),
    "mse": lambda logits, target: (logits.sigmoid() - target).square().mean((-2, -1)),
    "kl": _both(_kl),
}


def similarity(factors: tuple[Tensor, ...], alpha: float, rows: Tensor) -> Tensor:
    """S of some rows, [..., b] -> [..., b, b]: of (a, L, R), of a dense S alone, or of nothing, which is I."""
    if not factors:
        return torch.eye(rows.shape[-1], device=rows.device).expand(*rows.shape, -1)
    if len(factors) == 1:
        return factors[0][rows[..., :, None], rows[..., None, :]]
    a, left, right = (factor[rows] for factor in factors)
    return torch.diag_embed(a) + alpha / left.shape[-1] * left @ right.mT
