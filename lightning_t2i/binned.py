"""Weighted means over a whole evaluation, by bins of what the values depend on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class BinnedMean:
    """Sums up weighted values in equal bins of [0, 1].

    Args:
        bins: number of bins; 1 for the mean of all.
    """

    def __init__(self, bins: int = 10):
        self.bins = bins
        self.sums: Tensor | None = None  # float64 [bins, 2]: of weight x value, and of weights

    def add(self, values: Tensor, weights: Tensor, where: Tensor) -> None:
        """Adds values with weights and places in [0, 1], all of one shape."""
        index = (where * self.bins).long().clamp(0, self.bins - 1).flatten()
        rows = torch.stack([(weights * values).flatten(), weights.flatten()], 1).double()
        if self.sums is None:
            self.sums = rows.new_zeros(self.bins, 2)
        self.sums.index_add_(0, index, rows)

    def means(self, gather: Callable[[Tensor], Tensor] = lambda x: x) -> dict[int, Tensor]:
        """The mean of each bin that is not empty.

        Args:
            gather: rows of this process -> rows of all processes.
        """
        assert self.sums is not None, "nothing was added"
        sums = gather(self.sums[None]).sum(0)
        return {i: value / weight for i, (value, weight) in enumerate(sums) if weight > 0}
