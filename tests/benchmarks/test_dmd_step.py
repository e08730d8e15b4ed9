"""Both versions of DMD's step do the same update, and the benchmark counts and times each of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from benchmarks import dmd_step
from benchmarks.dmd_step import VERSIONS
from benchmarks.forward_units import prepared
from lightning_t2i.golden import heard

SIZES = {"main": 12, "pairs": 4}  # in the proportion of the tiny config


def small(method: str, class_path: str) -> tuple[Any, Any]:
    """What the benchmark trains, on smaller batches."""
    module, data = prepared(method, class_path)
    for name, size in SIZES.items():
        data.training[name].batch_size = size
    return module, data


def test_both_versions_have_the_same_losses_and_gradients(monkeypatch) -> None:
    module, data = small("dmd", "benchmarks.dmd_step.Alternating")
    module.configure_model()
    data.prepare_data()
    data.setup("fit")
    batch = {name: stream.load(range(SIZES[name]), 0) for name, stream in data.training.items()}
    with torch.no_grad():  # all three are one network at first, and one in the place of another would not show
        for shift, group in enumerate(module.groups.values()):
            for i, parameter in enumerate(group.parameters):
                parameter.mul_(1 + 0.02 * ((i + shift) % 3))
    monkeypatch.setattr(module, "_finish", lambda batch: None)  # no update: both begin with the same weights
    losses, gradients = {}, {}
    for version in VERSIONS:
        module.version = version
        with heard(module) as found:
            module.training_step(batch, 0)
        (losses[version],) = found
        for name, group in module.groups.items():
            gradients[version, name] = torch.cat([p.grad.flatten() for p in group.parameters])
            group.clear_gradients()
    assert [name for name, _ in losses["shared"]] == ["student", "fake"]
    for (name, shared), (other, straightforward) in zip(*losses.values(), strict=True):
        assert name == other and straightforward == pytest.approx(shared, rel=1e-5)
        ours, theirs = (gradients[version, name] for version in VERSIONS)
        assert ours.norm() > 1e-3 and (ours - theirs).norm() < 1e-4 * ours.norm()


def test_units_of_both_are_as_predicted_and_their_blocks_are_timed(monkeypatch) -> None:
    monkeypatch.setattr(dmd_step, "prepared", small)
    steps, ratios, parts = (table["rows"] for table in dmd_step.result(pairs=2, block=1)["tables"])
    predicted = 3 * (12 + 4) / 12 + 2 + 1 + 3  # 3 (B + B_ref) / B, a guided real estimate, and 1 + 3 of the fake
    for (version, rows, seconds, *units, off, good), name, expected in zip(
        steps, VERSIONS, (predicted, predicted + 1), strict=True
    ):
        assert (version, rows, good) == (name, "12 + 4", "yes") and seconds > 0
        assert units == pytest.approx([expected, expected]) and off == pytest.approx(0)
    assert ratios[0][1] == pytest.approx((predicted + 1) / predicted) and 1.1 < ratios[1][1] < 1.12
    assert ratios[2][1] > 0 and ratios[2][2] <= ratios[2][1] <= ratios[2][3] and ratios[2][4] == 2
    counted = {(version, network): found for version, network, _, found, *_ in parts}
    assert counted["shared", "student"] == 4 and counted["straightforward", "student"] == 5
    assert math.isclose(counted["straightforward", "text"], 1 + 4 / 12 + 1, rel_tol=1e-6)
