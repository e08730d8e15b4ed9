"""Runs that end as a machine failure would end them, and the whole runs that they must equal."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import lightning as L
import torch
import yaml

from lightning_t2i.state_io import AtomicCheckpointIO, newest

STEPS = 6


class KillAt(L.Callback):
    """SIGKILL after the training step that the environment variable KILL_AT_STEP names."""

    def on_train_batch_end(self, trainer, pl_module, *unused):
        if os.environ.get("KILL_AT_STEP") == str(pl_module.counters.step):
            os.kill(os.getpid(), signal.SIGKILL)


def what_a_kill_changes(repo: Path, folder: Path, method: str, streams: Sequence[str], **options) -> list[str]:
    """What of the last checkpoint differs between a whole run of a tiny config and one killed at a random step.

    Args:
        streams: names of the config's streams, each cut to a few samples.
        options: further arguments of each stream.
    """
    seed = random.SystemRandom().randrange(1000)
    kill_at = random.Random(seed).randrange(2, STEPS)
    print(f"seed {seed}: killed after training step {kill_at}")
    stream = {"init_args": {"batch_size": 8, "limit": 96, **options}}
    config = {
        "base": [str(repo / f"configs/{method}/tiny.yaml")],
        "model": {"init_args": {"common": {"accumulate": 2, "log_every": 1}}},
        "data": {"init_args": dict.fromkeys(streams, stream)},
        "trainer": {"max_steps": STEPS, "val_check_interval": 4, "callbacks": [{"class_path": "kills.KillAt"}]},
        "checkpoints": {"every": 2},
        "samples": {"enabled": False},
        "tracking": {"wandb": "off"},
    }
    (folder / "killed.yaml").write_text(yaml.safe_dump(config))
    variables = {"PYTHONPATH": str(repo / "tests/helpers"), "LIGHTNING_T2I_RUNS": str(folder / "runs")}

    def fit(run: str, **more: str) -> int:
        command = [sys.executable, str(repo / "train.py"), "fit", "--config", "killed.yaml", "--run", run]
        environment = {**os.environ, **variables, **more}
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=240).returncode

    assert fit("whole") == 0
    assert fit("killed", KILL_AT_STEP=str(kill_at)) == -signal.SIGKILL
    assert fit("killed") == 0
    a, b = (
        AtomicCheckpointIO().load_checkpoint(newest(folder / f"runs/{run}/checkpoints")) for run in ("whole", "killed")
    )
    assert a["t2i"]["counters"]["batches"] == 2 * STEPS
    found = [] if a["t2i"]["counters"] == b["t2i"]["counters"] else ["counters"]
    tensors = [{**state["state_dict"], **dict(optimizer_tensors(state))} for state in (a, b)]
    names = tensors[0].keys() | tensors[1].keys()
    same = (n in tensors[0] and n in tensors[1] and torch.equal(tensors[0][n], tensors[1][n]) for n in sorted(names))
    return found + [name for name, equal in zip(sorted(names), same, strict=True) if not equal]


def optimizer_tensors(state) -> Iterator[tuple[str, torch.Tensor]]:
    for group, content in state["t2i"]["groups"].items():
        for parameter, entries in content["states"].items():
            yield from ((f"{group}/{parameter}/{key}", torch.as_tensor(value)) for key, value in entries.items())
