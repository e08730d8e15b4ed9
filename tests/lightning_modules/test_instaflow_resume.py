"""InstaFlow killed: `train.py fit` of its stages, SIGKILL at a random moment, the same command again."""

import pytest
import yaml
from kills import FEW_MESHES, what_a_kill_changes


@pytest.mark.slow
@pytest.mark.parametrize("mesh", FEW_MESHES)
def test_a_killed_reflow_ends_with_the_bits_of_a_whole_one(tmp_path, repo, mesh):
    file = tmp_path / "reflow.yaml"  # three of its six steps convert
    base = str(repo / "configs/instaflow/tiny.yaml")
    file.write_text(yaml.safe_dump({"base": base, "model": {"init_args": {"init_steps": 3}}}))
    assert what_a_kill_changes(tmp_path, str(file), mesh) == []


@pytest.mark.slow
def test_a_killed_distillation_ends_with_the_bits_of_a_whole_one(tmp_path, repo):
    """From a diffusion teacher and its pairs. The run is killed in its fourth step, the first that compares pictures,
    and goes on from a checkpoint of before."""
    config = yaml.safe_load((repo / "configs/instaflow/distill.yaml").read_text())
    config["base"] = str(repo / "configs/trainer/cpu.yaml")
    few = {"teacher": "assets/tiny/sd", "guidance": 4.5, "init_steps": 1, "perceptual_from": 3}
    config["model"]["init_args"] |= few
    pairs = {"source": "assets/tiny/pairs", "teacher": "assets/tiny/sd", "batch_size": 64}
    config["data"]["init_args"]["main"]["init_args"] = pairs
    file = tmp_path / "distill.yaml"
    file.write_text(yaml.safe_dump(config))
    assert what_a_kill_changes(tmp_path, str(file), "1x1", seed=0) == []
