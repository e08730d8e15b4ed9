"""The run folder: its name, whether it may be resumed, and what is written there first."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from lightning_t2i import __version__
from lightning_t2i.checkpoints.mirror import on_a_disk, refuse_others
from lightning_t2i.cli import launch
from lightning_t2i.cli.configs import flatten
from lightning_t2i.errors import UserError
from lightning_t2i.loggers import sweep_run
from lightning_t2i.paths import ROOT
from lightning_t2i.slurm import job_id
from lightning_t2i.state_io import MARKER, newest, write_atomically

# What may change between two starts of one run: where it runs, how it is watched, and how long it goes on.
FREE = (
    "tracking*",
    "samples*",
    "throughput*",
    "checkpoints*",
    "eval*",
    "comparison*",
    "health*",
    "preemption*",
    "data.init_args.workers",
    "model.init_args.common.log_every",
    *(f"trainer.{name}" for name in ("accelerator", "devices", "num_nodes", "strategy*", "plugins*", "logger*")),
    *(f"trainer.{name}" for name in ("default_root_dir", "profiler*", "max_steps", "max_time*", "enable_*")),
    *(f"trainer.{name}" for name in ("log_every_n_steps", "val_check_interval", "check_val_every_n_epoch")),
    *(f"trainer.{name}" for name in ("limit_val_batches", "limit_test_batches", "limit_predict_batches")),
    *(f"trainer.{name}" for name in ("num_sanity_val_steps", "detect_anomaly", "model_registry")),
)
# Of this, what a measurement depends on all the same, under one name.
MEASURED = ("eval.networks.*", "trainer.limit_val_batches", "trainer.limit_test_batches")
PACKAGES = ("torch", "lightning", "diffusers", "transformers", "numpy", "jsonargparse", "wandb", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Run:
    """A run folder and the checkpoint that this start goes on from."""

    folder: Path
    resume: Path | None = None

    @property
    def step(self) -> int:
        """Training steps done at the resume point."""
        return int(json.loads((self.resume / MARKER).read_text())["step"]) if self.resume else 0


def runs_root() -> Path:
    return on_a_disk(os.environ.get("LIGHTNING_T2I_RUNS", "runs"), "LIGHTNING_T2I_RUNS")


def run_name(explicit: str | None, configs: list[Path]) -> str:
    """`--run`; in a sweep of W&B, whose agent trains one run after another, the last config's name with the training's
    id; else the id of the SLURM job (of an array's task); else the last config's name."""
    if explicit is not None:
        on_a_disk(explicit, "--run")
        if not explicit or Path(explicit).name != explicit:
            raise UserError("A run's name must be a single folder name", where="--run", given=explicit)
        return explicit
    if (job := job_id()) is not None and sweep_run() is None:
        return job
    if not configs:
        raise UserError("No config and no run was named", fix="--config configs/quickstart.yaml")
    return "-".join(name for name in (config_name(configs[-1]), sweep_run()) if name)


def config_name(config: Path) -> str:
    """`METHOD-EXPERIMENT` of a config in configs/METHOD, so that methods do not share a name; any other's stem."""
    inside = ROOT / "configs"
    path = config.resolve()
    return "-".join(path.relative_to(inside).with_suffix("").parts) if path.is_relative_to(inside) else path.stem


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a resolved config that decides what is trained: {dotted key: value}."""
    return {k: v for k, v in flatten(config).items() if not any(fnmatch(k, pattern) for pattern in FREE)}


def config_hash(config: Mapping[str, Any]) -> str:
    """Hash of `identity`, 12 hex digits."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True, default=str).encode()).hexdigest()[:12]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line `key: old -> new` for each key in which two resolved configs describe different trainings."""
    a, b = identity(old), identity(new)
    keys = [k for k in sorted(a.keys() | b.keys()) if k not in a or k not in b or a[k] != b[k]]
    return [f"{k}: {a.get(k, 'absent')} -> {b.get(k, 'absent')}" for k in keys]


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """{dotted key: new value} where two resolved configs measure different things under the same names."""

    def measured(config: Mapping[str, Any]) -> dict[str, Any]:
        flat = flatten(config)
        return identity(config) | {k: v for k, v in flat.items() if any(fnmatch(k, pattern) for pattern in MEASURED)}

    a, b = measured(old), measured(new)
    return {k: b.get(k, "absent") for k in sorted(a.keys() | b.keys()) if k not in a or k not in b or a[k] != b[k]}


def move_aside(folder: Path) -> Path:
    """Renames a folder to the first free NAME.1, NAME.2, …"""
    n = 1
    while (target := folder.with_name(f"{folder.name}.{n}")).exists():
        n += 1
    folder.rename(target)
    return target


def check_resumable(folder: Path, config: dict[str, Any], resume: Path | None) -> None:
    """Raises a UserError when the folder holds another training, or a finished one that this start would not extend."""
    again = f"--run OTHER_NAME trains beside it, --fresh moves {folder} aside and starts again"
    old = yaml.safe_load((folder / "config.yaml").read_text())
    if changed := differences(old, config):
        shown = "\n             ".join(changed[:12] + ([f"and {len(changed) - 12} more"] if len(changed) > 12 else []))
        raise UserError(
            f"The run {folder.name} was started with another config", where=str(folder), given=shown, fix=again
        )
    steps = config["trainer"]["max_steps"]
    if (folder / "finished").is_file():
        done = int(json.loads((folder / "finished").read_text())["step"])
        if steps != -1 and steps <= done:
            raise UserError(
                f"The run {folder.name} is finished",
                where=str(folder),
                given=f"trainer.max_steps {steps}, {done} steps done",
                fix=f"a larger trainer.max_steps goes on; {again}",
            )
    elif resume is not None and 0 <= steps < (done := Run(folder, resume).step):
        raise UserError(
            f"The run {folder.name} is past trainer.max_steps already",
            where="trainer.max_steps",
            given=steps,
            allowed=f"at least {done}",
            fix=again,
        )


def begin(folder: Path, config: dict[str, Any], fresh: bool) -> Run:
    """Prepares the folder for a training and decides where it goes on; rank 0 acts, the others wait for its word."""
    if launch.rank() != 0:
        return Run(folder, launch.hear(folder))
    launch.token()  # what is refused is refused before anything is moved
    mirror = (config.get("checkpoints") or {}).get("mirror")
    if mirror is not None and (fresh or newest(folder / "checkpoints") is None):
        refuse_others(mirror, folder.name)
    if fresh and folder.exists() and any(folder.iterdir()):
        move_aside(folder)
    resume = newest(folder / "checkpoints")
    if (folder / "config.yaml").is_file():
        check_resumable(folder, config, resume)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode())
    run = Run(folder, resume)
    write_environment(run, config)
    (folder / "finished").unlink(missing_ok=True)
    launch.tell(folder, resume)
    return run


def write_environment(run: Run, config: Mapping[str, Any]) -> None:
    """Writes env.json: this start's versions, git state and hardware, and the list of all starts so far."""
    file = run.folder / "env.json"
    starts = json.loads(file.read_text())["starts"] if file.is_file() else []
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(sys.argv),
        "step": run.step,
        "host": platform.node(),
    }
    state = {
        "config_hash": config_hash(config),
        "versions": {"lightning-t2i": __version__, "python": platform.python_version(), **versions()},
        "git": git_state(),
        "hardware": hardware(),
        "starts": [*starts, start],
    }
    write_atomically(file, (json.dumps(state, indent=1) + "\n").encode())


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def git_state() -> dict[str, Any]:
    """Commit of the repository and whether files differ from it; empty outside a clone."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.rstrip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return (
        {} if commit is None else {"commit": commit, "changed": (git("status", "--porcelain") or "").splitlines()[:50]}
    )


def hardware() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), "gpus": gpus, "machine": platform.machine()}
