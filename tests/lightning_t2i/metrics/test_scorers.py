"""Metrics by name: fed from records, named with what they measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.worlds.shapes import scene
from datamodules.worlds.shapes_draw import render
from lightning_t2i.batch import Records
from lightning_t2i.errors import UserError
from lightning_t2i.metrics.scorers import SCORERS, ScorerOptions, build_scorer
from lightning_t2i.networks.classifier import ClassifierConfig, ShapesClassifier


def ground_truth(n: int) -> tuple[torch.Tensor, Records]:
    scenes = [scene(0, "val", i) for i in range(n)]
    pixels = torch.from_numpy(np.stack([render(s) for s in scenes])).permute(0, 3, 1, 2)
    ids = torch.arange(n)
    images = pixels / 127.5 - 1
    return images, Records(id=ids, position=ids, image=images, caption=["a scene"] * n, scene=scenes)


def test_shapes_score_of_right_and_of_empty_pictures() -> None:
    images, records = ground_truth(12)
    scorer = build_scorer("shapes_score", ScorerOptions(), "shapes-val")
    scorer.add(images, records)
    assert scorer.results()["shapes_score/overall@n=12"] == 1
    scorer.reset()
    scorer.add(torch.zeros_like(images), records)
    assert scorer.results()["shapes_score/overall@n=12"] == 0


def test_distances_compare_with_the_pictures_of_the_records(tmp_path: Path) -> None:
    ShapesClassifier(ClassifierConfig(widths=(8, 8, 8))).save_pretrained(tmp_path)
    images, records = ground_truth(12)
    values = {}
    for label, generated in {"same": images, "inverted": -images}.items():
        for name in ("fd", "kd"):
            scorer = build_scorer(name, ScorerOptions(classifier=str(tmp_path), statistics=str(tmp_path)), "shapes-val")
            scorer.add(generated, records)
            values[label, name] = scorer.results()[f"{name}@n=12,ref=shapes-val:12"]
    assert values["same", "fd"] < 1e-6 < values["inverted", "fd"]
    assert values["same", "kd"] < 0  # equal sets lie below the mean of the unbiased estimate
    assert values["inverted", "kd"] != values["same", "kd"]


def test_reference_may_be_named_by_the_options(tmp_path: Path) -> None:
    ShapesClassifier(ClassifierConfig(widths=(8, 8, 8))).save_pretrained(tmp_path)
    scorer = build_scorer(
        "fd", ScorerOptions(classifier=str(tmp_path), reference="coco", statistics=str(tmp_path)), "shapes-val"
    )
    assert scorer.metric.name == "fd@n=0,ref=coco:0"


def test_missing_data_are_named() -> None:
    ids = torch.arange(2)
    scorer = build_scorer("shapes_score", ScorerOptions(), "val")
    with pytest.raises(UserError, match="shapes_score needs scenes"):
        scorer.add(torch.zeros(2, 3, 32, 32), Records(id=ids, position=ids))


def test_every_name_builds_or_says_what_it_lacks(tmp_path: Path) -> None:
    options = ScorerOptions(classifier=str(tmp_path / "nothing"), inception=str(tmp_path / "nothing.pth"))
    lacking = {"fd": "Inception", "kd": "Inception", "recall": "Inception", "clip_score": "needs a CLIP"}
    for name in SCORERS.keys() - lacking.keys():
        assert build_scorer(name, options, "val").metric.name.startswith(name)
    for name, message in lacking.items():
        with pytest.raises(UserError, match=message):
            build_scorer(name, options, "val")
