"""Figure 3 of DMD (arXiv 2311.18828): why there is a fake score, and why there are pairs.

    arm        gradient of the matching                       pairs   what the paper shows
    real       (x - mu_real(x_t, t)) / w                      no      all points at the peak of the nearest mode
    matching   (mu_fake(x_t, t) - mu_real(x_t, t)) / w        no      the nearest mode in full, nothing of the other
    full       (mu_fake(x_t, t) - mu_real(x_t, t)) / w        yes     both modes

    python -m lightning_t2i.claims.dmd_toy      three arms with three seeds: docs/results/dmd_toy.json and .png

All arms are configs/dmd/toy.yaml with overrides. The student begins as a copy of the teacher, whose one-step estimate
at the largest noise is nearly the mean of all points, whatever the noise: that is nearer to the first mode, to which
three quarters of the points belong.

The paper does not say how its figure was made; these are this file's own choices: the shares of the modes, and the
range of times, whose largest noise, .17, keeps the modes apart. With DMD's range of 0.98 T the smoothed modes are one
and matching alone finds both, and so it does at learning rates at which the first steps throw points across.

Range and learning rates were chosen in trials of these arms, so that the figure is an illustration, as in the paper,
and no independent test. The thresholds are what the words of the table mean in numbers. `arms` and `CLAIMS` may be part
of a larger matrix.
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

from lightning_modules.dmd import DMD, matching_gradient
from lightning_t2i.batch import Cond
from lightning_t2i.claims import hashes, results
from lightning_t2i.claims.runner import Runner, folders, root_of
from lightning_t2i.claims.spec import Arm, Cell, Claim, Matrix, Measured, Outcome
from lightning_t2i.claims.training import RUN, fit
from lightning_t2i.cli.configs import merge
from lightning_t2i.cli.restore import trained
from lightning_t2i.keys import Keys
from lightning_t2i.paths import ROOT
from lightning_t2i.processes import guided
from lightning_t2i.schedules import value_at

NAME = "lightning_t2i.claims.dmd_toy"  # not __name__, which is __main__ where the file is run
CONFIG = "configs/dmd/toy.yaml"
PAIRS = "assets/tiny/points/pairs"
NO_PAIRS = {"model.regression_weight": 0.0, "data.pairs": None}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> what the figure says, overrides of the config
    "real": ("(a) real score", {"model.class_path": f"{NAME}.RealScoreOnly", **NO_PAIRS}),
    "matching": ("(b) real and fake score", NO_PAIRS),
    "full": ("(c) with regression on pairs", {}),
}
POINTS = 2000  # that are measured
SHOWN = 600  # of them in the figure
SEEN = (-0.85, 1.05)  # range of both axes there
FAR = 3.0  # standard deviations from the centre; 2.9 % of a mode's points lie farther in three dimensions


class RealScoreOnly(DMD):
    """DMD without the entropy of the student: points climb the real density (arm a).

    The real score alone gives g in proportion to x_t - mu_real(x_t, t), whose mean over the noise is that of
    x - mu_real(x_t, t): x stands in for the fake estimate, as in DreamFusion (arXiv 2209.14988). The fake network is
    trained as always and not asked.
    """

    @torch.no_grad()
    def matching(self, x: Tensor, cond: Cond | None, places: Tensor) -> Tensor:
        """g at x [B, C, h, w], which has no gradient."""
        x_t, _, t = self.noised(x, places, "matching", self.t_min, value_at(self.t_max, self.counters.step))
        real = guided(self.teacher.x0, x_t, t, cond, self.guidance)
        return matching_gradient(x, real, x, *self.process.alpha_sigma(t, torch.float64), self.dm_weight)


def world() -> Mapping[str, Any]:
    """Means, shares and standard deviation of the modes, as `datamodules.points.Points` takes them."""
    options: Mapping[str, Any] = merge([ROOT / CONFIG]).config["data"]["init_args"]["main"]["init_args"]
    return options


@torch.no_grad()
def drawn(method: Any, n: int, seed: int, start: bool = False) -> Tensor:
    """Points [n, 3] of the student, or at the same noise those with which it began, as the teacher's copy."""
    keys, positions = Keys(seed).fork("claims"), torch.arange(n)
    if not start:
        return method.sample(None, keys, positions).flatten(1)
    return method.teacher.generate(keys.normal("z", positions, method.shape)).flatten(1)


def measured(points: Tensor, modes: Mapping[str, Any]) -> dict[str, float]:
    """What is told of points [n, 3].

    Args:
        modes: see `world`.

    Returns:
        share_k: of the points that are nearest to mode k; std_k: their standard deviation over the mode's, root mean
        square over the coordinates, 0 of fewer than two points; between: share that lies farther than 3 standard
        deviations from every centre.
    """
    distance = torch.cdist(points.double(), torch.tensor(modes["means"], dtype=torch.float64))
    nearest, numbers = distance.argmin(1), {}
    for k in range(len(modes["means"])):
        own = points[nearest == k].double()
        numbers[f"share_{k}"] = len(own) / len(points)
        numbers[f"std_{k}"] = float(own.var(0).mean().sqrt()) / modes["std"] if len(own) > 1 else 0.0
    numbers["between"] = float((distance.min(1).values > FAR * modes["std"]).double().mean())
    return numbers


