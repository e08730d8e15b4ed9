"""Cells of RepBlend's claims: experts, tuning on one validation seed, sets, coresets, and what students learn of them.

Validation (the split `val`, seed TUNING) chooses rates, the blending's regime, the iteration and the epoch; the test
split `retrieval` is searched with what was chosen.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from datamodules.retrieval import RetrievalPairs
from lightning_modules.experts import FOLDER, Trajectories
from lightning_t2i import coresets
from lightning_t2i.claims.spec import Cell, Measured
from lightning_t2i.claims.training import RUN, fit
from lightning_t2i.cli.restore import constructed, restore
from lightning_t2i.keys import Keys
from lightning_t2i.metrics.collapse import collapse, stripes, threshold
from lightning_t2i.networks.frozen_pair import FrozenImages
from lightning_t2i.networks.projection import Student
from lightning_t2i.pair_features import PairFeatures
from lightning_t2i.paths import resolve
from lightning_t2i.retrieval_student import Protocol, TrainingSet, evaluate, recall_of
from lightning_t2i.soft_contrast import OBJECTIVES, similarity
from lightning_t2i.state_io import complete_checkpoints

TUNING = 100  # seed
OTHER = "assets/tiny/perceptual"  # another encoder of pictures: architecture and seed differ
REAL_RATE = 0.02  # of students of real pairs
RATED = ("images", "texts")  # groups whose rates are tuned, together


def once(cell: Cell, make: Callable[[Cell], dict[str, Any]]) -> dict[str, Any]:
    """What `make` finds for the validation seed, for the cells of all seeds: the first one does the work."""
    folder = cell.folder.parent / f"seed-{TUNING}-tuning"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        file = folder / "found.json"
        if not file.is_file():
            found = make(replace(cell, seed=TUNING, folder=folder))
            file.write_text(json.dumps(found), encoding="utf-8")
    found = json.loads(file.read_text(encoding="utf-8"))
    return {**found, "folder": str(folder)}


def experts(cell: Cell) -> Measured:
    """Experts of the cell's seed, and in the first cell those of the validation seed: options config, overrides."""
    found = once(cell, lambda own: dict(fit(own).numbers))
    numbers = dict(fit(cell).numbers)
    files = sorted((cell.folder / RUN / FOLDER).glob("*.safetensors"))
    assert found["seconds_per_step"] > 0
    return Measured({**numbers, "bytes": float(files[0].stat().st_size)})


def _set(cell: Cell, folder: Path, trajectories: Path, overrides: dict[str, Any]) -> float:
    """Distils into a folder; returns the best mean recall of validation."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {**cell.options["overrides"], **overrides, "model.experts": str(trajectories)}
    fit(replace(cell, folder=folder, options={**cell.options, "overrides": given}))
    lines = [json.loads(line) for line in (folder / RUN / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return max(line["val/mean"] for line in lines if "val/mean" in line)


def _rates(options: Any, factor: float) -> dict[str, Any]:
    return {f"model.{name}.optimizer.lr": rate * factor for name, rate in zip(RATED, options["rates"], strict=True)}


def tune(cell: Cell) -> Measured:
    """The best of three factors on the rates of an arm, and before it of its regimes, by validation on one seed.

    Options: config, overrides, rates of X and Y, factors, regimes (lists of [key, value]), regime_of (an arm whose
    regime is taken).
    """
    options = cell.options

    def search(own: Cell) -> dict[str, Any]:
        trajectories = cell.after["experts"].parent / f"seed-{TUNING}-tuning" / RUN / FOLDER
        tried: dict[str, float] = {}
        regimes = [dict(regime) for regime in options["regimes"]] or [{}]
        taken = options.get("regime_of")
        if len(regimes) > 1 and taken is None:
            for i, regime in enumerate(regimes):
                name = f"regime-{i}"
                tried[name] = _set(own, own.folder / name, trajectories, {**regime, **_rates(options, 1.0)})
        chosen = max(range(len(regimes)), key=lambda i: (tried.get(f"regime-{i}", 0.0), -i))
        if taken is not None:
            chosen = int(own.measured(taken).numbers["regime"])
        for factor in options["factors"]:
            name = f"factor-{factor:g}"
            if factor == 1.0 and f"regime-{chosen}" in tried:
                tried[name] = tried[f"regime-{chosen}"]
            else:
                tried[name] = _set(own, own.folder / name, trajectories, {**regimes[chosen], **_rates(options, factor)})
        best = max(options["factors"], key=lambda f: tried[f"factor-{f:g}"])
        return {"tried": tried, "regime": chosen, "factor": best}

    found = once(cell, search)
    return Measured({"regime": float(found["regime"]), "factor": found["factor"], **found["tried"]})


def distil(cell: Cell) -> Measured:
    """A set of the cell's seed with what `tune` chose: options config, overrides, rates, regimes, tuned (its arm)."""
    options, chosen = cell.options, cell.measured(cell.options["tuned"]).numbers
    regimes = [dict(regime) for regime in options["regimes"]] or [{}]
    overrides = {**regimes[int(chosen["regime"])], **_rates(options, chosen["factor"])}
    value = _set(cell, cell.folder, cell.after["experts"] / RUN / FOLDER, overrides)
    return Measured({"val": value, **branches(cell.folder / RUN / "metrics.jsonl")})


