"""A training step under the strategy FSDP2 with one process against a plain one: what the one execution path costs.

Both train equal networks of 12 blocks through the engine, in two Trainers of one process that take turns: blocks of
`BLOCK` steps, so that both meet the same state of the machine. A ratio is that of the two blocks of a pair; the table
has the median over all pairs with its quartiles, of wall time and of processor time, which other work on the machine
does not lengthen. The bar is 1.05 from 50 ms on.

In float32 one process has nothing to cut, and its networks stay plain. In bfloat16 they are wrapped, for the float32
copies of the weights; the rows "wrapped" have float32 networks with these wrappers, which copy every weight and every
gradient once more. On a GPU the wrappers' own work runs ahead of the computation; that was not measured.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from benchmarks.running import quartiles
from benchmarks.step_overhead import WARM_UP, WIDTH, Ours, Stack, batches, train
from lightning_t2i.cli.session import quiet
from lightning_t2i.strategies import FSDP2
from lightning_t2i.strategies.fsdp2 import mesh_of

BLOCKS, BLOCK, BAR = 12, 10, 1.05
COLUMNS = [
    ["networks", ""], ["layers", "d"], ["plain, ms", ".1f"], ["FSDP2, ms", ".1f"], ["FSDP2 / plain", ".3f"],
    ["lower quartile", ".3f"], ["upper quartile", ".3f"], ["processor time, FSDP2 / plain", ".3f"],
    ["lower quartile of it", ".3f"], ["upper quartile of it", ".3f"], ["pairs", "d"], ["at most 1.05", ""],
]  # fmt: skip


class Block(nn.Module):
    """`depth` residual convolutions."""

    def __init__(self, depth: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(depth))

    def forward(self, h: Tensor) -> Tensor:
        for layer in self.layers:
            h = h + layer(nn.functional.silu(h))
        return h


class Blocks(Stack):
    """A stack whose convolutions come in blocks, as many as a transformer of middle size has."""

    _no_split_modules = ["Block"]

    def __init__(self, depth: int):
        super().__init__(0)
        self.blocks = nn.ModuleList(Block(depth) for _ in range(BLOCKS))


class Wrapped(Ours):
    """The same training in networks that FSDP2 holds."""

    def configure_model(self) -> None:
        super().configure_model()
        backbone: Any = self.denoiser.backbone
        for module in (*backbone.blocks, backbone):
            fully_shard(module, mesh=mesh_of(self), reshard_after_forward=True)


class Baton(L.Callback):
    """Stops its Trainer after each block until the other's is done; keeps (wall, processor) seconds of its blocks."""

    def __init__(self, mine: threading.Semaphore, theirs: threading.Semaphore, blocks: int, leads: bool):
        self.mine, self.theirs, self.blocks, self.leads = mine, theirs, blocks, leads
        self.taken: list[tuple[float, float]] = []
        self._start = (0.0, 0.0)

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.mine.acquire()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *unused: Any) -> None:
        done = pl_module.counters.step - WARM_UP
        if done < 0 or done % BLOCK:
            return
        if done:
            self.taken.append((time.perf_counter() - self._start[0], time.process_time() - self._start[1]))
        self.theirs.release()
        if self.leads or len(self.taken) < self.blocks:
            self.mine.acquire()
        self._start = time.perf_counter(), time.process_time()


def compare(method: type[Ours], depth: int, pairs: int) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """((wall, processor) of FSDP2, of plain) seconds per step of each pair of blocks."""
    data, network = batches(8), Blocks(depth)
    turn = [threading.Semaphore(1), threading.Semaphore(0)]
    steps = WARM_UP + pairs * BLOCK
    sharded, plain = Baton(turn[0], turn[1], pairs, leads=True), Baton(turn[1], turn[0], pairs, leads=False)

    def run_plain(folder: Path) -> None:
        try:
            train(Ours(copy.deepcopy(network)), data, steps, [plain], folder)
        finally:
            turn[0].release(pairs + 2)  # an error of this side must not leave the other one waiting

    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        thread = threading.Thread(target=run_plain, args=[Path(other)], daemon=True)
        thread.start()
        train(method(network), data, steps, [sharded], Path(one), strategy=FSDP2(1, 1))
        thread.join()
    per_step = [[(wall / BLOCK, used / BLOCK) for wall, used in baton.taken] for baton in (sharded, plain)]
    return list(zip(*per_step, strict=True))


def row(method: type[Ours], depth: int, pairs: int) -> list[Any]:
    found = compare(method, depth, pairs)
    cells: list[float] = []
    for kind in (0, 1):
        ratios = [ours[kind] / plain[kind] for ours, plain in found]
        low, middle, high = quartiles(ratios)
        cells += [middle, low, high]
    ms = [1000 * statistics.median(pair[k][0] for pair in found) for k in (1, 0)]
    return [
        "wrapped" if method is Wrapped else "plain",
        BLOCKS * depth,
        *ms,
        *cells,
        len(found),
        "yes" if cells[0] <= BAR else "no",
    ]


def measure(quick: bool = False) -> dict[str, Any]:
    """Steps of about 50 and 150 ms; quick: one pair of a small one."""
    quiet()
    rows = (
        [row(kind, 1, 1) for kind in (Ours, Wrapped)]
        if quick
        else [row(Ours, 6, 20), row(Ours, 18, 10), row(Wrapped, 6, 10)]
    )
    return {"title": "FSDP2 with one process", "tables": [{"columns": COLUMNS, "rows": rows}]}
