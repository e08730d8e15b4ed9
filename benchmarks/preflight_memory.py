"""Peak memory of a training step of the tiny configs: what `train.py check` predicts against what is allocated.

    python -m benchmarks --only preflight_memory

Measured is a training that Lightning runs on real weights and data, in the first step after the first in which all
groups are due, so that optimizer states are there: the bytes of networks, optimizer states and batch when the step
begins and, on top, the highest sum of what torch's CPU allocator reports to the profiler during the step. It is no
resident memory. The data are few scenes, encoded in the run, and the batches a part of the config's.
"""

from __future__ import annotations

import math
from typing import Any

import lightning as L
from torch.profiler import ProfilerActivity, profile

from benchmarks.forward_units import fit
from benchmarks.running import isolated
from lightning_t2i.cli.configs import merge
from lightning_t2i.cli.session import Session, quiet
from lightning_t2i.golden import SCENES, methods, overrides
from lightning_t2i.paths import ROOT
from lightning_t2i.preflight.allocator import Allocator
from lightning_t2i.preflight.rehearsal import adopt, rehearse
from lightning_t2i.preflight.world import World

BAR = 0.15  # how far the predicted peak may be from the measured one
PART = 4  # of a batch
OTHERS = ("diffusion/tiny_pixart", "diffusion/tiny_flux")  # networks of other kinds than the methods' tiny.yaml
COLUMNS = [["config", ""], ["batch", "d"], ["predicted, MB", ",.1f"], ["measured, MB", ",.1f"], ["off by", ".1%"]]
COLUMNS += [["at the step's beginning, MB", ",.1f"], ["within 15 %", ""]]


class Watch(L.Callback):
    """The peak of the training step that follows the first period of the groups, in bytes."""

    begin = peak = 0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        counters, period = pl_module.counters, math.lcm(*(g.options.every for g in pl_module.groups.values()))
        if counters.step != period or counters.micro:
            return
        with Allocator() as allocator:
            adopt(pl_module, allocator, batch)
            self.begin = allocator.alive
        self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profiler.start()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *unused: Any) -> None:
        if self.begin and pl_module.counters.at_boundary:
            self.profiler.stop()
            self.peak = self.begin + highest(self.profiler)
            trainer.should_stop = True


def highest(profiler: Any) -> int:
    """The largest sum of allocated less freed bytes since the profiler began."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


def prepared(config: str, part: int = PART) -> tuple[Any, Any]:
    """Method and data of a config on few scenes, each batch cut to a part."""
    from datamodules.worlds import ensure

    merged = merge([ROOT / "configs" / f"{config}.yaml"])
    streams = merged.config["data"]["init_args"]
    folder = ensure("shapes", train=SCENES, val=0, test=0, retrieval=0)
    for place, value in overrides(streams, folder).items():
        if place[-1] == "batch_size":
            value = max(streams[place[2]]["init_args"].get("batch_size", 64) // part, 1)
        merged.add(place, value, __name__)
    session = Session()
    session.parse(merged, "fit")
    session.construct()
    return session.method, session.data


def predicted_peak(config: str, part: int = PART) -> int:
    """Bytes."""
    return rehearse(*prepared(config, part), World(1, 1, None), steps=1).peak


def measured_peak(config: str, part: int = PART) -> tuple[int, int]:
    """(peak, what is there when the step begins) in bytes."""
    watch, (module, data) = Watch(), prepared(config, part)
    fit(module, data, 10**6, watch)  # it stops itself
    return watch.peak, watch.begin


def of_config(config: str) -> list[Any]:
    """The row of a config."""
    quiet()
    predicted, (measured, begin) = predicted_peak(config), measured_peak(config)
    batch = prepared(config)[1].training["main"].batch_size
    off = predicted / measured - 1
    sizes = [x / 1e6 for x in (predicted, measured)]
    return [config, batch, *sizes, off, begin / 1e6, "yes" if abs(off) <= BAR else "no"]


def measure(quick: bool = False) -> dict[str, Any]:
    """A row for each method's tiny config and the others; quick: the first alone."""
    configs = [*(f"{method}/tiny" for method in methods()), *OTHERS][: 1 if quick else None]
    rows = [isolated("benchmarks.preflight_memory", "of_config", config=config) for config in configs]
    return {"title": "Peak memory of a training step", "tables": [{"columns": COLUMNS, "rows": rows}]}
