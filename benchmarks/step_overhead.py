"""Time of our training step against a bare PyTorch loop on the same network, data and optimizer.

    python -m benchmarks.step_overhead [--targets 5 20 50] [--pairs 20] [--block 10] [--repeats 3]

Both train a stack of convolutions on [4, 4, 8, 8] latents with the DDPM noise loss, AdamW and the gradient clipped to
norm 1. The bare loop draws with torch.randn and logs nothing. Ours is a MethodModule in Lightning's Trainer as train.py
builds it, with keyed draws, the check for finite losses, throughput counters and a line in metrics.jsonl every ten
training steps; it draws no progress bar and no pictures and saves nothing.

The two run in one process, in blocks of `block` steps that take turns, so that both meet the same state of the machine.
A ratio is that of the two blocks of a pair; the table has the median over all pairs of all repeats and its quartiles.
The depth of the stack is chosen so that a step of the bare loop takes about as long as `targets` say.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from benchmarks.rendering import tables
from benchmarks.running import quartiles
from callbacks.throughput import Throughput, ThroughputOptions
from lightning_t2i.batch import Batch, Records
from lightning_t2i.cli.session import TRAINER_DEFAULTS, quiet
from lightning_t2i.keys import Keys
from lightning_t2i.loggers import Clock, JsonlLogger
from lightning_t2i.method import MethodModule
from lightning_t2i.networks.denoiser import Denoiser
from lightning_t2i.options import GroupOptions, MethodOptions
from lightning_t2i.processes import DDPM, Uniform
from lightning_t2i.state_io import AtomicCheckpointIO
from lightning_t2i.strategies import FSDP2

BATCH, SHAPE, WIDTH, CLIP = 4, (4, 8, 8), 64, 1.0  # about the work per picture of the tiny teacher
WARM_UP = 5  # steps before the first block: allocation, caches, optimizer states


class Stack(nn.Module):
    """`depth` residual 3x3 convolutions between two others; the time is added to every channel."""

    def __init__(self, depth: int):
        super().__init__()
        self.inside, self.outside = nn.Conv2d(SHAPE[0], WIDTH, 3, padding=1), nn.Conv2d(WIDTH, SHAPE[0], 3, padding=1)
        self.time = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor, cond: None = None) -> Tensor:
        h = self.inside(x) + self.time(t[:, None] / 1000)[:, :, None, None]
        for block in self.blocks:
            h = h + block(nn.functional.silu(h))
        return self.outside(h)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4)


def batches(count: int) -> list[Batch]:
    """Micro-batches that lie in memory; the loader has a benchmark of its own."""
    positions = torch.arange(count * BATCH)
    latents = Keys(0).normal("data", positions, SHAPE)
    return [
        {"main": Records(id=p, position=p, latent=x, cursor=k + 1)}
        for k, (p, x) in enumerate(zip(positions.split(BATCH), latents.split(BATCH), strict=True))
    ]


class Ours(MethodModule):
    """The benchmark's network, trained by the engine."""

    def __init__(self, network: Stack):
        super().__init__(MethodOptions(log_every=10))
        self.stack, self.law = [network], Uniform()

    def configure_model(self) -> None:
        self.add_group("denoiser", Denoiser(self.stack[0], DDPM(), "eps"), GroupOptions(adamw, clip=CLIP))

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        main, denoiser = batch["main"], self.denoiser
        t = self.law(denoiser.process, self.keys, main.position)
        eps = self.keys.normal("eps", main.position, SHAPE)
        x_t = denoiser.process.add_noise(main.latent, eps, t)
        self.backward("denoiser", (denoiser(x_t, t) - denoiser.target(main.latent, eps, t)).square().mean())


class Bare:
    """The same training as one would write it in a script."""

    def __init__(self, network: Stack):
        self.network, self.optimizer = network, adamw(network.parameters())
        abar = DDPM().alphas_cumprod
        self.alpha, self.sigma = abar.sqrt().view(-1, 1, 1, 1), (1 - abar).sqrt().view(-1, 1, 1, 1)

    def step(self, x0: Tensor, t: Tensor | None = None, eps: Tensor | None = None) -> None:
        """One update; `t` and `eps` are drawn unless they are given."""
        t = torch.randint(1000, (len(x0),)) if t is None else t
        eps = torch.randn_like(x0) if eps is None else eps
        loss = (self.network(self.alpha[t] * x0 + self.sigma[t] * eps, t) - eps).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), CLIP)
        self.optimizer.step()


class Data(L.LightningDataModule):
    """Hands out the batches again and again, moved as `datamodules.streams.Streams` moves them."""

    def __init__(self, found: list[Batch]):
        super().__init__()
        self.found = found

    def train_dataloader(self) -> Iterator[Batch]:
        return Endless(self.found)  # type: ignore[return-value]

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return {name: records.to(device) for name, records in batch.items()}


class Endless:
    def __init__(self, found: list[Batch]):
        self.found = found

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield from self.found


