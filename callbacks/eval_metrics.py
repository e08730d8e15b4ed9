"""Metrics of generated pictures while training goes on, within a share of its time, and in full by `validate`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning as L

from callbacks.budget import Budget
from callbacks.inference import data_name, data_pictures, first_records, log_metrics, undisturbed
from lightning_t2i.errors import UserError
from lightning_t2i.metrics.scorers import Scorer, ScorerOptions, build_scorer, check_metrics
from lightning_t2i.protocols import Generates

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalOptions:
    """What is measured on generated pictures, and when.

    Args:
        enabled: measure at all.
        metrics: any of shapes_score, fd, kd, recall, clip_score.
        every: training steps between two evaluations.
        n: pictures of one evaluation, rounded up to whole validation batches; fewer when the data has fewer.
        max_fraction: share of the training time so far that evaluation may have taken; one that would take more is
            left out. `validate` and `test` know no limit.
        networks: where the metrics' networks and references are.
    """

    enabled: bool = True
    metrics: list[str] = field(default_factory=list)
    every: int = 1000
    n: int = 400
    max_fraction: float = 0.02
    networks: ScorerOptions = field(default_factory=ScorerOptions)

    def __post_init__(self) -> None:
        check_metrics(self.metrics, "eval.metrics")
        for name in ("every", "n"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1", where=f"eval.{name}", given=getattr(self, name))
        if not 0 < self.max_fraction <= 1:
            raise UserError("The share is out of range", where="eval.max_fraction", given=self.max_fraction)


class EvalMetrics(L.Callback):
    """Generates pictures for the validation prompts at fixed noise and logs `eval/<metric>@n=...`.

    The picture of a prompt depends on the run's seed and the prompt's position: it is the same at every evaluation of
    the same weights, on any number of ranks.

    Args:
        options: what and when.
        clock: seconds, for tests.
    """

    def __init__(self, options: EvalOptions | None = None, clock: Callable[[], float] = time.monotonic):
        self.options, self.clock = options or EvalOptions(), clock
        self.budget = Budget(self.options.max_fraction, clock)
        self.results: dict[str, float] = {}
        self._last = 0
        self._scorers: list[Scorer] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._last = pl_module.counters.step
        self.budget.start()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *unused: Any) -> None:
        step = pl_module.counters.step
        if step != self._last and step % self.options.every == 0 and self._affordable(trainer):
            with self.budget.spending():
                self._evaluate(trainer, pl_module, "val", "eval")
        self._last = step

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "validate":
            self._evaluate(trainer, pl_module, "val", "eval")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._evaluate(trainer, pl_module, "test", "test")

    def _affordable(self, trainer: L.Trainer) -> bool:
        """Whether the budget allows one more evaluation; says so once when it does not."""
        budget = self.budget
        fits = budget.allows(trainer)
        if not fits and budget.skipped == 1 and trainer.is_global_zero:
            log.warning(
                "Evaluations are left out: they took %.1f s, the longest %.1f s, and eval.max_fraction is %g of the "
                "training time. Raise it, lower eval.n, or run `validate` beside the run.",
                budget.spent, budget.longest, budget.max_fraction,
            )  # fmt: skip
        return fits

    def _evaluate(self, trainer: L.Trainer, module: Any, split: str, prefix: str) -> None:
        wanted = self.options.enabled and self.options.metrics and isinstance(module, Generates)
        if not wanted:
            return
        start = self.clock()
        with undisturbed(module):
            if self._scorers is None:
                pictures = data_name(trainer, split), data_pictures(trainer, split)
                found = [build_scorer(name, self.options.networks, *pictures) for name in self.options.metrics]
                self._scorers = [scorer.to(module.device) for scorer in found]
            self._generate(trainer, module, split, self._scorers)
            self.results = {}
            for scorer in self._scorers:
                self.results |= {f"{prefix}/{name}": value for name, value in scorer.results().items()}
                scorer.reset()
        self.results[f"{prefix}/seconds"] = self.clock() - start
        log_metrics(trainer, self.results, module.counters.step)

    def _generate(self, trainer: L.Trainer, module: Any, split: str, scorers: list[Scorer]) -> None:
        keys = module.keys.fork("eval")
        for records in first_records(trainer, split, self.options.n, module.device):
            images = module.sample(module.condition(records), keys, records.position)
            for scorer in scorers:
                scorer.add(images, records)
