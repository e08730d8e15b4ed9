"""docs/support.md says what the probes say, and the probes say today what is committed."""

from __future__ import annotations

import json
import os
from functools import partial
from types import SimpleNamespace
from unittest import mock

import programs
import pytest

from lightning_t2i import support
from lightning_t2i.errors import UserError
from lightning_t2i.golden import Golden
from lightning_t2i.support import AXES, PAGE, RESULT, close, meshes, methods, page, probed

SLOW, ALWAYS = (
    ("bf16", "compile"),
    ("fluid", "wukong"),
)  # half a minute to two for a method; those of these two are short
KEPT = json.loads(RESULT.read_text(encoding="utf-8"))


@pytest.mark.parametrize("method", methods())
def test_support(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "subprocess", SimpleNamespace(run=partial(programs.run, timeout=1200)))
    whole = method in ALWAYS or os.environ.get("LIGHTNING_T2I_LONG_TESTS")
    axes = [axis for axis in AXES if whole or axis not in SLOW]
    wanted = {axis: KEPT[method][axis] for axis in axes}
    assert probed(method, axes) == wanted, f"python -m lightning_t2i.support --refresh --method {method}"


def test_the_page_is_made_from_the_result() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(KEPT)
    assert list(KEPT) == methods() and all(tuple(found) == tuple(AXES) for found in KEPT.values())


def test_meshes_are_those_of_the_proofs() -> None:
    assert meshes("dmd") == {"1x1": "10 kills", "2x1": "10 kills", "1x2": "10 kills"}
    assert meshes("no_such_method") == {}


def golden(*losses: float, frozen: str = "sha256:1") -> Golden:
    return Golden("dmd", {"teacher": frozen}, [[("student", loss)] for loss in losses])


@pytest.mark.parametrize(
    ("axis", "changed", "said"),
    [
        ("bf16", golden(1.01, 2.0), {"outcome": "yes", "what": ""}),
        ("bf16", golden(1.0, 2.0), None),
        ("bf16", golden(1.01, float("nan")), None),
        ("compile", golden(1.00001, 2.0), {"outcome": "yes", "what": ""}),
        ("compile", golden(1.01, 2.0), None),
        ("nf4", golden(1.01, 2.0, frozen="sha256:1 nf4"), {"outcome": "yes", "what": "teacher"}),
        ("nf4", golden(1.01, 2.0), None),
        ("int8", UserError("It cannot be"), {"outcome": "refused", "what": "It cannot be"}),
    ],
)
def test_a_probe_sees_whether_its_change_has_the_effect_that_it_should(axis, changed, said) -> None:
    with (
        mock.patch.object(support, "record", side_effect=[changed]),
        mock.patch.object(support, "plain", return_value=(golden(1.0, 2.0), "")),
    ):
        if said is None:
            with pytest.raises(AssertionError, match=f"dmd, {axis}"):
                support.probe("dmd", axis)
        else:
            assert support.probe("dmd", axis) == said


def test_losses_are_the_same_but_for_rounding() -> None:
    assert close(golden(1.0, 2.0), golden(1.00005, 2.0)) and not close(golden(1.0, 2.0), golden(1.0, 2.001))
