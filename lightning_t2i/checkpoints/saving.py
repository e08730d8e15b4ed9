"""One training's way to save: in which form, by which processes, at once or in the background."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from lightning_t2i.checkpoints.background import Background
from lightning_t2i.checkpoints.ranks import Ranks
from lightning_t2i.checkpoints.staging import Staging
from lightning_t2i.saved import Saved
from lightning_t2i.state_io import read_marker, write_folder, write_state

Form = Literal["single", "sharded"]


@dataclass(frozen=True)
class Written:
    """A finished save: its training step, seconds from its beginning until it was complete, bytes."""

    step: int
    seconds: float
    bytes: int


class Saving:
    """Writes checkpoints for the plug-in, which gets it as `storage_options` of `trainer.save_checkpoint`.

    No process talks to another one in the background but in the group, which nothing else uses.

    Args:
        form: "single": whole tensors in one file of rank 0; "sharded": every process writes its part.
        asynchronous: write in the background.
        leads: whether this is rank 0.
        group: gloo group of all processes, where there are several.
        done: called on rank 0 with the folder of a finished checkpoint, where it was written.
        device: of this process.
    """

    def __init__(
        self,
        form: Form,
        asynchronous: bool,
        leads: bool,
        group: Any,
        done: Callable[[Path], None],
        device: torch.device,
    ):
        self.form, self.asynchronous, self.leads, self.done = form, asynchronous, leads, done
        self.ranks = Ranks(group)
        self.staging = Staging(form == "sharded", asynchronous, leads)
        self.background = Background(asynchronous, device)
        self.written: deque[Written] = deque()  # on rank 0

    @contextmanager
    def of(self, method: Saved) -> Iterator[None]:
        """A save of this method; the one before has to be finished."""
        self._began = time.perf_counter()
        self.staging.begin()
        method.take = self.staging.take
        try:
            yield
        finally:
            del method.take

    def save(self, state: dict[str, Any], path: Path) -> None:
        """Writes a state, or has it written; for the plug-in, on every rank."""
        if self.asynchronous:
            state = self.staging.settled(state)
        self.submit(partial(self._write, state, path, self._began))

    def submit(self, job: Callable[[], None]) -> None:
        """Does a job at once or in the background, on every rank: where it fails on one, it fails on all."""
        self.background.submit(partial(self.ranks.gather, job))

    def _write(self, state: dict[str, Any], path: Path, began: float) -> None:
        step = int(state["global_step"])
        if self.form == "sharded":
            from lightning_t2i.checkpoints.sharded import write_sharded  # takes a while to import

            write_folder(path, step, self.form, partial(write_sharded, state, ranks=self.ranks), self.ranks)
        elif self.leads:
            write_folder(path, step, self.form, partial(write_state, state))
        if self.leads:
            size = sum(read_marker(path)["files"].values())
            self.written.append(Written(step, time.perf_counter() - began, size))
            self.done(path)
