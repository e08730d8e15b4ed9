"""The validation that a run owes: a process may be killed between the save of a step and the validation after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from lightning_t2i.counters import validate_now
from lightning_t2i.loggers import read_lines


class MissedValidation(L.Callback):
    """Validates where a resumed fit begins, if a validation is due there and metrics.jsonl has none of that step.

    Lightning takes a validation that is due at a checkpoint for done. Stands behind the callbacks that need their own
    `on_train_start` first.

    Args:
        file: metrics.jsonl of the run.
    """

    def __init__(self, file: Path):
        self.file = file
        self._trains = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._trains = False

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._trains = True
        if self._misses(trainer, pl_module):
            validate_now(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Of a resumed fit that has no step left, Lightning calls no other hook."""
        if not self._trains and self._misses(trainer, pl_module):
            pl_module.to(trainer.strategy.root_device)  # the strategy has taken it to the CPU
            validate_now(trainer)
            trainer.fit_loop.epoch_loop.val_loop.teardown()

    def _misses(self, trainer: L.Trainer, module: Any) -> bool:
        """What rank 0 finds, on every rank."""
        counters, interval = module.counters, trainer.val_check_batch  # in batches; inf or None without an interval
        by_steps = trainer.enable_validation and trainer.check_val_every_n_epoch is None and isinstance(interval, int)
        if not by_steps or counters.step == 0 or counters.batches % interval:
            return False
        lines = read_lines(self.file) if trainer.is_global_zero else []
        done = {name for line in lines if line["step"] == counters.step for name in line}
        missing = self.file.is_file() and not any(name.startswith("val/") for name in done)
        return bool(trainer.strategy.broadcast(missing))