def branches(file: Path) -> dict[str, float]:
    """Matching losses of both heads, means over the second half of the log lines."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    logged = [line for line in lines if "images/image" in line]
    late = logged[len(logged) // 2 :]
    return {name: sum(line[f"images/{name}"] for line in late) / len(late) for name in ("image", "text")}


def stream_of(world: str, split: str, limit: int | None) -> RetrievalPairs:
    stream = RetrievalPairs(world, split, 100, languages=["en"], limit=limit, in_memory=True)
    stream.prepare()
    stream.setup()
    stream.begin(0, split, shuffle=False)
    return stream


class World:
    """Features of the three splits of a world by the encoders of a method.

    Args:
        method: built; options: world, and limits of train and val.
    """

    def __init__(self, method: Any, options: Any, image: Any = None, identity: str = ""):
        world = options["world"]
        test = "retrieval" if world == "shapes" else "test"
        pair = (image or method.image, method.text)
        names = [identity or method.identities[0], method.identities[1]]
        limits = {"train": options["train"], "val": options["val"], test: options["test"]}
        found = [PairFeatures.of(stream_of(world, s, n), pair, names, "cpu") for s, n in limits.items()]
        self.train, self.val, self.test = found
        self.image = pair[0]


def score(
    world: World, student: Student, pairs: TrainingSet, objective: str, seed: int, nets: int, epochs: int
) -> dict[str, float]:
    """Recalls on the test split after the epoch that is best on validation, and after the last and its own best one."""
    protocol = Protocol(nets=nets, epochs=epochs, every=max(1, epochs // 5), drop=epochs // 2 + 1)
    splits = {"test": recall_of(world.test), "val": recall_of(world.val)}
    found = evaluate(student, pairs, OBJECTIVES[objective], protocol, Keys(seed).fork("claims"), splits, "val")
    numbers = {key: found[f"test/selected/{key}"] for key in ("mean", "i2t/r1", "i2t/r10", "t2i/r1", "t2i/r10")}
    return {**numbers, "last": found["test/last/mean"], "reference": found["test/reference/mean"]}


@torch.no_grad()
def know(cell: Cell) -> Measured:
    """What students learn of a distilled set: options of (its arm), those of `coreset` but its kind, identity."""
    options, run = cell.options, cell.after[cell.options["of"]] / RUN
    method: Any = constructed(run / "config.yaml")
    restore(method, run, best_checkpoint(run))
    world, pairs = World(method, options), method.training_set()
    if options.get("identity"):
        pairs = replace(pairs, factors=())
    name = next(key for key, value in OBJECTIVES.items() if value is method.objective)
    found = score(world, method.student, pairs, name, cell.seed, options["nets"], options["epochs"])
    numbers = {**found, **judged(cell, method, world, pairs)}
    if options.get("other"):
        numbers["other"] = elsewhere(cell, method, pairs, name)
    return Measured(numbers)


def best_checkpoint(run: Path) -> Path:
    """The checkpoint whose validation was best; all are kept that could be."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = {line["step"]: line["val/mean"] for line in lines if "val/mean" in line}
    there = {int(path.name.split("-")[1]): path for path in complete_checkpoints(run / "checkpoints")}
    return there[max((step for step in there if step in scores), key=lambda step: (scores[step], -step))]


