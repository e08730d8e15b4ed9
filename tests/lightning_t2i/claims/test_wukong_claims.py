"""Wukong's claims: the budget, what is compared with what, disjoint pictures, and each kind of cell."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from datamodules.worlds import shapes
from datamodules.worlds.shapes_captions import short_chinese
from datamodules.worlds.shapes_draw import png, render
from lightning_t2i.claims import wukong_cells as cells
from lightning_t2i.claims import wukong_knowledge as knowledge
from lightning_t2i.claims.spec import Cell, Measured, Outcome, load
from lightning_t2i.cli.restore import trained


@pytest.mark.parametrize("quick", [False, True])
def test_the_matrix_fits_its_budget_and_claims_what_the_spec_lists(quick: bool) -> None:
    matrix = load("wukong", quick)
    assert matrix.seeds == (0, 1, 2)
    assert {c.id[0] for c in matrix.claims if not c.id.startswith("emoji")} == set("12345678")
    assert sum(arm.seconds for arm in matrix.arms) * 3 <= 80 * 60
    own = {c.arm for c in matrix.claims} | {c.baseline for c in matrix.claims if c.baseline}
    needed = own | {after for arm in matrix.arms for after in arm.after}
    assert needed == {arm.name for arm in matrix.arms}  # nothing is trained for nothing


def test_the_english_tower_sees_none_of_the_excluded_pictures(tmp_path) -> None:
    first = [png(render(shapes.scene(cells.OTHER_SEED, "train", i))) for i in range(4)]
    excluded = {cells.digest_of(first[1]), cells.digest_of(first[3])}
    assert cells.other_scenes(tmp_path / "d", 6, excluded) == 2
    from datamodules.records import Shards

    shards = Shards(tmp_path / "d", "train")
    found = {cells.digest_of(shards.data(i)) for i in range(len(shards))}
    assert len(shards) == 6 and not found & excluded and cells.digest_of(first[0]) in found


def test_swapped_scenes_differ_in_colours_alone() -> None:
    scene = next(s for i in range(200) if len((s := shapes.scene(0, "test", i))["ask"]) == 2)
    other = knowledge.swapped(scene)
    assert [o["shape"] for o in other["objects"]] == [o["shape"] for o in scene["objects"]]
    assert [o["colour"] for o in other["objects"]] == [o["colour"] for o in scene["objects"]][::-1]
    assert short_chinese(other) != short_chinese(scene) and knowledge.swapped(other) == scene


def test_patches_on_an_object() -> None:
    assert knowledge.on_object([0, 0, 8, 8], 4, 32) == [True] + [False] * 15
    found = knowledge.on_object([4, 8, 16, 16], 4, 32)
    assert [i for i, on in enumerate(found) if on] == [4, 5]
    assert sum(knowledge.on_object([7, 7, 9, 9], 4, 32)) == 0  # a corner of each


def test_the_ratio_of_two_losses(tmp_path) -> None:
    folders = {name: tmp_path / name for name in ("a", "b")}
    for name, value in (("a", 3.0), ("b", 2.0)):
        folders[name].mkdir()
        Outcome(Measured({"loss": value}), 0.0, 1.0).save(folders[name])
    cell = Cell(0, tmp_path, {"arm": "a", "baseline": "b"}, folders)
    assert cells.compare(cell).of("loss_ratio") == 1.5


def test_fewer_tokens_cost_less(monkeypatch) -> None:
    options = {"all": 16, "tokens": 2, "pairs": 128, "width": 16, "turns": 3}
    with FlopCounterMode(display=False) as counter:  # a clock that no other program slows
        monkeypatch.setattr(cells, "time", SimpleNamespace(process_time=counter.get_total_flops))
        there = cells.cost(Cell(0, None, options)).of("ratio")  # type: ignore[arg-type]
        chosen = cells.cost(Cell(0, None, {**options, "chosen": True})).of("ratio")  # type: ignore[arg-type]
    assert 7.5 < there < 8  # 16 tokens over 2, and the logits of the pairs
    assert 1 < chosen < there  # choosing them costs


def test_a_tower_a_training_on_it_and_what_it_knows(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(cells, "seen_elsewhere", lambda n: set())
    matrix = load("wukong", quick=True)
    small = {"trainer.max_steps": 2, "data.main.batch_size": 4, "checkpoints.every": 2}
    folders = {}

    def run(name: str, of: str, **more) -> Measured:
        arm = matrix.arm(of)
        folders[name] = tmp_path / name
        folders[name].mkdir()
        options = {**arm.options, "overrides": {**arm.options["overrides"], **small, "data.main.limit": 8}, **more}
        return arm.cell(Cell(0, folders[name], options, dict(folders)))

    run("pretrain", "pretrain", scenes=8)
    assert (folders["pretrain"] / "tower" / "config.json").is_file()
    run("whole", "locked-f")
    run("cut", "locked-f", negatives=1)  # one pair has no negatives, and no loss
    run("open", "open-f")
    weights = {
        name: trained(folders[name] / "training").towers.text_projection.weight for name in ("whole", "cut", "open")
    }
    assert not torch.equal(weights["whole"], weights["cut"]) and not torch.equal(weights["whole"], weights["open"])
    found = cells.know(Cell(0, tmp_path, {"of": "whole", "n": 40, "world": "shapes"}, folders))
    assert {
        "mr",
        "r1",
        "r10",
        "chance",
        "above_chance",
        "bare",
        "prompts",
        "gain",
        "binding",
        "located",
        "area",
        "loss",
    } <= (found.numbers.keys())
    assert 0 < found.of("area") < 1 and torch.isfinite(torch.tensor(list(found.numbers.values()))).all()
