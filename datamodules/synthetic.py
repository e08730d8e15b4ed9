"""Pairs of a distilled set (`SyntheticSet`): pictures and text vectors in place of captions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.records import Stream, sample_id
from lightning_t2i.batch import Cond, Records
from lightning_t2i.frozen import folder_identity
from lightning_t2i.paths import resolve
from lightning_t2i.synthetic_set import SyntheticSet


class SyntheticPairs(Stream):
    """The pairs of a set, drawn by (seed, position) only.

    Batches hold `image` [B, 3, H, W], in normalised units and not clamped, the text vector as `cond` with embeds
    [B, 1, d'], and `label`, the number of the pair, by which its similarity to the others is known.

    Args:
        source: folder that `train.py export` wrote for a RepBlend run.
        batch_size: pairs of one micro-batch over all ranks.
    """

    def __init__(self, source: str, batch_size: int = 50):
        self.source, self.batch_size = source, batch_size

    def setup(self) -> None:
        """Reads the set, which is small.

        Raises:
            UserError: it is no such folder.
        """
        folder = resolve(self.source)
        self.found, self._sha = SyntheticSet.load(folder), folder_identity(folder)

    def __len__(self) -> int:
        return len(self.found)

    @property
    def identity(self) -> dict[str, Any]:
        return {"data": "synthetic pairs", "sha": self._sha}

    def fetch(self, rows: np.ndarray, positions: Tensor) -> Records:
        numbers = torch.as_tensor(rows)
        ids = torch.tensor([sample_id(self._sha, "pairs", str(row)) for row in rows.tolist()])
        texts = Cond(embeds=self.found.texts[numbers][:, None])
        return Records(id=ids, position=positions, image=self.found.images[numbers], cond=texts, label=numbers)
