"""A signal is noted; at a step boundary all ranks agree, save once and stop; a SLURM job goes back into its queue.

    SIGUSR1   SLURM's word that time is short (`--signal=USR1@120`): save, stop, `scontrol requeue`
    SIGTERM   save and stop; the same command goes on

Lightning's handlers save, requeue and talk to the other ranks inside the handler, wherever the training happens to be.
Here the handler notes the signal and nothing else. SLURM may signal every process of a job: workers that read data
outlive it (`lightning_t2i.slurm.outlive_signals`), and a training goes on without W&B's service, which does not.
"""

from __future__ import annotations

import logging
import signal
import subprocess
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import lightning as L
import torch

from callbacks.checkpoints import Checkpoints
from lightning_t2i.errors import UserError
from lightning_t2i.loggers import Wandb
from lightning_t2i.slurm import job_id

log = logging.getLogger(__name__)

REQUEUE, STOP = signal.SIGUSR1, signal.SIGTERM
RANKING = (None, STOP, REQUEUE)  # what ranks that heard different signals agree on: the last of them


@dataclass(frozen=True)
class PreemptionOptions:
    """What SIGUSR1 and SIGTERM do to a training.

    Args:
        enabled: save before the training stops; else the signals do what Python and Lightning do with them.
        every: training steps between two moments at which the ranks agree. All ranks wait for each other there, and a
            signal for at most that many steps, which have to fit into the time between signal and kill.
    """

    enabled: bool = True
    every: int = 1

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError("Ranks agree every 1 or more steps", where="preemption.every", given=self.every)


class Stopped(SystemExit):
    """Leaves `trainer.fit` with exit code 0 once the state is saved; hooks of a training's end are not for it."""


class Preemption(L.Callback):
    """Stops a training on a signal, at a step boundary, with its state saved by `Checkpoints`.

    A context around `trainer.fit`, in which signals are noted; it takes the `Stopped` that comes out, requeues when
    the loggers are closed, and puts the earlier handlers back. Outside of its context the callback does nothing. What
    comes after the last training step (comparisons, merges) may take hours and has no boundary: there SIGUSR1 requeues
    at once, and the resumed job does it again. Stands last among the callbacks, so that the others see the end of the
    step.

    Args:
        options: whether and how often to look.

    Attributes:
        noted: the first signal that this process heard; later ones change nothing.
        agreed: the signal that all ranks stopped for, None where there was none.
        requeues: rank 0 puts the job back into the queue; SLURM may kill it from then on.
        again: the command that goes on, in words.
    """

    again = "the same command"

    def __init__(self, options: PreemptionOptions | None = None):
        self.options = options or PreemptionOptions()
        self.noted: signal.Signals | None = None
        self.agreed: signal.Signals | None = None
        self._held = self.requeues = self._ends = False

    def __enter__(self) -> Preemption:
        self.noted = self.agreed = None
        self._held, self.requeues, self._ends = self.options.enabled, False, False
        if self._held:
            self._handlers = {number: signal.signal(number, self._note) for number in (REQUEUE, STOP)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> bool:
        if self._held:
            if self.requeues and not self._ends:
                requeue()
            for number, handler in self._handlers.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            self._held = False
        return kind is not None and issubclass(kind, Stopped)

    def _note(self, number: int, frame: Any) -> None:
        if self.noted is None:
            self.noted = signal.Signals(number)
        if self._ends and number == REQUEUE and not self.requeues:
            self.requeues = True
            requeue()

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if self._held:
            self._checkpoints = [c for c in trainer.callbacks if isinstance(c, Checkpoints)]
            if not self._checkpoints:
                raise RuntimeError("Preemption saves through the Checkpoints callback, and the Trainer has none")
            # Lightning's SIGTERM handler broadcasts wherever it interrupts. The name is private: a test watches it.
            trainer._signal_connector.register_signal_handlers = _nothing

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *unused: Any) -> None:
        counters = pl_module.counters
        last = 0 < trainer.max_steps <= counters.step
        if not self._held or not counters.at_boundary or (counters.step % self.options.every and not last):
            return
        self.agreed = self._agree(trainer)
        if self.agreed is not None:
            self._stop(trainer, pl_module)
        self._ends = last and trainer.is_global_zero and job_id() is not None

    def _agree(self, trainer: L.Trainer) -> signal.Signals | None:
        found = RANKING.index(self.noted)
        if trainer.world_size > 1:
            mine = torch.tensor(found, device=trainer.strategy.root_device)
            found = int(trainer.strategy.reduce(mine, reduce_op="max"))
        return RANKING[found]

    def _stop(self, trainer: L.Trainer, module: Any) -> None:
        assert self.agreed is not None
        for checkpoints in self._checkpoints:
            checkpoints.on_train_end(trainer, module)  # saves, unless this step is saved already
        if trainer.is_global_zero:
            self.requeues = self.agreed is REQUEUE and job_id() is not None
            then = "the job is requeued" if self.requeues else f"{self.again} goes on"
            step, name = module.counters.step, self.agreed.name
            log.warning("%s: stopped and saved after training step %d; %s", name, step, then)
            for logger in trainer.loggers:
                if isinstance(logger, Wandb):
                    logger.mark_preempting()
        raise Stopped(0)


def _nothing() -> None: ...


def requeue() -> None:
    """Puts this process's SLURM job back into the queue; SLURM then kills the job. A failure is logged."""
    job = job_id()
    assert job is not None
    # A session of its own: the kill that scontrol asks for must not cut its answer off.
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 60, "start_new_session": True}
    try:
        done = subprocess.run(["scontrol", "requeue", job], **options)
        said = "" if done.returncode == 0 else (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        said = str(error)
    if said:
        log.error("Job %s is saved but not requeued (%s): submit it again with --run NAME of its run folder", job, said)
    else:
        log.warning("Job %s is requeued", job)
