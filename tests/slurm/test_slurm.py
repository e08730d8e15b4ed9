"""The shipped job scripts on a real controller: several nodes, preemption and requeue, arrays, failures, evaluation."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from slurm_cluster import Cluster, until
from wandb_reader import history, records

from lightning_t2i.loggers import read_lines
from lightning_t2i.proof.compare import differences, final_state, logged
from lightning_t2i.state_io import complete_checkpoints

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

STEPS = 24


class Place:
    """A folder with the configs of the toy, one for a process and one for two nodes, and its runs."""

    def __init__(self, folder: Path, repo: Path):
        self.folder, self.runs = folder, folder / "runs"
        config = {
            "model": {"class_path": "signals.Scored", "init_args": {"common": {"accumulate": 2, "log_every": 1}}},
            "data": {"class_path": "signals.ScoredData"},
            "trainer": {"accelerator": "cpu", "max_steps": STEPS, "limit_val_batches": 0},
            "throughput": {"enabled": False},
            "checkpoints": {"every": 0},
        }
        config["trainer"]["callbacks"] = [{"class_path": f"signals.{name}"} for name in ("Pace", "SignalAt")]
        (folder / "toy.yaml").write_text(yaml.safe_dump(config))
        mesh = {"class_path": "lightning_t2i.strategies.FSDP2", "init_args": {"replicate": 1, "shard": None}}
        (folder / "sharded.yaml").write_text(yaml.safe_dump({"base": "toy.yaml", "trainer": {"strategy": mesh}}))
        self.variables = {"LIGHTNING_T2I_RUNS": str(self.runs), "PYTHONPATH": str(repo / "tests/helpers")}
        self.variables |= {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}

    def fit(self, config: str = "toy.yaml", *words: str) -> list[str]:
        return ["fit", "--config", str(self.folder / config), *words]


@pytest.fixture(scope="module")
def place(repo, tmp_path_factory) -> Place:
    return Place(tmp_path_factory.mktemp("place"), repo)


@pytest.fixture(scope="module")
def whole(cluster: Cluster, place: Place) -> Path:
    """The run of two nodes that nobody interrupted."""
    job = cluster.submit("nodes.sbatch", *place.fit("sharded.yaml", "--run", "whole"), **place.variables)
    cluster.ends(job)
    return place.runs / "whole"


def steps(run: Path) -> list[int]:
    return [int(p.name.removeprefix("step-")) for p in complete_checkpoints(run / "checkpoints")]


def starts(run: Path) -> list[int]:
    return [start["step"] for start in json.loads((run / "env.json").read_text())["starts"]]


def test_two_nodes_train_one_run(cluster, whole) -> None:
    assert steps(whole) == [STEPS] and starts(whole) == [0]
    assert [line["step"] for line in logged(whole)] == list(range(1, STEPS + 1, 5))  # when both networks learn
    counters = final_state(whole)["t2i"]["counters"]
    assert counters == {"step": STEPS, "micro": 0, "batches": 2 * STEPS, "samples": 16 * STEPS}
    output = next(text for f in cluster.folder.glob("*.out") if "(replicate, shard)" in (text := f.read_text()))
    assert "0:  strategy  FSDP2 on 2 x cpu (replicate, shard) = (1, 2)" in output
    assert output.count("from the beginning") == 1


def test_a_preempted_job_is_requeued_and_ends_as_if_nothing_had_happened(cluster, place, whole) -> None:
    """Weights, EMA, optimizer states and logged losses bit for bit, one W&B run; the run is named by the job."""
    words = place.fit("sharded.yaml", "--fresh")  # which a second start must not take as an order to begin again
    job = cluster.submit("nodes.sbatch", *words, STEP_SECONDS="0.1", **place.variables)
    run = place.runs / job
    until(lambda: len(read_lines(run / "metrics.jsonl")) > 2, 90, "eleven steps", lambda: cluster.told(job))
    cluster.ask("scancel", "--signal=USR1", job)
    cluster.goes_on(job)
    (stopped,) = steps(run)
    assert 10 < stopped < STEPS and not (run / "finished").exists()
    output = cluster.ends(job)
    assert output.count(f"SIGUSR1: stopped and saved after training step {stopped}; the job is requeued") == 1
    assert output.count(f"Job {job} is requeued") == 1 and "Traceback" not in output
    assert cluster.fact(job, "Restarts") == "1" and starts(run) == [0, stopped]
    assert steps(run) == [stopped, STEPS] and (run / "finished").exists()
    assert [p.name for p in place.runs.glob(f"{job}*")] == [job]

    assert differences(final_state(run), final_state(whole)) == []
    assert logged(run) == logged(whole)
    folders = sorted((run / "wandb").glob("offline-run-*"))
    identity = (run / "wandb_id").read_text()
    assert len(folders) == 2 and all(f.name.endswith(f"-{identity}") for f in folders)
    kinds = [r.WhichOneof("record_type") for r in records(folders[0] / f"run-{identity}.wandb")]
    assert "preempting" in kinds and "exit" in kinds
    rows = {row["trainer/global_step"]: row["critic/loss"] for row in history(run / "wandb") if "critic/loss" in row}
    assert rows == pytest.approx({line["step"]: line["critic/loss"] for line in logged(whole)})


def test_tasks_of_an_array_are_runs_of_their_own_and_requeued_alone(cluster, place) -> None:
    words = place.fit("toy.yaml", "--model.common.seed", "%a")
    job = cluster.submit("array.sbatch", *words, options=["--array=1-2"], STEP_SECONDS="0.1", **place.variables)
    one, two = (place.runs / f"{job}_{task}" for task in (1, 2))
    until(lambda: len(read_lines(one / "metrics.jsonl")) > 1, 90, "six steps", lambda: cluster.told(f"{job}_1"))
    cluster.ask("scancel", "--signal=USR1", f"{job}_1")
    cluster.goes_on(f"{job}_1")
    assert f"Job {job}_1 is requeued" in cluster.ends(f"{job}_1")
    assert "SIGUSR1" not in cluster.ends(f"{job}_2")
    assert [cluster.fact(f"{job}_{task}", "Restarts") for task in (1, 2)] == ["1", "0"]
    assert len(starts(one)) == 2 and len(starts(two)) == 1
    for task, run in ((1, one), (2, two)):
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert config["model"]["init_args"]["common"]["seed"] == task
        assert json.loads((run / "finished").read_text()) == {"step": STEPS}


def test_a_cancelled_job_is_saved_and_not_requeued(cluster, place) -> None:
    """SIGTERM reaches W&B's service too, which dies of it."""
    job = cluster.submit("node.sbatch", *place.fit(), STEP_SECONDS="0.1", **place.variables)
    run = place.runs / job
    until(lambda: len(read_lines(run / "metrics.jsonl")) > 1, 90, "six steps", lambda: cluster.told(job))
    cluster.ask("scancel", job)
    cluster.ends(job, "CANCELLED")
    until(lambda: len(steps(run)) == 1, 20, "a checkpoint")
    until(lambda: "SIGTERM: stopped and saved after training step" in cluster.output(job), 20, "SIGTERM")
    assert steps(run)[0] < STEPS and cluster.fact(job, "Restarts") == "0"


