"""Shared set-up of the tests: one thread, nothing from the network, seeded, and a runner for several processes."""

from __future__ import annotations

import os

# Before torch, wandb and huggingface_hub are imported, so that plain `pytest` behaves as `./run test` does.
for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "MPLBACKEND": "Agg",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(_name, _value)

import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent

LAUNCH = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests come first, so that no process waits at the end for another one's."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(autouse=True)
def _seeded_and_single_threaded() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_process_group_is_left() -> Iterator[None]:
    """A training in this process by FSDP2 says where its group meets, and later children would go there and wait."""
    before = {name: os.environ.get(name) for name in LAUNCH}
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture
def ranks(tmp_path: Path) -> Callable[..., list[Any]]:
    """`ranks(function, *arguments, world=2)` calls `function(rank, *arguments)` in `world` gloo processes.

    The function stands at the top level of the test file. Arguments and results are what `torch.load` reads with
    weights_only: tensors, numbers, strings, None and containers of them. Returns the results in the order of ranks;
    the output of a failing process becomes the failure message.
    """
    calls = 0

    def call(function: Callable[..., Any], *arguments: Any, world: int = 2, timeout: float = 240) -> list[Any]:
        nonlocal calls
        folder = tmp_path / f"ranks-{calls}"
        calls += 1
        folder.mkdir()
        torch.save(arguments, folder / "arguments.pt")
        source = inspect.getsourcefile(function)
        command = [sys.executable, ROOT / "tests" / "helpers" / "rank.py", source, function.__name__, folder]
        logs = [folder / f"log-{rank}.txt" for rank in range(world)]
        processes = []
        for rank, log in enumerate(logs):
            environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            with log.open("w") as stream:
                processes.append(
                    programs.Popen(command, env=environment, cwd=tmp_path, stdout=stream, stderr=subprocess.STDOUT)
                )
        try:
            codes = [process.wait(timeout) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if any(codes):
            pytest.fail("\n".join(f"rank {i} ended with {c}:\n{logs[i].read_text()}" for i, c in enumerate(codes)))
        return [torch.load(folder / f"result-{rank}.pt", weights_only=True) for rank in range(world)]

    return call
