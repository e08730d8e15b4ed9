"""Witness: a callback that writes down what each micro-batch was made of, and kills the run where it is told to."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L

from callbacks.checkpoints import Checkpoints

VARIABLE = "LIGHTNING_T2I_KILL"  # an environment variable: the config of the run, and so its hash, stays the same
FIRST_STEP = 0.2  # seconds; taken for the length of a training step where none has been measured yet
SAVE = 0.01  # seconds; taken for the length of a save


@dataclass(frozen=True)
class Kill:
    """A moment at which a machine fails.

    Args:
        step: training steps done before.
        where: "step": in the course of the next training step, at its end at the latest; "save": in the save that
            follows it, or right after it where a save is over too soon.
        fraction: share of its duration that passes before, in [0, 1).
    """

    step: int
    where: Literal["step", "save"]
    fraction: float

    def variable(self) -> dict[str, str]:
        """What a run has to find in its environment."""
        return {VARIABLE: json.dumps(asdict(self))}


class Witness(L.Callback):
    """Appends to `trace-RANK.jsonl` in the run folder, before anything of the micro-batch can be saved:

        {"step", "micro", "ids": {stream: [...]}}       a micro-batch that begins
        {"step", "micro", "group", "loss"}              a loss of it, the float in hexadecimal

    Steps that are trained once more after a kill are in it twice.

    The kill is SIGKILL for the process group, all ranks and workers at once, as when a machine goes down.
    """

    def __init__(self) -> None:
        plan = os.environ.get(VARIABLE)
        self.kill = Kill(**json.loads(plan)) if plan else None
        self._began, self._duration = 0.0, FIRST_STEP

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._file = Path(trainer.default_root_dir) / f"trace-{trainer.global_rank}.jsonl"
        self._file.parent.mkdir(parents=True, exist_ok=True)
        backward, training_step = pl_module.backward, pl_module.training_step

        def seen(names: str | tuple[str, ...], loss: Any, **scalars: Any) -> None:
            group = names if isinstance(names, str) else "+".join(names)
            self._write(pl_module, group=group, loss=float(loss.detach()).hex())
            backward(names, loss, **scalars)

        def timed(*batch: Any) -> None:
            training_step(*batch)
            if not pl_module.counters.micro:  # done; what may follow, a save or a validation, is no part of the step
                self._duration = time.monotonic() - self._began
                if self.kill is not None and self.kill.where == "step":
                    self._strike_after(trainer, pl_module.counters.step - 1)

        pl_module.backward, pl_module.training_step = seen, timed

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        del pl_module.backward, pl_module.training_step

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._write(pl_module, ids={name: records.id.tolist() for name, records in batch.items()})
        counters = pl_module.counters
        if counters.micro:
            return
        self._began = time.monotonic()
        self._strike_after(trainer, counters.step - 1)
        if self.kill is not None and self.kill.step == counters.step and trainer.is_global_zero:
            threading.Thread(target=self._strike, args=(trainer, self.kill, self._duration), daemon=True).start()

    def _write(self, module: Any, **content: Any) -> None:
        line = {"step": module.counters.step, "micro": module.counters.micro, **content}
        with self._file.open("a") as stream:
            stream.write(json.dumps(line) + "\n")

    def _strike_after(self, trainer: L.Trainer, step: int) -> None:
        """Strikes if this step was the one and is over: the thread was too slow, or waits in vain."""
        if self.kill is not None and self.kill.step == step and trainer.is_global_zero:
            os.killpg(os.getpgrp(), signal.SIGKILL)

    @staticmethod
    def _strike(trainer: L.Trainer, kill: Kill, duration: float) -> None:
        if kill.where == "save":
            folder = next(c.folder for c in trainer.callbacks if isinstance(c, Checkpoints))
            while not any(folder.glob(".*.tmp")):
                time.sleep(1e-4)
            duration = SAVE
        time.sleep(kill.fraction * duration)
        os.killpg(os.getpgrp(), signal.SIGKILL)
