"""Checkpoints at step boundaries: every n training steps and at the end, the last k kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L

from lightning_t2i.errors import UserError
from lightning_t2i.state_io import clean_leftovers, complete_checkpoints


@dataclass(frozen=True)
class CheckpointOptions:
    """When checkpoints are written.

    Args:
        every: training steps between two checkpoints; 0 writes one at the end only.
        keep: number of checkpoints kept, the newest ones.
    """

    every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        if self.every < 0:
            raise UserError("The checkpoint interval is negative", where="checkpoints.every", given=self.every)
        if self.keep < 1:
            raise UserError("At least one checkpoint must be kept", where="checkpoints.keep", given=self.keep)


class Checkpoints(L.Callback):
    """Writes `folder/step-XXXXXXXX`, see lightning_t2i/state_io.py.

    Args:
        folder: checkpoints folder of the run.
        options: when to write and how many to keep.
    """

    def __init__(self, folder: str | Path, options: CheckpointOptions | None = None):
        self.folder, self.options = Path(folder), options or CheckpointOptions()
        self._saved_step: int | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            clean_leftovers(self.folder)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *unused: Any) -> None:
        every = self.options.every
        if every and pl_module.counters.at_boundary and pl_module.counters.step % every == 0:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if pl_module.counters.at_boundary and self._saved_step != trainer.global_step:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.folder / f"step-{trainer.global_step:08d}", False)  # False: the whole state
        self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            for path in complete_checkpoints(self.folder)[: -self.options.keep]:
                trainer.strategy.checkpoint_io.remove_checkpoint(path)
