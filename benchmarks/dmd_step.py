"""Time of a training step of DMD against one that shares nothing, on the networks and data of configs/dmd/tiny.yaml.

    python -m benchmarks --only dmd_step

"shared" is DMD's own step: one pass of the student for samples and pairs, one of the teacher for both estimates of
guidance, and the sample that is already there for the loss of the fake network. "straightforward" is algorithms 1 to 3
of the paper line by line, where each asks for what it needs: the student makes its samples twice, and captions are
encoded three times. With equal draws both have equal losses (tests/benchmarks/test_dmd_step.py). The straightforward
step notes none of the signals that ours logs.

Both are steps of one method in one run of the Trainer and take turns in blocks, so that they meet the same weights and
the same state of the machine. The first block of each is counted (lightning_t2i/forward_units.py), which takes longer,
and the second warms up. The others are timed without hooks, each from the end of the block before to its own: reading
data, the step, and the updates of weights and average. A ratio is that of the two blocks of a pair; the table has the
median over all pairs and its quartiles. Beside it stand two predictions from what was counted: the ratio of the units
of student, teacher and fake, which have one architecture, and the ratio of the operations of all networks.
"""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from typing import Any

import lightning as L
import torch
from torch import Tensor

from benchmarks.forward_units import UNITS, compared, fit, prepared, within
from benchmarks.running import quartiles
from lightning_modules.dmd import DMD, matching_gradient, matching_loss
from lightning_t2i.batch import Batch, Cond, Records
from lightning_t2i.cli.session import quiet
from lightning_t2i.forward_units import Units, counting_units
from lightning_t2i.processes import guided
from lightning_t2i.schedules import value_at

VERSIONS = ("shared", "straightforward")
NETWORKS = ("student", "teacher", "fake")  # of one architecture: a unit costs the same in each
UNTIMED = 2 * len(VERSIONS)  # blocks: those that are counted and those that warm up
STEP = [["version", ""], ["samples + pairs", ""], ["s per step", ".3f"], ["units predicted", ".2f"]]
STEP += [["units counted", ".2f"], ["off by", ".1%"], ["within 15 %", ""]]
RATIO = [["straightforward / shared", ""], ["ratio", ".3f"], ["lower quartile", ".3f"], ["upper quartile", ".3f"]]
RATIO += [["pairs of blocks", "d"]]
PARTS = [["version", ""], *UNITS[1:]]


class Straightforward(DMD):
    """DMD that shares nothing, for configs that match samples alone and update both networks in each step."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x, cond, places = self.generated(batch["main"])
        x_ref, _, _ = self.generated(batch["pairs"])
        loss = self.matching_weight * matching_loss(x, self.gradient(x.detach(), cond, places))
        weight = value_at(self.regression_weight, self.counters.step)
        self.backward("student", loss + weight * self.regression(x_ref, batch["pairs"]))
        with torch.no_grad():
            again = self.generated(batch["main"])
        self.backward("fake", self.fake_loss(*again))

    def generated(self, records: Records) -> tuple[Tensor, Cond | None, Tensor]:
        """(x [B, C, h, w], condition, keys of the draws [B]) of records, all made anew."""
        z, cond, places = self.inputs(records)
        return self.generate(self.student, z, cond, self.keys, places), cond, places

    @torch.no_grad()
    def gradient(self, x: Tensor, cond: Cond | None, places: Tensor) -> Tensor:
        """g at x [B, C, h, w], with the teacher asked for one estimate at a time."""
        x_t, _, t = self.noised(x, places, "matching", self.t_min, value_at(self.t_max, self.counters.step))
        unconditional, conditional = (guided(self.teacher.x0, x_t, t, cond, scale) for scale in (0, 1))
        real = unconditional + self.guidance * (conditional - unconditional)
        fake = self.fake.x0(x_t, t, cond)
        return matching_gradient(x, real, fake, *self.process.alpha_sigma(t, torch.float64), self.dm_weight)

    def forward_units(self) -> dict[str, float]:
        """DMD's, with the samples and their captions once more."""
        units = super().forward_units()
        return units | {name: units[name] + 1 for name in ("student", "text")}


class Alternating(Straightforward):
    """Steps as the one or the other, on the same networks."""

    version = VERSIONS[0]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        kind = DMD if self.version == "shared" else Straightforward
        kind.training_step(self, batch, batch_idx)


class Turns(L.Callback):
    """Lets the versions take turns in blocks; keeps the units of the first block of each and the time of later ones."""

    def __init__(self, block: int):
        self.block, self.done = block, 0  # steps in a block; blocks that are over
        self.units: dict[str, Units] = {}
        self.seconds: dict[str, list[float]] = {version: [] for version in VERSIONS}  # per step, of each timed block
        self._counting, self._start = ExitStack(), 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._begin(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *unused: Any) -> None:
        if pl_module.counters.step % self.block:
            return
        now = time.perf_counter()
        self._counting.close()
        if self.done >= UNTIMED:
            self.seconds[pl_module.version].append((now - self._start) / self.block)
        self.done += 1
        self._begin(pl_module)

    def _begin(self, module: Any) -> None:
        module.version = VERSIONS[self.done % len(VERSIONS)]
        if module.version not in self.units:
            self.units[module.version] = self._counting.enter_context(counting_units(module, flops=True))
        self._start = time.perf_counter()


def result(pairs: int, block: int) -> dict[str, Any]:
    """The tables of so many pairs of blocks."""
    module, data = prepared("dmd", f"{__name__}.{Alternating.__name__}")
    module.configure_model()
    turns = Turns(block)
    fit(module, data, (UNTIMED + len(VERSIONS) * pairs) * block, turns)
    predicted = {"shared": DMD.forward_units(module), "straightforward": Straightforward.forward_units(module)}
    units = {version: compared(version, predicted[version], turns.units[version]) for version in VERSIONS}
    rows = " + ".join(str(data.training[name].batch_size) for name in ("main", "pairs"))
    steps = []
    for version, found in units.items():
        sums = [sum(row[column] for row in found if row[1] in NETWORKS) for column in (2, 3)]
        good = "yes" if all(within(row) for row in found) else "no"
        steps.append([version, rows, statistics.median(turns.seconds[version]), *sums, sums[1] / sums[0] - 1, good])
    work = {version: sum(row[5] for row in found if row[5] is not None) for version, found in units.items()}
    ratios = [b / a for a, b in zip(*(turns.seconds[version] for version in VERSIONS), strict=True)]
    low, middle, high = quartiles(ratios)
    ours, theirs = steps
    against = [
        ["units counted, predict", theirs[4] / ours[4], None, None, None],
        ["operations counted, predict", work["straightforward"] / work["shared"], None, None, None],
        ["time, measured", middle, low, high, len(ratios)],
    ]
    parts = [row for found in units.values() for row in found]
    tables = [
        {"columns": columns, "rows": lines} for columns, lines in ((STEP, steps), (RATIO, against), (PARTS, parts))
    ]
    return {"title": "A training step of DMD against one that shares nothing", "tables": tables}


def measure(quick: bool = False) -> dict[str, Any]:
    """DMD's step against one that shares nothing, in pairs of blocks."""
    quiet()
    return result(pairs=2, block=1) if quick else result(pairs=30, block=2)
