"""docs/cost.md: made from the committed plans, by the formula that it shows; a plan is what `check` says."""

from __future__ import annotations

import json

import programs
import pytest

from lightning_t2i import cost
from lightning_t2i.cost import PAGE, PEAKS, PLANS, RESULT, TINY, hours, page, plan, speeds

KEPT = json.loads(RESULT.read_text(encoding="utf-8"))


def test_the_page_is_made_from_the_plans() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(KEPT, speeds()), "python -m lightning_t2i.cost"
    assert set(KEPT) == {*PLANS, *(f"{method}/tiny" for method in TINY)}


def test_hours_follow_the_formula() -> None:
    assert hours({"steps": 1000, "operations": 3.6e15}, 1e15) == pytest.approx(2.5)
    assert PEAKS["H100 SXM"] > 3 * PEAKS["A100"]


def test_the_operations_of_fluid_are_those_of_the_paper_and_of_its_text_encoder() -> None:
    """4.1e21 of the 1.1 B transformer in a million steps of 2,048 pictures; T5-XXL, online, and attention add to it."""
    planned = KEPT["fluid/1b"]
    assert 1 < planned["steps"] * planned["operations"] / 4.1e21 < 2


def test_a_plan_is_what_check_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "subprocess", programs)
    assert plan("deme/tiny", 1, 1) == KEPT["deme/tiny"]
