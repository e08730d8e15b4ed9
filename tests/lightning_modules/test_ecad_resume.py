"""ECAD killed: `train.py fit` of a search on the tiny PixArt, SIGKILL at a random moment, the same command again.

Five generations are of six schedules of four sampling steps: what a generation keeps does not depend on these numbers.
Its networks rest and stay whole: processes that would share weights do what copies do.
"""

import pytest
import yaml
from kills import what_a_kill_changes

from lightning_t2i.paths import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["1x1", "2x1"])
def test_a_killed_search_ends_with_the_bits_of_a_whole_one(tmp_path, mesh):
    few = {"steps": 4, "search": {"population": 6}}
    file = tmp_path / "ecad" / "few.yaml"  # the folder tells the proof that a step is a generation
    file.parent.mkdir()
    file.write_text(yaml.safe_dump({"base": str(ROOT / "configs/ecad/tiny.yaml"), "model": {"init_args": few}}))
    assert what_a_kill_changes(tmp_path, str(file), mesh, steps=5) == []
