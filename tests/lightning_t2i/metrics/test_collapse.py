"""The share of stripes against dense least squares, and what it holds in memory."""

from __future__ import annotations

import pytest
import torch
from largest import Largest
from torch import Tensor

from lightning_t2i.metrics.collapse import off_diagonal, stripes


def dense(similarity: Tensor) -> float:
    """The same by a design matrix [M (M - 1), 2 M]."""
    m = len(similarity)
    i, j = (~torch.eye(m, dtype=torch.bool)).nonzero().T
    design = torch.zeros(len(i), 2 * m, dtype=torch.float64)
    design[torch.arange(len(i)), i], design[torch.arange(len(i)), m + j] = 1.0, 1.0
    values = off_diagonal(similarity.double())
    rest = values - design @ torch.linalg.lstsq(design, values[:, None], driver="gelsd").solution[:, 0]
    return float(1 - rest.square().sum() / (values - values.mean()).square().sum())


@pytest.mark.parametrize("m", [2, 3, 4, 7, 30])
@pytest.mark.parametrize("strength", [0.0, 0.3, 5.0])
def test_stripes_are_those_of_dense_least_squares(m: int, strength: float) -> None:
    rows, columns, noise = torch.randn(m), torch.randn(m), torch.randn(m, m)
    similarity = strength * (rows[:, None] + columns) + noise + 100 * torch.eye(m) + 3  # the diagonal does not count
    assert stripes(similarity) == pytest.approx(dense(similarity), abs=1e-9)
    assert m > 2 or stripes(similarity) == pytest.approx(1, abs=1e-9)


def test_a_constant_and_a_single_pair_have_no_stripes() -> None:
    assert stripes(torch.full((5, 5), 2.0)) == 0 and stripes(torch.ones(1, 1)) == 0


def test_no_tensor_is_larger_than_the_matrix() -> None:
    with Largest() as largest:
        assert 0 < stripes(torch.randn(100, 100)) < 0.1
    assert largest.entries == 100 * 100
