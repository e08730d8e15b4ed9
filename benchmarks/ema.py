"""An update of the averages on local shards against one that gathers whole tensors.

Two gloo processes hold a stack of linear layers that is cut over both. "shards" is `lightning_t2i.ema`: each process
moves its part of each average. "gathered" is what an average beside a sharded network costs where it knows nothing of
shards: every process gathers each weight and moves its own whole copy. The two take turns; a ratio is that of two
neighbours, and the bar is 10. Memory is what a process keeps between updates, and what one gathers in an update.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from benchmarks.running import quartiles
from lightning_t2i.ema import Averages
from lightning_t2i.options import EMAOptions
from lightning_t2i.strategies import shard_network

WORLD, WIDTH, DEPTH, DECAY, BAR = 2, 1024, 24, 0.999, 10
SEVERAL = EMAOptions([DECAY, 0.9999], warmup=False, sigma_rel=[0.05, 0.1])
COLUMNS = [
    ["averages", "d"], ["weights, MB", ".0f"], ["shards, ms", ".1f"], ["gathered, ms", ".1f"],
    ["gathered / shards", ".1f"], ["lower quartile", ".1f"], ["upper quartile", ".1f"], ["turns", "d"],
    ["at least 10", ""], ["shards keep, MB a process", ".0f"], ["gathered keep, MB a process", ".0f"],
    ["gathered in an update, MB a process", ".0f"],
]  # fmt: skip


class Gathered:
    """Averages in whole tensors, which every process keeps."""

    def __init__(self, weights: list[Tensor], decays: list[float]):
        self.averages = [[_whole(w) for w in weights] for _ in decays]
        self.decays, self.moved = decays, 0

    @torch.no_grad()
    def update(self, weights: list[Tensor]) -> None:
        self.moved = 0
        for k, weight in enumerate(weights):
            whole = _whole(weight)
            self.moved += whole.nbytes
            for average, decay in zip(self.averages, self.decays, strict=True):
                average[k].lerp_(whole, 1 - decay)


def _whole(weight: Tensor) -> Tensor:
    assert isinstance(weight, DTensor)
    return weight.detach().full_tensor()


def _kept(tensors: list[list[Tensor]]) -> int:
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for part in tensors for t in part)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)


class Stack(nn.Module):
    _no_split_modules = ["Block"]

    def __init__(self, depth: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))


def contest(depth: int, options: EMAOptions, turns: int) -> list[Any]:
    """The row of one process: seconds of both ways in turn, and bytes."""
    network = Stack(depth)
    ours = Averages("ema", network, [name for name, _ in network.named_parameters()], options)
    mesh = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("replicate", "shard"))
    for member in (network, ours.twin):
        shard_network(member, mesh)
    weights: list[Tensor] = list(network.parameters())
    theirs = Gathered(weights, [profile.decay(0) for profile in ours.profiles])
    taken: list[tuple[float, float]] = []
    for step in range(turns + 1):
        marks = []
        for update in (lambda step=step: ours.update(weights, step), lambda: theirs.update(weights)):
            dist.barrier()
            start = time.perf_counter()
            update()
            marks.append(time.perf_counter() - start)
        taken.append((marks[0], marks[1]))
    taken = taken[1:]  # the first touches new memory
    ratios = [b / a for a, b in taken]
    low, middle, high = quartiles(ratios)
    ms = [1000 * statistics.median(values) for values in zip(*taken, strict=True)]
    count, size = len(ours.profiles), sum(w.numel() * w.element_size() for w in weights)
    memory = [_kept([ours.first, *ours.others]) / 1e6, _kept(theirs.averages) / 1e6, theirs.moved / 1e6]
    return [count, size / 1e6, *ms, middle, low, high, turns, "yes" if middle >= BAR else "no", *memory]


def _process(rank: int, folder: str, depth: int, turns: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    rows = [contest(depth, options, turns) for options in (EMAOptions(DECAY, warmup=False), SEVERAL)]
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def measure(quick: bool = False) -> dict[str, Any]:
    """A row for one average and one for four; quick: a small network, once."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, 2, 1) if quick else (folder, DEPTH, 20)
        torch.multiprocessing.spawn(_process, arguments, nprocs=WORLD)
        rows = json.loads((Path(folder) / "rows.json").read_text())
    return {"title": "Averages on shards", "tables": [{"columns": COLUMNS, "rows": rows}]}
