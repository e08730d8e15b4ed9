"""How fast training is, what share of it waits for data, and how much of the device it uses.

Times are taken between hooks on the host. On a GPU the host runs ahead, so a window's end, and nothing else, waits for
the device. A window's time is that of its training steps: from asking for a batch to the end of the step; what
lies between steps (pictures, metrics, checkpoints) is reported as `perf/other`.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch

from callbacks.inference import log_metrics
from lightning_t2i.errors import UserError
from lightning_t2i.flops import counting, utilisation

UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, bytes
STATUS = Path("/proc/self/status")  # Linux
FETCH = "train_dataloader_next"  # the end of the name under which Lightning profiles the wait for a batch


@dataclass(frozen=True)
class ThroughputOptions:
    """What is measured.

    Args:
        enabled: measure at all.
        every: training steps of a window, and between two log lines.
        flops: count the operations of the second training step (of one whole period where groups are updated every n
            steps); these steps take longer and belong to no window.
    """

    enabled: bool = True
    every: int = 50
    flops: bool = True

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError("A window has at least 1 step", where="throughput.every", given=self.every)


class Throughput(L.Callback):
    """Logs, per window: perf/samples_per_s (all ranks), perf/step_ms, perf/data_wait and perf/other (shares in
    [0, 1]), perf/peak_memory_gb, perf/tflops_per_s (of one device, counted) and, on a GPU of known peak, perf/mfu.

    Stands first among the callbacks, so that the others' work is not counted as part of a step.

    Args:
        options: what is measured.
        clock: seconds, for tests.
    """

    def __init__(self, options: ThroughputOptions | None = None, clock: Callable[[], float] = time.perf_counter):
        self.options, self.clock = options or ThroughputOptions(), clock
        self.latest: dict[str, float] = {}
        self.flops_per_step: float | None = None
        self._counting = ExitStack()
        self._counter: Any = None
        self._counted, self._counted_steps = 0, 0
        self._fetch_start: float | None = None
        self._step_start: float | None = None
        self._first_step = self._last_step = 0
        self._open, self._steps, self._samples = False, 0, 0
        self._busy = self._wait = self._opened = 0.0

    # ---- Lightning's hooks ---------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.options.enabled:
            self._first_step = self._last_step = pl_module.counters.step
            self._watch_fetches(trainer.profiler)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self.options.enabled:
            return
        if self._step_start is None:
            self._step_start = self.clock()
        if self._counts(pl_module):
            self._counter = self._counting.enter_context(counting())

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *unused: Any) -> None:
        if not self.options.enabled:
            return
        now, step = self.clock(), pl_module.counters.step
        counted = self._counter is not None
        self._stop_counting()
        if self._open and self._step_start is not None:
            self._busy += now - self._step_start
        self._step_start = None
        if step == self._last_step:
            return
        self._last_step = step
        if counted:
            self._counted_steps += 1
            self._settle(pl_module)
        elif self._open:
            self._steps += 1
            if self._steps == self.options.every:
                self._report(trainer, pl_module)
                pl_module.log("samples/s", self.latest["perf/samples_per_s"], prog_bar=True, logger=False)
        if not self._counts(pl_module) and (not self._open or self._steps == self.options.every):
            self._open_window(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not self.latest and self._steps:  # a run shorter than a window
            self._report(trainer, pl_module)
        self._release(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._release(trainer)

    # ---- windows -------------------------------------------------------------------------------------------------

    def _open_window(self, module: Any) -> None:
        """The first training step is in no window: it compiles, allocates and fills caches."""
        self._open, self._steps, self._busy, self._wait = True, 0, 0.0, 0.0
        self._samples, self._opened = module.counters.samples, self.clock()

    def _report(self, trainer: L.Trainer, module: Any) -> None:
        device = module.device
        if device.type == "cuda":
            before = self.clock()
            torch.cuda.synchronize(device)
            self._busy += self.clock() - before
        wall = max(self.clock() - self._opened, self._busy)
        busy = max(self._busy, 1e-9)
        self.latest = {
            "perf/samples_per_s": (module.counters.samples - self._samples) / busy,
            "perf/step_ms": 1000 * busy / self._steps,
            "perf/data_wait": self._wait / busy,
            "perf/other": (wall - self._busy) / max(wall, 1e-9),
            "perf/peak_memory_gb": peak_memory(device) / 1e9,
        }
        if self.flops_per_step is not None:
            rate = self.flops_per_step * self._steps / busy
            self.latest["perf/tflops_per_s"] = rate / 1e12
            reduced = getattr(getattr(module, "common", None), "precision", "fp32") == "bf16"
            share = utilisation(rate, device, torch.bfloat16 if reduced else torch.float32)
            if share is not None:
                self.latest["perf/mfu"] = share
        log_metrics(trainer, self.latest, module.counters.step)

    def summary(self) -> dict[str, float | str]:
        """The latest window for a report; what could not be measured is "unknown"."""
        return {"perf/tflops_per_s": "unknown", "perf/mfu": "unknown", **self.latest}

    # ---- waiting for data ----------------------------------------------------------------------------------------

    def _watch_fetches(self, profiler: Any) -> None:
        """Lightning tells its profiler when it starts and stops to wait for a batch: listen there."""
        start, stop = profiler.start, profiler.stop

        def started(action: str) -> None:
            if action.endswith(FETCH):
                self._fetch_start = self.clock()
                self._step_start = self._fetch_start if self._step_start is None else self._step_start
            start(action)

        def stopped(action: str) -> None:
            stop(action)
            if action.endswith(FETCH) and self._fetch_start is not None:
                if self._open:
                    self._wait += self.clock() - self._fetch_start
                self._fetch_start = None

        profiler.start, profiler.stop = started, stopped

    def _release(self, trainer: L.Trainer) -> None:
        self._stop_counting()
        for name in ("start", "stop"):
            vars(trainer.profiler).pop(name, None)

    # ---- operations ----------------------------------------------------------------------------------------------

    def _period(self, module: Any) -> int:
        """Training steps after which the updates repeat, at most 16."""
        groups = getattr(module, "groups", {}).values()
        return min(math.lcm(1, *(group.options.every for group in groups)), 16)

    def _counts(self, module: Any) -> bool:
        return (
            self.options.flops
            and self.flops_per_step is None
            and module.counters.step > self._first_step
            and self._counted_steps < self._period(module)
        )

    def _stop_counting(self) -> None:
        if self._counter is not None:
            self._counting.close()
            self._counted += self._counter.total
            self._counter = None

    def _settle(self, module: Any) -> None:
        if self._counted_steps == self._period(module):
            self.flops_per_step = self._counted / self._counted_steps


def peak_memory(device: torch.device) -> int:
    """Largest memory in use so far, bytes: allocated on a GPU, resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_peak()


def resident_peak() -> int:
    """Largest resident memory of this process so far, bytes.

    On Linux ru_maxrss goes on from what the process that started this one held at that time, VmHWM does not.
    """
    if STATUS.exists():
        fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        if "VmHWM" in fields:
            return int(fields["VmHWM"].split()[0]) * 1024  # kB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT
