"""Coresets: which real pairs stand for all.

    random      drawn
    herding     greedy: the mean of the chosen stays nearest to the mean of all                     (ICML 2009, Welling)
    k_center    greedy: always the pair that is farthest from all chosen ones                            (1708.00489)
    forgetting  the pairs that an expert most often knew and then did not know, epoch by epoch           (1812.05159)

Herding and k-center see unit embeddings of picture and caption by an expert, side by side. A pair is known when its
caption is the picture's nearest among the captions of its batch of 128; those never known come last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_t2i.keys import Keys
from lightning_t2i.networks.projection import Student
from lightning_t2i.pair_features import PairFeatures

BATCH = 128


def drawn_pairs(count: int, pairs: int, keys: Keys) -> Tensor:
    """[count] of so many pairs."""
    return keys.uniform("random", torch.arange(pairs)).argsort()[:count]


def herding(points: Tensor, count: int) -> Tensor:
    """[count] rows of points [C, d]."""
    mean, total, chosen = points.mean(0), torch.zeros_like(points[0]), list[int]()
    free = torch.ones(len(points), dtype=torch.bool, device=points.device)
    for k in range(1, count + 1):
        distances = (mean - (total + points) / k).square().sum(1)
        chosen.append(int(distances.masked_fill(~free, torch.inf).argmin()))
        total, free[chosen[-1]] = total + points[chosen[-1]], False
    return torch.tensor(chosen)


def k_center(points: Tensor, count: int) -> Tensor:
    """[count] rows of points [C, d]; the first is the one nearest to the mean."""
    chosen = [int((points - points.mean(0)).square().sum(1).argmin())]
    nearest = torch.full((len(points),), torch.inf, device=points.device)
    while len(chosen) < count:
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(1))
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    return torch.tensor(chosen)


def forgotten(known: Tensor) -> Tensor:
    """How often each pair went from known to unknown, -1 if it was never known; known bool [E, C] by epochs."""
    lost = (known[:-1] & ~known[1:]).sum(0)
    return torch.where(known.any(0), lost, -torch.ones_like(lost))


@torch.no_grad()
def known_pairs(features: PairFeatures, student: Student, trajectories: Any, keys: Keys, expert: int = 0) -> Tensor:
    """bool [E + 1, C]: what each snapshot of an expert retrieves within batches, drawn for each epoch."""
    rows = []
    for epoch in range(trajectories.length):
        weights = trajectories.snapshot(expert, epoch, features.texts.device)
        x, y = student.embed(weights, features.images[features.owner], features.texts)
        right = torch.zeros(len(features), dtype=torch.bool, device=x.device)
        order = keys.at(epoch).uniform("forgetting", torch.arange(len(features))).argsort().to(x.device)
        for part in order.split(BATCH):
            nearest = (x[part] @ y[part].T).argmax(1)
            right[part] = nearest == torch.arange(len(part), device=x.device)
        rows.append(right)
    return torch.stack(rows)


@torch.no_grad()
def choose(kind: str, features: PairFeatures, count: int, keys: Keys, trajectories: Any, student: Student) -> Tensor:
    """Pairs [count] of a coreset; "noise" has those of "random"."""
    if kind in ("random", "noise"):
        return drawn_pairs(count, len(features), keys)
    if kind == "forgetting":
        counts = forgotten(known_pairs(features, student, trajectories, keys))
        return counts.sort(descending=True, stable=True).indices[:count].cpu()
    weights = trajectories.snapshot(0, trajectories.length - 1, features.texts.device)
    x, y = student.embed(weights, features.images[features.owner], features.texts)
    return {"herding": herding, "k_center": k_center}[kind](torch.cat([x, y], 1), count)
