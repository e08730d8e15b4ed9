"""Saved statistics are those of the whole split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from datamodules.worlds.shapes import scene
from datamodules.worlds.shapes_draw import render
from lightning_t2i.metrics.reference import main
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
