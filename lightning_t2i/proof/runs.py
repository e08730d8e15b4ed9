"""Runs of the proof: a tiny training on a mesh, once whole and once killed at random moments."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_t2i.cli.configs import merge
from lightning_t2i.errors import UserError
from lightning_t2i.golden import GENERATIONS
from lightning_t2i.paths import ROOT
from lightning_t2i.proof.compare import between
from lightning_t2i.proof.witness import Kill
from lightning_t2i.state_io import newest

MESHES = ("1x1", "2x1", "1x2")  # replicate x shard
EVERY = 3  # training steps between two checkpoints
BATCH, SAMPLES = 8, 96  # of each stream: more than an epoch is seen
TIMEOUT = 900  # seconds for one start


@dataclass
class Struck:
    """A kill that happened: the checkpoint's step it left, and whether a save was cut by it."""

    kill: Kill
    left: int
    cut: bool


@dataclass
class Proof:
    """What one mesh gave.

    mesh: replicate x shard; seed: of the moments; kills: in order; differences: between both runs, none when proven.
    """

    mesh: str
    seed: int
    steps: int
    kills: list[Struck] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return not self.differences

    def plain(self) -> dict[str, Any]:
        kills = [{**asdict(s.kill), "left": s.left, "cut": s.cut} for s in self.kills]
        return {**vars(self), "kills": kills}


def config_of(name: str) -> Path:
    """The config that a proof trains: the tiny one of a method, or a file.

    Raises:
        UserError: neither.
    """
    file = ROOT / "configs" / name / "tiny.yaml"
    for candidate in (file, Path(name)):
        if candidate.is_file():
            return candidate.resolve()
    allowed = sorted(f.parent.name for f in (ROOT / "configs").glob("*/tiny.yaml"))
    raise UserError("Neither a method with a tiny config nor a config file", given=name, allowed=allowed)


def moments(seed: int, count: int, steps: int, every: int = EVERY, first: int = 1) -> list[Kill]:
    """Random kills in the order of their steps, about one of five in a save; none before step `first`."""
    draw = random.Random(seed)
    in_saves = max(1, round(count / 5)) if count > 1 else draw.random() < 0.5
    saves = draw.sample([step for step in range(every - 1, steps - 1, every) if step >= first], int(in_saves))
    others = draw.sample([step for step in range(first, steps - 1) if step not in saves], count - len(saves))
    places: list[tuple[int, Any]] = [*((s, "save") for s in saves), *((s, "step") for s in others)]
    return [Kill(step, where, round(draw.random(), 3)) for step, where in sorted(places)]


def write_config(config: Path, folder: Path, mesh: str, steps: int, every: int = EVERY) -> Path:
    """A short training of a config on few samples, with accumulation, validation and many checkpoints."""
    replicate, shard = map(int, mesh.split("x"))
    streams = merge([config]).config["data"].get("init_args") or {}
    searches = config.parent.name in GENERATIONS
    small: dict[str, Any] = {}
    for name, stream in streams.items():
        if isinstance(stream, dict) and "class_path" in stream:
            small[name] = {"init_args": {"batch_size": BATCH, "limit": SAMPLES}}
            if (stream.get("init_args") or {}).get("latents"):
                small[name]["init_args"]["latents"] = None  # encoded in the run: nothing to prepare
    options: dict[str, Any] = {"common": {"accumulate": 2, "log_every": 1, "validate_first": False}}
    if searches:  # a step is a generation: every prompt with both seeds, never accumulated
        small["main"]["init_args"]["limit"] = BATCH // 2
        options["common"]["accumulate"], options["micro_batch"] = 1, 2
    trainer: dict[str, Any] = {"accelerator": "cpu", "devices": replicate * shard, "max_steps": steps}
    trainer |= {"val_check_interval": every + 1, "limit_val_batches": 1}
    trainer["callbacks"] = [{"class_path": "lightning_t2i.proof.witness.Witness"}]
    if replicate * shard > 1:
        mesh_options = {"replicate": replicate, "shard": shard}
        trainer["strategy"] = {"class_path": "lightning_t2i.strategies.FSDP2", "init_args": mesh_options}
    content = {
        "base": str(config),
        "model": {"init_args": options},
        "trainer": trainer,
        "checkpoints": {"every": every},
        "samples": {"enabled": False},
        "comparison": {"enabled": False},
        "throughput": {"enabled": False},
        "tracking": {"wandb": "off"},
    }
    if small:
        content["data"] = {"init_args": small}
    file = folder / f"{mesh}.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def environment(config: Path, folder: Path) -> dict[str, str]:
    """That of a start: runs go to the folder, classes beside the config are found, no job or launch is inherited."""
    own = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LIGHTNING_T2I_RESUME")
    kept = {k: v for k, v in os.environ.items() if k not in own and not k.startswith(("SLURM_", "MASTER_"))}
    path = os.pathsep.join([str(config.parent), *filter(None, [kept.get("PYTHONPATH")])])
    return {**kept, "PYTHONPATH": path, "LIGHTNING_T2I_RUNS": str(folder / "runs")} | {
        name: kept.get(name, "1") for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE")
    }


def start(words: Iterable[str], variables: dict[str, str], kill: Kill | None = None) -> None:
    """Runs `train.py` until it ends, or is killed as it should be.

    Raises:
        RuntimeError: it ended in another way; with its last words.
    """
    command = [sys.executable, str(ROOT / "train.py"), *words]
    variables = {**variables, **(kill.variable() if kill else {})}
    with subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            said, _ = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode != (-signal.SIGKILL if kill else 0):
        what = f"should have been killed ({kill})" if kill else "should have ended"
        raise RuntimeError(f"{' '.join(command)} {what}, exit code {process.returncode}:\n{said[-4000:]}")


def prove(
    name: str,
    folder: Path,
    mesh: str,
    seed: int,
    kills: int,
    steps: int,
    overrides: Sequence[str] = (),
    every: int = EVERY,
    first: int = 1,
) -> Proof:
    """Trains a config whole and killed, and compares both.

    Args:
        name: of a method, or a config file.
        folder: an empty one for both runs.
        mesh: replicate x shard, as in "1x2".
        seed: decides the moments of the kills.
        kills: how often the run is killed; it goes on from its newest checkpoint each time.
        steps: training steps of both runs.
        overrides: further words of `train.py fit` for both.
        every: training steps between two checkpoints.
        first: training steps done before the earliest kill; from `every` on there is a checkpoint to go on from.
    """
    config = config_of(name)
    proof = Proof(mesh, seed, steps)
    variables = environment(config, folder)
    words = ["fit", "--config", str(write_config(config, folder, mesh, steps, every)), *overrides, "--run"]
    whole, killed = folder / "runs" / "whole", folder / "runs" / "killed"
    start([*words, whole.name], variables)
    for kill in moments(seed, kills, steps, every, first):
        start([*words, killed.name], variables, kill)
        left = newest(killed / "checkpoints")
        cut = any((killed / "checkpoints").glob(".*.tmp"))
        proof.kills.append(Struck(kill, int(left.name.split("-")[1]) if left else 0, cut))
    start([*words, killed.name], variables)
    proof.differences = between(whole, killed)
    return proof
