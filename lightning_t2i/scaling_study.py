"""Scaling study of token models: sizes x checkpoints, their validation loss, and what their pictures score.

    python -m lightning_t2i.scaling_study OUT RUN [RUN ...]      runs of one seed, or of several; n prompts of a split
    python -m lightning_t2i.scaling_study OUT --report           table and plots again, from OUT/study.json

    log loss = a + k log N          N parameters of the transformer with its head; least squares over the last
                                    checkpoint of each run, a fit for each variant (order, head), with its R^2
    r(loss, score)                  Pearson, over all sizes and checkpoints of a variant

(Fluid, arXiv 2410.13863: figures of loss against parameters, and of scores against loss.) The losses are those that
the runs logged at the steps of their checkpoints, so validation has to come as often as these are kept; losses of two
variants are of different things and never share a fit. The scores are measured here, on the same prompts and draws.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lightning_t2i.cli.runs import runs_root
from lightning_t2i.errors import UserError
from lightning_t2i.loggers import read_lines
from lightning_t2i.report import table
from lightning_t2i.state_io import complete_checkpoints, write_atomically

LOSSES = ("val/eps_mse", "val/velocity_mse", "val/mse", "val/ce")  # the one that a variant has
FILE = "study.json"


@dataclass(frozen=True)
class Point:
    """A checkpoint: of which run and variant, its parameters, training step, validation loss, and scores by name."""

    run: str
    variant: str
    parameters: int
    step: int
    loss: float
    scores: dict[str, float]


@dataclass(frozen=True)
class Fit:
    """log y = intercept + exponent log x, with R^2; of `n` points."""

    exponent: float
    intercept: float
    r2: float
    n: int


def power_law(x: Sequence[float], y: Sequence[float]) -> Fit:
    """Least squares in logarithms.

    Raises:
        ValueError: fewer than two different x.
    """
    if len(set(x)) < 2:
        raise ValueError("a power law needs two sizes")
    log_x, log_y = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    exponent, intercept = np.polyfit(log_x, log_y, 1)
    spread = float(((log_y - log_y.mean()) ** 2).sum())
    rest = float(((log_y - intercept - exponent * log_x) ** 2).sum())
    return Fit(float(exponent), float(intercept), 1 - rest / spread if spread else 1.0, len(log_x))


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Correlation in [-1, 1]; None where one of the two does not vary or there are fewer than three points."""
    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def losses_of(run: Path) -> dict[int, float]:
    """Validation loss by training step, as a run logged it."""
    lines = read_lines(run / "metrics.jsonl")
    return {line["step"]: line[name] for name in LOSSES for line in lines if name in line}


def source_of(run: Path) -> Any:
    """The data set that a run was trained on, as its config names it."""
    data = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["data"]
    return data.get("init_args", {}).get("main", {}).get("init_args", {}).get("source")


def points_of(
    run: Path, split: str, n: int, seed: int, metrics: Sequence[str], sampling: Mapping[str, Any], name: str = ""
) -> list[Point]:
    """The checkpoints of a run at which it was validated.

    Args:
        name: of the run in the study; its folder's unless told.

    Raises:
        UserError: there is none, the run is of another method, or of data that are not scored.
    """
    from lightning_modules.fluid import Fluid
    from lightning_t2i.claims.training import measure
    from lightning_t2i.cli.restore import constructed, restore

    if metrics and (source := source_of(run)) != "shapes":
        fix = "--metrics with no name after it, for losses alone"
        raise UserError("Pictures are scored on the shapes world alone", where=str(run), given=source, fix=fix)
    losses, found = losses_of(run), []
    for checkpoint in complete_checkpoints(run / "checkpoints"):
        step = int(checkpoint.name.split("-")[1])
        if step not in losses:
            continue
        method = constructed(run / "config.yaml")
        if not isinstance(method, Fluid):
            raise UserError("Not a run of token models", where=str(run), given=type(method).__name__, allowed="Fluid")
        restore(method, run, checkpoint)
        size = sum(p.numel() for p in method.transformer.parameters())
        measured = measure(method, split, n, seed, metrics, **sampling) if metrics else None
        scores = {m: measured.of(m) for m in metrics} if measured else {}
        found.append(Point(name or run.name, f"{method.order} {method.head}", size, step, losses[step], scores))
    if not found:
        what, fix = "No checkpoint was validated", "trainer.val_check_interval: that of checkpoints.every"
        raise UserError(what, where=str(run), given=f"losses at steps {sorted(losses)}", fix=fix)
    return found


def last_of(points: Sequence[Point]) -> list[Point]:
    """The last checkpoint of each run."""
    return list({p.run: p for p in sorted(points, key=lambda p: p.step)}.values())


def variants(points: Sequence[Point]) -> dict[str, list[Point]]:
    return {name: [p for p in points if p.variant == name] for name in sorted({p.variant for p in points})}


