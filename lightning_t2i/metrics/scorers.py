"""The metrics by the names that configs use, behind one interface: pictures and their records in, named numbers out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_t2i.batch import Records
from lightning_t2i.errors import UserError
from lightning_t2i.metrics.clip_score import ClipScore, TransformersClip
from lightning_t2i.metrics.frechet import FrechetDistance, InceptionFeatures, KernelDistance, Recall
from lightning_t2i.networks.classifier import ShapesClassifier
from lightning_t2i.paths import resolve


@dataclass(frozen=True)
class ScorerOptions:
    """Where the networks and references of metrics are.

    Args:
        classifier: folder of the metric network whose features fd and kd compare.
        inception: file of Inception weights; fd and kd are then FID and KID.
        reference: name of the reference pictures; null: the data set and split that are evaluated, as "shapes-val".
        statistics: folder of reference statistics that `python -m lightning_t2i.metrics.reference` wrote; without a
            file there for the reference, the pictures of the evaluated records are the reference.
        clip: folder or hub id of the CLIP of clip_score.
    """

    classifier: str = "assets/tiny/classifier"
    inception: str | None = None
    reference: str | None = None
    statistics: str = "assets/tiny/statistics"
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

    def check(self, pictures: Mapping[str, Any]) -> None:
        """Compares what the metric was read from with what is known of the evaluated data, see `pictures_of`."""


class DistanceScorer(Scorer):
    """Reads the reference from a file, or gathers it from the records' pictures at the first evaluation.

    Args:
        file: statistics of the reference.
    """

    def __init__(self, metric: FrechetDistance | KernelDistance, file: Path):
        super().__init__(metric)
        self.file, self.complete = file, file.is_file()
        if self.complete:
            metric.load_reference(file)

    def add(self, images: Tensor, records: Records) -> None:
        self.metric.update(images)
        if self.complete:
            return
        if records.image is None:
            raise UserError(
                f"{self.metric.symbol} needs reference pictures; the data has none and there are no saved statistics",
                where="eval.networks.statistics",
                given=self.file,
                fix="python -m lightning_t2i.metrics.reference --source SOURCE --split SPLIT",
            )
        self.metric.update(records.image.to(images.device), real=True)

    def check(self, pictures: Mapping[str, Any]) -> None:
        self.metric.check_pictures(pictures)

    def results(self) -> dict[str, float]:
        found = super().results()
        self.complete = True
        return found


def build_distance(kind: type[FrechetDistance] | type[KernelDistance], options: ScorerOptions, reference: str) -> Any:
    """The metric with the network that the options name."""
    if options.inception is not None:
        return kind(InceptionFeatures(options.inception), reference)
    return kind(ShapesClassifier.from_pretrained(options.classifier), reference)


def statistics_file(symbol: str, options: ScorerOptions, reference: str) -> Path:
    """Where the statistics of a reference are; symbol: fd or kd, whatever the network."""
    return resolve(options.statistics) / f"{symbol}-{reference}.safetensors"


def _shapes_score(options: ScorerOptions, reference: str) -> Scorer:
    from lightning_t2i.metrics.shapes_score import ShapesScore

    return Scorer(ShapesScore(), lambda records: (_given(records.scene, "shapes_score", "scenes"),))


def _distance(kind: type[FrechetDistance] | type[KernelDistance]) -> Callable[[ScorerOptions, str], Scorer]:
    def build(options: ScorerOptions, reference: str) -> Scorer:
        return DistanceScorer(
            build_distance(kind, options, reference), statistics_file(kind.stored, options, reference)
        )

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
    "recall": _distance(Recall),
    "clip_score": _clip_score,
}


def check_metrics(names: Sequence[str], where: str) -> None:
    """Refuses names that are no metrics; `where` is their key in the config."""
    for name in names:
        if name not in SCORERS:
            raise UserError("There is no such metric", where=where, given=name, allowed=SCORERS)


def build_scorer(
    name: str, options: ScorerOptions, reference: str, pictures: Mapping[str, Any] | None = None
) -> Scorer:
    """The metric `name` (a key of SCORERS) against pictures that are called `reference` unless the options say else.

    Args:
        pictures: what is known of them, see `pictures_of`.

    Raises:
        UserError: statistics of that name are of other pictures.
    """
    scorer = SCORERS[name](options, options.reference or reference)
    if options.reference is None:
        scorer.check(pictures or {})
    return scorer


def pictures_of(stream: Any) -> dict[str, Any]:
    """What tells a stream's pictures from others that are called the same: hash of the index, and side in pixels.

    Which and how many of a split they are does not count: a run on its first rows is measured against the whole.
    """
    if "/" not in stream.identity["data"]:  # a file of prompts, whose pictures are nowhere
        return {}
    one_size = getattr(stream, "buckets", None) is None and hasattr(stream, "size")
    return {"sha": stream.identity["sha"], **({"size": stream.size} if one_size else {})}
