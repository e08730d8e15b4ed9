"""The metrics by the names that configs use, behind one interface: pictures and their records in, named numbers out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_t2i.batch import Records
from lightning_t2i.errors import UserError
from lightning_t2i.metrics.clip_score import ClipScore, TransformersClip
from lightning_t2i.metrics.frechet import FrechetDistance, InceptionFeatures, KernelDistance
from lightning_t2i.networks.classifier import ShapesClassifier
from lightning_t2i.paths import resolve


@dataclass(frozen=True)
class ScorerOptions:
    """Where the networks and references of metrics are.

    Args:
        classifier: folder of the metric network whose features fd and kd compare.
        inception: file of Inception weights; fd and kd are then FID and KID.
        reference: name of the reference pictures in the metrics' names; null: the data set and split they come from.
        statistics: folder of saved reference statistics, `<fd or kd>-<reference>.safetensors`, written when missing.
        clip: folder or hub id of the CLIP of clip_score.
    """

    classifier: str = "assets/tiny/classifier"
    inception: str | None = None
    reference: str | None = None
    statistics: str | None = None
    clip: str | None = None


class Scorer:
    """Feeds a torchmetrics metric from pictures and the records that they were made for.

    Args:
        metric: `compute` gives a number or a dict of numbers, `name` its name.
        feed: records -> what `metric.update` takes after the pictures.
    """

    def __init__(self, metric: Any, feed: Callable[[Records], tuple[Any, ...]] = lambda records: ()):
        self.metric, self.feed = metric, feed

    def to(self, device: torch.device) -> Scorer:
        self.metric.to(device)
        return self

    def add(self, images: Tensor, records: Records) -> None:
        """Adds generated pictures [B, 3, H, W] in [-1, 1]."""
        self.metric.update(images, *self.feed(records))

    def results(self) -> dict[str, float]:
        """Name, with number of pictures and reference, -> value; on several ranks a collective call."""
        value = self.metric.compute()
        if not isinstance(value, dict):
            return {self.metric.name: float(value)}
        symbol, _, facts = self.metric.name.partition("@")
        return {f"{symbol}/{part}@{facts}": float(number) for part, number in value.items()}

    def reset(self) -> None:
        self.metric.reset()


class DistanceScorer(Scorer):
    """Gathers the reference from the records' pictures at the first evaluation, or reads it from a file.

    Args:
        file: where the reference's statistics are, or are to be written; null keeps them in memory.
    """

    def __init__(self, metric: FrechetDistance | KernelDistance, file: Path | None):
        super().__init__(metric)
        self.file = file
        self.complete = file is not None and file.is_file()
        if file is not None and self.complete:
            metric.load_reference(file)

    def add(self, images: Tensor, records: Records) -> None:
        self.metric.update(images)
        if self.complete:
            return
        if records.image is None:
            raise UserError(
                f"{self.metric.symbol} needs reference pictures and the data has none",
                where="eval.networks.statistics",
                fix="use data with pictures, or name a folder with saved statistics",
            )
        self.metric.update(records.image.to(images.device), real=True)

    def results(self) -> dict[str, float]:
        found = super().results()
        if self.file is not None and not self.complete:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.metric.save_reference(self.file)
        self.complete = True
        return found


def _shapes_score(options: ScorerOptions, reference: str) -> Scorer:
    from lightning_t2i.metrics.shapes_score import ShapesScore

    return Scorer(ShapesScore(), lambda records: (_given(records.scene, "shapes_score", "scenes"),))


def _distance(kind: type[FrechetDistance] | type[KernelDistance]) -> Callable[[ScorerOptions, str], Scorer]:
    def build(options: ScorerOptions, reference: str) -> Scorer:
        extractor = (
            ShapesClassifier.from_pretrained(options.classifier)
            if options.inception is None
            else InceptionFeatures(options.inception)
        )
        file = Path(options.statistics) / f"{kind.symbol}-{reference}.safetensors" if options.statistics else None
        return DistanceScorer(kind(extractor, reference), file)

    return build


def _clip_score(options: ScorerOptions, reference: str) -> Scorer:
    if options.clip is None:
        raise UserError(
            "clip_score needs a CLIP", where="eval.networks.clip", fix="name a transformers folder or hub id"
        )
    encoder = TransformersClip.from_pretrained(str(resolve(options.clip)))
    metric = ClipScore(encoder, Path(options.clip).name)
    return Scorer(metric, lambda records: (_given(records.caption, "clip_score", "captions"),))


def _given(value: Any, metric: str, what: str) -> Any:
    if value is None:
        raise UserError(f"{metric} needs {what} and the data has none", where="data", fix="leave the metric out")
    return value


SCORERS: dict[str, Callable[[ScorerOptions, str], Scorer]] = {
    "shapes_score": _shapes_score,
    "fd": _distance(FrechetDistance),
    "kd": _distance(KernelDistance),
    "clip_score": _clip_score,
}


def build_scorer(name: str, options: ScorerOptions, reference: str) -> Scorer:
    """The metric `name` (a key of SCORERS) against pictures that are called `reference` unless the options say else."""
    return SCORERS[name](options, options.reference or reference)
