"""Checkpoints at step boundaries: every n training steps and at the end; which of them stay; EMA snapshots."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist

from callbacks.inference import log_metrics
from lightning_t2i.checkpoints.mirror import Mirror, mirror_of, on_a_disk
from lightning_t2i.checkpoints.retention import BestOptions, Scores, prune
from lightning_t2i.checkpoints.saving import Form, Saving
from lightning_t2i.checkpoints.snapshots import SnapshotOptions, averages, twins, write_snapshot
from lightning_t2i.errors import UserError
from lightning_t2i.loggers import Clock
from lightning_t2i.state_io import clean_leftovers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointOptions:
    """When and how checkpoints are written, and which of them stay.

    Args:
        every: training steps between two checkpoints; 0 writes one at the end only.
        keep: number of checkpoints kept, the newest ones.
        form: single: one file with whole tensors, gathered and written by rank 0; sharded: every process writes its
            part, into a folder that all of them see. A run goes on from either form, on any mesh.
        asynchronous: copy the state and write it while the training goes on. Each process needs memory for a copy of
            what it writes. A failure is raised at the next save or at the end of the training.
        keep_every: checkpoints of training steps that this number divides are kept for ever; 0 keeps none.
        best: checkpoints kept for a metric; null keeps none.
        ema: snapshots of the averaged weights.
        mirror: address or folder to which finished checkpoints are copied, into a folder of the run's name; whatever
            fsspec can write to. Nothing is ever removed there.
    """

    every: int = 500
    keep: int = 2
    form: Form = "single"
    asynchronous: bool = False
    keep_every: int = 0
    best: BestOptions | None = None
    ema: SnapshotOptions = field(default_factory=SnapshotOptions)
    mirror: str | None = None

    def __post_init__(self) -> None:
        if self.every < 0:
            raise UserError("The checkpoint interval is negative", where="checkpoints.every", given=self.every)
        if self.keep < 1:
            raise UserError("At least one checkpoint must be kept", where="checkpoints.keep", given=self.keep)
        if self.keep_every < 0 or (self.keep_every and (self.every == 0 or self.keep_every % self.every)):
            raise UserError(
                "There are no checkpoints at these steps",
                where="checkpoints.keep_every",
                given=self.keep_every,
                allowed=f"multiples of checkpoints.every, which is {self.every}",
            )


class Checkpoints(L.Callback):
    """Writes `folder/step-XXXXXXXX`, see lightning_t2i/state_io.py, and `ema/step-XXXXXXXX.safetensors` beside it.

    Logs of each save: checkpoint/seconds until it was complete, checkpoint/stall_seconds in which the training waited
    for it and for the end of the one before, checkpoint/bytes and checkpoint/mb_per_s, at the training step saved.

    Args:
        folder: checkpoints folder of the run.
        options: when, how and how many.
    """

    def __init__(self, folder: str | Path, options: CheckpointOptions | None = None):
        self.folder, self.options = on_a_disk(folder, "checkpoints folder"), options or CheckpointOptions()
        self._saved_step: int | None = None
        self._saving: Saving | None = None
        self._group: Any = None
        self._mirror: Mirror | None = None
        self._mirror_failure: Exception | None = None
        self._scores: Scores | None = None
        self._told: dict[int, dict[str, float]] = {}  # of saves that are not reported yet

    # ---- Lightning's hooks ---------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        options, leads = self.options, trainer.is_global_zero
        if options.ema.every and next(twins(pl_module.groups.values()), None) is None:
            raise UserError("No group of this method has an EMA to keep", where="checkpoints.ema.every")
        if leads:
            clean_leftovers(self.folder)
            clean_leftovers(self._snapshots)
            if options.mirror is not None:
                self._mirror = Mirror(mirror_of(options.mirror, self.folder.parent.name))
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=getattr(trainer.strategy, "timeout", None))
        device = trainer.strategy.root_device
        self._saving = Saving(options.form, options.asynchronous, leads, self._group, self._done, device)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if (best := self.options.best) is not None:
            self._scores = Scores(self.folder, best.metric, pl_module.counters.step, Clock(trainer))
            trainer.loggers.append(self._scores)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *unused: Any) -> None:
        self._report(trainer)
        step = pl_module.counters.step
        if pl_module.counters.at_boundary:
            checkpoint, snapshot = (every > 0 and step % every == 0 for every in self._intervals)
            self._save(trainer, pl_module, checkpoint, snapshot)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Returns when everything is on the disk; also what a preempted training calls."""
        try:
            self.saving.background.wait()
        finally:  # what went wrong before is raised when the last state is safe
            if pl_module.counters.at_boundary and self._saved_step != trainer.global_step:
                self._save(trainer, pl_module, True, False)
            self.saving.background.wait()
            self._report(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._mirror_failure is not None:
            raise RuntimeError(
                f"Not every checkpoint could be copied to {self.options.mirror}: {self._mirror_failure}. They are "
                f"complete in {self.folder}"
            ) from self._mirror_failure

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        if self._saving is not None:
            try:
                self._saving.background.wait()
            except Exception as error:  # the training has another one to tell
                log.error("A checkpoint was not written: %s", error)
            self._close(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if self._saving is not None:
            self._close(trainer)
            self._saving = None  # and the memory for copies
            if self._group is not None:
                dist.destroy_process_group(self._group)
                self._group = None

    # ---- saving --------------------------------------------------------------------------------------------------

    @property
    def saving(self) -> Saving:
        assert self._saving is not None, "between on_fit_start and the end of the fit"
        return self._saving

    @property
    def _intervals(self) -> tuple[int, int]:
        return self.options.every, self.options.ema.every

    @property
    def _snapshots(self) -> Path:
        return self.folder.parent / "ema"

    def _save(self, trainer: L.Trainer, module: Any, checkpoint: bool, snapshot: bool) -> None:
        if not (checkpoint or snapshot):
            return
        began, step = time.perf_counter(), trainer.global_step
        self.saving.background.wait()  # the memory for the copies is free, and a failure is heard of
        if checkpoint:
            with self.saving.of(module):
                path = self.folder / f"step-{step:08d}"
                trainer.save_checkpoint(path, False, self.saving)  # False: the whole state
            self._saved_step = step
            self._told[step] = {
                "checkpoint/stall_seconds": time.perf_counter() - began,
                "samples": module.counters.samples,
            }
        if snapshot:
            tensors = averages(module.groups.values(), keep=trainer.is_global_zero)

            def write() -> None:
                if trainer.is_global_zero:
                    write_snapshot(self._snapshots, step, tensors, self.options.ema.keep)

            self.saving.submit(write)
        self._report(trainer)

    def _done(self, path: Path) -> None:
        """On rank 0, when a checkpoint is complete."""
        options, scores = self.options, self._scores
        if self._mirror is not None:
            try:
                self._mirror.update(self.folder, path)
                self._mirror_failure = None
            except Exception as error:  # whatever a file system of fsspec's raises
                self._mirror_failure = error
                log.warning("%s could not be copied to %s: %s", path.name, options.mirror, error)
        gone = prune(self.folder, options.keep, options.keep_every, options.best, dict(scores.values) if scores else {})
        if scores is not None:
            scores.miss(gone)

    def _report(self, trainer: L.Trainer) -> None:
        """Logs the saves that were finished since the last call."""
        while self.saving.written:
            found = self.saving.written.popleft()
            metrics = {
                "checkpoint/seconds": found.seconds,
                "checkpoint/bytes": float(found.bytes),
                "checkpoint/mb_per_s": found.bytes / 1e6 / found.seconds,
            }
            log_metrics(trainer, metrics | self._told.pop(found.step), found.step)

    def _close(self, trainer: L.Trainer) -> None:
        self.saving.background.close()
        if self._scores in trainer.loggers:
            trainer.loggers.remove(self._scores)
