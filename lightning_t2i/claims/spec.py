"""What a claims file declares: arms, the claims about them, and the matrix of both.

A cell is one arm with one seed. Its function gets a `Cell` and returns `Measured`; training is one such function,
measuring a trained network another, and a method may bring its own. Arms that name the same arm in `after` share it.
"""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_t2i.errors import UserError, closest
from lightning_t2i.paths import ROOT

if TYPE_CHECKING:  # a cell that needs no torch starts without it
    from lightning_t2i.claims.statistics import Direction

OUTCOME = "outcome.json"
FURTHER = ("fluid_orders", "repblend_sets", "swiftbrush_longer")  # matrices of a method beside its first one
MINUTES = {"full": 90.0, "quick": 10.0}  # most that a matrix may cost on two cores


@dataclass(frozen=True)
class Measured:
    """What a cell gives.

    Args:
        numbers: name -> value.
        scores: metric -> one value for each prompt; its mean is the metric's number.
        prompts: identity of the prompts, in their order; None without scores.
    """

    numbers: Mapping[str, float] = field(default_factory=dict)
    scores: Mapping[str, list[float]] = field(default_factory=dict)
    prompts: str | None = None

    def of(self, metric: str) -> float:
        """The value of a metric.

        Raises:
            UserError: the cell did not measure it.
        """
        if metric in self.scores:
            return sum(self.scores[metric]) / len(self.scores[metric])
        if metric not in self.numbers:
            known = [*self.scores, *self.numbers]
            raise UserError("The arm does not measure this metric", where="metric", given=metric, allowed=known)
        return self.numbers[metric]


@dataclass(frozen=True)
class Outcome:
    """What a finished cell leaves: its measures, and when it began and ended in seconds since the epoch."""

    measured: Measured
    began: float
    ended: float

    @classmethod
    def load(cls, folder: Path) -> Outcome:
        content = json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
        return cls(Measured(**content.pop("measured")), **content)

    def save(self, folder: Path) -> None:
        """Writes the file whole or not at all; numbers that are not finite are a ValueError."""
        part = folder / f"{OUTCOME}.part"
        part.write_text(json.dumps(asdict(self), allow_nan=False), encoding="utf-8")
        os.replace(part, folder / OUTCOME)


@dataclass(frozen=True)
class Cell:
    """What a cell's function gets.

    Args:
        seed: of the training and of the noise of pictures.
        folder: its own, kept when it is killed: what lies there already is there to go on from.
        options: of its arm.
        after: name of each arm that it builds on -> folder of that arm's cell with the same seed.
    """

    seed: int
    folder: Path
    options: Mapping[str, Any]
    after: Mapping[str, Path] = field(default_factory=dict)

    def measured(self, arm: str) -> Measured:
        """What another arm of the same seed measured."""
        return Outcome.load(self.after[arm]).measured


@dataclass(frozen=True)
class Arm:
    """One thing that is measured, with every seed.

    Args:
        name: a word.
        cell: a function of a module, since it is called in a process of its own.
        options: plain values that decide what is measured; they are hashed. One called `config` is a config file.
        units, unit, unit_s: the cost of one cell on one core, as in 800 training steps of 0.3 s.
        after: arms whose cell of the same seed comes first.
    """

    name: str
    cell: Callable[[Cell], Measured]
    options: Mapping[str, Any]
    units: int
    unit: str
    unit_s: float
    after: tuple[str, ...] = ()

    @property
    def function(self) -> str:
        return f"{self.cell.__module__}:{self.cell.__qualname__}"

    @property
    def seconds(self) -> float:
        return self.units * self.unit_s


@dataclass(frozen=True)
class Claim:
    """What is claimed of the effect: metric of `arm` minus that of `baseline`, with the same seed and prompts.

    Args:
        id: a word.
        text: the claim as a sentence.
        arm: name of an arm.
        baseline: name of an arm, or None: then the metric itself is the effect.
        metric: what both measure.
        threshold: least effect (largest, if lower is better), fixed before the first full run; None reports only.
        direction: whether the effect is claimed to be higher or lower than the threshold.
    """

    id: str
    text: str
    arm: str
    baseline: str | None
    metric: str
    threshold: float | None
    direction: Direction = "higher"


