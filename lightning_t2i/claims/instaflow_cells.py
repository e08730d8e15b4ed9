"""Cells of InstaFlow's claims: pairs of a flow, its training and export, and what is measured of it.

An arm that trains leaves the run `training` and the exported folder `flow` in its cell; an arm of pairs leaves `pairs`.
Options `teacher` and `pairs` name such arms, or folders that are there; they come in `after`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from lightning_t2i.claims.spec import Cell, Measured
from lightning_t2i.claims.training import RUN, fit, measure, prompts
from lightning_t2i.cli.restore import trained
from lightning_t2i.keys import Keys
from lightning_t2i.loggers import read_lines
from lightning_t2i.metrics.straightness import Straightness, trajectory
from lightning_t2i.processes import sample
from lightning_t2i.state_io import newest

FLOW, PAIRS = "flow", "pairs"


def place(cell: Cell, name: str, folder: str) -> str:
    """The folder of an arm that an option names, or the option itself where it is a folder."""
    option = cell.options[name]
    return str(cell.after[option] / folder) if option in cell.after else option


def make_pairs(cell: Cell) -> Measured:
    """Pairs of a teacher: options config, teacher, n, split, guidance, solver."""
    from lightning_t2i.cli.main import parse
    from lightning_t2i.cli.verbs import predict

    options = cell.options
    words = {
        "model.network": place(cell, "teacher", FLOW),
        "model.guidance": options["guidance"],
        "model.solver": options["solver"],
        "model.common.seed": cell.seed,
        "data.predict.folder": str(cell.folder / PAIRS),
        "data.predict.limit": options["n"],
        "data.predict.split": options.get("split", "train"),
        "trainer.enable_progress_bar": False,
    }
    line = [word for key, value in words.items() for word in (f"--{key}", json.dumps(value))]
    predict(parse(["predict", "--config", options["config"], *line]))
    return Measured()


def train(cell: Cell) -> Measured:
    """`fit` on pairs, and the export of its student; numbers: loss@STEP of each validation on held-out pairs.

    Options: config, overrides, teacher, pairs; `held` names the arm of held-out pairs, `start` an arm to go on from.
    """
    options = cell.options
    teacher = place(cell, "teacher", FLOW)
    more: dict[str, Any] = {"model.teacher": teacher, "data.main.teacher": teacher}
    more["data.main.source"] = place(cell, "pairs", PAIRS)
    if "start" in options:
        more["model.start"] = str(newest(cell.after[options["start"]] / RUN / "checkpoints"))
    if "held" in options:
        held = {"source": place(cell, "held", PAIRS), "teacher": teacher, "split": "val", "batch_size": 100}
        more["data.val"] = {"class_path": "datamodules.pairs.Pairs", "init_args": held}
    found = fit(replace(cell, options={**options, "overrides": {**options["overrides"], **more}}))
    out = cell.folder / FLOW
    if not out.is_dir():
        part = cell.folder / f"{FLOW}.part"
        shutil.rmtree(part, ignore_errors=True)
        method: Any = trained(cell.folder / RUN)
        method.export(part, [])
        part.rename(out)
    lines = [line for line in read_lines(cell.folder / RUN / "metrics.jsonl") if "val/loss" in line]
    return Measured({**found.numbers, **{f"loss@{line['step']}": line["val/loss"] for line in lines}})


def draw(cell: Cell) -> Measured:
    """The metrics of a student's pictures: options of, split, n, metrics, sampling; its distance from its teacher at
    equal noise with `distance`."""
    method: Any = trained(cell.after[cell.options["of"]] / RUN)
    options, sampling = cell.options, cell.options.get("sampling", {})
    found = measure(method, options["split"], options["n"], cell.seed, options["metrics"], **sampling)
    more = {"distance": distance(method, cell.seed)} if options.get("distance") else {}
    return Measured({**found.numbers, **more}, found.scores, found.prompts)


@torch.no_grad()
def distance(method: Any, seed: int, n: int = 100) -> float:
    """Mean square distance of the student's x0 from its teacher's at equal noise and validation prompts."""
    (records,) = prompts("val", n)
    z, cond = Keys(seed).fork("claims").normal("z", records.position, method.shape), method.condition(records)
    end = sample(method.teacher, z, cond, method.val_steps, method.guidance)
    return float((method.couple(z, cond) - end).square().mean())


def bends(cell: Cell) -> Measured:
    """Straightness of a flow and of its teacher, unguided, and its `share` of the teacher's: options of, n, steps."""
    method: Any = trained(cell.after[cell.options["of"]] / RUN)
    (records,) = prompts("val", cell.options["n"])
    z, cond = Keys(cell.seed).normal("z", records.position, method.shape), method.condition(records)
    found = {}
    for name, network in (("flow", method.generator_of("student")), ("teacher", method.teacher)):
        metric = Straightness()
        metric.update(trajectory(network, z, cond, cell.options["steps"]))
        found[name] = float(metric.compute())
    return Measured({**found, "share": found["flow"] / found["teacher"]})


def best(cell: Cell) -> Measured:
    """The guidance with the best shapes score on validation prompts, as number `guidance`: options of (an arm that
    trains) or network (a pipeline), scales, n."""
    from lightning_modules.teacher import Teacher

    options, found = cell.options, {}
    for scale in options["scales"]:
        if "of" in options:
            method: Any = trained(cell.after[options["of"]] / RUN)
            sampling: Mapping[str, Any] = {"guidance": scale}
        else:
            method, sampling = Teacher(options["network"], guidance=scale, solver="dpmpp_2m"), {}
            method.configure_model()
            method.eval()
        found[scale] = measure(method, "val", options["n"], cell.seed, ["shapes_score"], **sampling).of("shapes_score")
    chosen = max(sorted(found), key=found.__getitem__)
    return Measured({"guidance": chosen, **{f"shapes_score@guidance={scale:g}": v for scale, v in found.items()}})


def gains(cell: Cell) -> Measured:
    """What the first and the second reflow take off the Fréchet distance of a one-step student: options direct, once,
    twice, names of arms; `excess` is the second gain minus the first."""
    direct, once, twice = (cell.measured(cell.options[name]).of("fd") for name in ("direct", "once", "twice"))
    return Measured({"first": direct - once, "second": once - twice, "excess": (once - twice) - (direct - once)})


def planar(cell: Cell) -> Measured:
    """The two modes in the plane: straightness and energy distances in one step, see `instaflow_toy`; `energy_excess`
    is that of the distilled reflow minus half of the direct distillation's."""
    from lightning_t2i.claims.instaflow_toy import energy_distance, flows

    found, keys = flows(cell.seed, cell.options["steps"]), Keys(cell.seed).fork("measured")
    z, real = keys.normal("z", torch.arange(1000), (2, 1, 1)), found.teacher.draw(keys, 1000)
    numbers: dict[str, float] = {}
    for name in ("teacher", "reflowed"):
        metric = Straightness()
        metric.update(trajectory(getattr(found, name), z))
        numbers[f"bend_{name}"] = float(metric.compute())
    with torch.no_grad():
        for name in ("distilled", "direct"):
            numbers[f"energy_{name}"] = energy_distance(getattr(found, name).generate(z), real)
    numbers["bend_share"] = numbers["bend_reflowed"] / numbers["bend_teacher"]
    return Measured({**numbers, "energy_excess": numbers["energy_distilled"] - numbers["energy_direct"] / 2})
