"""The shapes score: the share of pictures that show what their prompt asks for, task by task as in GenEval.

    task accuracy   pictures of the task that fulfil it / pictures of the task       (arXiv 2310.11513, section 3)
    overall         mean of the task accuracies
    interval        bootstrap over prompts within each task: resampling n outcomes of which k are right gives
                    Binomial(n, k / n) right ones, so the counts are all that has to be kept

One picture per prompt: several pictures of one prompt are no independent outcomes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from datamodules.worlds.shapes_scenes import TASKS
from lightning_t2i.errors import UserError
from lightning_t2i.metrics.shapes_detector import satisfied


class ShapesScore(Metric):
    """Accuracy of pictures of the shapes world, one per prompt.

    `compute` returns float32 scalars: `overall` with its 95 % interval `overall_low` and `overall_high`, each task
    that was seen by its name (`single_object`, `two_object`, `counting`, `colors`, `position`, `color_attr`), and
    `held_out`, the accuracy over prompts for (shape, colour) pairs left out of training, if there were any. These also
    count in their tasks. The detector runs on the CPU, whatever the device.

    Args:
        resamples: bootstrap samples.
        seed: of the bootstrap.
    """

    full_state_update = False
    higher_is_better = True

    right: Tensor  # int64 [tasks, 2], second axis: trained pairs, held-out pairs
    total: Tensor

    def __init__(self, resamples: int = 10_000, seed: int = 0, **kwargs: Any):
        super().__init__(**kwargs)
        self.resamples, self.seed = resamples, seed
        self._n: int | None = None
        for name in ("right", "total"):
            self.add_state(name, torch.zeros(len(TASKS), 2, dtype=torch.int64), dist_reduce_fx="sum")

    @property
    def name(self) -> str:
        """What a number of this metric is called: with the pictures behind it, on all ranks once computed."""
        return f"shapes_score@n={int(self.total.sum()) if self._n is None else self._n}"

    def update(self, images: Tensor, scenes: Sequence[Mapping[str, Any]]) -> None:
        """Adds pictures [B, 3, 32, 32] in [-1, 1] with the scenes whose prompts they were made for."""
        self._n = None
        tasks = torch.tensor([TASKS.index(scene["task"]) for scene in scenes], dtype=torch.int64)
        cells = 2 * tasks + torch.tensor([bool(scene["held_out"]) for scene in scenes], dtype=torch.int64)
        right = torch.from_numpy(satisfied(images, scenes))
        self.right += torch.bincount(cells[right], minlength=2 * len(TASKS)).view(-1, 2).to(self.right.device)
        self.total += torch.bincount(cells, minlength=2 * len(TASKS)).view(-1, 2).to(self.total.device)

    def reset(self) -> None:
        super().reset()
        self._n = None

    def compute(self) -> dict[str, Tensor]:
        right, total = self.right.cpu().numpy(), self.total.cpu().numpy()
        self._n = int(total.sum())
        seen = total.sum(1) > 0
        if not seen.any():
            raise UserError("The shapes score has seen no picture", fix="call update with pictures and their scenes")
        n, accuracy = total.sum(1)[seen], right.sum(1)[seen] / total.sum(1)[seen]
        draws = np.random.default_rng(self.seed).binomial(n, accuracy, (self.resamples, len(n))) / n
        low, high = np.quantile(draws.mean(1), (0.025, 0.975))
        scores = {"overall": accuracy.mean(), "overall_low": low, "overall_high": high}
        scores |= dict(zip(np.array(TASKS)[seen].tolist(), accuracy, strict=True))
        if total[:, 1].any():
            scores["held_out"] = right[:, 1].sum() / total[:, 1].sum()
        return {name: torch.tensor(value, dtype=torch.float32, device=self.device) for name, value in scores.items()}
