"""Every callback that measures pictures refuses reference statistics of others under the data's name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from data_sets import write_data_set

from callbacks.deme_merge import DeMeMerge, MergeOptions
from callbacks.eval_metrics import EvalMetrics, EvalOptions
from callbacks.teacher_comparison import ComparisonOptions, TeacherComparison
from datamodules.image_text import ImageText
from lightning_t2i.errors import UserError
from lightning_t2i.metrics.reference import write_statistics
from lightning_t2i.metrics.scorers import ScorerOptions
from lightning_t2i.networks.classifier import ClassifierConfig, ShapesClassifier
from lightning_t2i.protocols import Distils


def test_statistics_at_another_size_are_refused(studio, tmp_path: Path) -> None:
    ShapesClassifier(ClassifierConfig(widths=(8, 8, 8))).save_pretrained(tmp_path / "classifier")
    networks = ScorerOptions(classifier=str(tmp_path / "classifier"), statistics=str(tmp_path))
    folder = str(write_data_set(tmp_path / "toy"))
    write_statistics(ImageText(folder, size=8), networks)
    stream = ImageText(folder, size=16)
    stream.setup()
    trainer = SimpleNamespace(datamodule=SimpleNamespace(finite={"val": stream}))
    student = SimpleNamespace(**dict.fromkeys(("condition", "sample", *Distils.__annotations__)))
    with pytest.raises(UserError, match="'size'"):
        EvalMetrics(EvalOptions(metrics=["fd"], networks=networks))._evaluate(trainer, studio.Painter(), "val", "eval")
    with pytest.raises(UserError, match="'size'"):
        TeacherComparison(ComparisonOptions(True, ["kd"], networks=networks)).on_fit_start(trainer, student)
    with pytest.raises(UserError, match="'size'"):
        merge = DeMeMerge(tmp_path / "merged", MergeOptions(True, metrics=["fd"], networks=networks))
        merge._scorers(trainer, "val")
