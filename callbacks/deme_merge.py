"""Merges experts into one model when all of their deltas are there, and says what it is worth at other noise."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch

from callbacks.inference import data_name, data_pictures, first_records, log_metrics, undisturbed
from lightning_t2i.errors import UserError
from lightning_t2i.held_out import Data, HeldOut
from lightning_t2i.merge_search import Search, check_grid, search
from lightning_t2i.merging import PROVENANCE, write_provenance
from lightning_t2i.metrics.scorers import Scorer, ScorerOptions, build_scorer, check_metrics
from lightning_t2i.range_experts import RangeExperts
from lightning_t2i.streamed import read_header


@dataclass(frozen=True)
class MergeOptions:
    """When experts are merged, and with which weights.

    Args:
        enabled: merge at the end of a fit, if the deltas of all ranges are there, into `merged` in the run's folder.
        weights: w, one for each range; null searches for them.
        search: how; the objective is the held-out loss over all ranges, on validation data.
        grid: values of each weight in a grid search.
        limit: evaluations after which gradient and coordinate search end.
        n: samples of the objective, and pictures of each metric, rounded up to whole batches.
        metrics: of shapes_score, fd, kd, recall, clip_score: of base, merged model and experts in turn, at other noise
            than the search saw, and on other data where there is a test split.
        in_validation: `train.py validate` measures the merged model in the place of the trained expert, where all
            deltas are there; with given weights. Validations of a fit measure what is trained.
        networks: where the metrics' networks and references are.
    """

    enabled: bool = False
    weights: list[float] | None = None
    search: Search = "gradient"
    grid: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 1.0])
    limit: int = 60
    n: int = 200
    metrics: list[str] = field(default_factory=list)
    in_validation: bool = False
    networks: ScorerOptions = field(default_factory=ScorerOptions)

    def __post_init__(self) -> None:
        check_metrics(self.metrics, "merge.metrics")
        if self.in_validation and (self.weights is None or not self.enabled):
            what, fix = "A validation does not search", "merge.enabled: true, merge.weights: [0.25, 0.25, 0.25, 0.25]"
            raise UserError(what, where="merge.in_validation", given=f"weights {self.weights}", fix=fix)
        for name in ("n", "limit"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1", where=f"merge.{name}", given=getattr(self, name))


class DeMeMerge(L.Callback):
    """Writes `merged`: the pipeline of the merged model, and merge.json with weights, deltas and measures.

    Args:
        folder: what is written.
        options: when and how.
    """

    def __init__(self, folder: Path, options: MergeOptions | None = None):
        self.folder, self.options = folder, options or MergeOptions()
        self._done = False  # the training's end was seen
        self._merged = ExitStack()  # while a validation sees the merged model

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Refuses what could not be merged or measured, before the training and not after it."""
        self._check(pl_module)
        if self.options.enabled:
            split = self._reported(trainer)
            if split == "val" or self.options.weights is None:
                next(first_records(trainer, "val", 1, "cpu"))
            self._scorers(trainer, split)

    def _check(self, module: Any) -> None:
        options = self.options
        if not options.enabled:
            return
        if not isinstance(module, RangeExperts):
            given, fix = type(module).__name__, "merge.enabled: false"
            raise UserError("This method trains no experts to merge", where="merge", given=given, fix=fix)
        if options.weights is not None and len(options.weights) != module.num_ranges:
            given, allowed = f"{len(options.weights)} weights", f"{module.num_ranges}, one for each range"
            raise UserError("There must be one weight for each range", where="merge.weights", given=given,
                            allowed=allowed)  # fmt: skip
        if options.weights is None:
            check_grid(options.search, module.num_ranges, options.grid)

    # ---- in validations ------------------------------------------------------------------------------------------

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._check(pl_module)
        if self.options.in_validation and trainer.state.fn == "validate" and pl_module.all_deltas() is not None:
            self._merged.enter_context(pl_module.merged(self.options.weights))

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._merged.close()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._merged.close()

    # ---- at the end ----------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self.options.enabled:
            self._done = True
            pl_module.finish()  # the module's own hook comes after this one
            self.merge(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Merges where a run was killed in `on_train_end`: resumed, it has no step left and comes here at once."""
        if self.options.enabled and not self._done:
            pl_module.to(trainer.strategy.root_device)  # the strategy has taken it to the CPU
            pl_module.finish()
            self.merge(trainer, pl_module)

    def merge(self, trainer: L.Trainer, module: Any) -> None:
        """Finds weights, measures and writes; nothing while deltas are missing. All processes call it."""
        files = module.all_deltas()
        if files is None:
            return
        options = self.options
        with undisturbed(module):
            facts: dict[str, Any] = {"search": "given"}
            weights = options.weights
            if weights is None:
                data = self._data(trainer, module, "val")
                objective = HeldOut(module, data, module.keys.fork("merge"), trainer.strategy.reduce)
                found = search(options.search, module.num_ranges, objective, options.grid, options.limit)
                weights, loss = (
                    found.weights,
                    {"base": objective.value([0.0] * module.num_ranges), "merged": found.value},
                )
                facts = {"search": options.search, "evaluations": found.count, "search_loss": loss}
            report = self._report(trainer, module, weights)
        log_metrics(trainer, {f"merge/{name}": value for name, value in report.items()}, module.counters.step)
        if trainer.is_global_zero:
            if (self.folder / PROVENANCE).is_file():
                shutil.rmtree(self.folder)
            module.save(self.folder, module.plain(weights))
            abouts = [read_header(file)[1] for file in files]
            write_provenance(self.folder, module.identity, abouts, weights, **facts, report=report)
        trainer.strategy.barrier()

    def _data(self, trainer: L.Trainer, module: Any, split: str) -> Data:
        found = first_records(trainer, split, self.options.n, module.device)
        return [(records, module.condition(records)) for records in found]

    def _reported(self, trainer: L.Trainer) -> str:
        """Test data, or the pictures of the search where there is no test split."""
        return "test" if "test" in getattr(trainer.datamodule, "finite", {}) else "val"

    def _scorers(self, trainer: L.Trainer, split: str) -> list[Scorer]:
        return [
            build_scorer(name, self.options.networks, data_name(trainer, split), data_pictures(trainer, split))
            for name in self.options.metrics
        ]

    def _report(self, trainer: L.Trainer, module: Any, weights: Sequence[float]) -> dict[str, float]:
        """Loss and metrics of base, merged model and experts that take turns, at noise that no search saw."""
        split = self._reported(trainer)
        if split == "test":
            trainer.datamodule.setup("test")
        data, keys = self._data(trainer, module, split), module.keys.fork("merge/report")
        scorers = [scorer.to(module.device) for scorer in self._scorers(trainer, split)]
        found: dict[str, float] = {}
        networks = {"base": module.plain, "merged": lambda: module.plain(weights),
                    "switched": lambda: module.switch(module.experts())}  # fmt: skip
        for name, make in networks.items():
            network = make()
            losses = torch.stack([module.range_losses(network, r, c, keys) for r, c in data]).mean(0)
            losses = trainer.strategy.reduce(losses, reduce_op="mean")
            found |= {f"{name}/loss": float(losses.mean())}
            found |= {f"{name}/range_{i}": loss for i, loss in enumerate(losses.tolist())}
            for records, cond in data if scorers else ():
                images = module.sample(cond, keys, records.position, network)
                for scorer in scorers:
                    scorer.add(images, records)
            for scorer in scorers:
                found |= {f"{name}/{metric}": value for metric, value in scorer.results().items()}
                scorer.reset()
        return found
