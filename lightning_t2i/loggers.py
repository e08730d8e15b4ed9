"""Loggers of a run: an append-only metrics.jsonl that survives kill and resume, and Weights & Biases beside it."""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment

from lightning_t2i.errors import UserError
from lightning_t2i.state_io import write_atomically

log = logging.getLogger(__name__)

WANDB_BUFFER = 60.0  # seconds; W&B writes its offline file every 15 s, and a killed process never writes the rest


@dataclass(frozen=True)
class TrackingOptions:
    """Where metrics go besides metrics.jsonl, which is always written.

    Args:
        wandb: offline needs no account: `wandb sync runs/NAME/wandb/offline-*` uploads later. off uses no W&B at all.
        project: W&B project.
        tags: W&B tags.
    """

    wandb: Literal["offline", "online", "off"] = "offline"
    project: str = "lightning-t2i"
    tags: list[str] | None = None


class Clock:
    """Training step and samples seen, for values that Lightning logs with its own count of batches."""

    def __init__(self, trainer: L.Trainer | None = None) -> None:
        self.trainer = trainer

    def stamp(self, metrics: Mapping[str, Any], step: int | None) -> tuple[dict[str, Any], int, int]:
        """(metrics without Lightning's bookkeeping, training step, samples seen)."""
        values = dict(metrics)
        module = getattr(self.trainer, "lightning_module", None)
        from_lightning = values.pop("epoch", None) is not None
        counters = getattr(module, "counters", None)
        if counters is not None and (step is None or from_lightning):
            step = counters.step
        samples = getattr(counters, "samples", 0)
        if isinstance(values.get("samples"), int | float):  # else it is a list of pictures
            samples = int(values.pop("samples"))
        return values, step or 0, samples


