"""Signals that arrive in the middle of a training step, and toys for trainings that others signal, watch or follow."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import lightning as L
import torch
from toy import Toy, ToyData

from lightning_t2i.slurm import outlive_signals


def descendants(pid: int) -> list[int]:
    """A process and all that it started, directly or not."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [pid]
    for known in found:
        found += parents.get(known, [])
    return found


class SignalAt(L.Callback):
    """Sends signals at the start of the first micro-batch of a training step.

    Args:
        step: training steps done before; None takes the environment variable SIGNAL_AT, "STEP SIGNAL RANK": RANK "all"
            is rank 0 and every process that it has started, SIGNAL "error" raises one.
        numbers: the signals, in order.
        rank: which rank sends them to itself.
    """

    def __init__(self, step: int | None = None, *numbers: signal.Signals, rank: int = 0):
        self.step, self.numbers, self.rank, self.all = step, numbers, rank, False
        if step is None and "SIGNAL_AT" in os.environ:
            at, name, who = os.environ["SIGNAL_AT"].split()
            self.step, self.all = int(at), who == "all"
            self.numbers = () if name == "error" else (signal.Signals[name],)
            self.rank = 0 if self.all else int(who)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        counters = pl_module.counters
        if counters.step == self.step and counters.micro == 0 and (self.all or trainer.global_rank == self.rank):
            if not self.numbers:
                raise ArithmeticError("broken on purpose")
            for number in self.numbers:
                for pid in descendants(os.getpid()) if self.all else [os.getpid()]:
                    os.kill(pid, number)


class WorkedData(ToyData):
    """ToyData that a worker process reads."""

    def train_dataloader(self):
        dataset = super().train_dataloader().dataset
        options = {"num_workers": 1, "persistent_workers": True, "worker_init_fn": outlive_signals}
        return torch.utils.data.DataLoader(dataset, batch_size=None, **options)


class Pace(L.Callback):
    """Makes a training slow: STEP_SECONDS after each micro-batch; WAIT_AT "STEP FILE" waits until the file is there."""

    def on_train_batch_end(self, trainer, pl_module, *unused):
        time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
        if "WAIT_AT" in os.environ:
            step, file = os.environ["WAIT_AT"].split()
            while pl_module.counters.step == int(step) and not Path(file).exists():
                time.sleep(0.1)


class Scored(Toy):
    """A toy with a validation metric that the weights decide."""

    def validation_step(self, batch, batch_idx):
        self.log("val/size", sum(p.detach().abs().sum() for p in self.critic.parameters()), batch_size=1)


class ScoredData(ToyData):
    def val_dataloader(self):
        return torch.utils.data.DataLoader([{}], batch_size=None)
