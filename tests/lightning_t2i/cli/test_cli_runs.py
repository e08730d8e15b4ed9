"""Run folders: names, resume, what is refused, and that a killed run ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import programs
import pytest
import torch
import yaml
from wandb_reader import history

from lightning_t2i.cli import launch, runs, session, verbs
from lightning_t2i.cli.main import main
from lightning_t2i.errors import UserError
from lightning_t2i.guards import NonFiniteError
from lightning_t2i.proof.compare import logged
from lightning_t2i.state_io import AtomicCheckpointIO, newest

CONFIG = {
    "model": {"class_path": "toy.Toy", "init_args": {"common": {"seed": 3, "log_every": 2}}},
    "data": {"class_path": "toy.ToyData", "init_args": {"batch_size": 8}},
    "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 12, "callbacks": [{"class_path": "kills.KillAt"}]},
    "throughput": {"enabled": False},
    "checkpoints": {"every": 4},
    "tracking": {"wandb": "off"},
}


def written(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """A config file whose runs land in folder/runs."""
    patch.setenv("LIGHTNING_T2I_RUNS", str(folder / "runs"))
    inherited = ("RANK", "LOCAL_RANK", "WANDB_SERVICE", launch.HANDED_DOWN)
    for name in [n for n in os.environ if n.startswith(("SLURM_", "TORCHELASTIC_")) or n in inherited]:
        patch.delenv(name)
    file = folder / "toy.yaml"
    file.write_text(yaml.safe_dump(CONFIG))
    return file


@pytest.fixture
def config(tmp_path, monkeypatch) -> Path:
    return written(tmp_path, monkeypatch)


def fit(config: Path, *words: str) -> int:
    return main(["fit", "--config", str(config), *words])


def weights(run: Path) -> dict[str, torch.Tensor]:
    return AtomicCheckpointIO().load_checkpoint(newest(run / "checkpoints"))["state_dict"]


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "explicit", "expected"),
    [
        ({}, None, "toy"),
        ({}, "mine", "mine"),
        ({"SLURM_JOB_ID": "71"}, None, "71"),
        ({"SLURM_JOB_ID": "71"}, "mine", "mine"),
        ({"SLURM_JOB_ID": "73", "SLURM_ARRAY_JOB_ID": "71", "SLURM_ARRAY_TASK_ID": "2"}, None, "71_2"),
        ({"SLURM_JOB_ID": "71", "SLURM_JOB_NAME": "bash"}, None, "toy"),
        ({"WANDB_RUN_ID": "k3x"}, None, "toy"),
        ({"WANDB_RUN_ID": "k3x", "WANDB_SWEEP_ID": "s"}, None, "toy-k3x"),
        ({"WANDB_RUN_ID": "k3x", "WANDB_SWEEP_ID": "s", "SLURM_JOB_ID": "71"}, None, "toy-k3x"),
    ],
)
def test_name_of_a_run(config, monkeypatch, environment, explicit, expected) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert runs.run_name(explicit, [Path("first.yaml"), config]) == expected


@pytest.mark.parametrize("name", ["", "a/b", "../up", "/tmp/x"])
def test_a_run_name_is_one_folder(name) -> None:
    with pytest.raises(UserError, match="single folder name"):
        runs.run_name(name, [])


# ---- resume ----------------------------------------------------------------------------------------------------------


def test_the_folder_of_a_finished_run(config, tmp_path, capsys) -> None:
    assert fit(config) == 0
    run = tmp_path / "runs" / "toy"
    assert {p.name for p in run.iterdir()} >= {
        "config.yaml",
        "env.json",
        "metrics.jsonl",
        "metrics.csv",
        "checkpoints",
        "finished",
        "report.md",
        "curves.png",
        "cost.json",
    }
    environment = json.loads((run / "env.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["starts"][0]["step"] == 0 and environment["hardware"]["cpus"] > 0
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["model"]["init_args"]["dropout"] == 0.1  # defaults included
    assert environment["config_hash"] == runs.config_hash(resolved)
    assert [line["step"] for line in logged(run)] == [1, 6, 11]
    banner = capsys.readouterr().out
    for part in ("toy.Toy", "1 micro-batches", "from the beginning", "seed 3", "0 of 12", "report.md"):
        assert part in banner

    assert fit(config) == 2
    error = capsys.readouterr().err
    assert "is finished" in error and "--run" in error and "--fresh" in error and "max_steps" in error


def test_a_longer_training_goes_on_as_if_it_had_been_asked_for(config, tmp_path, capsys) -> None:
    assert fit(config, "--run", "whole", "--trainer.max_steps", "20") == 0
    assert fit(config, "--run", "parts") == 0
    assert fit(config, "--run", "parts", "--trainer.max_steps", "20") == 0
    assert "step-00000012" in capsys.readouterr().out
    whole, parts = tmp_path / "runs" / "whole", tmp_path / "runs" / "parts"
    assert logged(whole) == logged(parts)
    a, b = weights(whole), weights(parts)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert json.loads((parts / "finished").read_text()) == {"step": 20}
    assert [s["step"] for s in json.loads((parts / "env.json").read_text())["starts"]] == [0, 12]


def test_another_config_is_refused_and_names_the_keys(config, tmp_path, capsys) -> None:
    assert fit(config) == 0
    before = (tmp_path / "runs" / "toy" / "config.yaml").read_text()
    assert fit(config, "--model.dropout", "0.2", "--model.common.seed", "4", "--trainer.max_steps", "30") == 2
    error = capsys.readouterr().err
    assert "model.init_args.dropout: 0.1 -> 0.2" in error and "model.init_args.common.seed: 3 -> 4" in error
    assert "max_steps:" not in error
    assert "--run" in error and "--fresh" in error
    assert (tmp_path / "runs" / "toy" / "config.yaml").read_text() == before


def test_fresh_moves_aside_and_deletes_nothing(config, tmp_path) -> None:
    for steps in ("4", "8", "12"):
        assert fit(config, "--fresh", "--trainer.max_steps", steps) == 0
    done = {p.name: json.loads((p / "finished").read_text())["step"] for p in (tmp_path / "runs").iterdir()}
    assert done == {"toy.1": 4, "toy.2": 8, "toy": 12}


def test_a_mirror_does_not_mix_two_trainings(config, tmp_path, capsys) -> None:
    place = tmp_path / "mirror"
    words = ["--checkpoints.mirror", str(place), "--trainer.max_steps"]
    assert fit(config, *words, "4") == 0
    assert fit(config, *words, "8") == 0  # goes on, and its copies with it
    copies = sorted(p.name for p in (place / "toy").iterdir())
    assert copies == ["step-00000004", "step-00000008"]
    assert fit(config, "--fresh", "--model.dropout", "0.2", *words, "4") == 2
    error = capsys.readouterr().err
    assert "checkpoints.mirror" in error and f"rename {place}/toy" in error and "--run OTHER_NAME" in error
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["toy"]  # nothing was moved aside
    (tmp_path / "runs" / "toy").rename(tmp_path / "lost")
    assert fit(config, "--model.dropout", "0.2", *words, "4") == 2
    (place / "toy").rename(place / "first")
    assert fit(config, "--model.dropout", "0.2", *words, "4") == 0
    assert [p.name for p in (place / "toy").iterdir()] == ["step-00000004"]


ELASTIC = "TORCHELASTIC_RESTART_COUNT"


def test_a_fresh_run_goes_on_when_its_launcher_starts_it_again(config, tmp_path, monkeypatch) -> None:
    """torchrun --max-restarts gives its workers the same command; 0 is their first start."""
    for count, steps in (("0", "4"), ("1", "8"), ("2", "12")):
        monkeypatch.setenv(ELASTIC, count)
        assert fit(config, "--fresh", "--trainer.max_steps", steps) == 0
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["toy"]
    starts = json.loads((tmp_path / "runs" / "toy" / "env.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 4, 8]


def test_what_goes_on_after_a_signal_is_told(config, tmp_path, monkeypatch, caplog) -> None:
    """The command as it was given, but for what it does once."""
    monkeypatch.setenv("SIGNAL_AT", "1 SIGTERM 0")
    callbacks = [{"class_path": "signals.SignalAt"}]
    config.write_text(yaml.safe_dump(CONFIG | {"trainer": CONFIG["trainer"] | {"callbacks": callbacks}}))
    for words, told in ((["--fresh"], "the same command without --fresh goes on"), ([], "the same command goes on")):
        assert fit(config, "--run", f"with{len(words)}", *words) == 0
        assert caplog.records[-1].getMessage().endswith(told)


def test_how_a_run_is_watched_may_change(config, tmp_path) -> None:
    assert fit(config, "--trainer.max_steps", "4") == 0
    assert (
        fit(config, "--checkpoints.keep", "1", "--samples.enabled", "false", "--trainer.val_check_interval", "7") == 0
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        assert fit(written(folder, patch)) == 0
    return folder / "runs" / "toy"


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [5, 8])
def test_a_killed_run_ends_like_one_that_was_not(whole, config, tmp_path, repo, kill_at) -> None:
    """SIGKILL within a checkpoint interval, and just after a checkpoint; W&B's offline files miss nothing either."""
    config.write_text(yaml.safe_dump(CONFIG | {"tracking": {"wandb": "offline"}}))
    environment = {**os.environ, "KILL_AT_STEP": str(kill_at), "PYTHONPATH": str(repo / "tests" / "helpers")}
    command = [sys.executable, str(repo / "train.py"), "fit", "--config", str(config)]
    killed = programs.run(command, cwd=tmp_path, env=environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = tmp_path / "runs" / "toy"
    assert not (run / "finished").exists()
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "los')  # a line that the kill cut off
    identity = (run / "wandb_id").read_text()
    resumed_from = json.loads((newest(run / "checkpoints") / "complete.json").read_text())["step"]
    assert resumed_from == (4 if kill_at == 5 else 8)

    assert fit(config) == 0
    assert logged(run) == logged(whole)
    a, b = weights(run), weights(whole)
    assert all(torch.equal(a[k], b[k]) for k in a)

    folders = sorted((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(f.name.endswith(identity) for f in folders)
    told = {row["trainer/global_step"]: row["critic/loss"] for row in history(run / "wandb") if "critic/loss" in row}
    expected = {line["step"]: line["critic/loss"] for line in logged(run)}
    assert told == pytest.approx(expected)


def test_what_a_run_cost_is_told_however_it_ends(config, tmp_path) -> None:
    file = tmp_path / "runs" / "toy" / "cost.json"
    with pytest.raises(NonFiniteError):
        fit(config, "--model.poison_step", "3", "--trainer.enable_progress_bar", "false", "--debug")
    broken = json.loads(file.read_text())
    assert (broken["steps"], broken["samples"]) == (3, 32) and broken["seconds"] > 0
    assert fit(config, "--fresh") == 0
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(broken))
    (file.parent / "finished").unlink()  # as after a kill behind the last save
    assert fit(config) == 0
    found = json.loads(file.read_text())
    assert {k: found[k] for k in ("steps", "samples", "processes")} == {"steps": 12, "samples": 96, "processes": 1}
    assert 0 < found["seconds"] <= whole["seconds"] + 0.1  # nothing was trained since


def test_the_checkpoint_carries_the_wandb_id(config, tmp_path) -> None:
    assert fit(config, "--trainer.max_steps", "4", "--tracking.wandb", "offline") == 0
    file = tmp_path / "runs" / "toy" / "wandb_id"
    identity = file.read_text()
    file.unlink()
    assert fit(config) == 0
    assert file.read_text() == identity


# ---- several processes -----------------------------------------------------------------------------------------------


def resolved(steps: int = 4) -> dict:
    return {"trainer": {"max_steps": steps}, "model": {"a": 1}, "data": {}}


def test_other_ranks_follow_rank_0(config, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "runs" / "x"
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_PROCID", "0")
    run = runs.begin(folder, resolved(), fresh=False)
    assert run.resume is None and run.step == 0
    monkeypatch.delenv(launch.HANDED_DOWN)  # the other processes of srun are no children of rank 0
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert runs.begin(folder, resolved(), fresh=True) == run
    assert not folder.with_name("x.1").exists()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")  # the word of an earlier start does not count
    with pytest.raises(UserError, match="Rank 0 did not say"):
        launch.hear(folder, timeout=0.5)


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0", "MASTER_PORT": "29500"}
LOGS = "TORCHELASTIC_ERROR_FILE"


def under(monkeypatch, **environment: str) -> str | None:
    """The token of a process that a launcher gives these variables."""
    with monkeypatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        return launch.token()


def test_every_start_of_torchrun_has_a_token_of_its_own(config, tmp_path, monkeypatch) -> None:
    one = {**TORCHRUN, "GROUP_WORLD_SIZE": "1"}
    first, other_rank, second = (
        under(monkeypatch, **one, **{LOGS: f"/tmp/torchelastic_a/none_{file}/error.json"})
        for file in ("x/attempt_0/0", "x/attempt_0/1", "y/attempt_0/0")
    )
    assert first == other_rank and first != second
    named = {**TORCHRUN, "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "run-7"}
    a, b = (under(monkeypatch, **named, **{LOGS: f"/tmp/{x}/run-7_{x}/attempt_0/0/error.json"}) for x in "ab")
    assert a == b is not None  # each machine has log folders of its own
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "1", "GROUP_WORLD_SIZE": "2"}
    restarts = [under(monkeypatch, **step, **{**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": n}) for n in "01"]
    assert restarts[0] != restarts[1]
    assert under(monkeypatch) is None


@pytest.mark.parametrize("several", [{"GROUP_WORLD_SIZE": "2", LOGS: "/tmp/a/none_x/attempt_0/0/error.json"}, {}])
def test_a_start_of_torchrun_without_a_name_is_refused(config, tmp_path, monkeypatch, several) -> None:
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "mine").touch()
    for name, value in {**TORCHRUN, "GROUP_WORLD_SIZE": "1", LOGS: "", **several}.items():
        monkeypatch.setenv(name, value)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(UserError, match=r"--standalone .* --rdzv-id NAME"):
            runs.begin(tmp_path / "runs" / "x", resolved(), fresh=True)
    assert (tmp_path / "runs" / "x" / "mine").exists()  # nothing was moved aside


def test_launched_processes_inherit_the_decision(config, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(launch.HANDED_DOWN, str(tmp_path / "checkpoint"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert runs.begin(tmp_path / "x", resolved(), fresh=True).resume == tmp_path / "checkpoint"
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_two_processes_train_one_run_and_one_goes_on(config, tmp_path, repo, monkeypatch) -> None:
    two = tmp_path / "two.yaml"
    strategy = {"class_path": "lightning_t2i.strategies.FSDP2", "init_args": {"replicate": 1, "shard": 2}}
    two.write_text(yaml.safe_dump({"base": "toy.yaml", "trainer": {"devices": 2, "strategy": strategy}}))
    assert fit(config, "--run", "two", "--trainer.max_steps", "2") == 0
    words = ["fit", "--config", str(two), "--fresh", "--trainer.max_steps", "8"]
    environment = {**os.environ, "PYTHONPATH": str(repo / "tests" / "helpers")}
    environment.pop(launch.HANDED_DOWN, None)
    command = [sys.executable, str(repo / "train.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("from the beginning") == 1
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["two", "two.1"]  # rank 0 alone moved it
    run = tmp_path / "runs" / "two"
    assert [line["step"] for line in logged(run)] == [1, 6]
    assert fit(config, "--run", "two") == 0
    assert [line["step"] for line in logged(run)] == [1, 6, 11]


# ---- validate, test, predict -----------------------------------------------------------------------------------------


def test_verbs_on_a_run_say_what_is_missing(config, capsys) -> None:
    assert main(["validate", "--run", "nothing"]) == 2
    assert "no such run" in capsys.readouterr().err
    assert main(["validate", "--config", str(config), "--run", "nothing"]) == 2
    assert "no complete checkpoint" in capsys.readouterr().err
    assert fit(config) == 0
    assert main(["validate", "--run", "toi"]) == 2
    assert "--run toy" in capsys.readouterr().err
    assert main(["validate", "--run", "toy"]) == 2
    assert "validation_step" in capsys.readouterr().err


def test_an_evaluation_tells_what_it_has_otherwise_than_its_run(config, tmp_path, monkeypatch) -> None:
    told: list[dict] = []

    class Noted(verbs.JsonlLogger):
        def __init__(self, *args, changes, **options):
            told.append(changes)
            super().__init__(*args, **options)

    monkeypatch.setattr(verbs, "JsonlLogger", Noted)
    assert fit(config, "--model.dropout", "0.2") == 0
    run, file = ["--run", "toy"], ["--config", str(config)]
    for words in (
        run,
        [*run, "--trainer.devices", "1", "--eval.n", "8"],  # where, and of how much: a score's name says that
        [*run, "--model.dropout", "0.3", "--ema", "0.6"],
        file,  # the run has another dropout
        [*file, "--model.dropout", "0.2", "--trainer.limit_val_batches", "2"],
        [*run, "--eval.networks.classifier", "other"],
    ):
        main(["validate", *words])
    dropout = "model.init_args.dropout"
    assert told == [
        {},
        {},
        {"--ema": "0.6", dropout: 0.3},
        {dropout: 0.1},
        {"trainer.limit_val_batches": 2},
        {"eval.networks.classifier": "other"},
    ]


def test_a_rehearsal_leaves_no_run(config, tmp_path) -> None:
    assert fit(config, "--trainer.fast_dev_run", "true") == 0
    assert not (tmp_path / "runs").exists()


def test_the_device_of_a_training_is_told_before_it(config, tmp_path, monkeypatch) -> None:
    """So that a GPU's multiplies float32 as the measured peak assumes."""
    devices: list[torch.device] = []
    monkeypatch.setattr(session, "use_tensor_cores", devices.append)
    assert fit(config, "--trainer.fast_dev_run", "true") == 0
    assert devices == [torch.device("cpu")]


def test_a_rehearsal_waits_for_nobody_and_leaves_nothing(config, tmp_path, monkeypatch) -> None:
    (tmp_path / "rehearsals").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "rehearsals"))
    monkeypatch.setattr(launch, "hear", lambda *_: pytest.fail("rank 0 writes into another folder"))
    monkeypatch.setenv("RANK", "1")
    assert fit(config, "--trainer.fast_dev_run", "true", "--checkpoints.form", "sharded") == 0
    assert list((tmp_path / "rehearsals").iterdir()) == []


def test_every_rank_evaluates_the_checkpoint_that_rank_0_chose(config, tmp_path, monkeypatch) -> None:
    chosen: list[Path | None] = []
    monkeypatch.setattr(verbs, "banner", lambda session, run, tracking: chosen.append(run.resume) or "")
    assert fit(config) == 0
    checkpoints = tmp_path / "runs" / "toy" / "checkpoints"
    del chosen[:]
    assert main(["validate", "--run", "toy"]) == 2  # the toy cannot
    monkeypatch.setenv("RANK", "1")
    assert main(["validate", "--run", "toy"]) == 2
    monkeypatch.setenv(launch.HANDED_DOWN, str(checkpoints / "step-00000008"))  # a save came between the two choices
    assert main(["validate", "--run", "toy"]) == 2
    assert chosen == [checkpoints / f"step-{step:08d}" for step in (12, 12, 8)]


def test_print_config_stops_before_the_run(config, tmp_path, capsys) -> None:
    assert fit(config, "--print_config", "--model.common.seed", "9") == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["common"]["seed"] == 9
    assert not (tmp_path / "runs").exists()


def test_help_of_a_method(config, capsys) -> None:
    assert main(["fit", "--help"]) == 0
    assert "--samples.every" in capsys.readouterr().out
    assert main(["fit", "--model.help", "toy.Toy"]) == 0
    assert "poison_step" in capsys.readouterr().out
