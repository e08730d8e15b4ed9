"""Fluid's claims: the budget, what is compared with what, and each kind of cell on a training of two steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_t2i.claims import fluid_cells as cells
from lightning_t2i.claims.spec import Cell, Measured, Outcome, load

NETWORK = {"depth": 1, "head_depth": 1, "aligner_depth": 1, "heads": 2}
SMALL = {
    "data.main.batch_size": 4,
    "data.main.limit": 8,
    "data.main.latents": None,
    "data.main.in_memory": False,
    "data.val.limit": 8,
    "data.val.batch_size": 8,
    "data.val.latents": None,
    "data.val.in_memory": False,
    "model.mask.strata": 4,
    "model.transformer.schedule.steps": 1,
    "trainer.max_steps": 2,
    "trainer.val_check_interval": 1,
    "trainer.enable_progress_bar": False,
    "samples.enabled": False,
    "checkpoints.every": 1,
    "checkpoints.keep": 9,
}


@pytest.mark.parametrize("quick", [False, True])
def test_the_matrix_fits_its_budget_and_claims_what_the_spec_lists(quick: bool) -> None:
    matrix = load("fluid", quick)  # refuses a matrix over its budget
    assert matrix.seeds == (0, 1, 2)
    assert {c.id[0] for c in matrix.claims} == set("1234567")
    own = {c.arm for c in matrix.claims} | {c.baseline for c in matrix.claims if c.baseline}
    needed = own | {after for arm in matrix.arms for after in arm.after}
    assert needed == {arm.name for arm in matrix.arms}  # nothing is trained for nothing
    for claim in matrix.claims:  # codes and vectors are never compared with a threshold
        if "tokens" in claim.id:
            assert claim.threshold is None


def test_sizes_of_a_variant_differ_in_their_width_alone() -> None:
    matrix = load("fluid")
    for variant in ("dx", "dr"):
        a, b = (dict(matrix.arm(f"{variant}-{width}").options) for width in (32, 64))
        assert a.pop("width") != b.pop("width")
        assert a == b


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cell")
    patch = pytest.MonkeyPatch()
    architecture = cells.read_architecture(cells.NETWORK)
    patch.setattr(cells, "read_architecture", lambda _: {**architecture, **NETWORK})
    cell = Cell(5, folder, {"config": "configs/fluid/tiny.yaml", "width": 16, "overrides": SMALL})
    patch.setenv("LIGHTNING_T2I_RUNS", str(folder))  # `fit` sets it, and it is taken back here
    found = cells.train(cell)
    Outcome(found, 0.0, 1.0).save(folder)
    patch.undo()
    return folder


def test_a_training_of_another_width_reports_its_losses(trained) -> None:
    numbers = Outcome.load(trained).measured.numbers
    assert {"loss@1", "loss@2", "seconds_per_step"} <= numbers.keys()
    assert json.loads((trained / "network.json").read_text())["width"] == 16
    method = cells.at(trained / "training", 1)
    assert method.transformer.config.width == 16 and method.counters.step == 1 and method.common.seed == 5


def test_pictures_of_a_checkpoint(trained, tmp_path) -> None:
    facts = {"of": "cx", "step": 2, "split": "val", "n": 8, "metrics": ["shapes_score", "fd"]}
    facts |= {"sampling": {"guidance": 1.0, "steps": 4, "head_steps": 2}}
    after = {"cx": trained}
    plain = cells.draw(Cell(0, tmp_path, {**facts, "variety": True}, after))
    shuffled = cells.draw(Cell(0, tmp_path, {**facts, "shuffled": True}, after))
    assert {"fd", "diversity", "edges"} <= plain.numbers.keys()
    assert len(plain.scores["shapes_score"]) == 8 and plain.prompts == shuffled.prompts
    assert plain.numbers["fd"] != shuffled.numbers["fd"]
    assert plain.numbers["diversity"] > 0


def test_losses_with_the_captions_of_others(trained, tmp_path) -> None:
    found = cells.validate(Cell(0, tmp_path, {"of": "cx", "step": 2, "n": 8}, {"cx": trained})).numbers
    assert found["caption_gain"] == pytest.approx(found["shuffled_loss"] - found["loss"])
    assert found["caption_gain"] != 0
    assert found["loss"] == pytest.approx(Outcome.load(trained).measured.numbers["loss@2"], rel=1e-4)


def test_correlations_and_floors(tmp_path) -> None:
    after = {}
    for name, measured in {
        "cx": Measured({"loss@1": 3.0, "loss@2": 2.0, "loss@3": 1.0}),
        "one": Measured({"fd": 9.0}, {"shapes_score": [0.0, 0.2]}),
        "two": Measured({"fd": 6.0}, {"shapes_score": [0.2, 0.2]}),
        "three": Measured({"fd": 3.0}, {"shapes_score": [0.4, 0.2]}),
        "tokenizers": Measured({"fd_discrete": 2.5}),
    }.items():
        (tmp_path / name).mkdir()
        Outcome(measured, 0.0, 1.0).save(tmp_path / name)
        after[name] = tmp_path / name
    points = [["cx", 1, "one"], ["cx", 2, "two"], ["cx", 3, "three"]]
    found = cells.correlate(Cell(0, tmp_path, {"points": points}, after)).numbers
    assert found["r_score"] == pytest.approx(-1) and found["r_fd"] == pytest.approx(1)
    assert cells.floor(Cell(0, tmp_path, {"drawn": "three"}, after)).numbers["above_floor"] == pytest.approx(0.5)


def test_both_autoencoders_on_the_same_pictures(tmp_path) -> None:
    found = cells.tokenizers(Cell(0, tmp_path, {"split": "val", "n": 16})).numbers
    assert found["psnr_continuous"] > 33 > found["psnr_discrete"] > 20
    assert found["psnr_gain"] == pytest.approx(found["psnr_continuous"] - found["psnr_discrete"])


@pytest.mark.parametrize("quick", [False, True])
def test_the_longer_comparison_of_orders_differs_in_its_length_alone(quick: bool) -> None:
    base, longer = load("fluid", quick), load("fluid_orders", quick)
    assert longer.golden == ("fluid",) and longer.seeds == base.seeds
    for order in ("cx", "cr"):
        ours, theirs = longer.arm(f"train-{order}"), base.arm(f"long-{order}")
        a, b = ours.options["overrides"], theirs.options["overrides"]
        changed = {key for key in a if a[key] != b[key]}
        lengths = {"trainer.max_steps", "trainer.val_check_interval", "checkpoints.every"}
        assert changed == {*lengths, "model.transformer.schedule.total"} and a.keys() == b.keys()
        assert ours.options["config"] == theirs.options["config"] and ours.units > theirs.units
        assert longer.arm(order).options["sampling"] == base.arm(order).options["sampling"]
    assert {c.id for c in longer.claims} == {"2-score", "2-distance", "2-enough", "2-enough-raster"}
