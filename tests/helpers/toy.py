"""A two-network method for the engine's tests, and a script that trains it on any mesh.

generator (every 5 steps) maps noise to points, critic (every step) scores points; a frozen network scales the data.
Run as a script it trains in one process or several and writes the logged losses and sample ids.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
from pathlib import Path

import lightning as L
import torch
from torch import nn

from callbacks.checkpoints import CheckpointOptions, Checkpoints
from lightning_t2i.batch import Records
from lightning_t2i.keys import Keys
from lightning_t2i.method import MethodModule
from lightning_t2i.options import EMAOptions, GroupOptions, MethodOptions
from lightning_t2i.schedules import Warmup
from lightning_t2i.state_io import AtomicCheckpointIO, newest
from lightning_t2i.strategies import FSDP2

DIM = 6


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


class MLP(nn.Module):
    _no_split_modules = ["Block"]

    def __init__(self, out: int, width: int = 16, dropout: float = 0.1, lora: bool = False):
        super().__init__()
        self.inside = nn.Linear(DIM, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.dropout = nn.Dropout(dropout)
        self.outside = nn.Linear(width, out)
        self.adapter = nn.Linear(width, out, bias=False) if lora else None

    def forward(self, x):
        h = self.inside(x)
        for block in self.blocks:
            h = self.dropout(block(h))
        return self.outside(h) + (self.adapter(h) if self.adapter is not None else 0)


def adam(lr: float):
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr)


class Toy(MethodModule):
    def __init__(
        self,
        common: MethodOptions | None = None,
        generator: GroupOptions | None = None,
        critic: GroupOptions | None = None,
        lora: bool = False,
        dropout: float = 0.1,
        poison_step: int | None = None,
    ):
        super().__init__(common)
        self.lora, self.dropout, self.poison_step = lora, dropout, poison_step
        self.options = {
            "generator": generator
            or GroupOptions(
                adam(1e-2),
                schedule=lambda o: Warmup(o, 7),
                every=5,
                ema=EMAOptions([0.9, 0.6], start=8, sigma_rel=[0.1]),
            ),
            "critic": critic or GroupOptions(adam(1e-2), clip=0.5),
        }

    def configure_model(self):
        scale = nn.Linear(DIM, DIM)
        generator, critic = MLP(DIM, dropout=self.dropout), MLP(1, dropout=self.dropout, lora=self.lora)
        self.add_frozen("scale", scale, "toy:1")
        if self.lora:
            critic.requires_grad_(False)
            critic.adapter.requires_grad_(True)
        self.add_group("generator", generator, self.options["generator"])
        self.add_group("critic", critic, self.options["critic"])

    def training_step(self, batch, batch_idx):
        main = batch["main"]
        x = self.scale(main.latent)
        fake = self.generator(self.keys.normal("z", main.position, (DIM,)))
        if self.due("generator"):
            target = self.groups["generator"].ema if self.groups["generator"].ema is not None else self.generator
            with torch.no_grad():
                goal = target(self.keys.normal("z", main.position, (DIM,)))
            self.backward("generator", -self.critic(fake).mean() + 0.1 * (fake - goal).square().mean())
        loss = (self.critic(fake.detach()) - self.critic(x)).mean() + self.critic(x).square().mean()
        if self.poison_step == self.counters.step:
            loss = loss * float("nan")
        self.backward("critic", loss)


class ToyData(L.LightningDataModule):
    """Endless batches of keyed points; batch k holds positions [kB, (k + 1) B), each rank its slice."""

    def __init__(self, batch_size: int = 8, seed: int = 0):
        super().__init__()
        self.batch_size, self.seed, self.start = batch_size, seed, 0
        self.ids: list[list[int]] = []

    def train_dataloader(self):
        module = self

        class Positions(torch.utils.data.IterableDataset):
            def __iter__(self):
                world, rank = module.trainer.world_size, module.trainer.global_rank
                size, k = module.batch_size // world, module.start
                while True:
                    first = k * module.batch_size + rank * size
                    positions = torch.arange(first, first + size)
                    points = Keys(module.seed).normal("data", positions, (DIM,))
                    k += 1
                    yield {"main": Records(id=positions * 7, position=positions, latent=points, cursor=k)}

        return torch.utils.data.DataLoader(Positions(), batch_size=None)

    def state_dict(self):
        return {"cursor": self.trainer.lightning_module.counters.batches}

    def load_state_dict(self, state):
        self.start = state["cursor"]


class Trace(L.Callback):
    """Appends (step, loss, ids) of each training step to a file, and kills the process where it is told to."""

    def __init__(self, file: Path | None = None, kill_step: int | None = None, kill_in_save: bool = False):
        self.file, self.kill_step, self.kill_in_save = file, kill_step, kill_in_save

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        last = module.counters.micro == module.common.accumulate - 1
        if last and module.counters.step == self.kill_step and not self.kill_in_save:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if self.file is not None:
            ids = batch["main"].id.tolist()
            with self.file.open("a") as stream:
                stream.write(json.dumps([module.counters.step, module.counters.micro, ids]) + "\n")


class KilledSave(AtomicCheckpointIO):
    """Kills the process in the middle of the save of one training step."""

    def __init__(self, kill_step: int | None):
        self.kill_step = kill_step

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        if checkpoint["global_step"] == self.kill_step:
            original = torch.save

            def half(state, stream):
                original(state, stream)
                with contextlib.suppress(OSError):  # of the sharded form it is one of several parts
                    stream.truncate(stream.tell() // 2)
                os.kill(os.getpid(), signal.SIGKILL)

            torch.save = half
        super().save_checkpoint(checkpoint, path, storage_options)


def trainer_for(folder: Path, steps: int, replicate: int = 1, shard: int = 1, io=None, **kwargs) -> L.Trainer:
    plain = replicate * shard == 1 and not kwargs.pop("fsdp", False)
    patience = {"timeout": kwargs.pop("timeout")} if "timeout" in kwargs else {}
    strategy = "auto" if plain else FSDP2(replicate, shard, **patience)
    if not plain and io is not None:
        strategy.checkpoint_io = io
    return L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=replicate * shard,
        strategy=strategy,
        plugins=[io or AtomicCheckpointIO()] if plain else None,
        logger=kwargs.pop("logger", False),
        enable_checkpointing=kwargs.pop("enable_checkpointing", False),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        **kwargs,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--replicate", type=int, default=1)
    parser.add_argument("--shard", type=int, default=1)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--kill", type=int)
    parser.add_argument("--kill-in-save", action="store_true")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--form", default="single")
    parser.add_argument("--asynchronous", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    module = Toy(MethodOptions(accumulate=options.accumulate), lora=options.lora, dropout=options.dropout)
    rank = os.environ.get("LOCAL_RANK", "0")
    options.folder.mkdir(parents=True, exist_ok=True)
    saving = CheckpointOptions(options.every, 3, form=options.form, asynchronous=options.asynchronous)
    io = KilledSave(options.kill if options.kill_in_save else None)
    trainer = trainer_for(
        options.folder,
        options.steps,
        options.replicate,
        options.shard,
        io,
        callbacks=[
            Trace(options.folder / f"trace-{rank}.jsonl", options.kill, options.kill_in_save),
            Checkpoints(options.folder / "checkpoints", saving),
        ],
    )
    resume = newest(options.folder / "checkpoints")
    trainer.fit(module, ToyData(), ckpt_path=resume, weights_only=True)


if __name__ == "__main__":
    main()