def toy(cell: Cell) -> Measured:
    """Trains an arm by the ordinary command and measures its points."""
    numbers = fit(cell).numbers
    method: Any = trained(cell.folder / RUN)
    return Measured({**measured(drawn(method, POINTS, cell.seed), world()), **numbers})


def arms(steps: int = 1200) -> tuple[Arm, ...]:
    """The three arms.

    Args:
        steps: training steps of each.
    """
    quiet = {"trainer.limit_val_batches": 0, "trainer.enable_progress_bar": False, "checkpoints.keep": 1}
    length = {f"model.{group}.schedule.total": steps for group in ("student", "fake")} | {"trainer.max_steps": steps}
    return tuple(
        Arm(name, toy, {"config": CONFIG, "overrides": {**quiet, **length, **changed}}, steps, "training step", 0.02)
        for name, (_, changed) in ARMS.items()
    )


CLAIMS = (
    Claim("toy-collapse", "The real score alone draws all points to a peak.", "real", None, "std_0", 0.3, "lower"),
    Claim("toy-spread", "With the fake score the nearest mode is covered in full.", "matching", None, "std_0", 0.8),
    Claim("toy-missed", "It misses the other mode.", "matching", None, "share_1", 0.02, "lower"),
    Claim("toy-share", "With pairs the other mode is found.", "full", "matching", "share_1", 0.15),
    Claim("toy-both", "It is covered in full.", "full", None, "std_1", 0.7),
)


def draw(methods: Mapping[str, Any], file: Path, seed: int = 0) -> None:
    """The figure: the plane of the first two coordinates, a panel for each arm.

    Args:
        methods: trained method of each arm.
        file: the picture.
        seed: of the noise.
    """
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    modes = world()
    means, shares, std = (torch.tensor(modes[name], dtype=torch.float64) for name in ("means", "shares", "std"))
    side = torch.linspace(*SEEN, 200, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(side, side, indexing="xy"), dim=-1)
    away = (grid[:, :, None] - means[:, :2]).square().sum(-1) / std**2  # [200, 200, modes]
    density = (shares * (-away / 2).exp()).sum(-1)
    levels = [float(shares.min()) * float(torch.tensor(-(r**2) / 2).exp()) for r in (3.0, 2.0, 1.0)]
    figure = Figure(figsize=(9.6, 3.5), layout="constrained")
    for column, (name, (title, _)) in enumerate(ARMS.items(), 1):
        axis, method = figure.add_subplot(1, 3, column), methods[name]
        axis.contourf(
            side.numpy(),
            side.numpy(),
            density.numpy(),
            [*levels, float(density.max())],
            colors=["#e3edf7", "#c3d9ee", "#9dc0e0"],
        )
        start = drawn(method, SHOWN, seed, start=True)
        points = drawn(method, SHOWN, seed)
        axis.plot(
            *points[:, :2].T.numpy(), ".", color="#c4501b", markersize=3, alpha=0.6, markeredgewidth=0, label="student"
        )
        axis.plot(*start[:, :2].T.numpy(), ".", color="black", markersize=2, label="its start")
        axis.set(aspect="equal", xlim=SEEN, ylim=SEEN, xticks=[], yticks=[])
        axis.set_title(title, fontsize=11)
    figure.axes[0].legend(loc="upper left", fontsize=9, frameon=False, markerscale=3, handletextpad=0.1)
    figure.savefig(file, dpi=120)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing of the arms with all seeds; writes the numbers and the figure."""
    parser = argparse.ArgumentParser(f"python -m {NAME}", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes at a time (default: 2)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results", metavar="FOLDER")
    given = parser.parse_args(arguments)
    matrix = Matrix("dmd_toy", arms(), CLAIMS, data=(PAIRS,))
    found = hashes.hashes(matrix)
    places, root = folders(matrix, found), root_of(matrix.method)
    root.mkdir(parents=True, exist_ok=True)
    runner = Runner(matrix, places, given.workers, print)
    registration = results.register(root, NAME, matrix, sum(map(runner.finished, places)))
    if failed := runner.run():
        print(f"{len(failed)} of {len(places)} cells are missing, so there is no result")
        return 1
    outcomes = {cell: Outcome.load(place) for cell, place in places.items()}
    result = results.result_of(matrix, found, outcomes, registration, "full")
    results.write_result(given.out / "dmd_toy.json", {"command": f"python -m {NAME}", **result})
    draw({arm: trained(places[arm, 0] / RUN) for arm in ARMS}, given.out / "dmd_toy.png")
    print(json.dumps({c["id"]: (round(c["measured"], 4), c["verdict"]) for c in result["claims"]}, indent=1))
    return 0


if __name__ == "__main__":
    from lightning_t2i.claims import dmd_toy  # cells are functions of this module, not of __main__

    sys.exit(dmd_toy.main())
