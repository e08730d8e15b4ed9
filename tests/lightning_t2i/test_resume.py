"""Kill -9 and run the same command again: the result is that of an uninterrupted run, bit for bit, on every mesh."""

import json
import os
import signal
import sys
from pathlib import Path

import programs
import pytest
import torch

from lightning_t2i.proof.compare import differences
from lightning_t2i.state_io import complete_checkpoints

STEPS = 14
MESHES = [(1, 1), (2, 1), (1, 2)]


def train(repo: Path, folder: Path, *arguments: object, killed: bool = False) -> None:
    """Runs the toy script; `killed` says that it must die of SIGKILL."""
    command = [sys.executable, str(repo / "tests/helpers/toy.py"), str(folder), "--steps", STEPS, *arguments]
    environment = {**os.environ, "PYTHONPATH": f"{repo}:{repo / 'tests/helpers'}", "OMP_NUM_THREADS": "1"}
    environment = {k: v for k, v in environment.items() if not k.startswith(("LOCAL_", "MASTER_", "PYTEST_"))}
    result = programs.run(command, env=environment, timeout=120)
    if killed:
        lost = [1] if 2 in arguments else []  # of two processes one may end because the other has
        assert result.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL, *lost), result.stderr
        assert not (folder / f"checkpoints/step-{STEPS:08d}").exists()
    else:
        assert result.returncode == 0, result.stdout + result.stderr


def state(folder: Path) -> dict:
    return torch.load(folder / f"checkpoints/step-{STEPS:08d}/state.pt", weights_only=True)


def compare(interrupted: Path, uninterrupted: Path) -> None:
    a, b = state(interrupted), state(uninterrupted)
    for key in ("state_dict", "t2i", "global_step", "ToyData"):
        assert differences(a[key], b[key]) == []
    for trace in uninterrupted.glob("trace-*.jsonl"):
        lines = {tuple(x[:2]): x[2] for x in map(json.loads, trace.read_text().splitlines())}
        again = {tuple(x[:2]): x[2] for x in map(json.loads, (interrupted / trace.name).read_text().splitlines())}
        assert again == lines  # the ids of every micro-batch, those repeated after the kill included


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, repo):
    """`uninterrupted(mesh, accumulate, further arguments ...)`: the folder of a run that nobody killed."""
    folders: dict[tuple, Path] = {}

    def run(mesh: tuple[int, int], accumulate: int, *more: object) -> Path:
        if (key := (mesh, accumulate, *more)) not in folders:
            folders[key] = tmp_path_factory.mktemp("uninterrupted")
            options = ["--replicate", mesh[0], "--shard", mesh[1], "--accumulate", accumulate, *more]
            train(repo, folders[key], *options)
        return folders[key]

    return run


# Checkpoints come at 4, 8 and 12, the generator's EMA starts at step 8.
# name -> step of the kill, whether a save is cut, micro-batches of a step
MOMENTS = {
    "between-checkpoints-before-EMA": (6, False, 1),
    "during-a-save": (8, True, 1),
    "at-a-boundary-after-EMA": (12, False, 1),
    "inside-an-accumulated-step": (10, False, 3),
}


# Copies do the same but for the moment that concerns rank 0 alone, and for gradients that are not averaged yet.
@pytest.mark.parametrize(
    ("mesh", "kill", "in_save", "accumulate"),
    [
        pytest.param(mesh, *moment, id=f"{name}-{mesh[0]}x{mesh[1]}")
        for name, moment in MOMENTS.items()
        for mesh in MESHES
        if mesh != (2, 1) or name in ("during-a-save", "inside-an-accumulated-step")
    ],
)
def test_killed_run_equals_uninterrupted_run(tmp_path, repo, uninterrupted, mesh, kill, in_save, accumulate):
    options = ["--replicate", mesh[0], "--shard", mesh[1], "--accumulate", accumulate]
    train(repo, tmp_path, *options, "--kill", kill, *(["--kill-in-save"] if in_save else []), killed=True)
    assert complete_checkpoints(tmp_path / "checkpoints")  # what was complete before the kill still is
    train(repo, tmp_path, *options)
    compare(tmp_path, uninterrupted(mesh, accumulate))
    assert not list((tmp_path / "checkpoints").glob(".*"))  # a half-written folder is cleaned up


def test_one_and_two_processes_agree(uninterrupted):
    """Equal global batch, no dropout: the three meshes differ by summation order alone."""
    reference, *others = (state(uninterrupted(mesh, 1, "--dropout", 0))["state_dict"] for mesh in MESHES)
    for other in others:
        for name, tensor in other.items():
            torch.testing.assert_close(tensor, reference[name], rtol=1e-4, atol=1e-5)


def test_a_checkpoint_moves_between_meshes(tmp_path, repo, uninterrupted):
    """1x1 -> 1x2 -> 2x1: optimizer states and EMA are keyed by name and hold whole tensors."""
    straight, moved = uninterrupted((1, 1), 1, "--dropout", 0), tmp_path / "moved"
    train(repo, moved, "--dropout", 0, "--kill", 6, killed=True)
    train(repo, moved, "--dropout", 0, "--kill", 10, "--shard", 2, killed=True)
    train(repo, moved, "--dropout", 0, "--replicate", 2)
    for name, tensor in state(straight)["state_dict"].items():
        torch.testing.assert_close(state(moved)["state_dict"][name], tensor, rtol=1e-4, atol=1e-5)


def test_adapter_checkpoint_of_a_sharded_run_resumes(tmp_path, repo):
    options = ["--lora", "--shard", 2]
    train(repo, tmp_path / "whole", *options)
    train(repo, tmp_path / "killed", *options, "--kill", 9, killed=True)
    train(repo, tmp_path / "killed", *options)
    compare(tmp_path / "killed", tmp_path / "whole")
