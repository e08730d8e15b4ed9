"""Preemption: signals are noted, ranks agree at a step boundary, the state is saved once, the job is requeued once."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from signal import SIGTERM, SIGUSR1

import lightning as L
import programs
import pytest
import yaml
from signals import SignalAt
from toy import Toy, ToyData, trainer_for
from wandb_reader import history, records

from callbacks.checkpoints import CheckpointOptions, Checkpoints
from callbacks.preemption import Preemption, PreemptionOptions
from datamodules.points import Points
from datamodules.streams import Streams
from lightning_t2i.errors import UserError
from lightning_t2i.options import MethodOptions
from lightning_t2i.proof.compare import differences, final_state, logged
from lightning_t2i.state_io import AtomicCheckpointIO, complete_checkpoints, newest

SLURM = ("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_NTASKS")


class Watched(AtomicCheckpointIO):
    """Counts saves; `during` is called in the middle of each."""

    def __init__(self, during: Callable[[], None] = lambda: None):
        self.saves, self.during = 0, during

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.saves += 1
        self.during()
        super().save_checkpoint(checkpoint, path, storage_options)


class Ends(L.Callback):
    """What of a training's end was called."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_train_batch_end(self, trainer, pl_module, *unused):
        self.last = pl_module.counters.step

    def on_train_end(self, *unused):
        self.seen.append("train")

    def on_fit_end(self, *unused):
        self.seen.append("fit")

    def on_exception(self, *unused):
        self.seen.append("exception")


