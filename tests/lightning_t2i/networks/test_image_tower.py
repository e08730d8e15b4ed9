"""A tower sees pictures as its folder says that it was trained on them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch.nn.functional import normalize

from lightning_t2i.networks.image_tower import CLIP_PIXELS, ImageTower
from lightning_t2i.networks.towers import Towers
from lightning_t2i.paths import ROOT

CLIP = ROOT / "assets" / "tiny" / "clip"
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def test_the_tower_of_a_clip_gives_the_vectors_of_that_clip() -> None:
    tower = ImageTower.build(str(CLIP), tokens=False)
    assert tower.projection is not None
    found = normalize(tower.eval()(IMAGES)[:, 0] @ tower.projection.T, dim=-1)
    torch.testing.assert_close(found, Towers.build(str(CLIP)).eval().encode_image(IMAGES))


def test_mean_and_deviation_are_the_folders_else_the_familys(tmp_path: Path) -> None:
    folder = shutil.copytree(CLIP, tmp_path / "clip")
    facts = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps(facts))
    assert ImageTower.build(str(folder), False).normalise == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    (folder / "preprocessor_config.json").write_text(json.dumps(facts | {"do_normalize": False}))
    assert ImageTower.build(str(folder), False).normalise == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": 32}))
    assert ImageTower.build(str(folder), False).normalise == CLIP_PIXELS
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": facts}))
    assert ImageTower.build(str(folder), False).normalise == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").unlink()
    assert ImageTower.build(str(folder), False).normalise == CLIP_PIXELS
    assert ImageTower.build("configs/networks/tiny_wukong_image.json", False).normalise == CLIP_PIXELS
