"""Archive: every schedule that a search evaluated, what is known of it, and the front of the best ones.

front         schedules that no other one beats in quality and MACs at once
hypervolume   area between the front and the reference point (quality of the schedule that computes step 0 alone,
              MACs of no cache); in units of (quality without a cache - that quality) x (MACs of no cache)
knee          of the front, the schedule farthest above the line from its cheapest to its best member
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lightning_t2i.caching.schedule import Schedule
from lightning_t2i.caching.search import pack, unpack, whole
from lightning_t2i.errors import UserError
from lightning_t2i.options import Plain


def non_dominated(quality: np.ndarray, macs: np.ndarray) -> np.ndarray:
    """Indices of the front, from the cheapest on; of equals the first."""
    best, front = -np.inf, []
    for i in np.lexsort((np.arange(len(macs)), -quality, macs)):
        if quality[i] > best:
            best = quality[i]
            front.append(i)
    return np.array(front, int)


def hypervolume(quality: np.ndarray, macs: np.ndarray, worst: float, none: float, full: float) -> float:
    """See the file's head.

    Args:
        worst: quality of the schedule that computes step 0 alone.
        none: quality without a cache.
        full: MACs without a cache.
    """
    inside = (quality > worst) & (macs < full)
    quality, macs = quality[inside], macs[inside]
    area, level = 0.0, worst
    for i in non_dominated(quality, macs):  # quality rises with MACs
        area += (quality[i] - level) * (full - macs[i])
        level = quality[i]
    return float(area / (max(abs(none - worst), 1e-12) * full))


def chosen(front: Sequence[Mapping[str, Any]], speed: float | None = None) -> int:
    """Which member of a front, {quality, relative_macs} each, serves a budget; without one, the knee.

    Raises:
        UserError: none is fast enough.
    """
    quality, macs = (np.array([point[name] for point in front], float) for name in ("quality", "relative_macs"))
    if speed is None:
        low, high = macs.argmin(), quality.argmax()
        width, height = np.ptp(macs) or 1.0, np.ptp(quality) or 1.0
        return int(((quality - quality[low]) / height - (macs - macs[low]) / width * (high != low)).argmax())
    fast = np.flatnonzero(macs <= 1 / speed)
    if not len(fast):
        fastest = 1 / macs.min()
        raise UserError("No schedule of the front is so fast", where="speed", given=speed, allowed=f"{fastest:.2f}")
    return int(fast[quality[fast].argmax()])


class Archive:
    """Schedules by their key.

    Args:
        template: any schedule of the layout and number of steps.
    """

    def __init__(self, template: Schedule):
        self.template = template
        self.genomes: dict[bytes, np.ndarray] = {}
        self.facts: dict[bytes, tuple[float, float, float, float]] = {}  # quality, MACs, complete, generation
        self.scores: dict[bytes, np.ndarray] = {}  # of members of the front, one for each picture

    def __len__(self) -> int:
        return len(self.facts)

    def add(
        self, schedule: Schedule, quality: float, macs: float, generation: int, scores: np.ndarray | None = None
    ) -> None:
        """Files a schedule.

        Args:
            scores: float64 [J], one for each picture; None where it was dropped before all were made.
        """
        key = schedule.key
        self.genomes[key] = schedule.genome()
        self.facts[key] = quality, macs, float(scores is not None), float(generation)
        if scores is not None:
            self.scores[key] = scores

    def quality(self, key: bytes) -> float:
        return self.facts[key][0]

    def front(self) -> list[bytes]:
        """Keys of the front, from the cheapest on; schedules that were dropped in a race are not in it."""
        keys = [key for key, facts in self.facts.items() if facts[2]]
        facts = np.array([self.facts[key] for key in keys]).reshape(len(keys), 4)
        found = [keys[i] for i in non_dominated(facts[:, 0], facts[:, 1])]
        self.scores = {key: self.scores[key] for key in found}
        return found

    def schedule(self, key: bytes) -> Schedule:
        return Schedule.from_genome(self.genomes[key], self.template.layout, self.template.steps)

    def hypervolume(self, worst: float, none: float, full: float) -> float:
        """Of the front."""
        facts = np.array([self.facts[key] for key in self.front()]).reshape(-1, 4)
        return hypervolume(facts[:, 0], facts[:, 1], worst, none, full)

    def state(self) -> Plain:
        """As plain tensors."""
        front, bits = self.front(), self.template.genome().size
        genomes, scores = list(self.genomes.values()), [self.scores[key] for key in front]
        return {
            "genomes": pack(np.array(genomes, bool).reshape(-1, bits)),
            "facts": torch.tensor(list(self.facts.values()), dtype=torch.float64).reshape(-1, 4),
            "scores": torch.from_numpy(np.array(scores, np.float64).reshape(len(front), -1)),
        }

    def load(self, state: Plain) -> None:
        """What `state` gave."""
        self.genomes, self.facts, self.scores = {}, {}, {}
        genomes = unpack(state["genomes"], self.template.genome().size)
        for genome, facts in zip(genomes, whole(state["facts"]).tolist(), strict=True):
            schedule = Schedule.from_genome(genome, self.template.layout, self.template.steps)
            self.genomes[schedule.key], self.facts[schedule.key] = genome, tuple(facts)
        keys = [key for key, facts in self.facts.items() if facts[2]]
        self.scores = dict.fromkeys(keys, np.zeros(0))
        self.scores = dict(zip(self.front(), whole(state["scores"]).numpy(), strict=True))
