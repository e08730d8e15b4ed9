"""What a run is about to do, in ten lines."""

from __future__ import annotations

import re
import sys
from typing import Any

from lightning_t2i.cli.configs import show
from lightning_t2i.cli.runs import Run
from lightning_t2i.loggers import TrackingOptions
from lightning_t2i.strategies import FSDP2


def banner(session: Any, run: Run, tracking: TrackingOptions) -> str:
    """The banner of a built session."""
    method, trainer = session.method, session.trainer
    kind = type(method)
    title = (sys.modules[kind.__module__].__doc__ or kind.__name__).strip().splitlines()[0]
    paper = re.search(r"arXiv[ :]*(\d{4}\.\d{4,5})", title)
    rows = {
        "method": title.rstrip("."),
        "class": f"{kind.__module__}.{kind.__qualname__}" + (f", https://arxiv.org/abs/{paper[1]}" if paper else ""),
        "data": data_line(session.data),
        "batch": batch_line(session.data, method.common.accumulate, trainer.world_size),
        "precision": method.common.precision,
        "strategy": strategy_line(trainer),
        "steps": f"{run.step} of {trainer.max_steps}" if trainer.max_steps > 0 else str(run.step),
        "start": f"from {show(run.resume.resolve())}" if run.resume else "from the beginning",
        "run": f"{show(run.folder.resolve())}  (seed {method.common.seed})",
        "W&B": tracking.wandb,
    }
    return "\n".join(f"{name:>9}  {text}" for name, text in rows.items())


def data_line(data: Any) -> str:
    """The training streams: name, source and split."""
    streams = getattr(data, "training", None)
    if not streams:
        return type(data).__name__
    parts = []
    for name, stream in streams.items():
        facts = [str(value) for key in ("source", "split") if (value := getattr(stream, key, None)) is not None]
        parts.append(f"{name} = {type(stream).__name__}({' '.join(facts)})")
    return ", ".join(parts)


def batch_line(data: Any, accumulate: int, world: int) -> str:
    """Effective batch = pictures of a micro-batch over all ranks x micro-batches."""
    size = getattr(getattr(data, "training", {}).get("main"), "batch_size", None)
    if size is None:
        return f"{accumulate} micro-batches a step on {world} processes"
    return f"{size * accumulate} a step = {size // world} a process x {world} processes x {accumulate} micro-batches"


def strategy_line(trainer: Any) -> str:
    device = trainer.strategy.root_device.type
    if isinstance(trainer.strategy, FSDP2):
        return f"FSDP2 on {trainer.world_size} x {device} (replicate, shard) = {trainer.strategy.mesh_shape()}"
    return f"one process on {device}"