def judged(cell: Cell, method: Any, world: World, pairs: TrainingSet) -> dict[str, float]:
    """Collapse of a set in the space of an expert of another seed, which no set was matched to; cr42 against random
    real pairs."""
    assert cell.options["judge"] == TUNING
    trajectories = Trajectories(cell.after["experts"].parent / f"seed-{TUNING}-tuning" / RUN / FOLDER)
    weights = trajectories.snapshot(0, trajectories.length - 1)
    drawn = coresets.drawn_pairs(min(500, len(world.train)), len(world.train), Keys(cell.seed).fork("judge"))
    real = method.student.embed(weights, world.train.images[world.train.owner[drawn]], world.train.texts[drawn])
    x, y = method.student.embed(weights, pairs.images, pairs.texts)
    found = collapse(x, y, threshold(*real))
    if pairs.factors:
        found["stripes"] = stripes(similarity(pairs.factors, pairs.alpha, torch.arange(len(pairs.texts))))
    return found


def elsewhere(cell: Cell, method: Any, pairs: TrainingSet, objective: str) -> float:
    """Mean recall of students on features of another encoder of the same pictures."""
    image, identity = FrozenImages.build(OTHER)
    world = World(method, cell.options, image.requires_grad_(False), identity)
    student = Student.of(image.width, method.student.text.inputs, None, method.student.temperature)
    moved = replace(pairs, images=image(method.learned()[0]) if len(method.learned()) else pairs.images)
    return score(world, student, moved, objective, cell.seed, cell.options["nets"], cell.options["epochs"])["mean"]


@torch.no_grad()
def coreset(cell: Cell) -> Measured:
    """Students of real pairs, by InfoNCE, and by wBCE beside it.

    Options: config, kind, pairs, world, train, val, test (limits), nets, epochs, judge (seed of the expert in whose
    space collapse is measured).
    """
    options = cell.options
    method: Any = constructed(resolve(options["config"]))
    method.configure_model()
    world = World(method, options)
    trajectories = Trajectories(cell.after["experts"] / RUN / FOLDER)
    keys = Keys(cell.seed).fork("coreset")
    rows = coresets.choose(options["kind"], world.train, options["pairs"], keys, trajectories, method.student)
    pairs = TrainingSet.of_pairs(world.train, rows, REAL_RATE)
    sizes = (cell.seed, options["nets"], options["epochs"])
    found = {name: score(world, method.student, pairs, name, *sizes) for name in ("wbce", "infonce")}
    numbers = {**found["infonce"], **{f"{name}/mean": value["mean"] for name, value in found.items()}}
    numbers |= judged(cell, method, world, pairs)
    if options.get("other"):
        image, identity = FrozenImages.build(OTHER)
        there = World(method, options, image.requires_grad_(False), identity)
        student = Student.of(image.width, method.student.text.inputs, None, method.student.temperature)
        numbers["other"] = score(there, student, TrainingSet.of_pairs(there.train, rows, REAL_RATE), "infonce", *sizes)[
            "mean"
        ]
    return Measured(numbers)


def compare(cell: Cell) -> Measured:
    """A metric of one arm over that of another: options metric, arm, baseline."""
    a, b = (cell.measured(cell.options[name]).of(cell.options["metric"]) for name in ("arm", "baseline"))
    return Measured({"ratio": a / b})
