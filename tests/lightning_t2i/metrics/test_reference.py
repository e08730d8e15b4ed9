"""Saved statistics are those of the whole split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_sets import write_data_set
from safetensors.torch import load_file

from datamodules.buckets import Buckets
from datamodules.image_text import ImageText
from datamodules.prompts import Prompts
from datamodules.worlds.shapes import scene
from datamodules.worlds.shapes_draw import render
from lightning_t2i.errors import UserError
from lightning_t2i.metrics import scorers
from lightning_t2i.metrics.reference import main, write_statistics
from lightning_t2i.metrics.scorers import ScorerOptions, build_scorer, pictures_of
from lightning_t2i.networks.classifier import ClassifierConfig, ShapesClassifier


def test_statistics_of_the_first_scenes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ShapesClassifier(ClassifierConfig(widths=(8, 8, 8))).save_pretrained(tmp_path / "classifier")
    folders = ["--classifier", str(tmp_path / "classifier"), "--statistics", str(tmp_path / "statistics")]
    main(["--source", "shapes", "--split", "val", "--limit", "130", *folders])
    files = [Path(line) for line in capsys.readouterr().out.split()]
    assert [f.name for f in files] == ["fd-shapes-val.safetensors", "kd-shapes-val.safetensors"]
    frechet, kernel = (load_file(str(f)) for f in files)
    pixels = np.stack([render(scene(0, "val", i)) for i in range(130)])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    features = ShapesClassifier.from_pretrained(tmp_path / "classifier")(images).double()
    assert int(frechet["n"]) == int(kernel["n"]) == 130
    assert float((kernel["features"] - features).abs().max()) < 1e-4
    assert torch.allclose(frechet["sum"], features.sum(0), atol=1e-3)


def test_statistics_of_inception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Its weights are not here: a small network that is told the same file stands in."""
    told: list[str] = []

    def inception(weights: str) -> ShapesClassifier:
        told.append(weights)
        return ShapesClassifier(ClassifierConfig(widths=(8, 8, 16)))

    monkeypatch.setattr(scorers, "InceptionFeatures", inception)
    words = ["--inception", "weights.pth", "--name", "few", "--statistics", str(tmp_path)]
    main(["--source", "shapes", "--limit", "8", *words])
    files = [Path(line) for line in capsys.readouterr().out.split()]
    assert [f.name for f in files] == ["fd-few.safetensors", "kd-few.safetensors"]
    assert set(told) == {"weights.pth"} and load_file(files[1])["features"].shape == (8, 16)


def opened(folder: Path, size: int = 8, kind: type = ImageText, **options: Any) -> Any:
    stream = kind(str(folder), **({"size": size} if kind is ImageText else {}), **options)
    stream.prepare()
    stream.setup()
    return stream


def test_statistics_serve_the_pictures_they_are_of(tmp_path: Path) -> None:
    """Another size or a data set packed anew under the name is refused; fewer rows of the same are not."""
    ShapesClassifier(ClassifierConfig(widths=(8, 8, 8))).save_pretrained(tmp_path / "classifier")
    options = ScorerOptions(classifier=str(tmp_path / "classifier"), statistics=str(tmp_path))
    folder, name = write_data_set(tmp_path / "toy"), "toy-train"
    named = ScorerOptions(options.classifier, None, "by-hand", options.statistics)
    for given in (options, named):
        write_statistics(opened(folder), given)
    for metric in ("fd", "kd", "recall"):
        for same in (opened(folder, limit=20), opened(folder, kind=Prompts), opened(folder, lanes=2)):
            assert build_scorer(metric, options, name, pictures_of(same)).metric.name.endswith("ref=toy-train:50")
        with pytest.raises(UserError, match=r"'size'[\s\S]*given: +8[\s\S]*allowed: 16[\s\S]*delete the file"):
            build_scorer(metric, options, name, pictures_of(opened(folder, 16)))
    (tmp_path / "prompts.txt").write_text("a prompt")
    assert pictures_of(opened(tmp_path / "prompts.txt", kind=Prompts)) == {}
    assert pictures_of(opened(folder, buckets=Buckets(sizes=((8, 8),)))).keys() == {"sha"}
    anew = pictures_of(opened(write_data_set(folder, first=100)))
    with pytest.raises(UserError, match=rf"'sha'[\s\S]*{tmp_path}[\s\S]*{anew['sha']}"):
        build_scorer("fd", options, name, anew)
    assert build_scorer("fd", named, name, anew).metric.name == "fd@n=0,ref=by-hand:50"


def test_statistics_of_which_nothing_is_known_are_taken() -> None:
    stream = opened(Path("shapes"), 64, split="val")  # the shipped ones are of 32 pixels
    assert build_scorer("fd", ScorerOptions(), "shapes-val", pictures_of(stream)).complete
