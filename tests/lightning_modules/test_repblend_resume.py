"""RepBlend killed: `train.py fit` on the shapes world, SIGKILL at a random moment, the same command again."""

import pytest
from kills import what_a_kill_changes

from lightning_t2i.proof.runs import MESHES


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_a_killed_repblend_run_ends_with_the_bits_of_a_whole_one(tmp_path, mesh):
    assert what_a_kill_changes(tmp_path, "repblend", mesh, steps=5) == []
