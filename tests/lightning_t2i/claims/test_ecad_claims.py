"""ECAD's claims: the budget, margins and correlations by hand, a cell of the surrogate."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lightning_t2i.claims import ecad, ecad_cells
from lightning_t2i.claims.spec import Cell, Measured, Outcome
from lightning_t2i.paths import ROOT


def cell(folder: Path, options: dict, **measured: dict[str, float]) -> Cell:
    after = {}
    for arm, numbers in measured.items():
        after[arm] = folder / arm
        after[arm].mkdir(parents=True)
        Outcome(Measured(numbers), 0.0, 1.0).save(after[arm])
    return Cell(0, folder, options, after)


def test_every_claim_of_the_specification_is_there_and_fits() -> None:
    for quick in (False, True):
        matrix = ecad.matrix(quick)
        assert {claim.id[0] for claim in matrix.claims} == set("12345678")
        assert matrix.seeds == (0, 1, 2)
        for arm in matrix.arms:
            config = arm.options.get("config")
            assert config is None or (ROOT / config).is_file()
    core_minutes = sum(arm.seconds for arm in ecad.matrix().arms) * 3 / 60
    assert core_minutes <= 80


def test_a_margin_counts_standard_errors() -> None:
    ours, theirs = np.array([1.0, 3.0, 2.0, 2.0]), np.zeros(4)
    assert ecad_cells.margin(ours, theirs) == pytest.approx(2.0 / (ours.std(ddof=1) / 2))
    assert ecad_cells.margin(ours, ours) == 0.0


def test_thirds_are_held_against_a_tenth_of_the_gain(tmp_path: Path) -> None:
    full, small = {"hv@1": 0.2, "hv@4": 0.5, "hv@12": 0.7}, {"hv@12": 0.45}
    options = {"full": "full", "small": "small", "early": 4, "late": 12}
    found = ecad_cells.halved(cell(tmp_path, options, full=full, small=small))
    assert found.numbers == pytest.approx({"difference": -0.05, "above": 0.0, "below": 0.1})
    full["hv@12"] = 0.1  # a search that has lost: finite, and no reason to call thirds alike
    lost = ecad_cells.halved(cell(tmp_path / "lost", options, full=full, small=small)).numbers
    assert lost == pytest.approx({"difference": -0.05, "above": -0.06, "below": 0.04})


def test_gain_is_last_minus_first(tmp_path: Path) -> None:
    numbers = {"hv@1": 0.2, "hv@12": 0.7, "hv_closeness@1": 0.5, "hv_closeness@12": 0.6}
    found = ecad_cells.gained(cell(tmp_path, {"of": "full", "last": 12}, full=numbers))
    assert found.numbers == pytest.approx({"hv": 0.5, "hv_closeness": 0.1})


def test_preferred_is_the_best_that_is_cheap_enough() -> None:
    facts = {b"a": (0.1, 10.0), b"b": (0.5, 20.0), b"c": (0.9, 30.0)}
    archive = SimpleNamespace(
        facts=facts, front=lambda: list(facts), quality=lambda k: facts[k][0], schedule=lambda k: k
    )
    assert [ecad_cells.preferred(archive, m) for m in (5.0, 10.0, 25.0, 99.0)] == [b"a", b"a", b"b", b"c"]


def test_times_of_schedules_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, called = [0.0], list[str]()
    monkeypatch.setattr(ecad_cells, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def call(name: str, seconds: list[float]) -> None:
        called.append(name)
        clock[0] += seconds[called.count(name) - 1]

    slow, fast = partial(call, "slow", [9.0, 2.0, 3.0, 2.5]), partial(call, "fast", [9.0, 1.0, 0.5, 7.0])
    assert ecad_cells.timings([slow, fast]) == pytest.approx([2.5, 1.0]) and called == ["slow", "fast"] * 4


def test_the_surrogate_rises(tmp_path: Path) -> None:
    options = {"population": 12, "generations": 4, "initial": "heuristic", "mutate": 1.0, "mutate_bit": None}
    found = ecad_cells.surrogate(cell(tmp_path, options)).numbers
    assert 0 < found["first_hv"] < found["hv"] < 1
