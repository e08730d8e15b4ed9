"""The README's first command, shortened: it learns as it did, and ends with teacher and student side by side."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import programs
import pytest
import yaml
from PIL import Image

from benchmarks import quickstart
from benchmarks.rendering import render
from lightning_t2i.errors import UserError
from lightning_t2i.loggers import JsonlLogger, read_lines
from lightning_t2i.report import series

REFRESH = "./run fit --config configs/quickstart.yaml && .venv/bin/python -m benchmarks.quickstart runs/quickstart"
STEPS = 20
TOLERANCE = 0.01  # of losses in these steps; another rounding gives .001 at most, another draw or loss far more
TITLES = ["teacher, 25 steps", "teacher, 1 step", "student, 1 step"]


@pytest.fixture(scope="module")
def reference(repo) -> dict[str, Any]:
    return json.loads((repo / "docs/results/quickstart.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_quickstart_learns_as_in_the_reference_run_and_ends_with_teacher_and_student(repo, tmp_path, reference) -> None:
    command = [sys.executable, "train.py", "fit", "--config", "configs/quickstart.yaml", "--trainer.max_steps", STEPS]
    command += ["--trainer.val_check_interval", STEPS, "--samples.count", "2", "--samples.per_prompt", "1"]
    command += ["--comparison.n", "50", "--comparison.count", "6"]
    variables = {"LIGHTNING_T2I_RUNS": str(tmp_path), "WANDB_MODE": "offline"}
    done = programs.run(command, cwd=repo, env={**os.environ, **variables}, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "quickstart"
    for line in (
        f"samples: {folder / 'samples' / f'step-{STEPS:08d}.png'}",
        f"teacher and student: {folder / 'comparison.png'}",
        f"report:  {folder / 'report.md'}",
    ):
        assert line in done.stdout
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))

    found = series(read_lines(folder / "metrics.jsonl"))
    curves = {name: dict(zip(*found[name], strict=True)) for name in quickstart.CURVES}
    for name, curve in curves.items():
        shared = {int(s): value for s, value in reference["curves"][name].items() if int(s) in curve}
        assert shared, f"no step of {name} is in the reference; make it again: {REFRESH}"
        assert {s: curve[s] for s in shared} == pytest.approx(shared, rel=TOLERANCE), f"{name}; if meant: {REFRESH}"
    assert curves["val/distance"][STEPS] < 0.97 * curves["val/distance"][0]

    with Image.open(folder / "comparison.png") as image:
        image.load()
    assert image.text["titles"].split("\n") == TITLES and len(image.text["prompts"].split("\n")) == 6
    report = (folder / "report.md").read_text()
    assert "![teacher and student](comparison.png)" in report
    assert f"|  | {' | '.join(TITLES)} |" in report and "| shapes_score/overall@n=50 | 0." in report
    arms = json.loads((folder / "comparison.json").read_text())["arms"]
    low, high = (arms[title]["shapes_score/overall@n=50"] for title in (TITLES[1], TITLES[0]))
    assert low < 0.3 < 0.6 < high  # teacher with one step, and with all


def test_the_reference_is_a_whole_run_of_the_config(repo, reference) -> None:
    config = yaml.safe_load((repo / "configs/quickstart.yaml").read_text())
    assert reference["steps"] == config["trainer"]["max_steps"], f"make it again: {REFRESH}"
    assert list(reference["arms"]) == TITLES


def test_the_pages_figures_are_those_of_the_reference(repo, reference) -> None:
    page = (repo / "docs/quickstart.md").read_text()
    assert render(page, {"quickstart": reference}) == page, f"make it again: {REFRESH}"
    assert render(page.replace("teacher, 1 step |", "teacher, 1 step | |"), {"quickstart": reference}) == page


def a_run(folder: Path) -> Path:
    """Files of a finished run."""
    logger = JsonlLogger(folder / "metrics.jsonl")
    for step in (1, 10):
        logger.log_metrics({"student/loss": 1.0, "student/regression": 0.5, "fake/loss": 0.25 * step}, step=step)
    logger.log_metrics({"val/distance": 0.54321}, step=0)
    score = {"shapes_score/overall@n=9": 0.75, "shapes_score/overall_low@n=9": 0.5, "shapes_score/overall_high@n=9": 1}
    arms = {title: {"guidance": 4.5 if "teacher" in title else None, **score} for title in TITLES}
    env = {
        "hardware": {"cpus": 2, "threads": 1},
        "versions": dict.fromkeys(quickstart.PACKAGES, "1.0"),
        "git": {"commit": "0123456789", "changed": []},
        "starts": [{"command": "train.py fit", "time": "2026-01-02T03:04:05+0000"}],
    }
    cost = {"seconds": 170.0, "steps": 10}
    for name, content in (("comparison", {"arms": arms}), ("cost", cost), ("env", env)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"common": {"seed": 3}}}}))
    Image.new("RGB", (4, 4), "red").save(folder / "comparison.png")
    return folder


def test_a_run_becomes_the_reference(tmp_path) -> None:
    docs = tmp_path / "docs"
    for name in ("results", "images"):
        (docs / name).mkdir(parents=True)
    (docs / "quickstart.md").write_text("Before.\n\n<!-- measured: quickstart -->\nold\n<!-- end -->\n\nAfter.\n")
    quickstart.main([str(a_run(tmp_path / "run")), "--machine", "a box"], docs)
    found = json.loads((docs / "results/quickstart.json").read_text())
    assert found["curves"]["fake/loss"] == {"1": 0.25, "10": 2.5} and (found["seed"], found["steps"]) == (3, 10)
    page = (docs / "quickstart.md").read_text()
    for part in (
        "Before.\n\n<!-- measured: quickstart -->\n|  | guidance | shapes score of 9 prompts (95 %) |\n",
        "| teacher, 1 step | 4.5 | 0.75 (0.5 to 1) |\n| student, 1 step |  | 0.75 (0.5 to 1) |\n",
        "| 0 | 0.543 |\n",
        "Machine: a box, 2 cores, 1 thread, python 1.0,",
        "Measured 2026-01-02, commit 0123456.\n10 training steps and the comparison took 0 h 2 min 50 s.\n<!-- end -->",
    ):
        assert part in page, page
    assert page.endswith("\n\nAfter.\n")
    with Image.open(docs / "images/quickstart.png") as image:
        assert image.getpixel((0, 0)) == (255, 0, 0)


def test_a_run_without_a_comparison_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="no comparison"):
        quickstart.result(tmp_path, "a box")
