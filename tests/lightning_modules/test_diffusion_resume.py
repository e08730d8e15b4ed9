"""The real thing killed: `train.py fit` on the shapes world, SIGKILL at a random step, the same command again."""

import pytest
from kills import what_a_kill_changes


@pytest.mark.slow
def test_a_killed_diffusion_run_ends_with_the_bits_of_a_whole_one(repo, tmp_path):
    assert what_a_kill_changes(repo, tmp_path, "diffusion", ("main", "val", "test"), latents=None) == []
