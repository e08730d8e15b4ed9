"""Declarations: what does not fit is refused before anything runs."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lightning_t2i.claims.__main__ import main
from lightning_t2i.claims.spec import Arm, Cell, Claim, Matrix, Measured, load, methods
from lightning_t2i.errors import UserError


def nothing(cell: Cell) -> Measured:
    return Measured()


def arm(name: str, *after: str, seconds: float = 1.0) -> Arm:
    return Arm(name, nothing, {}, 1, "call", seconds, after)


def claim(id: str = "c", arm: str = "a", baseline: str | None = "b", threshold: float | None = 0.1) -> Claim:
    return Claim(id, "A claim.", arm, baseline, "score", threshold)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"arms": (arm("a"), arm("a"))}, "arms must differ"),
        ({"claims": (claim(), claim())}, "claims must differ"),
        ({"claims": ()}, "there must be one"),
        ({"seeds": (0, 0)}, "seeds must differ"),
        ({"arms": (arm("a", "b"), arm("b"))}, "comes after one that is not there before it"),
        ({"claims": (claim(arm="A"),)}, "about an arm that does not exist"),
        ({"claims": (claim(baseline="bb"),)}, "did you mean b"),
        ({"claims": (claim(threshold=math.nan),)}, "None for an effect that is reported only"),
        ({"arms": (arm("a", seconds=3600), arm("b", seconds=3600))}, "costs more than it may"),
        ({"arms": (arm("a", seconds=400), arm("b")), "quick": True}, "costs more than it may"),
    ],
)
def test_a_matrix_that_does_not_fit_is_refused(changed: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"arms": (arm("a"), arm("b")), "claims": (claim(),)}
    Matrix("toy", **given)
    with pytest.raises(UserError, match=message):
        Matrix("toy", **(given | changed))


def test_wall_time_is_that_of_the_longest_chain_or_of_shared_workers() -> None:
    chain = Matrix("toy", (arm("a", seconds=10), arm("b", "a", seconds=5)), (claim(),), seeds=(0,))
    assert chain.wall(1) == chain.wall(2) == 15
    apart = Matrix("toy", (arm("a", seconds=10), arm("b", seconds=5)), (claim(),), seeds=(0, 1))
    assert apart.wall(1) == 30 and apart.wall(2) == 15 and apart.wall(9) == 10


def test_unknown_method_names_the_closest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "diffusion" in methods() and "statistics" not in methods()
    assert main(["difusion"]) == 2
    shown = capsys.readouterr().err
    assert "did you mean diffusion?" in shown and "python -m lightning_t2i.claims diffusion" in shown
    with pytest.raises(UserError, match="cannot be imported"):
        load("no_such.module")


def test_a_metric_that_was_not_measured_names_the_closest() -> None:
    with pytest.raises(UserError, match="did you mean score?"):
        Measured({"level": 1.0}, {"score": [1.0]}).of("scores")