@pytest.fixture(autouse=True)
def outside_of_slurm(monkeypatch) -> None:
    for name in SLURM:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def scontrol(tmp_path, monkeypatch) -> Callable[[], list[str]]:
    """A stand-in for scontrol in a job; returns what it was called with. It ends with $SCONTROL_EXIT."""
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(
        f'#!/usr/bin/env bash\necho "$*" >>{tmp_path}/calls\necho "Requested operation is disabled" >&2\n'
        'exit "${SCONTROL_EXIT:-0}"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "71")
    calls = tmp_path / "calls"
    return lambda: calls.read_text().splitlines() if calls.exists() else []


def fit(folder: Path, *callbacks: L.Callback, io: AtomicCheckpointIO | None = None, **options) -> Preemption:
    """Trains the toy up to 12 steps of 2 micro-batches, or goes on; signals are noted."""
    preemption = Preemption(PreemptionOptions(**options))
    saving = Checkpoints(folder / "checkpoints", CheckpointOptions(every=5, keep=9))
    trainer = trainer_for(folder, 12, io=io or Watched(), callbacks=[saving, *callbacks, preemption])
    module = Toy(MethodOptions(accumulate=2))
    with preemption:
        trainer.fit(module, ToyData(), ckpt_path=newest(folder / "checkpoints"), weights_only=True)
    return preemption


def steps(folder: Path) -> list[int]:
    return [int(p.name.removeprefix("step-")) for p in complete_checkpoints(folder / "checkpoints")]


# ---- one process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [SIGTERM, SIGUSR1], ids=lambda n: n.name)
def test_a_signal_saves_once_at_the_boundary_and_the_same_command_goes_on(tmp_path, number, caplog) -> None:
    """Sent inside step 7 (the eighth); also without SLURM."""
    io, ends = Watched(), Ends()
    found = fit(tmp_path / "a", SignalAt(7, number), ends, io=io)
    assert found.agreed is number and not found.requeues
    assert steps(tmp_path / "a") == [5, 8] and io.saves == 2
    assert ends.last == 8 and ends.seen == ["exception"]  # nothing of a training's end: no last grid, no comparison
    assert f"{number.name}: stopped and saved after training step 8; the same command goes on" in caplog.text
    fit(tmp_path / "a")
    fit(tmp_path / "b")
    assert steps(tmp_path / "b") == [5, 10, 12]
    assert differences(final_state(tmp_path / "a"), final_state(tmp_path / "b")) == []


def test_a_checkpoint_of_the_same_step_is_not_written_again(tmp_path) -> None:
    io = Watched()
    fit(tmp_path, SignalAt(4, SIGTERM), io=io)
    assert steps(tmp_path) == [5] and io.saves == 1


@pytest.mark.parametrize(("every", "stopped"), [(1, 7), (4, 8)])
def test_ranks_agree_every_k_steps(tmp_path, every, stopped) -> None:
    fit(tmp_path, SignalAt(6, SIGTERM), every=every)
    assert steps(tmp_path) == [5, stopped]


@pytest.mark.parametrize("every", [1, 5])
def test_a_signal_in_the_last_step_leaves_the_end_to_the_same_command(tmp_path, every) -> None:
    ends, again = Ends(), Ends()
    assert fit(tmp_path, SignalAt(11, SIGUSR1), ends, every=every).agreed is SIGUSR1
    assert steps(tmp_path) == [5, 10, 12] and ends.seen == ["exception"]
    fit(tmp_path, again)
    assert steps(tmp_path) == [5, 10, 12] and again.seen == ["fit"]


@pytest.mark.parametrize("number", [SIGTERM, SIGUSR1], ids=lambda n: n.name)
def test_a_word_of_slurm_after_the_last_step_requeues_at_once(tmp_path, scontrol, number) -> None:
    """In what comes after a training: it may take longer than is left."""

    class Compares(Ends):
        def on_train_end(self, *unused):
            for _ in range(2):
                os.kill(os.getpid(), number)
            self.seen = scontrol()

    ends = Compares()
    expected = ["requeue 71"] if number is SIGUSR1 else []
    assert fit(tmp_path, ends).requeues is bool(expected)
    assert ends.seen == [*expected, "fit"] and scontrol() == expected


def test_a_signal_before_the_first_step_waits_for_it(tmp_path) -> None:
    """There may be minutes of loading, in which a process without a handler would die of it."""

    class Early(L.Callback):
        def on_fit_start(self, *unused):
            os.kill(os.getpid(), SIGTERM)

    assert fit(tmp_path, Early()).agreed is SIGTERM
    assert steps(tmp_path) == [1]


def test_lightning_has_no_handler_of_its_own_meanwhile(tmp_path) -> None:
    """Fails when Lightning renames what `setup` replaces: its SIGTERM handler broadcasts in the handler."""
    seen = {}

    class Look(L.Callback):
        def on_train_start(self, *unused):
            seen["start"] = [signal.getsignal(n) for n in (SIGTERM, SIGUSR1)]

        def teardown(self, *unused, **also):  # after Lightning has put "the earlier handlers" back
            seen["end"] = [signal.getsignal(n) for n in (SIGTERM, SIGUSR1)]

    found = fit(tmp_path, Look())
    assert seen == {"start": [found._note] * 2, "end": [found._note] * 2}


@pytest.mark.parametrize("stops", [False, True])
def test_handlers_are_put_back(tmp_path, stops) -> None:
    heard: list[int] = []
    before = {n: signal.signal(n, lambda number, frame: heard.append(number)) for n in (SIGTERM, SIGUSR1)}
    mine = [signal.getsignal(n) for n in (SIGTERM, SIGUSR1)]
    try:
        fit(tmp_path, *([SignalAt(2, SIGTERM)] if stops else []))
        assert [signal.getsignal(n) for n in (SIGTERM, SIGUSR1)] == mine
        assert heard == []
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_switched_off_it_leaves_the_signals_alone(tmp_path) -> None:
    heard: list[int] = []
    before = signal.signal(SIGUSR1, lambda number, frame: heard.append(number))
    try:
        assert fit(tmp_path, SignalAt(2, SIGUSR1), enabled=False).agreed is None
    finally:
        signal.signal(SIGUSR1, before)
    assert heard == [SIGUSR1] and steps(tmp_path)[-1] == 12


def test_a_training_without_checkpoints_is_refused(tmp_path) -> None:
    preemption = Preemption()
    trainer = trainer_for(tmp_path, 3, callbacks=[preemption])
    with pytest.raises(RuntimeError, match="Checkpoints"), preemption:
        trainer.fit(Toy(), ToyData())


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match="preemption.every"):
        PreemptionOptions(every=0)