class JsonlLogger(Logger):
    """One JSON object a line: {"step": training steps done, "samples": …, "time": seconds since 1970, name: value, …}.

    Args:
        file: metrics.jsonl of the run.
        resume_step: lines of later steps are removed: they belong to work that the resumed run does again. None
            leaves the file as it is.
        clock: see `Clock`.
        changes: what is measured otherwise than the run says, see `verbs.changes_of`; lines hold it as "with".
    """

    def __init__(
        self,
        file: Path,
        resume_step: int | None = None,
        clock: Clock | None = None,
        changes: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.file, self.clock = file, clock or Clock()
        self.said = {"with": dict(changes)} if changes else {}
        if rank_zero_only.rank == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            if resume_step is not None and file.exists():
                kept = [line for line in read_lines(file) if line["step"] <= resume_step]
                write_atomically(file, "".join(json.dumps(line) + "\n" for line in kept).encode())
            elif file.exists() and file.read_bytes()[-1:] not in (b"", b"\n"):
                with file.open("a", encoding="utf-8") as stream:
                    stream.write("\n")  # what follows is no part of a line that a kill or a full disk has cut

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return self.file.parent.name

    @property
    def save_dir(self) -> str:
        return str(self.file.parent)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        values, step, samples = self.clock.stamp(metrics, step)
        line = {"step": step, "samples": samples, "time": round(time.time(), 3), **self.said}
        line |= {name: float(value) for name, value in values.items()}
        with self.file.open("a", encoding="utf-8") as stream:  # closed, so flushed: a killed process loses no line
            stream.write(json.dumps(line) + "\n")

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The run's config.yaml holds them."""


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl; a kill or a full disk may have cut some off."""
    lines = []
    for text in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def write_csv(file: Path, target: Path) -> None:
    """metrics.jsonl as a table: a row per line, a column per name."""
    lines = read_lines(file)
    names = list(dict.fromkeys(name for line in lines for name in line))
    with target.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, names)
        writer.writeheader()
        writer.writerows(lines)


class Wandb(WandbLogger):
    """W&B run whose every value is plotted against training steps, and which goes on under its id after a resume.

    Args:
        folder: run folder.
        options: mode, project and tags.
        config: resolved config of the run.
        clock: see `Clock`.
        replay: lines of metrics.jsonl that an earlier, killed start may not have written out.
    """

    _experiment: Any

    def __init__(
        self,
        folder: Path,
        options: TrackingOptions,
        config: Mapping[str, Any],
        clock: Clock,
        replay: Sequence[dict[str, Any]] = (),
    ):
        super().__init__(
            name=folder.name,
            save_dir=folder,
            id=wandb_id(folder) if rank_zero_only.rank == 0 else None,
            project=options.project,
            tags=options.tags,
            config=dict(config),
            mode=options.wandb,
        )
        self.clock, self.mode, self.replay = clock, options.wandb, replay
        self._lost = False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            import wandb

            # One axis for everything: W&B's own step counts log calls and starts at 0 after each resume.
            quiet = wandb.Settings(silent=True, console="off") if self.mode == "offline" else None
            try:
                arguments = {k: v for k, v in self._wandb_init.items() if v is not None}
                self._experiment = wandb.init(**arguments, settings=quiet)
            except wandb.errors.Error as error:
                raise UserError(
                    "W&B could not start",
                    where="tracking.wandb",
                    given=str(error).splitlines()[0],
                    fix="wandb login, or tracking.wandb: offline",
                ) from error
            self._experiment.define_metric("trainer/global_step")
            self._experiment.define_metric("*", step_metric="trainer/global_step", step_sync=True)
            for line in self.replay:
                values = {k: v for k, v in line.items() if k not in ("step", "samples", "time")}
                stamps = {"trainer/global_step": line["step"], "trainer/samples": line["samples"]}
                self._experiment.log(values | stamps)
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        values, step, samples = self.clock.stamp(metrics, step)
        self._tell(lambda run: run.log({**values, "trainer/global_step": step, "trainer/samples": samples}))

    @rank_zero_only
    def mark_preempting(self) -> None:
        """W&B then calls the run "preempted" until it goes on, not "failed"."""
        self._tell(lambda run: run.mark_preempting())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Closes the run, so that the process can start another one and nothing waits in a buffer."""
        if self._experiment is not None:
            self._tell(lambda run: run.finish(exit_code=0 if status == "success" else 1))
            self._experiment = None

    def _tell(self, act: Callable[[Any], Any]) -> None:
        """W&B's service is a process of its own and dies of SLURM's SIGTERM; the training has to save all the same."""
        if self._lost:
            return
        try:
            act(self.experiment)
        except ConnectionError as error:
            import wandb

            self._lost = True
            log.warning("W&B's service is gone (%s): metrics.jsonl goes on, the next start hands over the rest", error)
            with contextlib.suppress(ConnectionError):
                wandb.teardown()  # else it complains once more when the process ends


def sweep_run() -> str | None:
    """The id that the agent of a W&B sweep gives a training; None outside of sweeps."""
    return os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None


def wandb_id(folder: Path) -> str:
    """The id in the run folder: drawn on the first start, or given by the agent of a W&B sweep."""
    file = folder / "wandb_id"
    if not file.is_file():
        write_atomically(file, (sweep_run() or secrets.token_hex(4)).encode())
    return file.read_text().strip()


def build_loggers(
    folder: Path, options: TrackingOptions, config: Mapping[str, Any], resume_step: int, clock: Clock
) -> list[Logger]:
    """The loggers of a training that goes on from `resume_step`."""
    lines = read_lines(folder / "metrics.jsonl")
    loggers: list[Logger] = [JsonlLogger(folder / "metrics.jsonl", resume_step, clock)]
    if options.wandb != "off":
        late = lines[-1]["time"] - WANDB_BUFFER if lines else 0.0
        replay = [line for line in lines if line["time"] > late and line["step"] <= resume_step]
        loggers.append(Wandb(folder, options, config, clock, replay))
    return loggers
