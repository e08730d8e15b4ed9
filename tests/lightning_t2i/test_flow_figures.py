"""Pictures of flows: the plane of the ends, paths and curves as files, and the command on tiny networks."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from lightning_t2i import flow_figures
from lightning_t2i.claims.instaflow_toy import TwoModes, crossings, energy_distance
from lightning_t2i.keys import Keys
from lightning_t2i.metrics.straightness import trajectory


def test_the_plane_holds_the_directions_of_most_variance() -> None:
    ends = torch.zeros(50, 5)
    ends[:, 3], ends[:, 1] = torch.linspace(-2, 2, 50), torch.linspace(-1, 1, 50) ** 2
    directions = flow_figures.plane(ends)
    assert directions[:, 0].abs().argmax() == 3 and directions[:, 1].abs().argmax() == 1
    paths = torch.stack([torch.zeros_like(ends), ends])
    assert flow_figures.projected(paths, directions).shape == (2, 50, 2)


def test_pictures_are_written_and_show_what_they_are_given(tmp_path) -> None:
    z = Keys(0).normal("z", torch.arange(20), (2, 1, 1))
    paths = trajectory(TwoModes(), z, steps=20).flatten(2)
    files = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    flow_figures.draw_paths({"one": paths}, files[0])
    flow_figures.draw_paths({"one": paths, "two": 0.1 * paths}, files[1])
    flow_figures.draw_curve({"teacher": {1: 30.0, 25: 1.0}, "flow": {1: 3.0, 25: 1.1}}, "distance", files[2])
    pictures = []
    for file in files:
        with Image.open(file) as image:
            pictures.append(image.convert("RGB"))
    assert pictures[1].width > 1.8 * pictures[0].width and pictures[2].width > 400
    assert all(len(picture.getcolors(1 << 20)) > 3 for picture in pictures)


def test_the_toys_numbers() -> None:
    keys, toy = Keys(0), TwoModes()
    a, b = toy.draw(keys, 400), toy.draw(keys.fork("other"), 400)
    assert abs(energy_distance(a, b)) < 0.05 < energy_distance(a, torch.zeros(400, 2, 1, 1))
    z = keys.normal("z", torch.arange(400), (2, 1, 1))
    end = trajectory(toy, z, steps=200)[-1]
    assert crossings(z, end) < 1e-3 and crossings(z, a) == pytest.approx(0.5, abs=0.05)
    assert float(end[:, 0].abs().mean()) == pytest.approx(1.5, abs=0.05)
    assert float(toy.draw(keys, 4000)[:, 1].std()) == pytest.approx(0.25, abs=0.01)


@pytest.mark.slow
def test_the_command_writes_three_pictures_and_their_numbers(tmp_path, capsys) -> None:
    """The tiny FLUX is a flow already, so it stands for the reflowed student as well."""
    words = ["--before", "assets/tiny/flux", "--after", "assets/tiny/flux", "--guidance", "1", "--alpha", "1"]
    words += ["--size", "32", "--n", "8", "--steps", "1", "2", "--toy-steps", "20", "--out", str(tmp_path / "out")]
    assert flow_figures.main(words) == 0
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"toy.png", "paths.png", "curve.png", "flow_figures.json"}
    content = json.loads((tmp_path / "out/flow_figures.json").read_text())
    assert content["n"] == 8 and all(set(curve) == {"1", "2"} for curve in content["curve"].values())
    same = [content["straightness"][f"shapes, {name}"] for name in ("before", "after reflow")]
    assert same[0] == same[1] > 0
    assert (
        flow_figures.main(["--before", "no/such/folder", "--after", "x", "--out", str(tmp_path), "--toy-steps", "2"])
        == 2
    )
    assert "No such model folder" in capsys.readouterr().err
