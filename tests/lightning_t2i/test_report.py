"""report.md: what a reader finds in it, whatever is missing."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from lightning_t2i.loggers import JsonlLogger
from lightning_t2i.report import cost_rows, importance, series, write_report


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "my-run"
    logger = JsonlLogger(folder / "metrics.jsonl")
    for step in (1, 2, 3):
        logger.log_metrics({"student/lr": 1e-3, "student/loss": 1.0 / step}, step=step)
    logger.log_metrics({"eval/fd@n=400": 12.25}, step=3)
    (folder / "samples").mkdir()
    for step in (1, 3):
        Image.new("RGB", (4, 4)).save(folder / "samples" / f"step-{step:08d}.png")
    (folder / "checkpoints" / "step-00000003").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000003" / "state.pt").write_bytes(b"0" * 2_500_000)
    cost = {"seconds": 75.0, "steps": 3, "samples": 150, "processes": 2, "peak_memory_bytes": 3 * 2**30}
    (folder / "cost.json").write_text(json.dumps(cost))
    return folder


def test_series_keep_steps_and_values() -> None:
    lines = [
        {"step": 1, "samples": 8, "time": 0.0, "a": 1.0},
        {"step": 2, "samples": 16, "time": 0.0, "a": 2.0, "b": 0.0},
    ]
    assert series(lines) == {"a": ([1, 2], [1.0, 2.0]), "b": ([2], [0.0])}


def test_losses_and_scores_come_first() -> None:
    names = ["student/lr", "perf/step_ms", "eval/fd@n=4", "student/loss", "student/grad_norm"]
    assert sorted(names, key=importance)[:3] == ["student/loss", "eval/fd@n=4", "student/grad_norm"]


def test_report_of_a_run(run) -> None:
    text = write_report(run).read_text()
    for part in (
        "# my-run",
        "![curves](curves.png)",
        "![samples](samples/step-00000003.png)",
        "| student/loss | 0.33333 | 3 | 0.33333 | 1 |",
        "| eval/fd@n=400 | 12.25 | 3 |",
        "| wall time | 0 h 1 min 15 s |",
        "| samples per second | 2.0 |",
        "| peak memory | 3.00 GiB |",
        "| checkpoint | 2.5 MB |",
    ):
        assert part in text, text
    with Image.open(run / "curves.png") as picture:
        assert picture.size[0] > 300
    assert (run / "metrics.csv").read_text().startswith("step,samples,time,student/lr")


def test_teacher_and_student_stand_side_by_side_in_a_section_of_their_own(run) -> None:
    assert "Teacher and student" not in write_report(run).read_text()
    score = {"s/overall@n=9": 0.75, "s/overall_low@n=9": 0.5, "s/overall_high@n=9": 1.0, "s/counting@n=9": 0.25}
    arms = {
        "teacher, 25 steps": {"guidance": 4.5, **score},
        "student, 1 step": {"guidance": None, **score, "fd@n=9": 2},
    }
    (run / "comparison.json").write_text(json.dumps({"step": 7, "data": "shapes-val", "arms": arms}))
    JsonlLogger(run / "metrics.jsonl").log_metrics({"comparison/student_1/s/counting@n=9": 0.25}, step=7)
    text = write_report(run).read_text()
    for part in (
        "## Teacher and student\n\n![teacher and student](comparison.png)\n\nAfter step 7, on prompts of shapes-val",
        "|  | teacher, 25 steps | student, 1 step |\n| --- | --- | --- |\n| guidance | 4.5 |  |\n",
        "| s/overall@n=9 | 0.75 (0.5 to 1) | 0.75 (0.5 to 1) |\n| s/counting@n=9 | 0.25 | 0.25 |\n| fd@n=9 |  | 2 |\n",
    ):
        assert part in text, text
    assert "overall_low" not in text and "comparison/student" not in text
    assert text.index("## Teacher and student") < text.index("## Curves")


def test_report_of_an_empty_folder(tmp_path) -> None:
    text = write_report(tmp_path).read_text()
    assert "## Curves" not in text and "## Samples" not in text and "## Metrics" not in text
    assert cost_rows(tmp_path) == []
