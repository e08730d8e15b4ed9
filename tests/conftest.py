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

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent

LAUNCH = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")

# Runs one function of a test file in one process of a gloo group. Test files are no modules, so the file is loaded
# by its path; the group meets in a file, so that tests that run side by side never share a port.
_RANK_PROGRAM = """
import datetime, importlib.util, sys
import torch
import torch.distributed as dist

source, name, arguments, rank, world, folder = sys.argv[1:]
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("ranked_test_file", source)
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=int(rank), world_size=int(world),
                        timeout=datetime.timedelta(seconds=120))
torch.manual_seed(int(rank))
result = getattr(module, name)(int(rank), *torch.load(arguments, weights_only=True))
torch.save(result, f"{folder}/result-{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


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
        command = [sys.executable, "-c", _RANK_PROGRAM, str(source), function.__name__, str(folder / "arguments.pt")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")])}
        logs = [(folder / f"log-{rank}.txt") for rank in range(world)]
        processes = []
        for rank, log in enumerate(logs):
            variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            with log.open("w") as stream:
                processes.append(
                    subprocess.Popen(
                        [*command, str(rank), str(world), str(folder)],
                        env={**environment, **variables},
                        cwd=tmp_path,
                        stdout=stream,
                        stderr=subprocess.STDOUT,
                    )
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