def test_a_failing_save_is_an_error_and_requeues_nothing(tmp_path, scontrol) -> None:
    def full() -> None:
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        fit(tmp_path, SignalAt(2, SIGUSR1), io=Watched(full))
    assert scontrol() == []


# ---- requeue ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ["requeue 71"]),
        ({"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"}, ["requeue 70_3"]),
        ({"SLURM_JOB_NAME": "bash"}, []),
        ({"SLURM_JOB_ID": ""}, []),
    ],
    ids=["job", "array", "interactive", "no-job"],
)
def test_usr1_requeues_the_job_once(tmp_path, monkeypatch, scontrol, variables, expected, caplog) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = fit(tmp_path, SignalAt(2, SIGUSR1))
    assert scontrol() == expected and found.requeues == bool(expected)
    assert ("is requeued" in caplog.text) == bool(expected)


def test_sigterm_requeues_nothing(tmp_path, scontrol) -> None:
    assert fit(tmp_path, SignalAt(2, SIGTERM)).agreed is SIGTERM
    assert scontrol() == [] and steps(tmp_path) == [3]


def test_further_signals_change_nothing(tmp_path, scontrol) -> None:
    """In the same step, and in the middle of the save, as SLURM and an impatient user send them."""

    def again() -> None:
        for number in (SIGUSR1, SIGTERM, SIGUSR1):
            os.kill(os.getpid(), number)

    io = Watched(again)
    found = fit(tmp_path, SignalAt(2, SIGUSR1, SIGTERM, SIGUSR1), io=io)
    assert found.agreed is SIGUSR1 and scontrol() == ["requeue 71"]
    assert io.saves == 1 and steps(tmp_path) == [3]
    assert fit(tmp_path / "other", SignalAt(2, SIGTERM, SIGUSR1)).agreed is SIGTERM
    assert scontrol() == ["requeue 71"]


def test_loggers_are_closed_before_the_job_is_requeued(tmp_path, scontrol) -> None:
    """SLURM kills the processes of a requeued job, W&B's among them."""
    closed: list[list[str]] = []

    class Closing(L.pytorch.loggers.CSVLogger):
        def finalize(self, status: str) -> None:
            closed.append(scontrol())
            super().finalize(status)

    preemption = Preemption()
    callbacks = [Checkpoints(tmp_path / "checkpoints"), SignalAt(2, SIGUSR1), preemption]
    trainer = trainer_for(tmp_path, 12, callbacks=callbacks, logger=Closing(tmp_path))
    with preemption:
        trainer.fit(Toy(), ToyData())
    assert closed == [[]] and scontrol() == ["requeue 71"]


def test_a_job_that_cannot_be_requeued_says_so(tmp_path, monkeypatch, scontrol, caplog) -> None:
    monkeypatch.setenv("SCONTROL_EXIT", "1")
    with caplog.at_level(logging.ERROR):
        fit(tmp_path / "a", SignalAt(2, SIGUSR1))
        monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
        fit(tmp_path / "b", SignalAt(2, SIGUSR1))
    assert len(scontrol()) == 1
    first, second = (r.message for r in caplog.records)
    assert "Job 71 is saved but not requeued (Requested operation is disabled)" in first
    assert "not requeued" in second and "No such file" in second


# ---- the other processes of a job ------------------------------------------------------------------------------------


def test_a_worker_that_reads_data_ends_by_its_parent_alone() -> None:
    """Else a SIGTERM to all processes is an error in the training process, which then saves nothing."""
    data = Streams(Points([(0.0, 0.0, 0.0)], [1.0], 1.0, batch_size=4), workers=1)
    data.setup("fit")
    batches = iter(data.train_dataloader())
    next(batches)
    (worker,) = multiprocessing.active_children()
    for number in (SIGTERM, SIGUSR1):
        subprocess.run([sys.executable, "-c", f"import os; os.kill({worker.pid}, {int(number)})"], check=True)
    for _ in range(8):  # more than it has read ahead
        next(batches)
    assert worker.is_alive()
    worker.terminate()
    worker.join(30)
    assert worker.exitcode == 0


