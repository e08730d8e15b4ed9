"""What a run costs, kept in its checkpoints so that it adds up over kills and resumes."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from callbacks.throughput import peak_memory
from lightning_t2i.state_io import write_atomically


class Record(L.Callback):
    """Wall time, samples and peak memory of a training; writes `cost.json` when it ends or is interrupted.

    Checkpoints carry these and the run's W&B id.

    Args:
        folder: run folder.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._before, self._peak = 0.0, 0
        self._start: float | None = None  # of the training; a resumed fit may have nothing left to do
        self._device = torch.device("cpu")

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        self._device = trainer.strategy.root_device

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._start = time.monotonic()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    @property
    def seconds(self) -> float:
        """Seconds of training up to here, lost work not counted."""
        return self._before + (0.0 if self._start is None else time.monotonic() - self._start)

    def peak_memory(self) -> int:
        """Bytes, over all starts of the run."""
        return max(self._peak, peak_memory(self._device))

    def state_dict(self) -> dict[str, Any]:
        file = self.folder / "wandb_id"
        return {
            "seconds": self.seconds,
            "peak_memory": self.peak_memory(),
            "wandb_id": file.read_text().strip() if file.is_file() else "",
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before, self._peak = state_dict["seconds"], state_dict["peak_memory"]
        if state_dict["wandb_id"] and not (self.folder / "wandb_id").exists():
            write_atomically(self.folder / "wandb_id", state_dict["wandb_id"].encode())

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self._write(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        if trainer.is_global_zero and self._start is not None:
            with contextlib.suppress(OSError):  # the training has another error to tell
                self._write(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """A run that was killed at its very end has nothing left to train: Lightning calls no other hook then."""
        if trainer.is_global_zero and self._start is None:
            self._write(trainer, pl_module)

    def _write(self, trainer: L.Trainer, module: Any) -> None:
        cost = {
            "seconds": round(self.seconds, 3),
            "steps": module.counters.step,
            "samples": module.counters.samples,
            "processes": trainer.world_size,
            "peak_memory_bytes": self.peak_memory(),
        }
        write_atomically(self.folder / "cost.json", json.dumps(cost, indent=1).encode())
