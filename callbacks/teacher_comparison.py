"""A student beside its teacher when training ends: one picture at equal prompts and noise, and the scores of each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
from PIL import Image
from torch import Tensor

from callbacks.inference import data_name, data_pictures, first_records, log_metrics, undisturbed
from lightning_t2i.batch import Cond
from lightning_t2i.errors import UserError
from lightning_t2i.keys import Keys
from lightning_t2i.metrics.scorers import Scorer, ScorerOptions, build_scorer, check_metrics
from lightning_t2i.pictures import draw_grid, save_png, to_pil
from lightning_t2i.processes import sample
from lightning_t2i.protocols import Distils
from lightning_t2i.state_io import write_atomically

LEAST = 128  # pixels of a picture's side: wide enough for the title of its column


@dataclass(frozen=True)
class ComparisonOptions:
    """What of a distillation is compared when its training ends.

    Args:
        enabled: compare at all.
        metrics: any of shapes_score, fd, kd, recall, clip_score.
        n: pictures that each arm is measured on, rounded up to whole validation batches; fewer when the data has fewer.
        count: prompts in the picture, the first ones.
        few_guidance: scale of the teacher's guidance where it has only the student's number of steps; null is the
            scale of its full sampler.
        networks: where the metrics' networks and references are.
    """

    enabled: bool = False
    metrics: list[str] = field(default_factory=lambda: ["shapes_score"])
    n: int = 200
    count: int = 8
    few_guidance: float | None = None
    networks: ScorerOptions = field(default_factory=ScorerOptions)

    def __post_init__(self) -> None:
        check_metrics(self.metrics, "comparison.metrics")
        for name in ("n", "count"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1", where=f"comparison.{name}", given=getattr(self, name))


@dataclass(frozen=True)
class Arm:
    """One of the generators: "teacher" or "student", its number of steps, and the scale of a teacher's guidance."""

    network: str
    steps: int
    guidance: float | None = None

    @property
    def title(self) -> str:
        return f"{self.network}, {self.steps} step{'s' if self.steps != 1 else ''}"

    def draw(self, module: Distils, cond: Cond | None, keys: Keys, positions: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1]; z is the one that the method's own `sample` starts from."""
        if self.guidance is None:
            return module.sample(cond, keys, positions)
        z = keys.normal("z", positions, module.shape)
        return module.codec.decode(sample(module.teacher, z, cond, self.steps, self.guidance)).clamp(-1, 1)


def arms(module: Distils, few_guidance: float | None = None) -> list[Arm]:
    """The teacher as it is meant to be used, the teacher with as few steps as the student, and the student."""
    few = getattr(module, "steps", 1)
    scale = module.guidance if few_guidance is None else few_guidance
    return [Arm("teacher", module.val_steps, module.guidance), Arm("teacher", few, scale), Arm("student", few)]


class TeacherComparison(L.Callback):
    """Writes `comparison.png` and `comparison.json` into the run folder, from which the report takes them.

    All arms get the same validation prompts and the same noise, which depends on the run's seed and the prompt's
    position alone. The metrics are logged as `comparison/<network>_<steps>/<metric>@n=...`. All ranks compute, since
    sharded networks need all of them; rank 0 writes, and the picture shows prompts of its share.
    """

    def __init__(self, options: ComparisonOptions | None = None):
        self.options = options or ComparisonOptions()
        self._scorers: list[Scorer] = []
        self._done = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Refuses what could not be compared, before the training and not after it."""
        if not self.options.enabled:
            return
        needed = ("condition", "sample", *Distils.__annotations__)
        if missing := [name for name in needed if not hasattr(pl_module, name)]:
            what, given = "This method cannot be compared with a teacher", f"a method without {', '.join(missing)}"
            raise UserError(what, where="comparison.enabled", given=given, fix="comparison.enabled: false")
        pictures = data_name(trainer, "val"), data_pictures(trainer, "val")
        self._scorers = [build_scorer(name, self.options.networks, *pictures) for name in self.options.metrics]
        for records in first_records(trainer, "val", 1, "cpu"):
            for scorer in self._scorers:
                scorer.feed(records)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._compare(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Compares where a run was killed in `on_train_end`: resumed, it has no step left and comes here at once."""
        pl_module.to(trainer.strategy.root_device)  # the strategy has taken it to the CPU
        self._compare(trainer, pl_module)

    def _compare(self, trainer: L.Trainer, module: Any) -> None:
        if self._done or not self.options.enabled:
            return
        self._done = True
        columns: dict[str, list[Image.Image]] = {}
        results: dict[str, dict[str, Any]] = {}
        compared = arms(module, self.options.few_guidance)
        with undisturbed(module):
            self._scorers = [scorer.to(module.device) for scorer in self._scorers]
            found = list(first_records(trainer, "val", self.options.n, module.device))
            batches = [(records, module.condition(records)) for records in found]
            for arm in compared:
                columns[arm.title], scores = self._measure(arm, module, batches)
                results[arm.title] = {"guidance": arm.guidance, **scores}
                named = {f"comparison/{arm.network}_{arm.steps}/{name}": value for name, value in scores.items()}
                log_metrics(trainer, named, module.counters.step)
        if trainer.is_global_zero:
            prompts = [text for records in found for text in records.caption or [""] * len(records)]
            facts = {"step": module.counters.step, "data": data_name(trainer, "val"), "arms": results}
            self._publish(trainer, columns, prompts, facts)

    def _measure(
        self, arm: Arm, module: Any, batches: Sequence[tuple[Any, Cond | None]]
    ) -> tuple[list[Image.Image], dict[str, float]]:
        """The pictures of an arm that are shown, and its metrics."""
        keys = module.keys.fork("comparison")
        shown: list[Image.Image] = []
        for records, cond in batches:
            images = arm.draw(module, cond, keys, records.position)
            shown += to_pil(images[: self.options.count - len(shown)])
            for scorer in self._scorers:
                scorer.add(images, records)
        scores: dict[str, float] = {}
        for scorer in self._scorers:
            scores |= scorer.results()
            scorer.reset()
        return shown, scores

    def _publish(
        self, trainer: L.Trainer, columns: dict[str, list[Image.Image]], prompts: list[str], facts: dict[str, Any]
    ) -> None:
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        grid = draw_grid(rows, prompts[: len(rows)], list(columns), LEAST)
        folder = Path(trainer.default_root_dir)
        save_png(grid, folder / "comparison.png", prompts="\n".join(prompts[: len(rows)]), titles="\n".join(columns))
        write_atomically(folder / "comparison.json", (json.dumps(facts, indent=1) + "\n").encode())
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("comparison", [grid], step=facts["step"])
