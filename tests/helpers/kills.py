"""Runs that end as a machine failure would end them, and the whole runs that they must equal."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import lightning as L
import programs
import torch

from lightning_t2i.proof import runs

# Those of methods that exchange nothing but gradients: the copies of 2x1 are killed with the toy, in test_resume.py.
FEW_MESHES = ("1x1", "1x2")


class KillAt(L.Callback):
    """SIGKILL after the training step that the environment variable KILL_AT_STEP names."""

    def on_train_batch_end(self, trainer, pl_module, *unused):
        if os.environ.get("KILL_AT_STEP") == str(pl_module.counters.step):
            os.kill(os.getpid(), signal.SIGKILL)


def what_a_kill_changes(
    folder: Path, name: str, mesh: str, steps: int = 6, every: int = 2, seed: int | None = None
) -> list[str]:
    """What differs between a whole run of a tiny config on a mesh and one killed at a random moment, in any bit.

    A checkpoint is there at every moment that is drawn: a run that begins again is a whole one, whatever it forgets.
    """
    seed = random.SystemRandom().randrange(10_000) if seed is None else seed
    with mock.patch.object(runs, "subprocess", programs):
        proof = runs.prove(name, folder, mesh, seed, kills=1, steps=steps, every=every, first=every)
    (struck,) = proof.kills
    print(f"{name} on {mesh}, seed {seed}: {struck}")
    assert struck.left > 0, "the killed run began again"
    return proof.differences


def optimizer_tensors(state) -> Iterator[tuple[str, torch.Tensor]]:
    for group, content in state["t2i"]["groups"].items():
        for parameter, entries in content["states"].items():
            yield from ((f"{group}/{parameter}/{key}", torch.as_tensor(value)) for key, value in entries.items())
