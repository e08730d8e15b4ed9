"""Cells of methods that make pictures: train by `train.py fit`, choose on validation prompts, measure on test prompts.

    fit        options config, overrides {dotted key: value}: the run `training` in the cell's folder
    tune       options split, n, guidance [scales], weights: the best scale by the shapes score, as number `guidance`
    generate   options split, n, guidance, weights, metrics: numbers, and scores for each prompt

`fit` comes in `after` of the others under the name "train". `weights` is "ema" or "raw"; `guidance` of `generate` is a
number or the name of a `tune` arm. Positions and keys are the same in all arms of a seed, and so is the noise.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from datamodules.prompts import Prompts
from datamodules.worlds.shapes_scenes import TASKS
from lightning_t2i.batch import Records
from lightning_t2i.claims.spec import Cell, Measured
from lightning_t2i.cli.restore import trained
from lightning_t2i.keys import Keys
from lightning_t2i.metrics.scorers import ScorerOptions, build_scorer
from lightning_t2i.metrics.shapes_detector import satisfied

BATCH = 100  # prompts sampled at a time
RUN = "training"


def fit(cell: Cell) -> Measured:
    """Trains, or goes on from the newest checkpoint; the number is seconds per training step."""
    from lightning_t2i.cli.main import parse
    from lightning_t2i.cli.verbs import fit as train

    os.environ["LIGHTNING_T2I_RUNS"] = str(cell.folder)
    overrides = {**cell.options["overrides"], "model.common.seed": cell.seed, "tracking.wandb": "off"}
    words = [word for key, value in overrides.items() for word in (f"--{key}", json.dumps(value))]
    if not (cell.folder / RUN / "finished").is_file():
        train(parse(["fit", "--config", cell.options["config"], "--run", RUN, *words]))
    cost = json.loads((cell.folder / RUN / "cost.json").read_text(encoding="utf-8"))
    return Measured({"seconds_per_step": cost["seconds"] / cost["steps"]})


def prompts(split: str, n: int) -> list[Records]:
    """The first n prompts of a split of the shapes world, in batches; its tasks come in turn."""
    stream = Prompts("shapes", split, batch_size=BATCH, limit=n)
    stream.prepare()
    stream.setup()
    stream.begin(0, split, shuffle=False)
    return [stream.load(range(i, min(i + BATCH, n)), i // BATCH) for i in range(0, n, BATCH)]


@torch.no_grad()
def pictures(method: Any, records: Records, seed: int, **sampling: Any) -> Tensor:
    """Pictures [B, 3, H, W] for records; `sampling` is what the method's `sample` takes beyond its protocol."""
    return method.sample(method.condition(records), Keys(seed).fork("claims"), records.position, **sampling)


def shapes_scores(right: Sequence[bool], tasks: Sequence[str]) -> list[float]:
    """Per prompt, whether its picture is right, weighted so that the mean is the mean of the task accuracies."""
    count = {task: list(tasks).count(task) for task in TASKS if task in tasks}
    return [float(r) * len(tasks) / (len(count) * count[task]) for r, task in zip(right, tasks, strict=True)]


def measure(method: Any, split: str, n: int, seed: int, metrics: Sequence[str], **sampling: Any) -> Measured:
    """Generates for n prompts of a split and measures the pictures.

    Args:
        metrics: shapes_score, which also gives scores per prompt, or any other key of `metrics.scorers.SCORERS`.
    """
    batches = prompts(split, n)
    others = {m: build_scorer(m, ScorerOptions(), f"shapes-{split}") for m in metrics if m != "shapes_score"}
    right: list[bool] = []
    for records in batches:
        images = pictures(method, records, seed, **sampling)
        right += satisfied(images, records.scene or []).tolist() if "shapes_score" in metrics else []
        for scorer in others.values():
            scorer.add(images, records)
    ids = torch.cat([records.id for records in batches])
    tasks = [scene["task"] for records in batches for scene in records.scene or []]
    return Measured(
        {name: next(iter(scorer.results().values())) for name, scorer in others.items()},
        {"shapes_score": shapes_scores(right, tasks)} if right else {},
        hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:12],
    )


def tune(cell: Cell) -> Measured:
    """The guidance scale with the best shapes score on validation prompts, the smaller one of equals."""
    options = cell.options
    method = trained(cell.after["train"] / RUN, options["weights"])
    found = {
        scale: measure(
            method, options["split"], options["n"], cell.seed, ["shapes_score"], guidance=scale
        ).of("shapes_score")
        for scale in options["guidance"]
    }  # fmt: skip
    best = max(sorted(found), key=found.__getitem__)
    return Measured({"guidance": best, **{f"shapes_score@guidance={scale:g}": v for scale, v in found.items()}})


def generate(cell: Cell) -> Measured:
    """The metrics of pictures for test prompts."""
    options = cell.options
    scale = options["guidance"]
    if isinstance(scale, str):
        scale = cell.measured(scale).numbers["guidance"]
    method = trained(cell.after["train"] / RUN, options["weights"])
    found = measure(method, options["split"], options["n"], cell.seed, options["metrics"], guidance=scale)
    return Measured({**found.numbers, "guidance": scale}, found.scores, found.prompts)