class TakeTurns(L.Callback):
    """After each block of the Trainer's steps, lets the bare loop do as many; keeps the seconds of both."""

    def __init__(self, bare: Callable[[int], None], block: int):
        self.bare, self.block = bare, block
        self.pairs: list[tuple[float, float]] = []  # seconds of a block: ours, bare
        self._start = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *unused: Any) -> None:
        done = pl_module.counters.step - WARM_UP
        if done < 0 or done % self.block:
            return
        now = time.perf_counter()
        self.bare(self.block if done else WARM_UP)
        middle = time.perf_counter()
        if done:
            self.pairs.append((now - self._start, middle - now))
        self._start = time.perf_counter()


def train(
    module: Ours,
    data: list[Batch],
    steps: int,
    callbacks: list[L.Callback],
    folder: Path,
    strategy: FSDP2 | None = None,
) -> None:
    """Fits with a Trainer that is set up as train.py sets it up."""
    trainer = L.Trainer(
        **TRAINER_DEFAULTS,
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        default_root_dir=folder,
        logger=False,
        strategy=strategy or "auto",
        plugins=None if strategy else [AtomicCheckpointIO()],
        callbacks=[Throughput(ThroughputOptions(flops=False)), *callbacks],
    )
    trainer.loggers = [JsonlLogger(folder / "metrics.jsonl", clock=Clock(trainer))]
    trainer.fit(module, Data(data))


def compare(depth: int, pairs: int, block: int) -> list[tuple[float, float]]:
    """Seconds per step (ours, bare) of each pair of blocks, in one run of the Trainer."""
    data, network = batches(8), Stack(depth)
    bare, source = Bare(copy.deepcopy(network)), iter(Endless(data))

    def run_bare(steps: int) -> None:
        for _ in range(steps):
            bare.step(next(source)["main"].latent)

    turns = TakeTurns(run_bare, block)
    with tempfile.TemporaryDirectory() as folder:
        train(Ours(network), data, WARM_UP + pairs * block, [turns], Path(folder))
    return [(ours / block, bare_ / block) for ours, bare_ in turns.pairs]


def seconds_of_bare(depth: int, steps: int = 10) -> float:
    """Median seconds of a step of the bare loop."""
    bare, x0, taken = Bare(Stack(depth)), batches(1)[0]["main"].latent, []
    for _ in range(steps + WARM_UP):
        start = time.perf_counter()
        bare.step(x0)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[WARM_UP:])


def depth_for(milliseconds: float) -> int:
    """The depth at which the bare step takes about that long: time grows linearly with depth."""
    shallow, deep = 2, 16
    low, high = seconds_of_bare(shallow), seconds_of_bare(deep)
    return max(1, round(shallow + (milliseconds / 1000 - low) * (deep - shallow) / max(high - low, 1e-6)))


def seconds_of_draws(steps: int = 20) -> float:
    """Median seconds of a training step's keyed draws, which are part of ours."""
    positions, law, process, taken = torch.arange(BATCH), Uniform(), DDPM(), []
    for step in range(steps):
        start = time.perf_counter()
        law(process, Keys(0, step), positions)
        Keys(0, step).normal("eps", positions, SHAPE)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def row(depth: int, repeats: int, pairs: int, block: int) -> list[float]:
    """One line of the table."""
    found = [pair for _ in range(repeats) for pair in compare(depth, pairs, block)]
    ours, bare = (1000 * statistics.median(values) for values in zip(*found, strict=True))
    ratios = [a / b for a, b in found]
    low, middle, high = quartiles(ratios)
    return [depth, bare, ours, middle, low, high, 1000 * seconds_of_draws(), len(found)]


def result(depths: list[int], repeats: int, pairs: int, block: int) -> dict[str, Any]:
    columns = [["depth", "d"], ["bare, ms", ".2f"], ["ours, ms", ".2f"], ["ours / bare", ".3f"]]
    columns += [["lower quartile", ".3f"], ["upper quartile", ".3f"], ["keyed draws, ms", ".2f"], ["pairs", "d"]]
    rows = [row(depth, repeats, pairs, block) for depth in depths]
    return {"title": "A training step against a bare loop", "tables": [{"columns": columns, "rows": rows}]}


def measure(quick: bool = False) -> dict[str, Any]:
    """Our step against a bare loop's at three sizes."""
    quiet()
    if quick:
        return result([1], repeats=1, pairs=2, block=2)
    return result([depth_for(milliseconds) for milliseconds in (5, 20, 50)], repeats=3, pairs=20, block=10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=float, nargs="+", default=[5, 20, 50], help="milliseconds of a bare step")
    parser.add_argument("--pairs", type=int, default=20, help="pairs of blocks in a run of the Trainer")
    parser.add_argument("--block", type=int, default=10, help="steps of a block")
    parser.add_argument("--repeats", type=int, default=3, help="runs of the Trainer per row")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    quiet()
    depths = [depth_for(milliseconds) for milliseconds in options.targets]
    print(tables(result(depths, options.repeats, options.pairs, options.block)))


if __name__ == "__main__":
    main()
