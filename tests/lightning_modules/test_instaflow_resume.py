"""InstaFlow killed: `train.py fit` of its reflow, SIGKILL at a random moment, the same command again."""

import pytest
import yaml
from kills import what_a_kill_changes

from lightning_t2i.proof.runs import MESHES


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_a_killed_reflow_ends_with_the_bits_of_a_whole_one(tmp_path, repo, mesh):
    file = tmp_path / "reflow.yaml"  # three of its six steps convert
    base = str(repo / "configs/instaflow/tiny.yaml")
    file.write_text(yaml.safe_dump({"base": base, "model": {"init_args": {"init_steps": 3}}}))
    assert what_a_kill_changes(tmp_path, str(file), mesh) == []
