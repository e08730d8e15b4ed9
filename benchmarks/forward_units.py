"""Forward units of each method's tiny config, predicted against counted, with speed and memory.

    python -m benchmarks --only forward_units

Methods appear when they have configs/METHOD/tiny.yaml and `forward_units()` (lightning_t2i/forward_units.py). The
config is taken as it is, but for pictures and captions: few scenes, encoded in the run and not read from a cache, so
that the encoders' passes are there to be counted. First whole periods of the groups are counted, then steps are timed
without counting; the time of a step is the median. Each method has a process of its own: peak memory is the process's.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
import warnings
from contextlib import ExitStack
from typing import Any

import lightning as L

from benchmarks.running import isolated
from callbacks.throughput import resident_peak
from lightning_t2i.cli.configs import merge
from lightning_t2i.cli.session import TRAINER_DEFAULTS, Session, quiet
from lightning_t2i.forward_units import PredictsUnits, Units, counting_units
from lightning_t2i.golden import SCENES, methods, overrides
from lightning_t2i.paths import ROOT

BAR = 0.15  # how far counted units may be from predicted ones
UNITS = [["method", ""], ["network", ""], ["predicted", ".2f"], ["counted", ".2f"], ["off by", ".1%"]]
UNITS += [["MFLOP per sample", ",.1f"], ["share", ".0%"]]
SPEED = [["method", ""], ["batch", "d"], ["s per step", ".3f"], ["samples/s", ",.1f"], ["peak memory, MB", ",.0f"]]
SPEED += [["units predicted", ".2f"], ["units counted", ".2f"], ["within 15 %", ""]]


class Watch(L.Callback):
    """Counts units in the first `counted` training steps, then times the others."""

    def __init__(self, counted: int):
        self.counted = counted
        self.seconds: list[float] = []
        self._counting, self._last, self._start = ExitStack(), 0, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.units = self._counting.enter_context(counting_units(pl_module, flops=True))
        self.predicted = pl_module.forward_units()  # of these steps: later ones may cost something else

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *unused: Any) -> None:
        step = pl_module.counters.step
        if step == self._last:
            return
        self._last, now = step, time.perf_counter()
        if step == self.counted:
            self._counting.close()
        elif step > self.counted + 1:  # the first one fills caches that counting emptied
            self.seconds.append(now - self._start)
        self._start = time.perf_counter()


def prepared(method: str, class_path: str | None = None) -> tuple[Any, Any]:
    """The method and its data as the tiny config says, on few scenes; `class_path` names a subclass in its place."""
    from datamodules.worlds import ensure

    merged = merge([ROOT / "configs" / method / "tiny.yaml"])
    folder = ensure("shapes", train=SCENES, val=0, test=0, retrieval=0)
    for place, value in overrides(merged.config["data"]["init_args"], folder).items():
        if place[-1] != "batch_size":
            merged.add(place, value, __name__)
    if class_path is not None:
        merged.add(("model", "class_path"), class_path, __name__)
    session = Session()
    session.parse(merged, "fit")
    session.construct()
    return session.method, session.data


def fit(module: Any, data: Any, steps: int, callback: L.Callback) -> None:
    """Trains for so many steps on the CPU, without logs, checkpoints and validation."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no `val_dataloader`")
        trainer = L.Trainer(
            **TRAINER_DEFAULTS,
            max_steps=steps,
            accelerator="cpu",
            devices=1,
            logger=False,
            limit_val_batches=0,
            enable_progress_bar=False,
            default_root_dir=folder,
            callbacks=[callback],
        )
        trainer.fit(module, data)


def of_method(method: str, quick: bool) -> dict[str, Any] | None:
    """Rows of both tables for one method; None when it predicts nothing."""
    quiet()
    module, data = prepared(method)
    predicts = isinstance(module, PredictsUnits)
    if not predicts:
        return None
    module.configure_model()
    period = math.lcm(*(group.options.every for group in module.groups.values()))
    timed = period * math.ceil((2 if quick else 30) / period)
    watch = Watch(period * math.ceil((2 if quick else 10) / period))
    fit(module, data, watch.counted + 1 + timed, watch)
    units = compared(method, watch.predicted, watch.units)
    memory = resident_peak() / 1e6
    seconds, batch = statistics.median(watch.seconds), data.training["main"].batch_size
    speed = [method, batch, seconds, batch * module.common.accumulate / seconds, memory]
    speed += [sum(row[column] for row in units) for column in (2, 3)]
    return {"units": units, "speed": [*speed, "yes" if all(within(row) for row in units) else "no"]}


def compared(label: str, predicted: dict[str, float], units: Units) -> list[list[Any]]:
    """Rows of units: each network that was called or predicted."""
    counted, spent, rows = units.per_step(), units.flops_per_sample(), []
    total = sum(spent.values())
    for name in sorted(predicted.keys() | counted.keys()):
        expected, found, cost = predicted.get(name, 0.0), counted.get(name, 0.0), spent.get(name)
        off = found / expected - 1 if expected else None
        share = cost / total if cost is not None else None
        rows.append([label, name, expected, found, off, cost / 1e6 if cost is not None else None, share])
    return rows


def within(row: list[Any]) -> bool:
    """Whether a row of units meets the bar: a network that nobody predicted does only when it was not called."""
    expected, found = row[2], row[3]
    return abs(found - expected) <= BAR * expected + 1e-9


def result(found: list[dict[str, Any]]) -> dict[str, Any]:
    units = {"columns": UNITS, "rows": [row for one in found for row in one["units"]]}
    return {"title": "Forward units", "tables": [{"columns": SPEED, "rows": [o["speed"] for o in found]}, units]}


def measure(quick: bool = False) -> dict[str, Any]:
    """Both tables for every method that predicts its units."""
    found = [isolated("benchmarks.forward_units", "of_method", method=name, quick=quick) for name in methods()]
    return result([one for one in found if one is not None])
