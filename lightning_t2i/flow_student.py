"""FlowStudent: what a distillation whose student is a rectified flow does beside its loss: sample, compare, go out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_t2i.batch import Batch, Cond, Records
from lightning_t2i.distillation import Pipeline
from lightning_t2i.keys import Keys
from lightning_t2i.method import MethodModule
from lightning_t2i.processes import guided, sample
from lightning_t2i.shipped import ship
from lightning_t2i.state_io import AtomicCheckpointIO


class FlowStudent(MethodModule):
    """Base of distillations into a group `student`, a velocity head on `processes.RectifiedFlow`.

    A subclass builds the group and the frozen `teacher`, `codec` and `text`, and sets these:

    Attributes:
        pipeline: the teacher's; shape: of one x0.
        guidance, val_steps: scale and steps of the teacher's sampler that validation compares with.
        steps, alpha: number of Euler steps and guidance of the student's own sampling.
        start, start_optimizer: see `on_train_start`.
    """

    pipeline: Pipeline
    shape: tuple[int, int, int]
    guidance: float
    val_steps: int
    steps: int
    alpha: float
    start: str | None = None
    start_optimizer: bool = True

    def on_train_start(self) -> None:
        """Takes weights, averages and, with `start_optimizer`, optimizer and schedule of the checkpoint `start`.

        Without them the averages' warm-up begins anew as well: they soon forget those that they were given.
        """
        if self.start is not None and self.counters.step == 0:
            state = AtomicCheckpointIO().load_checkpoint(self.start, whole=False)  # each process reads its part
            self.load_state_dict(state["state_dict"])
            if self.start_optimizer:
                self._load_groups(state["t2i"]["groups"])
        super().on_train_start()

    @abstractmethod
    def pair_loss(self, pairs: Records, network: Any, keys: Keys) -> Tensor:
        """The loss of a network on pairs: a scalar."""

    def condition(self, records: Records) -> Cond | None:
        """Cached conditions, encoded captions, class labels (in turn where records have none), or nothing."""
        return self.pipeline.condition(records)

    def velocity(self, x: Tensor, s: Tensor | float, cond: Cond | None, alpha: float = 1.0) -> Tensor:
        """Guided velocity [B, C, h, w] of the averaged student in InstaFlow's time and sign.

        Its time s is 0 for noise and 1 for data, and its velocity points to the data.
        """
        t = 1 - torch.as_tensor(s, dtype=torch.float32, device=x.device)
        return -guided(self.generator_of("student").velocity, x, t, cond, alpha)

    @torch.no_grad()
    def couple(self, z: Tensor, cond: Cond | None, steps: int | None = None, guidance: float | None = None) -> Tensor:
        """x0 [B, C, h, w] of unit Gaussian noise z by the averaged student; `steps` and `alpha` are the defaults."""
        scale = 1.0 if cond is None else self.alpha if guidance is None else guidance
        return self.solve(z, cond, steps or self.steps, scale)

    def solve(self, z: Tensor, cond: Cond | None, steps: int, scale: float) -> Tensor:
        """Euler's method on the grid 1, 1 - 1/N, ..., 0."""
        return sample(self.generator_of("student"), z, cond, steps, scale, "euler")

    @torch.no_grad()
    def sample(
        self, cond: Cond | None, keys: Keys, positions: Tensor, guidance: float | None = None, steps: int | None = None
    ) -> Tensor:
        """Pictures [B, 3, H, W] of the averaged student; the noise depends on keys and position."""
        x = self.couple(keys.normal("z", positions, self.shape), cond, steps, guidance)
        return self.codec.decode(x).clamp(-1, 1)

    @torch.no_grad()
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Mean absolute distance of the student's x0 from the teacher's at equal noise; of pairs their loss as well."""
        main, stage = batch["main"], "test" if self.trainer.testing else "val"
        keys, cond = self.keys.fork("validation"), self.condition(main)
        z = keys.normal("z", main.position, self.shape)
        end = sample(self.teacher, z, cond, self.val_steps, self.guidance)
        found = {"distance": (self.couple(z, cond) - end).abs().mean()}
        if main.noise_seed is not None:
            found["loss"] = self.pair_loss(main, self.generator_of("student"), keys)
        for name, value in found.items():
            self.log(f"{stage}/{name}", value, batch_size=len(main), sync_dist=True)

    test_step = validation_step

    def export(self, folder: Path, batches: Iterable[Batch]) -> None:
        """Writes the stock pipeline of the averaged student with the files that it needs, or a network of ours."""
        self.pipeline.save(folder, self.generator_of("student"))
        ship(folder)
