"""Sweeps: trainings of the toy, evaluations that are written down instead of run, and what is told of mistakes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_t2i.cli.main import main as train
from lightning_t2i.cli.main import parse
from lightning_t2i.cli.runs import config_name
from lightning_t2i.loggers import read_lines
from lightning_t2i.paths import ROOT
from lightning_t2i.sweep import Sweep, main, words_of

TOY = {
    "model": {"class_path": "toy.Toy"},
    "data": {"class_path": "toy.ToyData", "init_args": {"batch_size": 8}},
    "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 2, "enable_progress_bar": False},
    "throughput": {"enabled": False},
    "tracking": {"wandb": "off"},
}
GRID = {
    "grid": {"model.common.seed": [0, 1], "model.dropout": [0.1, 0.2]},
    "validate": {"model.lora": [False, True], "ema": ["0.9"]},
    "metric": "eval/fd",
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LIGHTNING_T2I_RUNS", str(tmp_path / "runs"))
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(TOY))
    return tmp_path


def written(folder: Path, **content: object) -> str:
    file = folder / "rates.yaml"
    file.write_text(yaml.safe_dump({"config": [str(folder / "toy.yaml")], **GRID, **content}, sort_keys=False))
    return str(file)


class Launch:
    """Trains for real; an evaluation finds as many as there have been. Fails where a word contains `fails`."""

    def __init__(self, folder: Path, fails: str = "nothing", trains: bool = True):
        self.folder, self.fails, self.trains = folder / "runs", fails, trains
        self.calls: list[list[str]] = []

    def __call__(self, words: list[str]) -> int:
        if any(self.fails in word for word in words):
            return 1
        self.calls.append(words)
        run = self.folder / words[words.index("--run") + 1]
        if words[0] == "fit":
            if self.trains:
                return train(words)
            run.mkdir(parents=True, exist_ok=True)
            (run / "finished").write_text("{}")
            return 0
        with (run / "validate.jsonl").open("a") as stream:
            stream.write(json.dumps({"step": 2, "eval/fd": float(len(self.calls))}) + "\n")
        return 0


def test_every_combination_is_trained_once_and_evaluated_as_listed(folder, capsys) -> None:
    file, launch = written(folder, set={"model.common.log_every": 1}), Launch(folder)
    assert main([file], launch) == 0
    fits = [words for words in launch.calls if words[0] == "fit"]
    assert len(fits) == 4 and len(launch.calls) == 4 + 8
    assert {(w[-2], w[-1]) for w in fits} == {
        (f"--model.common.seed={seed}", f"--model.dropout={rate}") for seed in (0, 1) for rate in (0.1, 0.2)
    }
    assert all("--model.common.log_every=1" in words for words in launch.calls)
    assert [w[-2:] for w in launch.calls if w[0] == "validate"][:2] == [
        ["--model.lora=false", "--ema=0.9"],
        ["--model.lora=true", "--ema=0.9"],
    ]
    configs = [yaml.safe_load((folder / "runs" / w[w.index("--run") + 1] / "config.yaml").read_text()) for w in fits]
    assert len({(c["model"]["init_args"]["common"]["seed"], c["model"]["init_args"]["dropout"]) for c in configs}) == 4
    rows = json.loads((folder / "runs/rates/sweep.json").read_text())
    assert [row["eval/fd"] for row in rows] == sorted(row["eval/fd"] for row in rows) and len(rows) == 8
    assert "| model.common.seed | model.dropout | model.lora | ema | eval/fd | run |" in capsys.readouterr().out
    again = Launch(folder)
    assert main([file], again) == 0 and again.calls == []  # all is there
    assert main([written(folder, best="highest"), "--table"], again) == 0
    assert "| eval/fd |" in (folder / "runs/rates/sweep.md").read_text()


def test_what_failed_is_told_and_done_the_next_time(folder, capsys) -> None:
    file = written(folder)
    assert main([file], Launch(folder, fails="dropout=0.2", trains=False)) == 1
    assert capsys.readouterr().err.count("failed: rates-") == 2
    again = Launch(folder, trains=False)
    assert main([file], again) == 0
    assert sum(words[0] == "fit" for words in again.calls) == 2


def test_an_evaluation_that_failed_leaves_the_others(folder) -> None:
    assert main([written(folder)], Launch(folder, fails="lora=true", trains=False)) == 1
    assert len(json.loads((folder / "runs/rates/sweep.json").read_text())) == 4


def test_tasks_share_the_points(folder) -> None:
    file = written(folder)
    tasks = [Launch(folder, trains=False) for _ in range(3)]
    for i, launch in enumerate(tasks):
        assert main([file, "--task", str(i), "--tasks", "3"], launch) == 0
    assert [sum(w[0] == "fit" for w in launch.calls) for launch in tasks] == [2, 1, 1]
    assert len(json.loads((folder / "runs/rates/sweep.json").read_text())) == 8


def test_the_best_comes_first(folder) -> None:
    launch = Launch(folder, trains=False)
    assert main([written(folder, best="highest")], launch) == 0
    found = [row["eval/fd"] for row in json.loads((folder / "runs/rates/sweep.json").read_text())]
    assert found == sorted(found, reverse=True) and len(set(found)) == 8


def test_a_point_keeps_its_run_when_others_are_added(folder) -> None:
    few = Sweep.read(Path(written(folder)))
    more = Sweep.read(Path(written(folder, grid={"model.dropout": [0.1, 0.2, 0.3], "model.common.seed": [2, 1, 0]})))
    assert set(few.points()) < set(more.points()) and len(more.points()) == 9


def test_other_values_and_other_configs_are_other_runs(folder) -> None:
    first = Sweep.read(Path(written(folder))).points()
    assert not first.keys() & Sweep.read(Path(written(folder, set={"trainer.max_steps": 3}))).points().keys()
    (folder / "toy.yaml").write_text(yaml.safe_dump({**TOY, "checkpoints": {"every": 7}}))
    assert not first.keys() & Sweep.read(Path(written(folder))).points().keys()


def test_an_evaluation_is_of_one_checkpoint_and_of_its_own_lines(folder) -> None:
    file = written(folder, grid={}, validate={}, set={"model.common.log_every": 1})
    assert main([file], Launch(folder)) == 0
    (run,) = Sweep.read(Path(file)).points()
    again = Launch(folder)
    assert main([file], again) == 0 and again.calls == []
    (folder / "runs" / run / "validate.jsonl").write_text(json.dumps({"step": 2, "eval/old": 9.0}) + "\n")
    words = ["fit", "--config", str(folder / "toy.yaml"), "--run", run, "--model.common.log_every", "1"]
    assert train([*words, "--trainer.max_steps", "3"]) == 0
    assert main([file], again) == 0
    assert [words[0] for words in again.calls] == ["validate"]
    (row,) = json.loads((folder / "runs/rates/sweep.json").read_text())
    assert "eval/old" not in row


def test_a_run_that_is_there_is_evaluated_only(folder) -> None:
    (folder / "runs/mine").mkdir(parents=True)
    launch = Launch(folder)
    assert main([written(folder, config=[], run="mine", grid={})], launch) == 0
    assert [words[:3] for words in launch.calls] == [["validate", "--run", "mine"]] * 2
    assert len(read_lines(folder / "runs/mine/validate.jsonl")) == 2


def test_values_reach_the_command_line_as_they_are() -> None:
    request = parse(["fit", *words_of({"a.b": [1, 2], "c": None, "d": "text", "e": True})])
    assert request.overrides == [("a.b", "[1, 2]"), ("c", "null"), ("d", "text"), ("e", "true")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"config": []}, "trains from configs, or evaluates a run"),
        ({"run": "mine"}, "trains from configs, or evaluates a run"),
        ({"grid": {"model.dropout": 0.1}}, "Not a list of values"),
        ({"validate": {"ema": []}}, "Not a list of values"),
        ({"best": "middle"}, "No such order"),
        ({"grids": {}}, "Not a sweep"),
        ({"metric": "eval/kd"}, "no such metric"),
    ],
)
def test_mistakes_are_told(folder, capsys, content, message) -> None:
    assert main([written(folder, **content)], Launch(folder, trains=False)) == 2
    assert message in capsys.readouterr().err


def test_unknown_files_and_tasks_are_told(folder, capsys) -> None:
    assert main([str(folder / "none.yaml")], Launch(folder)) == 2
    assert "no such file" in capsys.readouterr().err
    assert main([written(folder), "--task", "2", "--tasks", "2"], Launch(folder)) == 2
    assert "No such task" in capsys.readouterr().err


def resolves(config: str, overrides: Mapping[str, Any]) -> bool:
    return train(["fit", "--config", config, *words_of(dict(overrides)), "--print_config"]) == 0


def test_the_shipped_sweep_fits_the_run_that_it_names(capsys) -> None:
    sweep = Sweep.read(ROOT / "sweeps/guidance.yaml")
    config = "configs/diffusion/tiny.yaml"
    assert config_name(ROOT / config) == sweep.run
    changes = {key: values[0] for key, values in sweep.validate.items()}
    average = changes.pop("ema")
    assert resolves(config, {**sweep.set, **changes})
    assert f"decay: {average}" in capsys.readouterr().out


def test_the_shipped_sweep_of_wandb_has_keys_of_its_config() -> None:
    content = yaml.safe_load((ROOT / "sweeps/wandb.yaml").read_text())
    config = content["command"][content["command"].index("--config") + 1]
    assert resolves(config, {key: about["min"] for key, about in content["parameters"].items()})
