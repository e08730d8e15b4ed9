"""Coresets choose what their rules say, on points whose answer is plain."""

from __future__ import annotations

import torch

from lightning_t2i.coresets import drawn_pairs, forgotten, herding, k_center
from lightning_t2i.keys import Keys


def test_herding_keeps_the_mean() -> None:
    points = torch.tensor([[0.0, 0.0], [4.0, 0.0], [2.0, 0.1], [0.0, 4.0], [4.0, 4.0], [2.0, 3.9]])
    chosen = herding(points, 3).tolist()
    assert len(set(chosen)) == 3
    free = [i for i in range(6) if i != chosen[0]]
    distance = {i: float((points.mean(0) - points[[chosen[0], i]].mean(0)).norm()) for i in free}
    assert chosen[1] == min(free, key=distance.__getitem__)
    random = torch.randn(200, 8)
    kept = random[herding(random, 20)].mean(0)
    assert float((kept - random.mean(0)).norm()) < 0.3 * float((random[:20].mean(0) - random.mean(0)).norm())


def test_k_center_takes_the_farthest_point_each_time() -> None:
    points = torch.tensor([[0.0], [1.0], [2.0], [10.0], [-9.0]])
    assert k_center(points, 3).tolist() == [1, 4, 3]  # nearest to the mean, then the two ends
    assert sorted(k_center(points, 5).tolist()) == list(range(5))


def test_forgetting_counts_what_was_known_and_then_was_not() -> None:
    known = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1], [1, 0, 1, 0], [0, 0, 1, 1]], dtype=torch.bool)
    assert forgotten(known).tolist() == [2, -1, 0, 1]


def test_drawn_pairs_are_different_and_depend_on_the_seed() -> None:
    a, b = (drawn_pairs(10, 40, Keys(seed)) for seed in (0, 1))
    assert len(a.unique()) == 10 and not torch.equal(a, b)
    assert torch.equal(a, drawn_pairs(10, 40, Keys(0)))
