"""Metrics on disk: append-only, truncated to the resumed step, on one axis."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace
from unittest import mock

import pytest

from lightning_t2i.loggers import Clock, JsonlLogger, TrackingOptions, build_loggers, read_lines, wandb_id, write_csv


def clock_at(step: int, samples: int) -> Clock:
    counters = SimpleNamespace(step=step, samples=samples)
    return Clock(SimpleNamespace(lightning_module=SimpleNamespace(counters=counters)))


def test_a_line_per_call_with_step_samples_and_time(tmp_path) -> None:
    logger = JsonlLogger(tmp_path / "run" / "metrics.jsonl")
    logger.log_metrics({"a/loss": 0.5, "samples": 64}, step=1)
    logger.log_metrics({"b": 2}, step=3)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line.pop("time") > 1e9 for line in lines] == [True, True]
    assert lines == [{"step": 1, "samples": 64, "a/loss": 0.5}, {"step": 3, "samples": 0, "b": 2.0}]


def test_lines_after_the_resumed_step_and_cut_ones_are_removed(tmp_path) -> None:
    file = tmp_path / "metrics.jsonl"
    whole = "".join(json.dumps({"step": s, "samples": 0, "time": 1.0, "x": s}) + "\n" for s in (1, 4, 4, 6))
    file.write_text(whole + '{"step": 8, "sam')
    assert [line["step"] for line in read_lines(file)] == [1, 4, 4, 6]
    JsonlLogger(file)
    assert file.read_text().startswith(whole)  # no resume: nothing is touched
    logger = JsonlLogger(file, resume_step=4)
    logger.log_metrics({"x": 5.0}, step=5)
    assert [line["step"] for line in read_lines(file)] == [1, 4, 4, 5]
    JsonlLogger(file, resume_step=0)
    assert file.read_text() == ""


@pytest.mark.parametrize("cut", ['{"step": 2, "sam', '{"step": 2, "samples": 0, "time": 1.0, "x": 2.0}'])
def test_a_line_without_an_end_hides_none_that_follows(tmp_path, cut) -> None:
    """A full disk cuts validate.jsonl, which no resume cuts back; a line that lacks its end alone is a whole one."""
    file = tmp_path / "validate.jsonl"
    JsonlLogger(file).log_metrics({"x": 1.0}, step=1)
    with file.open("a") as stream:
        stream.write(cut)
    JsonlLogger(file).log_metrics({"x": 3.0}, step=3)
    JsonlLogger(file).log_metrics({"x": 4.0}, step=4)
    assert [line["x"] for line in read_lines(file)] == ([1.0, 2.0, 3.0, 4.0] if cut.endswith("}") else [1.0, 3.0, 4.0])
    JsonlLogger(file, resume_step=3)
    assert [line["step"] for line in read_lines(file)][-1] == 3


def test_lightnings_own_step_is_replaced_by_training_steps() -> None:
    """Lightning counts batches and marks its metrics with `epoch`; with accumulation that is another number."""
    clock = clock_at(7, 112)
    assert clock.stamp({"val/loss": 1.0, "epoch": 0}, step=21) == ({"val/loss": 1.0}, 7, 112)
    assert clock.stamp({"x": 1.0}, step=None) == ({"x": 1.0}, 7, 112)
    assert clock.stamp({"x": 1.0, "samples": 96}, step=6) == ({"x": 1.0}, 6, 96)
    pictures = [object()]
    assert clock.stamp({"samples": pictures}, step=6) == ({"samples": pictures}, 6, 112)


def test_csv_has_a_column_for_each_name(tmp_path) -> None:
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    logger.log_metrics({"a": 1.0}, step=1)
    logger.log_metrics({"b": 2.0}, step=2)
    write_csv(tmp_path / "metrics.jsonl", tmp_path / "metrics.csv")
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [(r["step"], r["a"], r["b"]) for r in rows] == [("1", "1.0", ""), ("2", "", "2.0")]


def test_the_wandb_id_is_drawn_once(tmp_path) -> None:
    first = wandb_id(tmp_path)
    assert len(first) == 8 and wandb_id(tmp_path) == first
    (tmp_path / "other").mkdir()
    assert wandb_id(tmp_path / "other") != first


def test_in_a_sweep_the_wandb_id_is_the_agents(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "k3x")
    assert wandb_id(tmp_path) == "k3x"


@pytest.mark.parametrize(("mode", "kinds"), [("off", ["JsonlLogger"]), ("offline", ["JsonlLogger", "Wandb"])])
def test_loggers_of_a_run(tmp_path, mode, kinds) -> None:
    loggers = build_loggers(tmp_path, TrackingOptions(wandb=mode), {}, 0, Clock())
    assert [type(logger).__name__ for logger in loggers] == kinds


def test_project_and_tags_are_wandbs(tmp_path) -> None:
    options = TrackingOptions(project="mine", tags=["a", "b"])
    with mock.patch("wandb.init") as init:
        assert build_loggers(tmp_path, options, {}, 0, Clock())[1].experiment is init.return_value
    assert (init.call_args.kwargs["project"], init.call_args.kwargs["tags"]) == ("mine", ["a", "b"])


def test_what_wandb_may_have_lost_is_logged_again(tmp_path) -> None:
    """W&B writes every 15 s: the minute before a kill is replayed, but nothing past the resumed step."""
    times = {1: 100.0, 2: 155.0, 3: 190.0, 4: 200.0}
    lines = [{"step": s, "samples": 8 * s, "time": t, "x": float(s)} for s, t in times.items()]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    wandb = build_loggers(tmp_path, TrackingOptions(), {}, 3, Clock())[1]
    assert [line["step"] for line in wandb.replay] == [2, 3]
