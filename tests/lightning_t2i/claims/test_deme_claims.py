"""DeMe's claims: the budget, what is compared with what, and each kind of cell on trainings of two steps."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

from lightning_t2i.claims import deme_cells as cells
from lightning_t2i.claims.spec import Cell, Measured, Outcome, load
from lightning_t2i.claims.training import RUN, fit

FEW = {"batch_size": 4, "limit": 8, "latents": None, "in_memory": False}
SMALL = {
    **{f"data.main.{key}": value for key, value in FEW.items()},
    "trainer.max_steps": 2,
    "trainer.limit_val_batches": 0,
    "trainer.enable_progress_bar": False,
    "samples.enabled": False,
}


@pytest.mark.parametrize("quick", [False, True])
def test_the_matrix_fits_its_budget_and_holds_what_the_issue_lists(quick: bool) -> None:
    matrix = load("deme", quick)
    assert matrix.seeds == (0, 1, 2)
    assert {c.id[0] for c in matrix.claims} == set("1234567")
    own = {c.arm for c in matrix.claims} | {c.baseline for c in matrix.claims if c.baseline}
    needed = own | {after for arm in matrix.arms for after in arm.after}
    assert needed == {arm.name for arm in matrix.arms}  # nothing is trained for nothing
    for base in ("sd", "early"):
        compared = {(c.arm, c.baseline) for c in matrix.claims if c.metric == "fd"}
        assert {(f"{base}-merged", f"{base}-{other}") for other in ("base", "joint", "switched")} <= compared
    assert sum(arm.seconds for arm in matrix.arms) * 3 / 60 <= 75  # core minutes


def test_trainings_that_are_compared_have_as_many_updates_and_the_same_batches() -> None:
    matrix = load("deme")
    trainings = [dict(arm.options)["overrides"] for arm in matrix.arms if arm.cell is fit]
    assert len({o["trainer.max_steps"] for o in trainings}) == 1
    assert len({o["data.main.batch_size"] for o in trainings}) == 1
    for o in trainings:
        if "model.num_ranges" in o:
            assert o["model.num_ranges"] * o["model.steps_per_range"] == o["trainer.max_steps"]


def test_searches_and_reports_use_other_data_and_noise() -> None:
    matrix = load("deme")
    assert all(dict(a.options).get("split") == "test" for a in matrix.arms if a.cell is cells.draw)
    assert cells.Keys(0).fork("choose") != cells.Keys(0).fork("report")


def outcome(folder, measured: Measured):
    folder.mkdir(parents=True, exist_ok=True)
    Outcome(measured, 0.0, 1.0).save(folder)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Cells of a training of two experts, of a joint one, and of weights."""
    root, patch = tmp_path_factory.mktemp("cells"), pytest.MonkeyPatch()
    original = cells.scenes
    patch.setattr(cells, "scenes", lambda split, n: original(split, min(n, 6)))
    patch.setenv("LIGHTNING_T2I_RUNS", str(root))
    ours = {**SMALL, "model.num_ranges": 2, "model.steps_per_range": 1, "merge.enabled": False}
    for name, config, overrides in (("ours", "tiny", ours), ("joint", "joint", SMALL)):
        (root / name).mkdir()
        fit(Cell(3, root / name, {"config": f"configs/deme/{config}.yaml", "overrides": overrides}))
    outcome(root / "w", Measured({"w0": 0.5, "w1": 1.0, "sum": 1.5}))
    yield {"ours": root / "ours", "joint": root / "joint", "w": root / "w"}
    patch.undo()
    shutil.rmtree(root)


def test_weights_are_chosen_on_validation_pictures(finished, tmp_path) -> None:
    found = cells.choose(Cell(3, tmp_path, {"of": "ours", "search": "gradient", "n": 4, "limit": 3}, finished)).numbers
    assert found["search_gain"] >= 0 and {"w0", "w1"} <= found.keys()


def test_losses_of_every_network(finished, tmp_path) -> None:
    options = {"of": "ours", "n": 4, "weights": "w", "joint": "joint"}
    found = cells.losses(Cell(3, tmp_path, options, finished)).numbers
    for other in ("joint", "uniform", "flipped", "base"):
        assert found[f"loss_gain_over_{other}"] == pytest.approx(found[other] - found["loss"])
    assert found["least_gain"] == min(found["gain_0"], found["gain_1"])
    assert found["drift"] > 0 and np.isfinite(list(found.values())).all()
    method = cells.experts_of(finished["ours"] / RUN)
    data, keys = cells.held_out(method, "test", 4), cells.Keys(3).fork("report")
    with torch.no_grad():
        base = torch.stack([method.range_losses(method.teacher, r, c, keys) for r, c in data]).mean()
    assert found["base"] == pytest.approx(float(base), rel=1e-5)


@pytest.mark.parametrize("model", ["base", "merged", "switched", "joint"])
def test_pictures_of_every_model(finished, tmp_path, monkeypatch, model) -> None:
    of = "joint" if model == "joint" else "ours"
    options = {"of": of, "model": model, "weights": "w", "split": "test", "n": 6, "steps": 1}
    seen = []
    monkeypatch.setattr(cells, "measure", lambda subject, split, n, seed, metrics: seen.append(subject) or Measured())
    cells.draw(Cell(3, tmp_path, options, finished))
    (subject,) = seen
    records = cells.scenes("test", 2)[0]
    images = subject.sample(subject.condition(records), cells.Keys(0), records.position)
    assert images.shape == (len(records), 3, 32, 32) and subject.method.steps == 1


def test_gradients_over_times(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(cells, "held_out", lambda method, split, n: [
        (r, method.condition(r)) for r in (cells.scenes("val", 6)[0].slice(0, 3), cells.scenes("val", 6)[0].slice(3, 6))
    ])  # fmt: skip
    options = {"config": "configs/deme/tiny.yaml", "n": 6, "times": 8}
    found = cells.gradients(Cell(0, tmp_path, options)).numbers
    assert found["banded"] == pytest.approx(found["near"] - found["far"])
    assert all(-1 <= found[name] <= 1 for name in ("near", "far", "whole", "quarter", "ceiling"))
    assert np.isfinite(list(found.values())).all()


def test_signs_are_flipped_and_weights_kept() -> None:
    weights = [0.1, 0.2, 0.3]
    flipped = [cells.signed(weights, i) for i in range(7)]
    assert all(np.abs(w).tolist() == weights for w in flipped)
    assert len({tuple(w) for w in flipped}) == 7 and weights not in flipped
