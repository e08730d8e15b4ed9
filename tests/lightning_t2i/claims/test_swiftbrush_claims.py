"""SwiftBrush's claims: the budget, what is compared with what, and each kind of cell on a training of a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightning_t2i.claims import swiftbrush as cells
from lightning_t2i.claims.spec import Cell, Measured, Outcome, load
from lightning_t2i.claims.swiftbrush_longer import watched
from lightning_t2i.cli.restore import constructed
from lightning_t2i.paths import resolve

SMALL = {
    "data.main.batch_size": 4,
    "data.val.batch_size": 4,
    "data.test.batch_size": 4,
    "trainer.max_steps": 8,
    "trainer.limit_val_batches": 0,
    "trainer.enable_progress_bar": False,
    "samples.enabled": False,
    "health.enabled": False,
    "checkpoints.every": 8,
    "model.common.log_every": 2,
}


@pytest.mark.parametrize("quick", [False, True])
def test_the_matrix_fits_its_budget_and_claims_what_the_spec_lists(quick: bool) -> None:
    matrix = load("swiftbrush", quick)
    assert matrix.seeds == (0, 1, 2)
    assert {c.id[0] for c in matrix.claims} >= set("123457")
    own = {c.arm for c in matrix.claims} | {c.baseline for c in matrix.claims if c.baseline}
    needed = own | {after for arm in matrix.arms for after in arm.after}
    assert needed == {arm.name for arm in matrix.arms}  # nothing is trained for nothing
    minutes = sum(arm.seconds for arm in matrix.arms) * len(matrix.seeds) / 60
    assert minutes <= (10 if quick else 60)
    for claim in matrix.claims:
        assert (claim.threshold is None) == (
            claim.id.startswith(("versus", "cost", "backgrounds")) or claim.id in ("1-score", "1-diversity")
        )


@pytest.mark.parametrize("quick", [False, True])
def test_the_longer_trainings_differ_in_their_length_alone_and_are_watched(quick: bool) -> None:
    base, longer = load("swiftbrush", quick), load("swiftbrush_longer", quick)
    assert longer.golden == ("swiftbrush",) and longer.seeds == base.seeds
    for name in ("full", "sds"):
        ours, theirs = longer.arm(f"train-{name}"), base.arm(f"train-{name}")
        a, b = ours.options["overrides"], theirs.options["overrides"]
        changed = {key for key in b if a[key] != b[key]}
        assert {"trainer.max_steps", "model.student.schedule.init_args.total"} <= changed
        assert all(key.endswith(("max_steps", "total")) for key in changed)
        assert {key.partition(".")[0] for key in a.keys() - b.keys()} == {"eval"}
        assert longer.arm(name) == base.arm(name) and ours.units > theirs.units
    of_base = {claim.id: claim for claim in base.claims}
    assert all(claim == of_base[claim.id] for claim in longer.claims if not claim.id.startswith("curve"))


def test_scores_on_the_way_are_read_from_the_run(folder) -> None:
    watch = {"eval.metrics": ["shapes_score"], "eval.every": 8, "eval.n": 100, "eval.max_fraction": 1.0}
    found = watched(cell_of(folder, **watch, **{"model.score": "noise"})).numbers
    assert found.keys() == {"seconds_per_step", "score@8"} and 0 <= found["score@8"] <= 1


def test_distances_of_pictures_of_one_prompt() -> None:
    features = torch.tensor([[[0.0, 0.0], [3.0, 4.0]], [[1.0, 1.0], [1.0, 2.0]]])
    assert cells.pairwise(features) == pytest.approx((5 + 1) / 2)


def test_the_way_from_one_step_to_many(tmp_path) -> None:
    places = {}
    for name, fd, score in (("teacher-1", 20.0, 0.1), ("teacher-25", 2.0, 0.8), ("full", 6.5, 0.4)):
        places[name] = tmp_path / name
        places[name].mkdir()
        Outcome(Measured({"fd": fd, "shapes_score": score}), 0.0, 1.0).save(places[name])
    about = {"student": "full", "teacher": "teacher-25", "teacher_in_one": "teacher-1"}
    numbers = cells.closed(Cell(0, tmp_path, about, places)).numbers
    assert numbers == pytest.approx({"score_share": 0.5, "fd_ratio": 3.25, "gap_closed": 0.75})


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LIGHTNING_T2I_RUNS", str(tmp_path))  # `fit` sets it, and it is taken back here
    return tmp_path


def test_the_untrained_student_is_that_of_the_full_arm() -> None:
    matrix = load("swiftbrush")
    untrained, full = (matrix.arm(name).options for name in ("untrained", "train-full"))
    assert {key: untrained[key] for key in full} == dict(full)
    method = constructed(resolve(full["config"]), {**full["overrides"], "model.lora_rank": 3})
    assert method.lora_rank == 3 != constructed(resolve(full["config"])).lora_rank  # overrides count


def cell_of(folder: Path, **overrides) -> Cell:
    return Cell(0, folder, {"config": "configs/swiftbrush/tiny.yaml", "overrides": {**SMALL, **overrides}})


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a training that is over: cells of the same one go on from its end."""
    place = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_T2I_RUNS", str(place))
        cells.fit(cell_of(place))
    return place


def test_an_adapter_that_never_learns_moves_nothing_and_one_that_does_moves_the_student(folder, trained) -> None:
    frozen = cell_of(folder, **{"model.lora.optimizer.init_args.lr": 0.0})
    assert cells.moved(frozen).numbers["moved"] == 0
    assert cells.moved(cell_of(trained)).numbers["moved"] > 1e-5


def test_files_of_pictures_are_counted(folder) -> None:
    found = cells.image_free(cell_of(folder)).numbers
    assert found["pictures"] == 0 and found["files"] > 5
    with cells.reads() as seen:
        (folder / "a.png").write_bytes(b"x")
        assert not [n for n in seen if n.endswith("a.png")]  # it was written
        (folder / "a.png").read_bytes()
    (folder / "a.png").read_bytes()
    assert sum(n.endswith("a.png") for n in seen) == 1


def test_backgrounds_of_a_student_and_of_its_teacher(folder, trained) -> None:
    facts = {"split": "val", "n": 30}
    student = cells.grounds(Cell(0, folder, {**facts, "of": "train-full"}, {"train-full": trained})).numbers
    teacher = cells.grounds(Cell(0, folder, facts)).numbers
    for found in (student, teacher):
        shares = [found[name] for name in ("white", "grey", "black")]
        assert sum(shares) == pytest.approx(1) and 1 <= found["kinds"] <= 3
    assert teacher["kinds"] > 2 and student != teacher


def test_measures_of_a_student_and_of_its_teacher(folder, trained) -> None:
    facts = {"split": "val", "n": 6, "varied": 3, "metrics": ["shapes_score", "fd"]}
    student = cells.student(Cell(0, folder, {**facts, "of": "train-full"}, {"train-full": trained}))
    teacher = cells.teacher(Cell(0, folder, {**facts, "network": cells.TEACHER, "guidance": 4.5, "steps": 2}))
    for found in (student, teacher):
        assert found.numbers.keys() >= {"fd", "diversity"} and found.numbers["diversity"] > 0
        assert len(found.scores["shapes_score"]) == 6
    assert json.loads((trained / "training" / "cost.json").read_text())["steps"] == 8
    assert student.prompts == teacher.prompts and student.numbers["diversity"] != teacher.numbers["diversity"]