@dataclass(frozen=True)
class Matrix:
    """All arms with all seeds, and the claims about them.

    Args:
        method: name of the method, and of the result.
        arms: in order, an arm after those that it builds on.
        claims: what is claimed of them.
        data: embedded worlds or data-set folders that the arms use.
        quick: a rehearsal of the whole at a fraction of the cost.
        seeds: every arm is run with each, so that effects are paired.
        golden: methods whose golden losses the results depend on; none is `method` alone.

    Raises:
        UserError: names that do not fit, a threshold that is no number, or a matrix over its budget.
    """

    method: str
    arms: tuple[Arm, ...]
    claims: tuple[Claim, ...]
    data: tuple[str, ...] = ()
    quick: bool = False
    seeds: tuple[int, ...] = (0, 1, 2)
    golden: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        where, names = f"claims of {self.method}", [arm.name for arm in self.arms]
        for kind, found in (("arms", names), ("claims", [c.id for c in self.claims]), ("seeds", self.seeds)):
            if len(set(found)) < len(found) or not found:
                raise UserError(f"The {kind} must differ, and there must be one", where=where, given=list(found))
        for number, arm in enumerate(self.arms):
            for name in arm.after:
                if name not in names[:number]:
                    what = f"The arm {arm.name} comes after one that is not there before it"
                    raise UserError(what, where=where, given=name, allowed=names[:number])
        for claim in self.claims:
            for about in (claim.arm, claim.baseline):
                if about is not None and about not in names:
                    what = f"The claim {claim.id} is about an arm that does not exist"
                    raise UserError(what, where=where, given=about, allowed=names)
            if claim.threshold is not None and not math.isfinite(claim.threshold):
                what, fix = f"The threshold of {claim.id} is no number", "None for an effect that is reported only"
                raise UserError(what, where=where, given=claim.threshold, allowed="a finite number", fix=fix)
        limit, needed = MINUTES["quick" if self.quick else "full"], self.wall(workers=2) / 60
        if needed > limit:
            fix = "cut sizes first, then steps, never seeds or baselines"
            what = "The matrix costs more than it may on two cores"
            raise UserError(what, where=where, given=f"{needed:.0f} min", allowed=f"{limit:.0f} min", fix=fix)

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def cells(self) -> list[tuple[str, int]]:
        """(arm, seed) in the order in which they are started: the arms of one seed together."""
        return [(arm.name, seed) for seed in self.seeds for arm in self.arms]

    def wall(self, workers: int) -> float:
        """Seconds that `workers` processes need for all cells, each started as soon as it can be."""
        done: dict[tuple[str, int], float] = {}
        free, left = [0.0] * workers, self.cells()
        while left:
            ready = {cell: max((done.get((a, cell[1]), math.inf) for a in self.arm(cell[0]).after), default=0.0)
                     for cell in left}  # fmt: skip
            worker = min(range(workers), key=free.__getitem__)
            cell = next((c for c in left if ready[c] <= free[worker]), None) or min(left, key=ready.__getitem__)
            free[worker] = done[cell] = max(free[worker], ready[cell]) + self.arm(cell[0]).seconds
            left.remove(cell)
        return max(done.values())

    def plain(self) -> dict[str, Any]:
        """Everything that is decided before a run, as plain values."""
        arms = {a.name: {"cell": a.function, "options": dict(a.options), "after": list(a.after)} for a in self.arms}
        return {"arms": arms, "claims": [asdict(claim) for claim in self.claims], "seeds": list(self.seeds)}


def methods() -> list[str]:
    """The methods with a claims file here, which have a folder of configs, too, and further matrices of theirs."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return [file.stem for file in files if file.stem in FURTHER or (ROOT / "configs" / file.stem).is_dir()]


def load(name: str, quick: bool = False) -> Matrix:
    """The matrix of a method, or of a dotted module of your own with a function `matrix(quick)`.

    Raises:
        UserError: there is no such method or module.
    """
    module = name if "." in name else f"lightning_t2i.claims.{name}"
    if "." not in name and name not in methods():
        near = closest(name, methods())
        fix = f"python -m lightning_t2i.claims {near}" if near else "docs/claims.md says how to add claims"
        raise UserError("No such method has claims", where="METHOD", given=name, allowed=methods(), fix=fix)
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        what, allowed = "This module cannot be imported", "a method, or a module on the Python path"
        raise UserError(what, where="METHOD", given=f"{name}: {error}", allowed=allowed) from error
    matrix: Matrix = found.matrix(quick)
    return matrix


def source_of(name: str) -> str | None:
    """The file that declares the claims."""
    return importlib.import_module(name if "." in name else f"lightning_t2i.claims.{name}").__file__
