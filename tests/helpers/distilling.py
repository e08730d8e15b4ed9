"""What tests of distillations share: an EDM teacher, prompts, update rules, and what a training did."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import torch
from torch import nn

from datamodules.pair_prompts import PairPrompts
from datamodules.streams import Streams
from lightning_modules.teacher import Teacher
from lightning_t2i.cli.pair_job import PairJob
from lightning_t2i.method import MethodModule
from lightning_t2i.networks.edm_unets import SongUNet
from lightning_t2i.options import GroupOptions
from lightning_t2i.processes import EDM
from lightning_t2i.processes.schedulers import to_scheduler

WORDS = ("red", "blue", "square", "circle", "two", "the")
LR = 1e-3


def words_file(folder: Path) -> str:
    """32 prompts with labels."""
    file = folder / "words.jsonl"
    rows = [{"caption": {"en": [f"{WORDS[i % 6]} {WORDS[i // 6 % 6]}"]}, "label": i % 10} for i in range(32)]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return str(file)


def edm_folder(folder: Path, classes: int, dropout: float = 0.1) -> str:
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "channels": 8, "channel_mult": (1, 1), "blocks": 1, "augment_dim": 9}
    network = SongUNet(num_classes=classes, dropout=dropout, **sizes)
    for parameter in network.parameters():  # output layers start near zero, where no prediction could be told apart
        if float(parameter.detach().abs().max()) < 1e-3:
            nn.init.normal_(parameter, std=0.05)
    network.save_pretrained(folder)
    to_scheduler(EDM(), "edm").save_pretrained(folder / "scheduler")
    return str(folder)


def make_pairs(source: str, prompts: str, folder: Path, batch_size: int = 8, **options) -> str:
    """Pairs of prompts and what a teacher of two steps made of them; `options` are the teacher's."""
    job = PairPrompts(prompts, str(folder), batch_size=batch_size, samples_per_shard=16)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[PairJob(job)],
    )  # fmt: skip
    trainer.predict(Teacher(source, steps=2, **options), datamodule=Streams(predict=job), return_predictions=False)
    return str(folder)


def update(**options) -> GroupOptions:
    return GroupOptions(lambda p: torch.optim.AdamW(p, lr=LR), **{"clip": 10.0, **options})


def heard(method: MethodModule) -> list[tuple[str, float]]:
    """The losses that it will give to `backward`."""
    losses: list[tuple[str, float]] = []
    backward = method.backward

    def listened(name, loss, **scalars):
        losses.append((name, float(loss.detach())))
        backward(name, loss, **scalars)

    method.backward = listened
    return losses


def noted(method: MethodModule) -> dict[str, torch.Tensor]:
    """The last value of each scalar that it will note."""
    notes: dict[str, torch.Tensor] = {}
    note = method.note

    def listened(**scalars):
        notes.update(scalars)
        note(**scalars)

    method.note = listened
    return notes


def states(method: MethodModule) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in method.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], **tolerances) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], **(tolerances or {"rtol": 0, "atol": 0}))
