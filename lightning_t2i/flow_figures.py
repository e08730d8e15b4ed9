"""Pictures of flows: paths before and after reflow, and how few steps are enough.

    python -m lightning_t2i.flow_figures --before TEACHER --after FLOW --out FOLDER

writes three pictures and their numbers:

    toy.png     paths of two modes in the plane, of the exact flow and of its reflow (claims/instaflow_toy.py)
    paths.png   paths of latents, of the teacher and of the flow, in the plane in which the teacher's ends vary most
    curve.png   Fréchet distance of pictures of the shapes world at 1, 2, 4, 8 and 25 steps
    flow_figures.json   the curve, and the straightness of all four
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_t2i.claims.instaflow_toy import Flows, flows
from lightning_t2i.claims.training import measure, prompts
from lightning_t2i.errors import UserError
from lightning_t2i.keys import Keys
from lightning_t2i.metrics.straightness import Straightness, trajectory

STEPS = (1, 2, 4, 8, 25)
SHOWN = 40  # paths
FINE = 50  # Euler steps of a path


def plane(ends: Tensor) -> Tensor:
    """The two directions in which points [B, ...] vary most: [D, 2]."""
    points = ends.flatten(1).double()
    return torch.linalg.svd(points - points.mean(0), full_matrices=False).Vh[:2].T


def projected(points: Tensor, directions: Tensor) -> Tensor:
    """Paths [N + 1, B, ...] in a plane: [N + 1, B, 2]."""
    return points.flatten(2).double() @ directions


def straightness_of(points: Tensor) -> float:
    """S of paths [N + 1, B, ...]."""
    metric = Straightness()
    metric.update(points)
    return float(metric.compute())


def draw_paths(panels: Mapping[str, Tensor], file: Path) -> None:
    """A panel for each set of paths [N + 1, B, 2], with equal axes; black where they begin.

    Args:
        panels: title -> paths.
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(4.2 * len(panels), 4.2), layout="constrained")
    largest = max(float(paths.abs().max()) for paths in panels.values()) * 1.05
    for column, (title, paths) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(1, len(panels), column)
        for path in paths.transpose(0, 1).tolist():
            axis.plot(*zip(*path, strict=True), color="#8aa9c8", linewidth=0.8)
        axis.plot(*paths[0].T.tolist(), ".", color="black", markersize=3, label="noise")
        axis.plot(*paths[-1].T.tolist(), ".", color="#c4501b", markersize=4, label="data")
        axis.set(aspect="equal", xlim=(-largest, largest), ylim=(-largest, largest), xticks=[], yticks=[])
        axis.set_title(title, fontsize=11)
    figure.axes[0].legend(loc="upper left", fontsize=9, frameon=False)
    figure.savefig(file, dpi=120)


def draw_curve(curves: Mapping[str, Mapping[int, float]], label: str, file: Path) -> None:
    """A line for each curve, {steps: value}, on logarithmic axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axis = figure.add_subplot()
    for name, curve in curves.items():
        axis.plot(list(curve), list(curve.values()), "o-", markersize=4, label=name)
    ticks = sorted({steps for curve in curves.values() for steps in curve})
    axis.set(xscale="log", yscale="log", xlabel="steps", ylabel=label)
    axis.set_xticks(ticks, [str(t) for t in ticks], minor=False)
    axis.minorticks_off()
    axis.legend(frameon=False)
    figure.savefig(file, dpi=120)


def toy_paths(found: Flows, seed: int) -> dict[str, Tensor]:
    """Paths of the exact flow and of its reflow from the same noise: [N + 1, B, 2] each."""
    z = Keys(seed).normal("z", torch.arange(SHOWN), (2, 1, 1))
    both = {"before": found.teacher, "after reflow": found.reflowed}
    return {name: trajectory(flow, z, steps=FINE).flatten(2) for name, flow in both.items()}


def paths_of(pipelines: Mapping[str, tuple[Any, float]], seed: int) -> dict[str, Tensor]:
    """Paths [N + 1, B, C, h, w] of pipelines (`Teacher`, guidance) from the same noise, for the first prompts."""
    found: dict[str, Tensor] = {}
    (records,) = prompts("val", SHOWN)
    for name, (method, guidance) in pipelines.items():
        z = Keys(seed).normal("z", records.position, method.latent_shape())
        found[name] = trajectory(method.denoiser, z, method.condition(records), FINE, guidance)
    return found


def curve_of(
    network: str, guidance: float, solver: Any, n: int, seed: int, steps: Sequence[int], size: int | None = None
) -> dict[int, float]:
    """Fréchet distance of a pipeline's pictures for n validation prompts, by its number of steps."""
    from lightning_modules.teacher import Teacher

    found = {}
    for number in steps:
        method = Teacher(network, guidance=guidance, steps=number, solver=solver, size=size)
        method.configure_model()
        found[number] = measure(method.eval(), "val", n, seed, ["fd"]).of("fd")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Draws; 2 for a mistake."""
    from lightning_modules.teacher import Teacher

    parser = argparse.ArgumentParser("python -m lightning_t2i.flow_figures", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--before", required=True, help="pipeline folder of the teacher")
    parser.add_argument("--after", required=True, help="exported folder of the reflowed student")
    parser.add_argument("--guidance", type=float, default=4.5, help="of the teacher")
    parser.add_argument("--alpha", type=float, default=1.5, help="guidance of the flow")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--n", type=int, default=200, help="pictures of a point of the curve")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--toy-steps", type=int, default=1000, help="updates of the toy's reflow")
    parser.add_argument("--size", type=int, help="side of the pictures, where the network has none")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        toy = toy_paths(flows(given.seed, given.toy_steps), given.seed)
        draw_paths(toy, given.out / "toy.png")
        pipelines = {
            "before": (Teacher(given.before, size=given.size), given.guidance),
            "after reflow": (Teacher(given.after, size=given.size), given.alpha),
        }
        for method, _ in pipelines.values():
            method.configure_model()
        paths = paths_of(pipelines, given.seed)
        directions = plane(paths["before"][-1])
        draw_paths({name: projected(points, directions) for name, points in paths.items()}, given.out / "paths.png")
        shared = (given.n, given.seed, given.steps, given.size)
        curves = {
            "teacher, DPM-Solver": curve_of(given.before, given.guidance, "dpmpp_2m", *shared),
            "reflowed, Euler": curve_of(given.after, given.alpha, "euler", *shared),
        }
        draw_curve(curves, f"Fréchet distance, {given.n} pictures", given.out / "curve.png")
        straight = {f"{world}, {name}": straightness_of(points) for world, found in (("toy", toy), ("shapes", paths))
                    for name, points in found.items()}  # fmt: skip
        content = json.dumps({"curve": curves, "straightness": straight, "n": given.n}, indent=1)
        (given.out / "flow_figures.json").write_text(content + "\n", encoding="utf-8")
        print(content)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
