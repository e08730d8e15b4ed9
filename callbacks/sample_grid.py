"""Grids of pictures at fixed prompts and fixed noise: what changes from one to the next is the method alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from PIL import Image

from callbacks.inference import shared_records, undisturbed
from lightning_t2i.batch import Records
from lightning_t2i.errors import UserError
from lightning_t2i.pictures import draw_grid, save_png, to_pil
from lightning_t2i.protocols import Generates, Reconstructs


@dataclass(frozen=True)
class SampleOptions:
    """When pictures are made, and of what.

    Args:
        enabled: make pictures at all.
        every: after the training steps 1, 2, 4, ... up to this number, then after every multiple of it, and at the end.
        prompts: the prompts; null takes the first ones of the validation data (of the training data when there is
            none), and then real pictures can be shown beside them.
        count: number of prompts to take from the validation data; fewer, with a warning, where there are fewer.
        per_prompt: pictures for each prompt, each with noise of its own.
    """

    enabled: bool = True
    every: int = 500
    prompts: list[str] | None = None
    count: int = 8
    per_prompt: int = 4

    def __post_init__(self) -> None:
        for name in ("every", "count", "per_prompt"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1", where=f"samples.{name}", given=getattr(self, name))
        if self.prompts is not None and not self.prompts:
            raise UserError("The list of prompts is empty", where="samples.prompts", fix="samples.prompts: null")


def is_due(step: int, every: int) -> bool:
    """Whether a grid follows training step `step` (1 is the first)."""
    return step > 0 and (step % every == 0 or (step < every and step & (step - 1) == 0))


class SampleGrid(L.Callback):
    """Writes `samples/step-XXXXXXXX.png` into the run folder and sends the picture to the loggers that take pictures.

    A method that Generates fills `per_prompt` columns, one that Reconstructs two more: the real picture and what it
    makes of it. Rank 0 writes; all ranks compute, since sharded networks need all of them.
    """

    def __init__(self, options: SampleOptions | None = None):
        self.options = options or SampleOptions()
        self._last = 0
        self._subjects: list[Records] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._last = pl_module.counters.step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = pl_module.counters.step
        if step != self._last and is_due(step, self.options.every):
            self._draw(trainer, pl_module, batch["main"])

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if pl_module.counters.step != self._last:
            self._draw(trainer, pl_module, None)

    def _draw(self, trainer: L.Trainer, module: Any, current: Records | None) -> None:
        generates, reconstructs = isinstance(module, Generates), isinstance(module, Reconstructs)
        self._last = module.counters.step
        if not self.options.enabled or not (generates or reconstructs):
            return
        with undisturbed(module):
            prompts: list[str] = []
            columns: dict[str, list[Image.Image]] = {}
            for subjects in self._fixed(trainer, current):
                drawn: dict[str, list[Image.Image]] = {}
                if reconstructs and subjects.image is not None:
                    drawn["real"] = to_pil(subjects.image)
                    drawn["reconstructed"] = to_pil(module.reconstruct(subjects.image.to(module.device)))
                if generates:
                    drawn |= self._generate(module, subjects.to(module.device), len(prompts))
                prompts += subjects.caption or [""] * len(subjects)
                columns = {title: columns.get(title, []) + pictures for title, pictures in drawn.items()}
        if columns and trainer.is_global_zero:
            self._publish(trainer, columns, prompts)

    def _fixed(self, trainer: L.Trainer, current: Records | None) -> list[Records]:
        """What pictures are made for, the same on all ranks; chosen once."""
        if not self._subjects:
            n = self.options.count
            if self.options.prompts is not None:
                self._subjects = [Records.of_prompts(self.options.prompts)]
            else:
                found = shared_records(trainer, "val", n, current, "samples.count")
                self._subjects = found or [Records.of_prompts([""] * n)]
        return self._subjects

    def _generate(self, module: Any, subjects: Records, first: int) -> dict[str, list[Image.Image]]:
        """One column per noise; picture i of column j, i counted from `first`, has the position i * per_prompt + j."""
        cond, n, k = module.condition(subjects), len(subjects), self.options.per_prompt
        keys = module.keys.fork("samples")
        columns = {}
        for j in range(k):  # a column at a time: as much memory as one batch of prompts
            positions = torch.arange(first, first + n, device=module.device) * k + j
            columns[f"sample {j + 1}"] = to_pil(module.sample(cond, keys, positions))
        return columns

    def _publish(self, trainer: L.Trainer, columns: dict[str, list[Image.Image]], prompts: list[str]) -> None:
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        titles = [title if title in ("real", "reconstructed") else "" for title in columns]
        grid = draw_grid(rows, prompts[: len(rows)], titles)
        path = Path(trainer.default_root_dir) / "samples" / f"step-{self._last:08d}.png"
        save_png(grid, path, prompts="\n".join(prompts))
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("grids", [grid], step=self._last)
