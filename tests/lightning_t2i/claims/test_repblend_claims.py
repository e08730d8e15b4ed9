"""The claims of RepBlend: what they cost, that arms are tuned alike, and that the direction of each is told."""

from __future__ import annotations

import json

import pytest

from lightning_t2i.claims import repblend, repblend_cells
from lightning_t2i.claims.spec import Cell, Measured, Outcome


@pytest.fixture(scope="module")
def matrix():
    return repblend.matrix()


def test_the_matrix_fits_its_budget_and_a_rehearsal_fits_ten_minutes(matrix):
    total = sum(len(matrix.seeds) * arm.seconds for arm in matrix.arms)
    assert total <= 75 * 60 and len(matrix.seeds) == 3
    assert repblend.matrix(quick=True).wall(2) < 600


def test_all_distilled_arms_are_tuned_alike(matrix):
    tunings = {name: matrix.arm(f"tune-{name}").options for name in repblend.DISTILLED}
    assert {tuple(o["factors"]) for o in tunings.values()} == {repblend.FACTORS}
    assert len(repblend.FACTORS) == 3 and len(repblend.REGIMES) <= 3
    assert {tuple(o["rates"]) for o in tunings.values()} == {repblend.RATES}
    assert [name for name, o in tunings.items() if o["regimes"]] == ["repblend", "noise"]
    assert [name for name, o in tunings.items() if "regime_of" in o] == ["noise"]
    steps = {matrix.arm(name).options["overrides"]["trainer.max_steps"] for name in repblend.DISTILLED}
    assert len(steps) == 1
    assert repblend_cells.TUNING not in matrix.seeds


def test_noise_is_tuned_in_the_regime_of_blending(tmp_path, monkeypatch):
    """Only then is its variance that of blending; its rates are its own."""
    tried = []
    monkeypatch.setattr(repblend_cells, "_set", lambda cell, folder, experts, given: tried.append(given) or len(tried))
    other = Outcome(Measured({"regime": 1.0, "factor": 1.0}), 0.0, 1.0)
    after = {"tune-repblend": tmp_path / "tune-repblend" / "seed-0", "experts": tmp_path / "experts" / "seed-0"}
    after["tune-repblend"].mkdir(parents=True)
    other.save(after["tune-repblend"])
    options = {"rates": [0.1, 0.2], "factors": [0.3, 1.0], "regimes": [[], [["each", True]]]}
    (tmp_path / "noise").mkdir()
    cell = Cell(0, tmp_path / "noise" / "seed-0", {**options, "regime_of": "tune-repblend"}, after)
    found = repblend_cells.tune(cell).numbers
    assert found["regime"] == 1 and found["factor"] == 1.0
    assert [given["each"] for given in tried] == [True, True]
    assert [given["model.images.optimizer.lr"] for given in tried] == pytest.approx([0.03, 0.1])


def test_every_coreset_has_the_students_of_the_sets(matrix):
    measured = [matrix.arm(name).options for name in (*repblend.CORESETS, "know-repblend", "know-identity")]
    for key in ("nets", "epochs", "train", "val", "test", "world", "judge"):
        assert len({options[key] for options in measured}) == 1, key
    assert measured[0]["nets"] == 5


def test_claims_have_the_direction_of_the_papers(matrix):
    found = {claim.id: claim for claim in matrix.claims}
    assert all(found[f"1-{kind}"].threshold == 0.0 for kind in repblend.CORESETS)
    assert {found[f"4-{kind}"].direction for kind in ("intra", "gap", "cr42", "stripes")} == {"lower"}
    assert found["4-recall"].direction == "higher" and found["3-image"].threshold == 1.0


def test_what_was_found_for_the_validation_seed_is_found_once(tmp_path):
    calls = []

    def make(cell: Cell) -> dict[str, float]:
        calls.append(cell.seed)
        return {"best": 3.0}

    cells = [Cell(seed, tmp_path / f"seed-{seed}", {}) for seed in (0, 1)]
    found = [repblend_cells.once(cell, make) for cell in cells]
    assert calls == [repblend_cells.TUNING]
    assert found[0] == found[1] and found[0]["best"] == 3.0


def test_branches_are_those_of_the_second_half(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [{"images/image": float(i), "images/text": 2.0 * i} for i in range(4)] + [{"val/mean": 1.0}]
    file.write_text("\n".join(map(json.dumps, lines)))
    assert repblend_cells.branches(file) == {"image": 2.5, "text": 5.0}
