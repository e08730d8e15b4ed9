"""The protocol that every set of pairs is measured by: new students are trained on it and retrieve real pairs.

SGD with momentum 0.9, weight decay 5e-4, rates eta_x and eta_y of the set, a tenth of them from epoch 51 on; epochs
0 to 100, each of ceil(M / 128) batches of 128 pairs (all, where there are fewer), without blending; dropout is on.
Several students are trained side by side. Recalls after epochs 0, 20, ..., 100.

last       recalls after the last epoch;   reference  after the epoch that is best on the very split, as published
selected   after the epoch that is best on validation
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_t2i.errors import UserError
from lightning_t2i.keys import Keys
from lightning_t2i.metrics.retrieval import RetrievalRecall
from lightning_t2i.networks.projection import Branches, Student, each
from lightning_t2i.pair_features import PairFeatures
from lightning_t2i.soft_contrast import Objective, similarity


@dataclass(frozen=True)
class Protocol:
    """How students are trained on a set.

    Args:
        nets: students.
        epochs: the last one; they count from 0.
        drop: epoch from which rates are a tenth.
        batch_size: pairs of a batch.
        every: epochs between two tests.
    """

    nets: int = 5
    epochs: int = 100
    drop: int = 51
    batch_size: int = 128
    every: int = 20

    def __post_init__(self) -> None:
        for name, least in (("nets", 1), ("epochs", 0), ("drop", 0), ("batch_size", 1), ("every", 1)):
            if (given := getattr(self, name)) < least:
                where, allowed = f"model.protocol.{name}", f"{least} or more"
                raise UserError("Too small a number", where=where, given=given, allowed=allowed)


@dataclass(frozen=True)
class TrainingSet:
    """Features [M, d], text vectors [M, d'], factors of S with their alpha, and rates [2], all without gradients."""

    images: Tensor
    texts: Tensor
    factors: tuple[Tensor, ...]
    alpha: float
    rates: Tensor

    @classmethod
    def of_pairs(cls, features: PairFeatures, rows: Tensor, rate: float = 0.1) -> TrainingSet:
        """Real pairs with S = I."""
        rates = torch.full((2,), rate, device=rows.device)
        return cls(features.images[features.owner[rows]], features.texts[rows], (), 1.0, rates)


def students(
    student: Student, pairs: TrainingSet, objective: Objective, protocol: Protocol, keys: Keys
) -> Iterator[tuple[int, Branches]]:
    """(epoch, weights [nets, n] of both heads) after every epoch that is tested."""
    device, m, nets = pairs.texts.device, len(pairs.texts), protocol.nets
    size = min(protocol.batch_size, m)
    weights = [w.to(device).requires_grad_() for w in student.initial(keys, torch.arange(nets))]
    groups = [{"params": [w], "lr": float(rate)} for w, rate in zip(weights, pairs.rates, strict=True)]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=5e-4)
    step = 0
    for epoch in range(protocol.epochs + 1):
        if epoch == protocol.drop:
            for group in optimizer.param_groups:
                group["lr"] *= 0.1
        for _ in range(-(-m // protocol.batch_size)):
            drawn = keys.at(step).uniform("batch", torch.arange(nets * m)).view(nets, m)
            rows = drawn.argsort(1)[:, :size].to(device)
            slots = torch.arange(nets * size, device=device)
            drawn_keep = student.keep(keys.at(step), "dropout", slots)
            keep = each(lambda k: k.view(nets, size, -1), drawn_keep)
            with torch.enable_grad():
                logits = student.logits((weights[0], weights[1]), pairs.images[rows], pairs.texts[rows], keep)
                loss = objective(logits, similarity(pairs.factors, pairs.alpha, rows).to(logits)).sum()
                found = torch.autograd.grad(loss, weights)
            for weight, gradient in zip(weights, found, strict=True):
                weight.grad = gradient
            optimizer.step()
            step += 1
        if epoch % protocol.every == 0 or epoch == protocol.epochs:
            yield epoch, (weights[0].detach(), weights[1].detach())


def recall_of(features: PairFeatures) -> RetrievalRecall:
    """Pictures and captions to be searched, which every process has."""
    recall = RetrievalRecall(whole=True)
    recall.add(features.images, torch.arange(len(features.images)), features.texts, features.owner)
    return recall


def retrieve(recall: RetrievalRecall, student: Student, weights: Branches) -> dict[str, float]:
    """Recalls of one student, with weights [n]: those of `RetrievalRecall.compute`."""
    on_cpu, embedded = (weights[0].cpu(), weights[1].cpu()), RetrievalRecall(recall.whole)
    for images, ids, texts, owners in recall.parts:  # each vector once, not once for every block of the search
        x, y = student.embed(on_cpu, images, texts)
        embedded.add(x, ids, y, owners)
    return embedded.compute(lambda x, y: (x @ y.T, y @ x.T))


@torch.no_grad()
def evaluate(
    student: Student,
    pairs: TrainingSet,
    objective: Objective,
    protocol: Protocol,
    keys: Keys,
    splits: dict[str, RetrievalRecall],
    select: str | None = None,
) -> dict[str, float]:
    """Means over the students: last/..., reference/... for each split as SPLIT/last/mean, and selected/... if told.

    Args:
        select: split whose best epoch is taken for all others.
    """
    table: dict[str, list[dict[str, float]]] = {name: [] for name in splits}
    for _, (image, text) in students(student, pairs, objective, protocol, keys):
        for name, recall in splits.items():
            found = [retrieve(recall, student, (image[i], text[i])) for i in range(protocol.nets)]
            table[name].append({key: sum(f[key] for f in found) / len(found) for key in found[0]})
    values: dict[str, float] = {}
    for name, rows in table.items():
        chosen = {"last": len(rows) - 1, "reference": best(rows)}
        if select is not None and name != select:
            chosen["selected"] = best(table[select])
        for kind, row in chosen.items():
            values |= {f"{name}/{kind}/{key}": value for key, value in rows[row].items()}
    return values


def best(rows: list[dict[str, float]]) -> int:
    """The row with the highest mean recall, the first of equals."""
    return max(range(len(rows)), key=lambda i: (rows[i]["mean"], -i))
