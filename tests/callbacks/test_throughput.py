"""Figures of speed against a clock that the test moves: what a step, a batch and a pause take is known."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

from callbacks.throughput import STATUS, UNIT, Throughput, ThroughputOptions, peak_memory, resident_peak
from lightning_t2i.cli.record import Record
from lightning_t2i.errors import UserError
from lightning_t2i.options import GroupOptions, MethodOptions

FETCH, STEP, PAUSE = 2.0, 6.0, 5.0  # seconds


def timed(studio: Any, clock: Any, every: int = 1) -> tuple[Any, Any]:
    """A method and data whose steps and batches take known times."""

    class Painter(studio.Painter):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            clock.now += STEP

    class Easel(studio.Easel):
        def records(self, positions: torch.Tensor) -> Any:
            clock.now += FETCH
            return super().records(positions)

    return Painter, Easel(batch_size=4)


class Pause(L.Callback):
    """Something that takes its time after every step."""

    def __init__(self, clock: Any):
        self.clock = clock

    def on_train_batch_end(self, *unused: Any) -> None:
        self.clock.now += PAUSE


def test_figures_of_a_window(studio, ticking) -> None:
    clock, notebook = ticking(), studio.Notebook()
    painter, easel = timed(studio, clock)
    speed = Throughput(ThroughputOptions(every=3, flops=False), clock)
    studio.trainer(speed, Pause(clock), steps=8, logger=notebook).fit(painter(), easel)
    assert sorted(notebook.values("perf/step_ms")) == [4, 7]  # the first step is in no window
    for step in (4, 7):
        assert notebook.values("perf/step_ms")[step] == pytest.approx(1000 * (FETCH + STEP))
        assert notebook.values("perf/samples_per_s")[step] == pytest.approx(4 / (FETCH + STEP))
        assert notebook.values("perf/data_wait")[step] == pytest.approx(FETCH / (FETCH + STEP))
        # Three pauses would lie in a window of 3 steps; the last one follows its end.
        pauses = 3 * PAUSE
        assert notebook.values("perf/other")[step] == pytest.approx(pauses / (pauses + 3 * (FETCH + STEP)))
    assert "perf/tflops_per_s" not in speed.latest and speed.summary()["perf/tflops_per_s"] == "unknown"


def test_validation_is_not_part_of_a_step(studio, ticking) -> None:
    clock, notebook = ticking(), studio.Notebook()
    painter, easel = timed(studio, clock)

    class Checked(painter):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            clock.now += 50.0

    speed = Throughput(ThroughputOptions(every=3, flops=False), clock)
    trainer = studio.trainer(
        speed, steps=7, logger=notebook, limit_val_batches=1, val_check_interval=2, check_val_every_n_epoch=None
    )
    trainer.fit(Checked(), easel)
    assert list(notebook.values("perf/step_ms").values()) == pytest.approx([1000 * (FETCH + STEP)] * 2)
    assert min(notebook.values("perf/other").values()) > 0.5


def test_steps_of_several_micro_batches(studio, ticking) -> None:
    clock, notebook = ticking(), studio.Notebook()
    painter, easel = timed(studio, clock)
    speed = Throughput(ThroughputOptions(every=2, flops=False), clock)
    studio.trainer(speed, steps=5, logger=notebook).fit(painter(MethodOptions(accumulate=3)), easel)
    assert sorted(notebook.values("perf/step_ms")) == [3, 5]
    assert notebook.values("perf/step_ms")[5] == pytest.approx(3000 * (FETCH + STEP))
    assert notebook.values("perf/samples_per_s")[5] == pytest.approx(4 / (FETCH + STEP))


# A linear layer 4 -> 4 on 4 rows: the forward pass and the weight's gradient; the input needs none.
PER_STEP = 2 * (2 * 4 * 4 * 4)


def test_operations_of_a_step_are_counted_once_and_outside_of_windows(studio, ticking) -> None:
    clock, notebook = ticking(), studio.Notebook()
    painter, easel = timed(studio, clock)
    speed = Throughput(ThroughputOptions(every=3), clock)
    studio.trainer(speed, steps=9, logger=notebook).fit(painter(), easel)
    assert speed.flops_per_step == PER_STEP
    assert sorted(notebook.values("perf/tflops_per_s")) == [5, 8]  # steps 1 (warm-up) and 2 (counted) are in no window
    assert speed.latest["perf/tflops_per_s"] == pytest.approx(PER_STEP / (FETCH + STEP) / 1e12)
    assert "perf/mfu" not in speed.latest and speed.summary()["perf/mfu"] == "unknown"


def test_operations_are_averaged_over_the_period_of_the_groups(studio, ticking) -> None:
    clock = ticking()
    painter, easel = timed(studio, clock)

    class TwoBrushes(painter):
        def configure_model(self) -> None:
            super().configure_model()
            self.add_group("second", torch.nn.Linear(4, 4), GroupOptions())

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.backward("second", self.second(torch.ones(4, 4)).square().mean())
            super().training_step(batch, batch_idx)

    speed = Throughput(ThroughputOptions(every=3), clock)
    studio.trainer(speed, steps=9).fit(TwoBrushes(MethodOptions(accumulate=2), every=4), easel)
    assert speed.flops_per_step == 2 * (PER_STEP + PER_STEP / 4)


def test_utilisation_on_a_device_of_known_peak(studio, ticking, monkeypatch) -> None:
    clock = ticking()
    painter, easel = timed(studio, clock)
    monkeypatch.setattr("callbacks.throughput.utilisation", lambda rate, device, dtype: rate / 1e3)
    speed = Throughput(ThroughputOptions(every=2), clock)
    studio.trainer(speed, steps=6).fit(painter(), easel)
    assert speed.latest["perf/mfu"] == pytest.approx(PER_STEP / (FETCH + STEP) / 1e3)


def test_run_shorter_than_a_window_is_reported_at_its_end(studio, ticking) -> None:
    clock, notebook = ticking(), studio.Notebook()
    painter, easel = timed(studio, clock)
    speed = Throughput(ThroughputOptions(every=50, flops=False), clock)
    studio.trainer(speed, steps=5, logger=notebook).fit(painter(), easel)
    assert notebook.values("perf/step_ms") == {5: pytest.approx(1000 * (FETCH + STEP))}


def test_training_is_the_same_with_and_without(studio) -> None:
    weights = []
    for options in (ThroughputOptions(every=2), ThroughputOptions(enabled=False)):
        method = studio.Painter()
        studio.trainer(Throughput(options), steps=6).fit(method, studio.Easel())
        weights.append(method.brush.linear.weight.clone())
    assert torch.equal(*weights)


def test_profiler_is_given_back_also_after_an_error(studio) -> None:
    class Broken(studio.Painter):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            if self.counters.step == 2:
                raise RuntimeError("broken")

    trainer = studio.trainer(Throughput(ThroughputOptions(every=2)), steps=6)
    with pytest.raises(RuntimeError, match="broken"):
        trainer.fit(Broken(), studio.Easel())
    assert not {"start", "stop"} & vars(trainer.profiler).keys()
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    assert _get_current_dispatch_mode() is None  # the step that broke was one that is counted


def test_a_real_process(studio) -> None:
    speed = Throughput(ThroughputOptions(every=2))
    studio.trainer(speed, steps=7).fit(studio.Painter(), studio.Easel())
    assert speed.latest["perf/samples_per_s"] > 0
    assert 0.05 < speed.latest["perf/peak_memory_gb"] < 50
    assert speed.latest["perf/peak_memory_gb"] == pytest.approx(peak_memory(torch.device("cpu")) / 1e9, rel=0.2)


def test_speed_and_cost_of_a_run_tell_one_peak(studio, monkeypatch) -> None:
    """As on macOS, where the system tells bytes; what an earlier start of the run took counts for its cost."""
    monkeypatch.setattr("resource.getrusage", lambda _: SimpleNamespace(ru_maxrss=3_000_000_000))
    monkeypatch.setattr("callbacks.throughput.UNIT", 1)
    monkeypatch.setattr("callbacks.throughput.STATUS", Path("no such file"))
    speed, record = Throughput(ThroughputOptions(every=2, flops=False)), Record(studio.folder)
    studio.trainer(speed, record, steps=7).fit(studio.Painter(), studio.Easel())
    assert speed.latest["perf/peak_memory_gb"] == 3
    assert json.loads((studio.folder / "cost.json").read_text())["peak_memory_bytes"] == 3_000_000_000
    again = Record(studio.folder)
    again.load_state_dict({**record.state_dict(), "peak_memory": 4_000_000_000})
    assert again.peak_memory() == 4_000_000_000


def test_peak_is_of_this_process_alone() -> None:
    """On Linux ru_maxrss of a new process begins with what its parent holds."""
    begin = f"import resource, sys; from pathlib import Path; UNIT, STATUS = {UNIT}, Path({str(STATUS)!r})"
    command = f"{begin}\n{inspect.getsource(resident_peak)}\nprint(resident_peak())"  # torch would take seconds
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert 5e6 < int(done.stdout) < resident_peak() / 4


def test_window_of_no_steps_is_refused() -> None:
    with pytest.raises(UserError, match="throughput.every"):
        ThroughputOptions(every=0)