# ---- the command -----------------------------------------------------------------------------------------------------


def command(folder: Path, repo: Path, run: str, signal_at: str = "", devices: int = 1) -> str:
    """Trains the toy by train.py; returns its messages."""
    config = {
        "model": {"class_path": "toy.Toy", "init_args": {"common": {"log_every": 1}}},
        "data": {"class_path": "signals.WorkedData" if devices == 1 else "toy.ToyData"},
        "trainer": {"accelerator": "cpu", "devices": devices, "max_steps": 9},
        "throughput": {"enabled": False},
        "tracking": {"wandb": "offline" if devices == 1 else "off"},
    }
    config["trainer"]["callbacks"] = [{"class_path": "signals.SignalAt"}]
    if devices > 1:
        mesh = {"replicate": 1, "shard": devices}
        config["trainer"]["strategy"] = {"class_path": "lightning_t2i.strategies.FSDP2", "init_args": mesh}
    (folder / "toy.yaml").write_text(yaml.safe_dump(config))
    inherited = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "WANDB_SERVICE", "LIGHTNING_T2I_RESUME")
    environment = {k: v for k, v in os.environ.items() if k not in inherited and not k.startswith("MASTER_")}
    environment |= {"PYTHONPATH": str(repo / "tests/helpers"), "LIGHTNING_T2I_RUNS": str(folder / "runs")}
    environment |= {"SIGNAL_AT": signal_at} if signal_at else {}
    words = [sys.executable, str(repo / "train.py"), "fit", "--config", "toy.yaml", "--run", run]
    done = programs.run(words, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory, repo) -> Path:
    """The run folder of a training that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    command(folder, repo, "whole")
    return folder / "runs/whole"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_every_process_of_a_job_may_be_signalled(tmp_path, repo, whole, name) -> None:
    """As where SLURM tracks processes by cgroups: W&B's service and the worker that reads data hear it as well."""
    said = command(tmp_path, repo, "stopped", f"4 {name} all")
    stopped = tmp_path / "runs/stopped"
    assert "Traceback" not in said and f"{name}: stopped and saved after training step 5" in said
    assert steps(stopped) == [5] and not (stopped / "finished").exists()
    (file,) = (stopped / "wandb").glob("offline-run-*/run-*.wandb")
    kinds = [r.WhichOneof("record_type") for r in records(file)]
    if name == "SIGTERM":  # of which W&B's service dies
        assert said.count("W&B's service is gone") == 1
    else:
        assert "preempting" in kinds and kinds.count("history") == 2 and "exit" in kinds
    identity = (stopped / "wandb_id").read_text()

    assert "step-00000005" in command(tmp_path, repo, "stopped")
    assert differences(final_state(stopped), final_state(whole)) == [] and logged(stopped) == logged(whole)
    assert (stopped / "finished").exists() and (stopped / "wandb_id").read_text() == identity
    rows = [row for row in history(stopped / "wandb") if "critic/loss" in row]
    assert {r["trainer/global_step"]: r["critic/loss"] for r in rows} == pytest.approx(
        {line["step"]: line["critic/loss"] for line in logged(whole)}
    )


@pytest.mark.slow
def test_one_rank_hears_it_and_all_ranks_stop_at_one_step(tmp_path, repo) -> None:
    said = command(tmp_path, repo, "stopped", "4 SIGTERM 1", devices=2)
    assert said.count("SIGTERM: stopped and saved after training step 5") == 1 and "Traceback" not in said
    assert steps(tmp_path / "runs/stopped") == [5]
    command(tmp_path, repo, "stopped", devices=2)
    command(tmp_path, repo, "whole", devices=2)
    assert differences(final_state(tmp_path / "runs/stopped"), final_state(tmp_path / "runs/whole")) == []
