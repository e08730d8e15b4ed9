"""A metric that can be checked by hand, for tests of what measures."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class Mean(Metric):
    """Mean of the pictures and how many there were; where captions are fed, one for each."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("n", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @property
    def name(self) -> str:
        return f"mean@n={self.computed_n}"

    def update(self, images: Tensor, captions: list[str] | None = None) -> None:
        assert captions is None or len(images) == len(captions)
        self.total += images.mean((1, 2, 3)).sum()
        self.n += len(images)

    def compute(self) -> Tensor:
        self.computed_n = int(self.n)
        return self.total / self.n