@pytest.mark.parametrize(
    ("happens", "first"),
    [("SIGKILL", r"0:"), ("error", r"1:")],
    ids=["killed", "raises"],
)
def test_a_task_that_fails_ends_the_job_with_the_first_traceback(cluster, place, happens, first) -> None:
    """Rank 1 is killed, and rank 0 cannot go on; or rank 1 raises, and its error is the first that the output has."""
    words = place.fit("sharded.yaml", "--tracking.wandb", "off")
    job = cluster.submit("nodes.sbatch", *words, SIGNAL_AT=f"4 {happens} 1", **place.variables)
    output = cluster.ends(job, "FAILED", 90)  # of the two minutes and more that a collective call would wait
    tracebacks = [line for line in output.splitlines() if "Traceback (most recent call last)" in line]
    assert tracebacks and tracebacks[0].startswith(first), output
    assert ("ArithmeticError: broken on purpose" in output) == (happens == "error")
    assert not (place.runs / job / "finished").exists()


def test_evaluation_follows_a_run_to_its_end(cluster, place) -> None:
    """The training waits after its first checkpoint until that one is evaluated; the last one always is."""
    run = place.runs / "followed"
    words = ["followed", "--trainer.limit_val_batches", "1"]
    beside = cluster.submit("validate.sbatch", *words, LIGHTNING_T2I_POLL="1", **place.variables)
    variables = place.variables | {"WAIT_AT": f"10 {run / 'validated'}"}
    words = place.fit("toy.yaml", "--run", "followed", "--checkpoints.every", "8", "--tracking.wandb", "off")
    training = cluster.submit("node.sbatch", *words, **variables)
    cluster.ends(beside)
    cluster.ends(training)
    assert (run / "validated").read_text().split() == ["step-00000008", f"step-{STEPS:08d}"]
    values = {line["step"]: line["val/size"] for line in read_lines(run / "validate.jsonl")}
    assert list(values) == [8, STEPS] and values[8] != values[STEPS]


def test_nothing_of_the_machine_is_in_the_scripts(repo) -> None:
    """Each script asks for what the promises need; what differs from cluster to cluster is left to the command line."""
    for script in (repo / "slurm").glob("*.sbatch"):
        directives = [line.split()[1] for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
        names = {d.partition("=")[0] for d in directives}
        assert {"--requeue", "--open-mode", "--nodes", "--ntasks-per-node"} <= names
        assert ("--signal=USR1@120" in directives) == (script.name != "validate.sbatch")
        assert not names & {"--partition", "--account", "--gpus", "--gres", "--time", "--mem", "--chdir", "--output"}
        assert os.access(script, os.X_OK)
