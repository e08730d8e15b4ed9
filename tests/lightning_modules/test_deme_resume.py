"""DeMe killed: `train.py fit` on the shapes world, SIGKILL at a random moment, the same command again.

Six training steps are two of each of three ranges, so that a range ends before or after most kills. Every step has its
checkpoint: the run goes on from the middle of a range as well as from its end.
"""

import pytest
import yaml
from kills import what_a_kill_changes

from lightning_t2i.paths import ROOT
from lightning_t2i.proof.runs import MESHES


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_a_killed_deme_run_ends_with_the_bits_of_a_whole_one(tmp_path, mesh):
    few = {"num_ranges": 3, "steps_per_range": 2, "ema_refresh": 1, "lambda_cons": 0.5}
    config = {"base": str(ROOT / "configs/deme/tiny.yaml"), "model": {"init_args": few}, "merge": {"enabled": False}}
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(config))
    assert what_a_kill_changes(tmp_path, str(tmp_path / "few.yaml"), mesh, every=1) == []
    runs = tmp_path / "runs"
    deltas = [sorted((runs / name / "deltas").glob("*.safetensors")) for name in ("whole", "killed")]
    assert len(deltas[0]) == 3
    assert [f.read_bytes() for f in deltas[0]] == [f.read_bytes() for f in deltas[1]]
