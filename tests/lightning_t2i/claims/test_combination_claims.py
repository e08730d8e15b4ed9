"""Combinations: what is compared with what, the data sets of distilled pairs, and pictures as a Wukong reads them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

from datamodules.records import Shards
from lightning_t2i.claims import combination_cells as cells
from lightning_t2i.claims import hashes
from lightning_t2i.claims.spec import Cell, load
from lightning_t2i.cli.configs import merge
from lightning_t2i.networks.load import load_backbone
from lightning_t2i.networks.projections import add_projections, projected
from lightning_t2i.paths import ROOT


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("file", ["combinations", "repblend_sets"])
def test_every_arm_serves_a_claim_and_no_combination_is_judged(file: str, quick: bool) -> None:
    matrix = load(file, quick)
    used, left = set(), [name for c in matrix.claims for name in (c.arm, c.baseline) if name]
    while left:
        used.add(name := left.pop())
        left += matrix.arm(name).after
    assert used == {arm.name for arm in matrix.arms}
    combined = [c for c in matrix.claims if c.id[0] in "abcde"]
    assert {c.id[0] for c in combined} == set("abce" if file == "combinations" else "d")
    assert all(c.threshold is None for c in combined)


def test_with_and_without_the_first_method_all_else_is_equal() -> None:
    for matrix, ours, other, differs in (
        ("combinations", "dmd-merged", "dmd-plain", {"teacher", "pairs"}),
        ("combinations", "pairs-merged", "pairs-plain", {"teacher"}),
        ("combinations", "search-merged", "search-pixart", {"network"}),
        ("combinations", "search-reflowed", "search-flux", {"network"}),
        ("repblend_sets", "wukong-set", "wukong-real", {"kind"}),
        ("repblend_sets", "wukong-near", "wukong-real_near", {"kind"}),
    ):
        a, b = (dict(load(matrix).arm(name).options) for name in (ours, other))
        assert {key for key in a if a[key] != b[key]} == differs and a.keys() == b.keys()


@pytest.mark.parametrize("base", ["sd", "pixart"])
def test_a_merge_has_projections_that_its_base_can_fold(base: str) -> None:
    """Those of a transformer cannot be; a stock pipeline comes out all the same."""
    found = load("combinations", quick=True).arm(f"{base}-experts").options["overrides"]["model.projection"]
    backbone = load_backbone(f"assets/tiny/{base}")
    add_projections(backbone, found["blocks"])
    assert (found["blocks"] == "foldable") == (base == "sd") == bool(projected(backbone))


def test_a_rehearsal_has_experts_of_as_many_epochs_as_it_asks_for() -> None:
    options = load("repblend_sets", quick=True).arm("experts").options["overrides"]
    epochs = options["trainer.max_steps"] // -(-options["data.main.limit"] // options["model.batch_size"])
    distilled = load("repblend_sets", quick=True).arm("repblend").options["overrides"]
    merged = merge([ROOT / "configs/repblend/tiny.yaml"]).config["model"]["init_args"]
    assert epochs >= distilled["model.max_start"] - 1 + merged["expert_epochs"]


def test_each_combination_has_a_config_that_says_how_to_make_what_it_needs() -> None:
    files = sorted(path.stem for path in (ROOT / "configs" / "combinations").glob("*.yaml"))
    assert files == ["dmd_of_merged", "ecad_of_merged", "ecad_of_reflowed", "wukong_of_set"]


def test_more_seeds_of_repblend_are_other_ones_with_equal_arms() -> None:
    first, more = load("repblend"), load("repblend_sets")
    assert not set(first.seeds) & set(more.seeds) and len(more.seeds) == 5
    for name in ("experts", "tune-repblend", "repblend", "know-repblend", "random"):
        assert more.arm(name) == first.arm(name)


def test_pairs_are_written_as_a_data_set(tmp_path: Path) -> None:
    images = torch.linspace(-1.2, 1.2, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
    metas = [{"caption": {"zh": [f"图{i}"]}, "scene": {"objects": []}} for i in range(2)]
    cells.write_pairs(tmp_path / "set", images, metas)
    shards = Shards(tmp_path / "set", "train", ["zh"])
    assert [shards.meta(row)["caption"]["zh"] for row in range(2)] == [["图0"], ["图1"]]
    read = torch.from_numpy(np.array(shards.picture(1, 32))).permute(2, 0, 1) / 127.5 - 1
    assert torch.allclose(read, images[1].clamp(-1, 1), atol=1 / 127)


class Reader:
    """A Wukong that sees the mean of a picture and reads a number."""

    def __init__(self) -> None:
        self.pipeline = SimpleNamespace(similarity=lambda a, b: (-(a[:, None] - b[None]).abs(), None))

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).mean(1)

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([float(text) for text in texts])


def seen(tmp_path: Path, made: list[float], **options: object) -> float:
    """What `judge` finds of pictures with these means for the captions 0, 1, 2."""
    records = SimpleNamespace(id=torch.arange(3), caption=["0", "1", "2"])
    records.image = torch.arange(3.0)[:, None, None, None].expand(3, 3, 2, 2)
    batch = mock.MagicMock(id=torch.arange(3), __len__=lambda self: 3)
    pictures = torch.tensor(made)[:, None, None, None].expand(3, 3, 2, 2)
    with mock.patch.multiple(
        cells,
        trained=lambda run: Reader(),
        records_of=lambda *args: [records],
        prompts=lambda *args: [batch],
        pictures=lambda *args: pictures,
    ):
        cell = Cell(0, tmp_path, {"judge": "judge", "n": 3, **options}, {"judge": tmp_path, "student": tmp_path})
        return cells.judge(cell).of("found")


def test_a_wukong_finds_the_captions_of_the_pictures_that_are_as_they_say(tmp_path: Path) -> None:
    assert seen(tmp_path, [0.0] * 3, of=None) == 1.0
    assert seen(tmp_path, [0.0] * 3, of=None, shuffled=True) == 0.0
    assert seen(tmp_path, [0.1, 0.2, 2.2], of="student") == pytest.approx(2 / 3)


def test_a_result_is_stale_when_the_mathematics_of_any_of_the_methods_changes(tmp_path, monkeypatch) -> None:
    matrix = load("combinations")
    for name in matrix.golden:
        (tmp_path / f"{name}.json").write_text('{"losses": [1.0]}')
    monkeypatch.setattr(hashes, "FOLDER", tmp_path)
    before = hashes.hashes(matrix)["golden"]
    assert len(matrix.golden) == 7 and hashes.hashes(matrix)["golden"] == before
    (tmp_path / "wukong.json").write_text('{"losses": [2.0]}')
    assert hashes.hashes(matrix)["golden"] != before
