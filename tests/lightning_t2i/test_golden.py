"""The golden losses of each method that has them, and the harness itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import Toy, ToyData, trainer_for

from lightning_t2i import golden
from lightning_t2i.golden import FOLDER, Golden, compare, heard, main, overrides, record, steps_of
from lightning_t2i.paths import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:Unable to serialize instance")
FILES = sorted(FOLDER.glob("*.json"))
LOSSES = [[("critic", 1.0), ("generator", 2.0)], [("critic", 0.5)]]
SOME = Golden("toy", {"teacher": "sha256:1"}, LOSSES)


def test_every_tiny_config_but_the_classifiers_has_golden_losses() -> None:
    tiny = {file.parent.name for file in (ROOT / "configs").glob("*/tiny.yaml")}
    assert {file.stem for file in FILES} == tiny - {"classifier"}


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_golden_losses(file: Path) -> None:
    kept = Golden.load(file)
    assert kept.method == file.stem and len(kept.losses) == steps_of(kept.method)
    assert compare(kept, record(kept.method)) == []


def test_losses_are_heard_as_they_are_given(tmp_path: Path) -> None:
    method = Toy()
    with heard(method) as losses:
        trainer_for(tmp_path, 6).fit(method, ToyData())
    assert [[name for name, _ in step] for step in losses] == [
        ["generator", "critic"], ["critic"], ["critic"], ["critic"], ["critic"], ["generator", "critic"],
    ]  # fmt: skip
    assert "backward" not in vars(method)
    with torch.no_grad():
        again = Toy()
        again.configure_model()
    with heard(again) as repeated:
        trainer_for(tmp_path, 6).fit(again, ToyData())
    assert compare(Golden("toy", {}, losses), Golden("toy", {}, repeated)) == []


def changed(step: int, place: int, factor: float) -> Golden:
    losses = [list(entries) for entries in LOSSES]
    group, loss = losses[step][place]
    losses[step][place] = (group, loss * factor)
    return replace(SOME, losses=losses)


def test_a_change_beyond_the_tolerance_is_told_with_its_step() -> None:
    assert compare(SOME, changed(0, 1, 1.00009)) == []
    (line,) = compare(SOME, changed(0, 1, 1.0002))
    assert line.startswith("step  1: generator") and "2 " in line and "2.0004" in line and line.endswith("+0.02%")
    assert compare(SOME, changed(1, 0, float("nan"))) != []
    assert compare(SOME, replace(SOME, losses=LOSSES[:1])) == ["training steps: 2 -> 1"]
    other = replace(SOME, losses=[LOSSES[0][::-1], LOSSES[1]])
    assert compare(SOME, other) == ["step  1: backwards critic, generator -> generator, critic"]


def test_rounding_that_has_grown_is_allowed_for_in_later_steps() -> None:
    def run(step: int, factor: float) -> Golden:
        losses = [[("net", 2.0)] for _ in range(20)]
        losses[step - 1] = [("net", 2.0 * factor)]
        return Golden("long", {}, losses)

    assert compare(run(1, 1.0), run(11, 1.0009)) == []
    assert len(compare(run(1, 1.0), run(11, 1.0011))) == 1
    assert len(compare(run(1, 1.0), run(10, 1.0009))) == 1
    rough = [replace(run(11, factor), method="swiftbrush") for factor in (1.0, 1.004, 1.006)]
    assert compare(*rough[:2]) == [] and len(compare(rough[0], rough[2])) == 1


def test_another_frozen_network_is_named_as_a_cause_and_is_none_by_itself() -> None:
    other = {"teacher": "sha256:2"}
    assert compare(SOME, replace(SOME, frozen=other)) == []
    assert compare(SOME, replace(changed(1, 0, 2.0), frozen=other))[0] == "frozen network teacher is another one"


def test_files_hold_what_was_saved(tmp_path: Path) -> None:
    SOME.save(tmp_path / "toy.json")
    assert Golden.load(tmp_path / "toy.json") == SOME
    assert len((tmp_path / "toy.json").read_text().splitlines()) == 6 + len(LOSSES) + 2


def test_data_is_replaced_by_few_scenes(tmp_path: Path) -> None:
    stream = {"class_path": "datamodules.image_text.ImageText", "init_args": {"source": "openmoji", "latents": "vae"}}
    pairs = {"class_path": "datamodules.pairs.Pairs", "init_args": {"source": "assets/pairs"}}
    found = overrides({"main": stream, "pairs": pairs}, tmp_path)
    place = ("data", "init_args", "main", "init_args")
    assert found[(*place, "source")] == str(tmp_path)
    assert found[(*place, "latents")] is None and found[(*place, "batch_size")] == golden.BATCH
    assert ("data", "init_args", "pairs", "init_args", "source") not in found  # pairs belong to their teacher
    assert found[("data", "init_args", "val")] is None
    assert (*place, "limit") not in found and overrides({"main": stream}, tmp_path, 4)[(*place, "limit")] == 4


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Golden]:
    """A folder with one golden file, and what `record` finds instead of training."""
    monkeypatch.setattr(golden, "FOLDER", tmp_path)
    SOME.save(tmp_path / "toy.json")
    finds = [SOME]
    monkeypatch.setattr(golden, "record", lambda method: finds[0])
    return finds


def test_the_command_compares(kept: list[Golden], capsys: Any) -> None:
    assert main([]) == 0 and capsys.readouterr().out == "toy: as before\n"
    kept[0] = changed(1, 0, 1.5)
    assert main([]) == 1 and "step  2: critic" in capsys.readouterr().out
    assert Golden.load(golden.FOLDER / "toy.json") == SOME


def test_refresh_prints_the_difference_and_then_writes(kept: list[Golden], capsys: Any) -> None:
    kept[0] = changed(1, 0, 1.5)
    assert main(["--refresh"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "toy: golden losses" and "+50.00%" in lines[1] and "written" in lines[2]
    assert Golden.load(golden.FOLDER / "toy.json") == kept[0]
    assert main(["--method", "new"]) == 2 and "--method new --refresh" in capsys.readouterr().err
    assert main(["--method", "new", "--refresh"]) == 0 and (golden.FOLDER / "new.json").is_file()


def test_an_unknown_method_is_named_with_its_closest_match(capsys: Any) -> None:
    assert main(["--method", "difusion"]) == 2
    assert "did you mean diffusion?" in capsys.readouterr().err
