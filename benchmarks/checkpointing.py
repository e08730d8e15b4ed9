"""How long a training waits for its checkpoints: written at once against written in the background.

    python -m benchmarks --only checkpointing

A network of 15 million weights trains by AdamW with an EMA in Lightning's Trainer, set up as train.py sets it up: a
state of 240 MB in float32. Every checkpoint is flushed to the disk of the folder for temporary files. Trainings that
save at once and in the background take turns in one process; a ratio is that of the median waits of two that follow
each other. The first save in the background makes the memory that the later ones use again, and stands alone. Between
two saves there are steps enough for a write in the background to end.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.running import quartiles
from benchmarks.step_overhead import adamw, batches, train
from callbacks.checkpoints import CheckpointOptions, Checkpoints
from lightning_t2i.batch import Batch
from lightning_t2i.checkpoints.saving import Form
from lightning_t2i.cli.session import quiet
from lightning_t2i.loggers import read_lines
from lightning_t2i.method import MethodModule
from lightning_t2i.options import EMAOptions, GroupOptions, MethodOptions

WIDTH, LAYERS = 1024, 14  # 15 million weights
STEPS, SAVES = 10, 3  # training steps between two saves, saves of a training
BAR = 0.10  # wait in the background / wait at once
COLUMNS = [
    ["form", ""],
    ["state, MB", ",.0f"],
    ["at once, s", ".3f"],
    ["in the background, s", ".3f"],
    ["ratio", ".1%"],
]
COLUMNS += [["lower quartile", ".1%"], ["upper quartile", ".1%"], ["under 10 %", ""], ["first, s", ".3f"]]
COLUMNS += [["complete after, s", ".2f"], ["MB/s", ",.0f"], ["pairs", "d"]]


class Wide(MethodModule):
    """Layers whose weights are many and whose steps are short."""

    def __init__(self, width: int, layers: int):
        super().__init__(MethodOptions(log_every=1000))
        self.sizes = width, layers

    def configure_model(self) -> None:
        width, layers = self.sizes
        network = nn.Sequential(nn.Flatten(), nn.Linear(256, width), *(nn.Linear(width, width) for _ in range(layers)))
        self.add_group("net", network, GroupOptions(adamw, ema=EMAOptions()))

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.backward("net", self.net(batch["main"].latent).square().mean())


def saved(form: Form, asynchronous: bool, width: int, layers: int, steps: int, saves: int) -> list[dict[str, Any]]:
    """The logged figures of the saves of a training."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = CheckpointOptions(every=steps, keep=1, form=form, asynchronous=asynchronous)
        saving = Checkpoints(folder / "checkpoints", options)
        train(Wide(width, layers), batches(2), steps * saves, [saving], folder)
        return [line for line in read_lines(folder / "metrics.jsonl") if "checkpoint/seconds" in line]


def row(form: Form, pairs: int, width: int = WIDTH, layers: int = LAYERS, steps: int = STEPS) -> list[Any]:
    """A form's row of the table."""
    ratios, waits, lines, first = [], [], [], []
    for _ in range(pairs):
        at_once, background = (saved(form, kind, width, layers, steps, SAVES) for kind in (False, True))
        first.append(background[0]["checkpoint/stall_seconds"])
        pair = [
            statistics.median(line["checkpoint/stall_seconds"] for line in found) for found in (at_once, background[1:])
        ]
        waits.append(pair)
        ratios.append(pair[1] / pair[0])
        lines += background
    low, middle, high = quartiles(ratios)
    seconds = statistics.median(line["checkpoint/seconds"] for line in lines)
    speed = statistics.median(line["checkpoint/mb_per_s"] for line in lines)
    once, later = (statistics.median(w) for w in zip(*waits, strict=True))
    size, good = lines[0]["checkpoint/bytes"] / 1e6, "yes" if middle < BAR else "no"
    return [form, size, once, later, middle, low, high, good, statistics.median(first), seconds, speed, pairs]


def result(pairs: int, **sizes: int) -> dict[str, Any]:
    quiet()
    forms: list[Form] = ["single", "sharded"]
    rows = [row(form, pairs, **sizes) for form in forms]
    return {"title": "Waiting for checkpoints", "tables": [{"columns": COLUMNS, "rows": rows}]}


def measure(quick: bool = False) -> dict[str, Any]:
    """Both forms on one process; quick: one pair of a small network."""
    torch.set_num_threads(1)
    return result(1, width=64, layers=2, steps=3) if quick else result(pairs=3)
