"""Batches of keyed noise pictures with captions, for tests of methods, and a Trainer that runs a few steps on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset
from toy import trainer_for

from datamodules.records import Stream
from lightning_t2i.batch import Records
from lightning_t2i.keys import Keys

CAPTIONS = ["a red square", "two blue circle", "red and blue", "a circle and a square"]


def records(first: int, size: int, side: int = 16) -> Records:
    """Pictures, captions and labels at positions first ... first + size - 1."""
    positions = torch.arange(first, first + size)
    return Records(
        id=positions + 1000,
        position=positions,
        image=Keys(9).normal("pictures", positions, (3, side, side)).clamp(-2, 2) / 2,
        caption=[CAPTIONS[p % 4] for p in positions.tolist()],
        label=positions % 10,
    )


class PictureStream(Stream):
    """The same pictures as a stream of `Streams`.

    Args:
        label, caption: give classes, captions.
    """

    def __init__(self, batch_size: int = 4, side: int = 16, label: bool = True, caption: bool = True):
        self.batch_size, self.side, self.label, self.caption = batch_size, side, label, caption

    def setup(self) -> None:
        pass

    def __len__(self) -> int:
        return 64

    @property
    def identity(self) -> dict[str, Any]:
        return {"pictures": self.side}

    def fetch(self, rows: np.ndarray, positions: torch.Tensor) -> Records:
        found = [records(int(row), 1, self.side) for row in rows]
        return Records(
            id=torch.cat([r.id for r in found]),
            position=positions,
            image=torch.cat([r.image for r in found]),
            caption=[r.caption[0] for r in found] if self.caption else None,
            label=torch.cat([r.label for r in found]) if self.label else None,
        )


class Pictures(L.LightningDataModule):
    """Endless training batches and two validation batches; each rank takes its slice."""

    def __init__(self, batch_size: int = 4, side: int = 16):
        super().__init__()
        self.batch_size, self.side, self.start = batch_size, side, 0

    def _batches(self, stop: int | None):
        module = self
        size = self.batch_size // self.trainer.world_size if self.trainer else self.batch_size
        rank = self.trainer.global_rank if self.trainer else 0

        class Batches(IterableDataset):
            def __iter__(self):
                k = module.start if stop is None else 0
                while stop is None or k < stop:
                    yield {"main": records(k * module.batch_size + rank * size, size, module.side)}
                    k += 1

        return DataLoader(Batches(), batch_size=None)

    def train_dataloader(self):
        return self._batches(None)

    def val_dataloader(self):
        return self._batches(2)

    def state_dict(self):
        return {"cursor": self.trainer.lightning_module.counters.batches}

    def load_state_dict(self, state):
        self.start = state["cursor"]


def fit(folder: Path, module: L.LightningModule, steps: int, data: Pictures | None = None, **kwargs) -> L.Trainer:
    """Trains for a few steps in this process."""
    trainer = trainer_for(folder, steps, max_epochs=-1, check_val_every_n_epoch=None, num_sanity_val_steps=0, **kwargs)
    trainer.fit(module, data or Pictures(), weights_only=True)
    return trainer
