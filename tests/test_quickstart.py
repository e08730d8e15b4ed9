"""The README's first command, shortened: it learns, prints its pictures and report, and W&B's offline run is there."""

import json
import os
import subprocess
import sys

import pytest

REFERENCE = "docs/results/quickstart.json"  # the whole run, with machine and commit
STEPS = 100


@pytest.mark.slow
def test_quickstart_learns_as_in_the_reference_run(repo, tmp_path):
    command = [sys.executable, "train.py", "fit", "--config", "configs/quickstart.yaml", "--trainer.max_steps", STEPS]
    variables = {"LIGHTNING_T2I_RUNS": str(tmp_path), "WANDB_MODE": "offline"}
    arguments = [*map(str, command), "--samples.count", "2", "--samples.per_prompt", "1"]
    done = subprocess.run(
        arguments, cwd=repo, env={**os.environ, **variables}, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "quickstart"
    assert f"samples: {folder / 'samples' / f'step-{STEPS:08d}.png'}" in done.stdout
    assert f"report:  {folder / 'report.md'}" in done.stdout
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["val/loss"] for line in lines if "val/loss" in line}
    reference = {int(step): loss for step, loss in json.loads((repo / REFERENCE).read_text())["val/loss"].items()}
    constant = 1.0  # an eps network that predicts the mean of the noise, which is zero
    margin = 0.5 * (min(reference[0], constant) - reference[STEPS])  # half of what the reference gained by then
    assert losses[STEPS] < losses[0] - margin
    assert losses[STEPS] < constant - margin