def findings(points: Sequence[Point]) -> dict[str, dict[str, Any]]:
    """For each variant its fit ("fit", None for one size) and the correlations of loss with scores ("r")."""
    found: dict[str, dict[str, Any]] = {}
    for name, own in variants(points).items():
        last = last_of(own)
        sizes = [p.parameters for p in last]
        fit = asdict(power_law(sizes, [p.loss for p in last])) if len(set(sizes)) > 1 else None
        r = {m: pearson([p.loss for p in own], [p.scores[m] for p in own]) for m in own[0].scores}
        found[name] = {"fit": fit, "r": r}
    return found


def markdown(points: Sequence[Point]) -> str:
    """The tables of a study."""
    metrics = list(points[0].scores)
    rows = [
        [
            p.run,
            p.variant,
            f"{p.parameters:,}",
            f"{p.step:,}",
            f"{p.loss:.5f}",
            *(f"{p.scores[m]:.4g}" for m in metrics),
        ]
        for p in points
    ]
    fits = []
    for name, found in findings(points).items():
        fit = found["fit"] or {"exponent": float("nan"), "r2": float("nan"), "n": 1}
        shown = [f"{r:+.3f}" if r is not None else "" for r in found["r"].values()]
        fits.append([name, f"{fit['exponent']:+.4f}", f"{fit['r2']:.3f}", str(fit["n"]), *shown])
    head = ("variant", "exponent", "R2", "runs", *(f"r(loss, {m})" for m in metrics))
    body = table(rows, ("run", "variant", "parameters", "step", "loss", *metrics))
    return f"# Scaling study\n\n{table(fits, head)}\n\n![Loss and scores](study.png)\n\n{body}\n"


def draw(points: Sequence[Point], file: Path) -> None:
    """Loss over parameters with its fit, and each score over the loss; a colour for each variant."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    metrics = list(points[0].scores)
    figure = Figure(figsize=(4.4 * (1 + len(metrics)), 3.8), layout="constrained")
    axes = [figure.add_subplot(1, 1 + len(metrics), i + 1) for i in range(1 + len(metrics))]
    for number, (name, own) in enumerate(variants(points).items()):
        last, colour = last_of(own), f"C{number}"
        axes[0].loglog([p.parameters for p in last], [p.loss for p in last], "o", color=colour, label=name)
        fit = findings(own)[name]["fit"]
        if fit:
            x = np.geomspace(min(p.parameters for p in last), max(p.parameters for p in last), 20)
            axes[0].loglog(x, np.exp(fit["intercept"]) * x ** fit["exponent"], color=colour, linewidth=1)
        for axis, metric in zip(axes[1:], metrics, strict=True):
            axis.plot([p.loss for p in own], [p.scores[metric] for p in own], "o", color=colour, markersize=4)
            axis.set(xlabel="validation loss", ylabel=metric)
    axes[0].set(xlabel="parameters", ylabel="validation loss")
    axes[0].legend(fontsize=7)
    figure.savefig(file, dpi=110)


def write(points: Sequence[Point], out: Path) -> None:
    """Writes study.json, study.md and study.png."""
    out.mkdir(parents=True, exist_ok=True)
    content = {"points": [asdict(p) for p in points], "findings": findings(points)}
    write_atomically(out / FILE, json.dumps(content, indent=1).encode())
    (out / "study.md").write_text(markdown(points), encoding="utf-8")
    draw(points, out / "study.png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes; 2 for a mistake."""
    parser = argparse.ArgumentParser(
        "python -m lightning_t2i.scaling_study", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the study")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="names of runs, or their folders")
    parser.add_argument("--report", action="store_true", help="table and plots from OUT/study.json alone")
    parser.add_argument("--split", default="val", help="prompts that are scored (default: val)")
    parser.add_argument("--n", type=int, default=200, help="number of prompts (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--metrics", nargs="*", default=["shapes_score", "fd"], help="none: losses alone")
    parser.add_argument("--guidance", type=float, help="default: that of each run")
    given = parser.parse_args(arguments)
    try:
        if given.report and not (given.out / FILE).is_file():
            raise UserError("There is no study here", where=str(given.out), fix="name its runs first")
        if given.report:
            points = [Point(**p) for p in json.loads((given.out / FILE).read_text(encoding="utf-8"))["points"]]
        elif not given.runs:
            raise UserError("No run was named", fix="python -m lightning_t2i.scaling_study OUT RUN [RUN ...]")
        else:
            places = [Path(r) if Path(r).is_dir() else runs_root() / r for r in given.runs]
            short = len({place.name for place in places}) == len(places)
            sampling = {} if given.guidance is None else {"guidance": given.guidance}
            asked = given.split, given.n, given.seed, given.metrics, sampling
            points = [point for run in places for point in points_of(run, *asked, "" if short else str(run))]
        write(points, given.out)
        print(markdown(points))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
