"""A method that paints, small enough to be trained in the tests of every callback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn

from lightning_t2i.batch import Cond, Records
from lightning_t2i.keys import Keys
from lightning_t2i.method import MethodModule
from lightning_t2i.options import GroupOptions, MethodOptions

SIZE = 8
PROMPTS = ["red", "green dot", "two blue squares", "a yellow sky"]


class Brush(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear(x))


class Painter(MethodModule):
    """Pictures of one grey level, the label's, with keyed noise."""

    def __init__(self, common: MethodOptions | None = None, every: int = 1, dropout: float = 0.5) -> None:
        super().__init__(common)
        self.dropout = dropout
        self.options = GroupOptions(lambda p: torch.optim.SGD(p, lr=0.1), every=every)
        self.sampled: list[tuple[int, list[int]]] = []

    def configure_model(self) -> None:
        self.add_group("brush", Brush(self.dropout), self.options)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if self.due("brush"):
            noise = self.keys.normal("noise", batch["main"].position, (4,))
            self.backward("brush", self.brush(noise).square().mean())

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    test_step = validation_step

    def condition(self, records: Records) -> Cond:
        return Cond(label=torch.tensor([len(p) for p in records.caption or [""] * len(records)]))

    def sample(self, cond: Cond, keys: Keys, positions: Tensor) -> Tensor:
        self.sampled.append((self.counters.step, positions.tolist()))
        torch.rand(3)  # what library code may do
        assert not self.brush.training and not torch.is_grad_enabled()
        assert cond.label is not None
        grey = (cond.label.float() / 32 + 0.1 * float(self.brush.linear.bias[0].detach())).view(-1, 1, 1, 1)
        return grey + 0.1 * keys.normal("z", positions, (3, SIZE, SIZE))


class Easel(L.LightningDataModule):
    """Endless training batches; `n` validation records with pictures and captions, this rank's share of each batch."""

    def __init__(self, batch_size: int = 4, n: int = 10, captions: bool = True, pictures: bool = True):
        super().__init__()
        self.batch_size, self.n, self.captions, self.pictures = batch_size, n, captions, pictures

    def records(self, positions: Tensor) -> Records:
        return Records(
            id=positions,
            position=positions,
            caption=[PROMPTS[int(p) % len(PROMPTS)] for p in positions] if self.captions else None,
            image=Keys(0).normal("real", positions, (3, SIZE, SIZE)) if self.pictures else None,
        )

    def share(self, start: int, stop: int) -> Records:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        size = (stop - start) // world
        return self.records(torch.arange(start + rank * size, start + (rank + 1) * size))

    def train_dataloader(self) -> Any:
        class Endless(torch.utils.data.IterableDataset):
            def __iter__(_) -> Any:
                k = 0
                while True:
                    yield {"main": self.share(k * self.batch_size, (k + 1) * self.batch_size)}
                    k += 1

        return torch.utils.data.DataLoader(Endless(), batch_size=None)

    def val_dataloader(self) -> Any:
        edges = range(0, self.n, self.batch_size)
        batches = [{"main": self.share(a, min(a + self.batch_size, self.n))} for a in edges]
        return torch.utils.data.DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)  # type: ignore[arg-type]

    test_dataloader = val_dataloader


class Notebook(Logger):
    """Keeps what it is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[tuple[int, dict[str, float]]] = []
        self.images: list[tuple[int, str]] = []

    name, version = "notebook", 0

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append((step or 0, metrics))

    def log_image(self, key: str, images: list, step: int | None = None) -> None:
        self.images.append((step or 0, key))

    def values(self, name: str) -> dict[int, float]:
        return {step: metrics[name] for step, metrics in self.metrics if name in metrics}


class Studio:
    """Makes methods, data, loggers and trainers."""

    Painter, Easel, Notebook, prompts = Painter, Easel, Notebook, PROMPTS

    def __init__(self, folder: Path):
        self.folder = folder

    def trainer(
        self, *callbacks: L.Callback, steps: int = 10, logger: Logger | None = None, **kwargs: Any
    ) -> L.Trainer:
        return L.Trainer(
            max_steps=steps,
            accelerator="cpu",
            devices=kwargs.pop("devices", 1),
            callbacks=list(callbacks),
            logger=logger or False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            default_root_dir=self.folder,
            **{"limit_val_batches": 0, **kwargs},
        )


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    return Studio(tmp_path)


@pytest.fixture
def ticking() -> Callable[..., Any]:
    """A clock that only the test moves."""

    class Clock:
        now = 100.0

        def __call__(self) -> float:
            return self.now

    return Clock
