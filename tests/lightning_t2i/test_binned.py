"""Means by bins: weights, ends of the range, several processes."""

import pytest
import torch

from lightning_t2i.binned import BinnedMean


def test_values_count_with_their_weights_in_their_bins() -> None:
    mean = BinnedMean(4)
    mean.add(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([1.0, 3.0, 0.0]), torch.tensor([0.1, 0.2, 0.2]))
    mean.add(torch.tensor([[5.0, 7.0]]), torch.ones(1, 2), torch.tensor([[0.5, 1.0]]))
    assert {i: float(v) for i, v in mean.means().items()} == {0: pytest.approx(2.5), 2: 5.0, 3: 7.0}


def test_one_bin_is_the_mean_of_all_processes() -> None:
    mean = BinnedMean(1)
    mean.add(torch.tensor([1.0, 2.0]), torch.ones(2), torch.zeros(2))
    other = torch.tensor([[[12.0, 2.0]]], dtype=torch.float64)  # of two values with the sum 12
    assert float(mean.means(lambda rows: torch.cat([rows, other]))[0]) == pytest.approx(15 / 4)
    with pytest.raises(AssertionError, match="nothing"):
        BinnedMean().means()
