"""The real thing killed: `train.py fit` on the shapes world, SIGKILL at a random step, the same command again."""

import os
import random
import signal
import subprocess
import sys

import pytest
import torch
import yaml

from lightning_t2i.state_io import AtomicCheckpointIO, newest

STEPS = 6


@pytest.mark.slow
def test_a_killed_diffusion_run_ends_with_the_bits_of_a_whole_one(repo, tmp_path):
    seed = random.SystemRandom().randrange(1000)
    kill_at = random.Random(seed).randrange(2, STEPS)
    print(f"seed {seed}: killed after training step {kill_at}")
    stream = {"init_args": {"batch_size": 8, "latents": None, "limit": 96}}
    config = {
        "base": [str(repo / "configs/diffusion/tiny.yaml")],
        "model": {"init_args": {"common": {"accumulate": 2, "log_every": 1}}},
        "data": {"init_args": {"main": stream, "val": stream, "test": stream}},
        "trainer": {"max_steps": STEPS, "val_check_interval": 4, "callbacks": [{"class_path": "kills.KillAt"}]},
        "checkpoints": {"every": 2},
        "samples": {"enabled": False},
        "tracking": {"wandb": "off"},
    }
    (tmp_path / "killed.yaml").write_text(yaml.safe_dump(config))
    variables = {"PYTHONPATH": str(repo / "tests/helpers"), "LIGHTNING_T2I_RUNS": str(tmp_path / "runs")}

    def fit(run: str, **more: str) -> int:
        command = [sys.executable, str(repo / "train.py"), "fit", "--config", "killed.yaml", "--run", run]
        environment = {**os.environ, **variables, **more}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=240).returncode

    assert fit("whole") == 0
    assert fit("killed", KILL_AT_STEP=str(kill_at)) == -signal.SIGKILL
    assert fit("killed") == 0
    a, b = (
        AtomicCheckpointIO().load_checkpoint(newest(tmp_path / f"runs/{run}/checkpoints"))
        for run in ("whole", "killed")
    )
    assert a["t2i"]["counters"] == b["t2i"]["counters"]
    assert a["t2i"]["counters"]["batches"] == 2 * STEPS
    assert a["state_dict"].keys() == b["state_dict"].keys()
    assert all(torch.equal(tensor, b["state_dict"][name]) for name, tensor in a["state_dict"].items())
    for name, group in a["t2i"]["groups"].items():
        for parameter, entries in group["states"].items():
            again = b["t2i"]["groups"][name]["states"][parameter]
            assert all(torch.equal(value, again[key]) for key, value in entries.items())
