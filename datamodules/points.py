"""Points of a mixture of Gaussians, as pictures of one pixel: a world whose density is known, for toy experiments.

x = means[k] + std n,   k ~ shares,   n ~ N(0, I)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.records import Stream, sample_id
from lightning_t2i.batch import Records
from lightning_t2i.errors import UserError


class Points(Stream):
    """The stream; every position has a point of its own, so nothing is ever read twice.

    Batches hold `image` [B, 3, 1, 1], the coordinates in place of the colours, and `label`, the number of the mode.

    Args:
        means: three coordinates of the centre of each mode.
        shares: probability of each mode; they add up to 1.
        std: standard deviation of a mode in every direction.
        size: points of one pass of validation.
        batch_size: points of one micro-batch over all ranks.
    """

    def __init__(
        self,
        means: Sequence[tuple[float, float, float]],
        shares: Sequence[float],
        std: float,
        size: int = 10_000,
        batch_size: int = 256,
    ):
        if len(means) != len(shares) or min(shares, default=0) <= 0 or abs(sum(shares) - 1) > 1e-6:
            allowed = "a positive number for each of the means, 1 in all"
            raise UserError("Not the shares of these modes", where="shares", given=list(shares), allowed=allowed)
        if std <= 0 or size < 1:
            raise UserError("A mode has a width, and a pass has points", where="std, size", given=[std, size])
        self.means, self.shares, self.std = [tuple(mean) for mean in means], list(shares), std
        self.size, self.batch_size = size, batch_size

    def setup(self) -> None:
        """Nothing is there to be opened."""

    def __len__(self) -> int:
        return self.size

    @property
    def identity(self) -> dict[str, Any]:
        return {"data": "points", "means": self.means, "shares": self.shares, "std": self.std, "size": self.size}

    def fetch(self, rows: np.ndarray, positions: Tensor) -> Records:
        u = self.keys.uniform("mode", positions, dtype=torch.float64)
        last = torch.tensor(self.shares, dtype=torch.float64).cumsum(0)[:-1]  # of u, for each mode but the last
        mode = torch.bucketize(u, last)
        x = torch.tensor(self.means)[mode] + self.std * self.keys.normal("point", positions, (3,))
        ids = torch.tensor([sample_id("points", str(self.order.seed), str(p)) for p in positions.tolist()])
        return Records(id=ids, position=positions, image=x[:, :, None, None], label=mode)
