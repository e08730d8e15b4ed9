"""Progress: all that a search knows after a generation, and the race in which new candidates are evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from lightning_t2i.caching.archive import Archive
from lightning_t2i.caching.cost import Cost
from lightning_t2i.caching.front import content
from lightning_t2i.caching.heuristics import first_generation
from lightning_t2i.caching.schedule import Schedule
from lightning_t2i.caching.search import Search, SearchOptions, whole
from lightning_t2i.options import Plain

Measure = Callable[..., np.ndarray]  # (schedules, range of pictures or None) -> scores [k, n]


class Progress:
    """A search of schedules of a network.

    Args:
        cost: what components cost.
        steps: N.
        options: how it searches.
        seed: of its draws.

    Attributes:
        anchors: quality without a cache, and of the schedule that computes step 0 alone; None before they are known.
        history: hypervolume after each generation.
    """

    def __init__(self, cost: Cost, steps: int, options: SearchOptions, seed: int):
        self.cost, self.options = cost, options
        self.full = Schedule.full(cost.layout, steps)
        self.only_first = Schedule(np.repeat(np.arange(steps)[:, None] == 0, cost.layout.width, axis=1), cost.layout)
        self.archive = Archive(self.full)
        bits = self.full.genome(not options.fix_first_step).size
        self.search = Search(bits, options, seed, first_generation(options, cost, steps))
        self.anchors: tuple[float, float] | None = None
        self.history: list[float] = []

    def macs(self, schedule: Schedule) -> int:
        """MACs of a picture, as the search counts them."""
        return self.cost.macs(schedule, self.options.sdpa)

    def schedules(self, genomes: np.ndarray) -> list[Schedule]:
        """Of genomes [k, n]."""
        return [Schedule.from_genome(genome, self.full.layout, self.full.steps) for genome in genomes]

    def new(self, schedules: Sequence[Schedule]) -> list[Schedule]:
        """Those that have to be evaluated, each once."""
        known = self.archive.facts if self.options.memoise else {}
        return list({s.key: s for s in schedules if s.key not in known and s.key != self.full.key}.values())

    def quality(self, schedule: Schedule) -> float:
        """What is known of a schedule."""
        assert self.anchors is not None
        return self.anchors[0] if schedule.key == self.full.key else self.archive.quality(schedule.key)

    def evaluate(self, schedules: Sequence[Schedule], measure: Measure, first: int, n: int, generation: int) -> None:
        """Files schedules in the archive, each with all n pictures or, where it lost the race, with the first ones.

        A schedule loses against one that is known and needs no more MACs, if its first pictures are worse by more than
        two standard errors of the mean of the paired differences. What is filed is then an estimate of its quality.
        """
        if not schedules:
            return
        rivals = self.rivals() if self.options.race and first < n else []
        begun, running = measure(schedules, range(first) if rivals else None), []
        for schedule, row in zip(schedules, begun, strict=True):
            lost = [quality - ahead.mean() for quality, ahead in self.lost(schedule, row[:first], rivals)]
            if lost:
                self.archive.add(schedule, float(min(lost)), self.macs(schedule), generation)
            else:
                running.append((schedule, row))
        if rivals and running:
            rest = measure([schedule for schedule, _ in running], range(first, n))
            running = [(schedule, row + more) for (schedule, row), more in zip(running, rest, strict=True)]
        for schedule, row in running:
            self.archive.add(schedule, float(row.mean()), self.macs(schedule), generation, row)

    def rivals(self) -> list[tuple[int, float, np.ndarray]]:
        """MACs, quality and scores of the front."""
        archive = self.archive
        return [(self.macs(archive.schedule(k)), archive.quality(k), archive.scores[k]) for k in archive.front()]

    def lost(self, schedule: Schedule, row: np.ndarray, rivals: Any) -> Iterator[tuple[float, np.ndarray]]:
        """Quality of each rival that is clearly better, and its lead in each picture."""
        for macs, quality, scores in rivals:
            ahead = scores[: len(row)] - row
            cheaper = len(row) > 1 and macs <= self.macs(schedule)
            if cheaper and ahead.mean() > 2 * ahead.std(ddof=1) / len(row) ** 0.5:
                yield quality, ahead

    def summary(self) -> dict[str, float]:
        """Files the hypervolume of this generation; and numbers to log."""
        assert self.anchors is not None
        archive, (none, worst), full = self.archive, self.anchors, self.macs(self.full)
        self.history.append(archive.hypervolume(worst, none, full))
        half = [archive.quality(key) for key in archive.front() if 2 * archive.facts[key][1] <= full]
        return {
            "hypervolume": self.history[-1],
            "evaluated": float(len(archive)),
            "dropped": float(sum(not facts[2] for facts in archive.facts.values())),
            "front": float(len(archive.front())),
        } | ({"best_2x": max(half)} if half else {})

    def found(self, **facts: Any) -> dict[str, Any]:
        """The front as front.json holds it."""
        none, worst = self.anchors or (None, None)
        facts |= {"quality_without_cache": none, "quality_of_first_step": worst, "hypervolume": self.history}
        return content(self.archive, self.cost, self.options.sdpa, **facts)

    def state(self) -> Plain:
        """Everything, between two generations."""
        numbers = {"history": self.history, "anchors": self.anchors or ()}
        tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
        return {"archive": self.archive.state(), "search": self.search.state(), **tensors}

    def load(self, state: Plain) -> Progress:
        """What `state` gave."""
        self.archive.load(state["archive"])
        self.search.load(state["search"])
        self.history, anchors = (whole(state[name]).tolist() for name in ("history", "anchors"))
        self.anchors = (anchors[0], anchors[1]) if anchors else None
        return self
