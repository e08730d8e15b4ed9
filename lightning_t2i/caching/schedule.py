"""Schedule: for every sampling step and component, whether it is computed or gives what it gave last.

    recompute [N, G]  True: computed; False: the last value is used again. Step 0 is the noisiest; there nothing is
                      kept yet, so its row has no effect and is True in the canonical form (arXiv 2506.15682)
    live      [N, G]  the computations that the pictures depend on
    used      [N, G]  whether the step reads the component's output at all
    keep      [N, G]  whether a later step reads the value that the slot holds after the step

Where the projection of a single-stream block is not computed, nothing reads what feeds it: a computation there is dead
unless a later step uses it again. All other components are read in every step.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lightning_t2i.caching.layout import PER_BLOCK, Layout
from lightning_t2i.errors import UserError
from lightning_t2i.paths import resolve
from lightning_t2i.state_io import write_atomically

log = logging.getLogger(__name__)
# Class of diffusers -> the solvers that take the same steps.
SOLVERS = {
    "DDIMScheduler": ("ddim", "euler"),
    "DPMSolverMultistepScheduler": ("dpmpp_2m",),
    "EDMEulerScheduler": ("ddim", "euler"),
    "FlowMatchEulerDiscreteScheduler": ("ddim", "euler"),
    "FlowMatchHeunDiscreteScheduler": ("heun",),
}
MEANING = "1: computed; 0: the last value of this component again"


@dataclass(frozen=True)
class Plan:
    """What an executor does in every step: bool arrays [N, G], see the file's head."""

    live: np.ndarray
    used: np.ndarray
    keep: np.ndarray


@dataclass(frozen=True, eq=False)
class Schedule:
    """A schedule of a layout.

    Args:
        recompute: bool [N, G].
        layout: what its columns are.
        made_for: what its search sampled with, as `ECAD.made_for` says it; None where that is not known.

    Raises:
        UserError: the shape does not fit the layout.
    """

    recompute: np.ndarray
    layout: Layout
    made_for: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        array = np.array(self.recompute, dtype=bool)
        if array.ndim != 2 or len(array) < 1 or array.shape[1] != self.layout.width:
            allowed = f"[steps, {self.layout.width}]"
            raise UserError("The schedule does not fit its layout", given=list(array.shape), allowed=allowed)
        object.__setattr__(self, "recompute", array)

    @classmethod
    def full(cls, layout: Layout, steps: int) -> Schedule:
        """Everything is computed in every step."""
        return cls(np.ones((steps, layout.width), bool), layout)

    @classmethod
    def from_genome(cls, genome: np.ndarray, layout: Layout, steps: int) -> Schedule:
        """The schedule of a genome, bool [(N - 1) G] without step 0 or [N G] with it."""
        rows = np.asarray(genome, bool).reshape(-1, layout.width)
        return cls(np.concatenate([np.ones((steps - len(rows), layout.width), bool), rows]), layout).canonical()

    def genome(self, first_step: bool = False) -> np.ndarray:
        """Its rows one after the other, bool; without that of step 0 unless `first_step`."""
        return self.recompute[0 if first_step else 1 :].ravel()

    @property
    def steps(self) -> int:
        return len(self.recompute)

    @property
    def key(self) -> bytes:
        """Equal for schedules that give equal pictures at equal cost."""
        return np.packbits(self.plan.live).tobytes()

    def canonical(self) -> Schedule:
        """With step 0 computed, as it is in any case."""
        array = self.recompute.copy()
        array[0] = True
        return Schedule(array, self.layout)

    @cached_property
    def plan(self) -> Plan:
        """What an executor does, dead computations left out."""
        recompute = self.canonical().recompute
        live, used, keep = recompute.copy(), np.ones_like(recompute), np.zeros_like(recompute)
        outputs = np.array(self.layout.columns("proj_out"), int)
        feeders = np.array([column - offset for column in outputs for offset in range(1, PER_BLOCK)], int)
        if len(feeders):
            used[:, feeders] = np.repeat(recompute[:, outputs], PER_BLOCK - 1, axis=1)
        wanted = np.zeros(self.layout.width, bool)  # whether a later step reads the slot before it is overwritten
        for n in reversed(range(self.steps)):
            keep[n] = wanted
            live[n] &= used[n] | wanted
            wanted = np.where(live[n], False, wanted | used[n])
        return Plan(live, used, keep)

    def check(self, layout: Layout, steps: int) -> None:
        """Refuses another network or number of steps than it was made for.

        Raises:
            UserError: names what differs.
        """
        if layout != self.layout:
            what = "The schedule was made for a network with other blocks"
            raise UserError(what, where="schedule", given=_told(self.layout), allowed=_told(layout))
        if steps != self.steps:
            fix = f"sample in {self.steps} steps, or search a schedule of {steps}"
            raise UserError("The schedule has another number of steps", where="schedule", given=self.steps,
                            allowed=str(steps), fix=fix)  # fmt: skip

    def doubt(self, scheduler: str) -> None:
        """Warns where a pipeline's scheduler, a class of diffusers, is of another solver than the search had."""
        solver = (self.made_for or {}).get("solver")
        if solver is not None and solver not in SOLVERS.get(scheduler, ()):
            log.warning("the schedule was searched with solver %s, and may be worse with %s", solver, scheduler)

    def plain(self) -> dict[str, Any]:
        """As JSON holds it: a row for each step, a word of three digits for each block."""
        rows = [" ".join("".join(str(int(bit)) for bit in row[i : i + PER_BLOCK])
                         for i in range(0, len(row), PER_BLOCK)) for row in self.recompute]  # fmt: skip
        return {"meaning of recompute": MEANING, **self.layout.plain(), "steps": self.steps, "recompute": rows}

    @classmethod
    def from_plain(cls, content: dict[str, Any], where: str = "schedule") -> Schedule:
        """What `plain` gave.

        Raises:
            UserError: entries are missing, or rows do not fit the blocks.
        """
        try:
            layout = Layout.from_plain(content)
            rows = [row.replace(" ", "") for row in content["recompute"]]
            if any(set(row) - {"0", "1"} for row in rows) or len({len(row) for row in rows}) != 1:
                raise ValueError("rows must be of equal length and consist of 0 and 1")
            found = cls(np.array([[digit == "1" for digit in row] for row in rows]), layout)
            found.check(layout, content["steps"])
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError("This is not a schedule", where=where, given=f"{error}") from error
        return found

    def save(self, file: str | Path, **facts: Any) -> None:
        """Writes a JSON file; `facts` are plain values that go beside the schedule."""
        text = json.dumps({**self.plain(), **facts}, indent=1)
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(file), f"{text}\n".encode())

    @classmethod
    def load(cls, file: str | Path, speed: float | None = None) -> Schedule:
        """Reads a schedule, or one out of a front that a search wrote.

        Args:
            speed: of a front, the best one that needs at most 1 / speed of all computations; null is its knee.

        Raises:
            UserError: there is no such file or schedule.
        """
        path = resolve(file)
        if not path.is_file():
            raise UserError("There is no such schedule", where="schedule", given=str(file))
        content = json.loads(path.read_text(encoding="utf-8"))
        made_for = content.get("made_for") if isinstance(content, dict) else None
        if "front" in content:
            from lightning_t2i.caching.archive import chosen

            content = content["front"][chosen(content["front"], speed)]["schedule"]
        return replace(cls.from_plain(content, str(file)), made_for=made_for)


def _told(layout: Layout) -> str:
    return f"{layout.family}: " + ", ".join(f"{s.count} {s.kind}" for s in layout.stacks)
