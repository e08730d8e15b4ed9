"""The protocol that sets are measured by: its schedule, its independence of neighbours, what it reports."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from lightning_t2i.keys import Keys
from lightning_t2i.networks.projection import Student
from lightning_t2i.pair_features import PairFeatures
from lightning_t2i.retrieval_student import Protocol, TrainingSet, best, evaluate, recall_of, students
from lightning_t2i.soft_contrast import OBJECTIVES, contrast

STUDENT = Student.of(6, 5)
PROTOCOL = Protocol(nets=2, epochs=4, drop=3, every=2)


def pairs(count: int = 12) -> PairFeatures:
    """Texts that are a linear map of pictures, two for each."""
    images = torch.randn(count, 6)
    texts = (images @ torch.randn(6, 5)).repeat_interleave(2, 0) + 0.01 * torch.randn(2 * count, 5)
    return PairFeatures(images, texts, torch.arange(count).repeat_interleave(2), ["x"] * 2 * count)


def test_students_are_tested_when_the_protocol_says() -> None:
    rows = TrainingSet.of_pairs(pairs(), torch.arange(10))
    infonce = OBJECTIVES["infonce"]
    assert [epoch for epoch, _ in students(STUDENT, rows, infonce, PROTOCOL, Keys(0))] == [0, 2, 4]
    ends = [list(students(STUDENT, rows, infonce, p, Keys(0)))[-1][1] for p in (PROTOCOL, PROTOCOL)]
    assert torch.equal(ends[0][0], ends[1][0])


@pytest.mark.parametrize("change", [{"epochs": 5}, {"drop": 2}, {"batch_size": 6}], ids=str)
def test_every_number_of_the_protocol_counts(change) -> None:
    rows = TrainingSet.of_pairs(pairs(), torch.arange(10))
    found = [
        list(students(STUDENT, rows, OBJECTIVES["wbce"], p, Keys(0)))[-1][1][0]
        for p in (PROTOCOL, replace(PROTOCOL, **change))
    ]
    assert not torch.equal(*found)


def test_a_first_step_is_that_of_plain_descent() -> None:
    """Momentum begins at the gradient, weight decay adds to it; heads stand side by side without touching."""
    rows = TrainingSet.of_pairs(pairs(), torch.arange(10))
    keys, protocol = Keys(0), Protocol(nets=2, epochs=0, every=1)
    (_, end), *_ = students(STUDENT, rows, OBJECTIVES["infonce"], protocol, keys)
    weights = tuple(w.requires_grad_() for w in STUDENT.initial(keys, torch.arange(2)))
    order = keys.uniform("batch", torch.arange(20)).view(2, 10).argsort(1)
    keep = tuple(k.view(2, 10, -1) for k in STUDENT.keep(keys, "dropout", torch.arange(20)))
    for net in range(2):
        own = tuple(w[net] for w in weights)
        logits = STUDENT.logits(own, rows.images[order[net]], rows.texts[order[net]], tuple(k[net] for k in keep))
        for weight, gradient, found in zip(own, torch.autograd.grad(contrast(logits), own), end, strict=True):
            expected = weight - 0.1 * (gradient + 5e-4 * weight)
            torch.testing.assert_close(found[net], expected.detach(), rtol=1e-4, atol=1e-6)


def test_it_learns_a_set_and_chooses_epochs_by_the_split_it_is_told() -> None:
    features = pairs(20)
    rows = TrainingSet.of_pairs(features, torch.arange(40))
    protocol = Protocol(nets=1, epochs=60, drop=50, every=20)
    splits = {"test": recall_of(features), "val": recall_of(pairs(20))}
    found = evaluate(STUDENT, rows, OBJECTIVES["infonce"], protocol, Keys(0), splits, "val")
    assert found["test/last/mean"] > 0.8
    assert found["test/reference/mean"] >= max(found["test/last/mean"], found["test/selected/mean"])
    assert "val/selected/mean" not in found
    assert best([{"mean": 0.1}, {"mean": 0.3}, {"mean": 0.3}]) == 1


def test_pairs_are_captions_with_their_pictures() -> None:
    features = pairs(3)
    rows = TrainingSet.of_pairs(features, torch.tensor([1, 4]))
    assert torch.equal(rows.images, features.images[[0, 2]]) and rows.factors == ()
    assert torch.allclose(normalize(rows.texts, dim=1), normalize(features.texts[[1, 4]], dim=1))
