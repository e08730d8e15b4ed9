"""The real thing killed: `train.py fit` on the shapes world, SIGKILL at a random moment, the same command again."""

import pytest
from kills import FEW_MESHES, what_a_kill_changes


@pytest.mark.slow
@pytest.mark.parametrize("mesh", FEW_MESHES)
def test_a_killed_diffusion_run_ends_with_the_bits_of_a_whole_one(tmp_path, mesh):
    assert what_a_kill_changes(tmp_path, "diffusion", mesh, steps=5) == []
