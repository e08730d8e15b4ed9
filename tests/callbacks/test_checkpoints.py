"""The Checkpoints callback: saves in the background, what stays, snapshots, copies elsewhere, figures."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import lightning as L
import programs
import pytest
import torch
from kills import optimizer_tensors
from safetensors import safe_open
from safetensors.torch import load_file
from signals import Scored, ScoredData, SignalAt
from toy import Toy, ToyData, adam, trainer_for

from callbacks import checkpoints, preemption
from callbacks.checkpoints import CheckpointOptions, Checkpoints
from callbacks.preemption import Preemption
from lightning_t2i.checkpoints.background import Background
from lightning_t2i.checkpoints.retention import BestOptions
from lightning_t2i.checkpoints.snapshots import SnapshotOptions
from lightning_t2i.checkpoints.staging import LARGE, Staging
from lightning_t2i.cli.main import main
from lightning_t2i.errors import UserError
from lightning_t2i.guards import NonFiniteError
from lightning_t2i.options import GroupOptions
from lightning_t2i.state_io import AtomicCheckpointIO, complete_checkpoints, newest

FORMS = pytest.mark.parametrize("form", ["single", "sharded"])


class Lines(L.pytorch.loggers.Logger):
    """What is logged."""

    name = version = None

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int | None, dict]] = []

    def log_metrics(self, metrics, step=None) -> None:
        self.lines.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs) -> None:
        pass


class At(L.Callback):
    """Calls a function after each training step."""

    def __init__(self, act: Callable[[int], None]):
        self.act = act

    def on_train_batch_end(self, trainer, pl_module, *unused) -> None:
        self.act(pl_module.counters.step)


def fit(
    folder: Path, steps: int, *callbacks: L.Callback, method: Toy | None = None, logger=False, data=None, **options
) -> Checkpoints:
    """Trains the toy up to a step, or goes on."""
    saving = Checkpoints(folder / "checkpoints", CheckpointOptions(**{"every": 2, "keep": 99, **options}))
    more = {"val_check_interval": 2, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0} if data else {}
    trainer = trainer_for(folder, steps, callbacks=[saving, *callbacks], logger=logger, **more)
    resume = newest(folder / "checkpoints")
    trainer.fit(method or Toy(), data or ToyData(), ckpt_path=resume, weights_only=True)
    return saving


def steps(folder: Path) -> list[int]:
    return [int(p.name.removeprefix("step-")) for p in complete_checkpoints(folder / "checkpoints")]


def state(folder: Path, step: int) -> dict:
    return AtomicCheckpointIO().load_checkpoint(folder / f"checkpoints/step-{step:08d}")


def same(a: dict, b: dict) -> bool:
    """Whether two states are equal in weights, EMA, optimizer states, counters and the position in the data."""
    x, y = ({**s["state_dict"], **dict(optimizer_tensors(s))} for s in (a, b))
    plain = all(a[key] == b[key] for key in ("global_step", "ToyData", "loops"))
    return plain and x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


@pytest.fixture
def saves(monkeypatch) -> Callable[[Callable[[], None]], None]:
    """`saves(before)` has `before` called in the writing thread, before the first tensor of each save is written."""
    original = torch.save

    def replace(before: Callable[[], None]) -> None:
        def save(*args):
            before()
            original(*args)

        monkeypatch.setattr(torch, "save", save)

    return replace


def full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# ---- in the background -----------------------------------------------------------------------------------------------


@FORMS
def test_the_state_is_that_of_its_step_while_the_training_goes_on(tmp_path, saves, form) -> None:
    """Step 2 is written during step 3; the save of step 4 waits for it."""
    gate, complete, threads = threading.Event(), {}, set()

    def wait() -> None:
        threads.add(threading.current_thread())
        assert gate.wait(60)

    def after(step: int) -> None:
        complete[step] = 2 in steps(tmp_path / "a")
        if step == 3:
            gate.set()

    saves(wait)
    fit(tmp_path / "a", 4, At(after), form=form, asynchronous=True)
    assert complete == {1: False, 2: False, 3: False, 4: True}
    assert len(threads) == 1 and threading.main_thread() not in threads
    saves(lambda: None)
    fit(tmp_path / "b", 4)
    assert steps(tmp_path / "a") == steps(tmp_path / "b") == [2, 4]
    for step in (2, 4):
        assert same(state(tmp_path / "a", step), state(tmp_path / "b", step))


@FORMS
def test_a_failure_is_raised_at_the_next_save(tmp_path, saves, form) -> None:
    fit(tmp_path, 2)
    saves(full)
    trained: list[int] = []
    with pytest.raises(OSError, match="No space left"):
        fit(tmp_path, 12, At(trained.append), form=form, asynchronous=True)
    assert trained[-1] == 5  # step 4 was not written, and the save of step 6 says so
    assert steps(tmp_path) == [2] and len(list((tmp_path / "checkpoints").iterdir())) == 1


@FORMS
def test_a_failure_of_the_last_save_is_raised_at_the_end(tmp_path, saves, form) -> None:
    fit(tmp_path, 2)
    saves(full)
    with pytest.raises(OSError, match="No space left"):
        fit(tmp_path, 5, every=0, form=form, asynchronous=True)
    assert steps(tmp_path) == [2] and len(list((tmp_path / "checkpoints").iterdir())) == 1


def test_a_failure_before_the_end_does_not_cost_the_last_state(tmp_path, saves) -> None:
    """The disk is full for the save of step 4, of which the end is the first to hear."""
    failures = iter([full])
    saves(lambda: next(failures, lambda: None)())
    with pytest.raises(OSError, match="No space left"):
        fit(tmp_path, 5, every=4, asynchronous=True)
    assert steps(tmp_path) == [5]


def test_the_command_ends_with_an_error_when_its_last_save_fails(tmp_path, saves, monkeypatch) -> None:
    monkeypatch.setenv("LIGHTNING_T2I_RUNS", str(tmp_path / "runs"))
    for name in ("LIGHTNING_T2I_RESUME", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    config = {
        "model": {"class_path": "toy.Toy"},
        "data": {"class_path": "toy.ToyData"},
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 3},
        "checkpoints": {"asynchronous": True},
        "tracking": {"wandb": "off"},
    }
    (tmp_path / "toy.yaml").write_text(json.dumps(config))
    saves(full)
    assert main(["fit", "--config", str(tmp_path / "toy.yaml")]) != 0
    assert not (tmp_path / "runs/toy/finished").exists()


def test_a_training_that_breaks_still_gets_its_checkpoint(tmp_path, saves, monkeypatch, caplog) -> None:
    """The write begins when the training has broken off."""
    gate, original = threading.Event(), Background.wait

    def wait(self) -> None:
        gate.set()
        original(self)

    monkeypatch.setattr(Background, "wait", wait)
    monkeypatch.setattr(checkpoints.Checkpoints, "_save", once(checkpoints.Checkpoints._save, gate.clear))
    saves(lambda: gate.wait(60))
    with pytest.raises(NonFiniteError):
        fit(tmp_path / "a", 9, method=Toy(poison_step=3), asynchronous=True)
    assert steps(tmp_path / "a") == [2]
    saves(full)
    with pytest.raises(NonFiniteError):
        fit(tmp_path / "b", 9, method=Toy(poison_step=3), asynchronous=True)
    assert steps(tmp_path / "b") == [] and "A checkpoint was not written: [Errno 28]" in caplog.text


def once(function: Callable, after: Callable[[], None]) -> Callable:
    """A function after which another one is called."""

    def both(*args):
        function(*args)
        after()

    return both


def test_a_preempted_job_is_requeued_when_its_checkpoint_is_complete(tmp_path, saves, monkeypatch) -> None:
    gate, original, seen = threading.Event(), Background.wait, []

    def wait(self) -> None:
        gate.set()
        original(self)

    monkeypatch.setattr(Background, "wait", wait)
    monkeypatch.setattr(checkpoints.Checkpoints, "_save", once(checkpoints.Checkpoints._save, gate.clear))
    monkeypatch.setattr(preemption, "job_id", lambda: "7")
    monkeypatch.setattr(preemption, "requeue", lambda: seen.append(steps(tmp_path)))
    saves(lambda: gate.wait(60))
    leaves = Preemption()
    with leaves:
        fit(tmp_path, 9, SignalAt(3, signal.SIGUSR1), leaves, asynchronous=True)  # in the step that is saved anyway
    assert leaves.requeues and seen == [[2, 4]]
    saves(full)
    with pytest.raises(OSError, match="No space left"), leaves:
        fit(tmp_path, 9, SignalAt(5, signal.SIGUSR1), leaves, asynchronous=True)
    assert not leaves.requeues and seen == [[2, 4]]


def test_a_kill_during_a_save_leaves_complete_checkpoints_alone(tmp_path, repo) -> None:
    """SIGKILL in the writing thread at step 8, in the middle of a file; the run then ends with the same bits."""
    script = [sys.executable, str(repo / "tests/helpers/toy.py"), str(tmp_path / "a"), "--steps", "10", "--every", "4"]
    script += ["--form", "sharded", "--asynchronous", "--kill", "8", "--kill-in-save"]
    environment = {**os.environ, "PYTHONPATH": f"{repo}:{repo / 'tests/helpers'}"}
    done = programs.run(script, env=environment)
    assert done.returncode == -signal.SIGKILL
    assert steps(tmp_path / "a") == [4]
    left = {p.name for p in (tmp_path / "a/checkpoints").iterdir()}
    assert left == {"step-00000004", ".step-00000008.tmp"}
    for run in ("a", "b"):
        fit(tmp_path / run, 10, every=4, form="sharded", asynchronous=True)
    assert steps(tmp_path / "a") == [4, 8, 10] and not list((tmp_path / "a/checkpoints").glob(".*"))
    assert same(state(tmp_path / "a", 10), state(tmp_path / "b", 10))


def test_the_memory_of_copies_is_used_again() -> None:
    staging, found = Staging(sharded=False, asynchronous=True), []
    for value in (1.0, 2.0):
        staging.begin()
        found.append([staging.take(torch.full((3,), value)), staging.take(torch.full((), value))])
        assert [t.tolist() for t in found[-1]] == [[value] * 3, value]
    assert [t.data_ptr() for t in found[0]] == [t.data_ptr() for t in found[1]]
    staging.begin()
    assert staging.take(torch.zeros(4)).shape == (4,)  # another method's
    taken = staging.take(torch.zeros(()))
    large = torch.arange(1.0, 1 + 3 * LARGE)  # copied by a thread
    copied, mine, live = staging.take(large), [1], torch.ones(2)
    settled = staging.settled({"a": taken, "b": mine, "c": live})
    mine.append(2)
    live.zero_()
    assert torch.equal(copied, large)
    assert settled["a"] is taken and settled["b"] == [1] and settled["c"].tolist() == [1, 1]


def test_the_thread_uses_the_device_of_its_process(monkeypatch) -> None:
    """A new thread's own is CUDA's first."""
    used: list = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: used.append((device, threading.current_thread())))
    background = Background(True, torch.device("cuda", 3))
    background.submit(lambda: used.append(threading.current_thread()))
    background.wait()
    (device, first), second = used
    assert device == torch.device("cuda", 3) and first is second is not threading.main_thread()
    Background(True, torch.device("cpu")).submit(lambda: used.append(None))
    assert len(used) == 3


# ---- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [False, True])
def test_time_size_and_speed_of_every_save_are_logged(tmp_path, asynchronous) -> None:
    logger = Lines()
    fit(tmp_path, 5, logger=logger, asynchronous=asynchronous)
    lines = {step: line for step, line in logger.lines if "checkpoint/seconds" in line}
    assert list(lines) == [2, 4, 5]
    for step, line in lines.items():
        path = tmp_path / f"checkpoints/step-{step:08d}"
        assert line["checkpoint/bytes"] == sum(p.stat().st_size for p in path.iterdir() if p.name != "complete.json")
        assert line["checkpoint/mb_per_s"] == pytest.approx(line["checkpoint/bytes"] / 1e6 / line["checkpoint/seconds"])
        assert line["checkpoint/stall_seconds"] > 0 and line["samples"] == 8 * step


# ---- what stays ------------------------------------------------------------------------------------------------------


def test_the_last_the_best_and_every_nth_stay(tmp_path, monkeypatch) -> None:
    """Validation runs right after the save of its step; a restart knows the values."""
    values = {2: 5.0, 4: 1.0, 6: 3.0, 8: 2.0, 10: 4.0, 12: 9.0}
    options = {"keep": 1, "keep_every": 6, "best": BestOptions("val/score", "min", 2)}

    class Judged(Scored):
        def validation_step(self, batch, batch_idx):
            self.log("val/score", values[self.counters.step], batch_size=1)

    fit(tmp_path, 8, method=Judged(), data=ScoredData(), **options)
    assert steps(tmp_path) == [4, 6, 8]
    fit(tmp_path, 12, method=Judged(), data=ScoredData(), **options)
    assert steps(tmp_path) == [4, 6, 8, 12]
    assert json.loads((tmp_path / "checkpoints/scores.json").read_text()) == {str(k): v for k, v in values.items()}


def test_a_metric_that_is_never_logged_is_told(tmp_path, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        fit(tmp_path, 8, method=Scored(), data=ScoredData(), keep=1, best=BestOptions("val/sise"))
    assert steps(tmp_path) == [8]
    (told,) = [r.message for r in caplog.records if "checkpoints.best" in r.message]
    assert "'val/sise'" in told and "val/size" in told


@pytest.mark.parametrize("asynchronous", [False, True])
def test_snapshots_hold_the_averages_in_bf16(tmp_path, asynchronous) -> None:
    fit(tmp_path, 8, every=4, asynchronous=asynchronous, ema=SnapshotOptions(every=2, keep=3))
    files = sorted((tmp_path / "ema").iterdir())
    assert [f.name for f in files] == [f"step-{step:08d}.safetensors" for step in (4, 6, 8)]
    found, saved = load_file(files[-1]), state(tmp_path, 8)["state_dict"]
    assert found.keys() == {name for name in saved if name.startswith("generator_ema")}
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, saved[name].to(torch.bfloat16))
    with safe_open(files[-1], "pt") as opened:
        assert opened.metadata()["step"] == "8"
    assert steps(tmp_path) == [4, 8]


def test_snapshots_of_a_method_without_averages_are_refused(tmp_path) -> None:
    method = Toy(generator=GroupOptions(adam(1e-2)))
    with pytest.raises(UserError, match="checkpoints.ema.every"):
        fit(tmp_path, 2, method=method, ema=SnapshotOptions(every=2))


@pytest.mark.parametrize(
    ("build", "where"),
    [
        (lambda: CheckpointOptions(every=-1), "checkpoints.every"),
        (lambda: CheckpointOptions(keep=0), "checkpoints.keep"),
        (lambda: CheckpointOptions(every=4, keep_every=6), "checkpoints.keep_every"),
        (lambda: CheckpointOptions(every=0, keep_every=6), "checkpoints.keep_every"),
        (lambda: BestOptions("val/loss", keep=0), "checkpoints.best.keep"),
        (lambda: SnapshotOptions(every=-1), "checkpoints.ema.every"),
        (lambda: SnapshotOptions(keep=0), "checkpoints.ema.keep"),
    ],
)
def test_options_are_checked(build, where) -> None:
    with pytest.raises(UserError, match=where):
        build()
