"""InstaFlow's claims: the budget, what is compared with what, and each kind of cell on trainings of a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_t2i.claims import instaflow_cells as cells
from lightning_t2i.claims.spec import Cell, Measured, Outcome, load

QUIET = {
    "data.main.batch_size": 4,
    "trainer.max_steps": 2,
    "trainer.limit_val_batches": 1,
    "trainer.val_check_interval": 1,
    "trainer.enable_progress_bar": False,
    "samples.enabled": False,
    "comparison.enabled": False,
    "health.enabled": False,
    "checkpoints.every": 1,
    "model.val_steps": 2,
}


@pytest.mark.parametrize("quick", [False, True])
def test_the_matrix_fits_its_budget_and_claims_what_the_spec_lists(quick: bool) -> None:
    matrix = load("instaflow", quick)  # refuses a matrix over its budget
    assert matrix.seeds == (0, 1, 2)
    roman = [claim.id.split("-")[0] for claim in matrix.claims]
    assert list(dict.fromkeys(roman)) == ["i", "ii", "iii", "iv", "v", "vi", "vii", "viii"]
    needed = {c.arm for c in matrix.claims} | {c.baseline for c in matrix.claims if c.baseline}
    needed |= {after for arm in matrix.arms for after in arm.after}
    assert needed == {arm.name for arm in matrix.arms}  # nothing is trained for nothing
    minutes = sum(len(matrix.seeds) * arm.seconds for arm in matrix.arms) / 60
    assert minutes < (20 if quick else 75)


def test_arms_are_fair() -> None:
    arms = {arm.name: arm for arm in load("instaflow").arms}
    steps = {
        name: arm.options["overrides"]["trainer.max_steps"] for name, arm in arms.items() if "overrides" in arm.options
    }
    assert steps["direct"] == steps["reflow"] + steps["distilled"]
    assert steps["more-l2"] == steps["perceptual"] and steps["twice"] == steps["distilled"]
    assert arms["direct"].options["pairs"] == arms["reflow"].options["pairs"] == "assets/tiny/pairs"
    same = [{k: v for k, v in arms[name].options["overrides"].items() if "perceptual" not in k}
            for name in ("more-l2", "perceptual")]  # fmt: skip
    assert same[0] == same[1]
    rates = [arms[name].options["overrides"]["model.student.schedule.init_args.total"] for name in ("reflow", "raw")]
    assert rates[0] == rates[1]
    assert "classifier" not in str([arm.options for arm in arms.values()])  # the judge is in no loss


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> dict[str, Path]:
    """Folders of cells: held-out pairs of the tiny teacher, a reflow of two steps, its pairs, a distillation."""
    root, folders = tmp_path_factory.mktemp("cells"), {}

    def run(name: str, function, options: dict, after: tuple[str, ...] = ()) -> None:
        folders[name] = root / name
        folders[name].mkdir()
        cell = Cell(5, folders[name], options, {a: folders[a] for a in after})
        Outcome(function(cell), 0, 1).save(folders[name])

    patch = pytest.MonkeyPatch()
    patch.setenv("LIGHTNING_T2I_RUNS", str(root / "runs"))
    pairs = {"n": 8, "guidance": 4.5, "solver": "ddim", "config": "configs/pairs/instaflow_teacher.yaml"}
    run("held", cells.make_pairs, {**pairs, "teacher": "assets/tiny/sd", "split": "val"})
    reflow = {"config": "configs/instaflow/tiny.yaml", "teacher": "assets/tiny/sd", "pairs": "assets/tiny/pairs"}
    run("reflow", cells.train, {**reflow, "held": "held", "overrides": QUIET | {"model.init_steps": 1}}, ("held",))
    flow = {"n": 8, "guidance": 1.5, "solver": "euler", "config": "configs/pairs/instaflow_flow.yaml"}
    run("pairs-1", cells.make_pairs, {**flow, "teacher": "reflow"}, ("reflow",))
    squares = QUIET | {"trainer.limit_val_batches": 0, "model.perceptual_from": None}
    distill = {"config": "configs/instaflow/distill.yaml", "teacher": "reflow", "pairs": "pairs-1"}
    run("distilled", cells.train, {**distill, "overrides": squares}, ("reflow", "pairs-1"))
    ends = {**distill, "start": "distilled", "overrides": squares | {"model.start_optimizer": False}}
    run("more", cells.train, ends, ("reflow", "pairs-1", "distilled"))
    patch.undo()
    return folders


def cell(done: dict[str, Path], options: dict, *after: str) -> Cell:
    return Cell(5, done["reflow"], options, {name: done[name] for name in after})


@pytest.mark.slow
def test_trainings_leave_flows_and_losses_of_held_out_pairs(done) -> None:
    numbers = Outcome.load(done["reflow"]).measured.numbers
    assert {"loss@1", "loss@2"} <= numbers.keys() and numbers["loss@1"] > 0
    for name in ("reflow", "distilled", "more"):
        assert (done[name] / cells.FLOW / "model_index.json").is_file()
    assert (done["pairs-1"] / cells.PAIRS / "dataset.json").is_file()


@pytest.mark.slow
def test_what_is_measured(done) -> None:
    options = {"of": "distilled", "split": "val", "n": 4, "metrics": ["shapes_score"]}
    drawn = cells.draw(cell(done, {**options, "distance": True}, "distilled"))
    assert drawn.numbers["distance"] > 0 and len(drawn.scores["shapes_score"]) == 4
    sampled = {**options, "of": "reflow", "sampling": {"steps": 2}}
    assert len(cells.draw(cell(done, sampled, "reflow")).scores["shapes_score"]) == 4
    bends = cells.bends(cell(done, {"of": "reflow", "n": 4, "steps": 3}, "reflow")).numbers
    assert bends["share"] == pytest.approx(bends["flow"] / bends["teacher"])
    best = cells.best(cell(done, {"of": "reflow", "scales": [1.0, 2.0], "n": 4}, "reflow")).numbers
    assert best["guidance"] in (1.0, 2.0) and "shapes_score@guidance=2" in best


def test_gains_and_the_plane(tmp_path) -> None:
    for name, fd in (("a", 10.0), ("b", 4.0), ("c", 3.0)):
        (tmp_path / name).mkdir()
        Outcome(Measured({"fd": fd}), 0, 1).save(tmp_path / name)
    folders = {name: tmp_path / name for name in "abc"}
    found = cells.gains(Cell(0, tmp_path, {"direct": "a", "once": "b", "twice": "c"}, folders))
    assert found.numbers == {"first": 6.0, "second": 1.0, "excess": -5.0}
    numbers = cells.planar(Cell(0, tmp_path, {"steps": 20})).numbers
    assert numbers["bend_share"] == pytest.approx(numbers["bend_reflowed"] / numbers["bend_teacher"])
    assert numbers["energy_excess"] == pytest.approx(numbers["energy_distilled"] - numbers["energy_direct"] / 2)


def test_places_are_those_of_arms_or_of_folders(tmp_path) -> None:
    of = Cell(0, tmp_path, {"teacher": "reflow", "pairs": "assets/tiny/pairs"}, {"reflow": tmp_path / "r"})
    assert cells.place(of, "teacher", "flow") == str(tmp_path / "r" / "flow")
    assert cells.place(of, "pairs", "pairs") == "assets/tiny/pairs"
