"""Time of sampling under caching schedules against their MACs, and what a search spends beside its pictures.

    python -m benchmarks --only ecad

Schedules of the tiny PixArt in 10 steps: FORA 2 and 3, and the points of a front (configs/ecad/tiny.yaml, searched
here) that are nearest to 2, 2.5 and 3 times fewer MACs. Pictures without a cache and with one take turns; "transformer"
is the time within the calls of the network, "end to end" that of the sampler and the decoder. What is predicted is the
ratio of MACs, and "share" what time keeps of it. Static programs run eagerly.

The search's overhead is the time of its generations over that of the pictures and scores within them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import torch

from benchmarks.forward_units import fit, prepared
from lightning_t2i.batch import Records
from lightning_t2i.caching import Executor, Schedule
from lightning_t2i.caching.executor import Kind
from lightning_t2i.caching.heuristics import baselines
from lightning_t2i.cli.session import quiet
from lightning_t2i.keys import Keys

SPEEDS = (2.0, 2.5, 3.0)
KINDS: tuple[Kind, ...] = ("hooks", "static")
TIMES = [
    ["schedule", ""],
    ["executor", ""],
    ["pictures", "d"],
    ["MACs, x fewer", ".2f"],
    ["transformer, x faster", ".2f"],
]
TIMES += [["share", ".2f"], ["end to end, x faster", ".2f"], ["ms a picture", ".2f"]]
SEARCH = [["generations", "d"], ["s a generation", ".2f"], ["of it pictures and scores", ".2f"], ["overhead", ".1%"]]


class Stopwatch:
    """Adds up the seconds of the calls of functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its calls timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


class Generations(L.Callback):
    """Seconds of each generation after the first, and those of the pictures and scores within."""

    def __init__(self) -> None:
        self.watch, self.steps = Stopwatch(), list[tuple[float, float]]()

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        sampler = pl_module.sampler
        object.__setattr__(sampler, "pictures", self.watch.watched(sampler.pictures))
        self.reward, pl_module.reward = pl_module.reward, self.watch.watched(pl_module.reward)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *unused: Any) -> None:
        self.watch.seconds, self.began = 0.0, time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *unused: Any) -> None:
        self.steps.append((time.perf_counter() - self.began, self.watch.seconds))

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        object.__delattr__(pl_module.sampler, "pictures")
        pl_module.reward = self.reward


def points(method: Any) -> dict[str, Schedule]:
    """FORA 2 and 3, and the members of the front that are nearest to SPEEDS."""
    progress = method.progress
    found = {
        name: s for name, s in baselines(progress.full.layout, method.steps).items() if name in ("FORA 2", "FORA 3")
    }
    keys, full = progress.archive.front(), progress.macs(progress.full)
    speeds = np.array([full / progress.archive.facts[key][1] for key in keys])
    for speed in SPEEDS:
        found[f"front near {speed:g}x"] = progress.archive.schedule(keys[int(np.abs(speeds - speed).argmin())])
    return found


def times(method: Any, schedules: dict[str, Schedule], count: int, rounds: int) -> list[list[Any]]:
    """Rows of TIMES for batches of so many pictures."""
    records = Records.of_prompts(["a red circle"] * count)
    z, cond = Keys(0).normal("z", records.position, method.sampler.shape), method.condition(records)
    backbone, progress, rows = method.denoiser.backbone, method.progress, []
    method.executor.detach()
    for kind in KINDS:
        with Executor(backbone, method.sampler.times, kind) as executor:
            forward, watch = backbone.forward, Stopwatch()
            backbone.forward = watch.watched(forward)

            def once(schedule: Schedule | None, executor=executor, watch=watch) -> tuple[float, float]:
                executor.use(schedule)
                watch.seconds, began = 0.0, time.perf_counter()
                method.sampler.pictures(z, cond)
                return watch.seconds, time.perf_counter() - began

            for name, schedule in schedules.items():
                once(schedule)
                turns = [(once(None), once(schedule)) for _ in range(rounds)]
                network, whole = (statistics.median(a[i] / b[i] for a, b in turns) for i in range(2))
                predicted = progress.cost.full(method.steps) / progress.cost.macs(schedule)
                ms = 1000 * statistics.median(b[1] for _, b in turns) / count
                rows.append([name, kind, count, predicted, network, network / predicted, whole, ms])
            backbone.forward = forward
    method.executor.attach()
    return rows


@torch.no_grad()
def result(generations: int, counts: list[int], rounds: int) -> dict[str, Any]:
    """Both tables."""
    module, data = prepared("ecad", "lightning_modules.ecad.ECAD")
    module.configure_model()
    watch = Generations()
    fit(module, data, generations, watch)
    schedules = points(module)
    rows = [row for count in counts for row in times(module, schedules, count, rounds)]
    later = watch.steps[1:] or watch.steps
    whole, within = (statistics.mean(step[i] for step in later) for i in range(2))
    search = [[len(later), whole, within, whole / within - 1]]
    tables = [{"columns": TIMES, "rows": rows}, {"columns": SEARCH, "rows": search}]
    return {"title": "Sampling under caching schedules", "tables": tables}


def measure(quick: bool = False) -> dict[str, Any]:
    """Time under schedules, and the overhead of a search."""
    quiet()
    return result(1, [1], 1) if quick else result(12, [1, 64], 7)
