"""`new`: a method of one's own that trains at once, and the names that it refuses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_t2i.cli.new import camel, create, main_class
from lightning_t2i.errors import UserError

PARENT = {
    "model": {"class_path": "lightning_modules.points.Toy"},
    "data": {"class_path": "lightning_modules.points.ToyData"},
    "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 500},
    "tracking": {"wandb": "off"},
}


def with_points(root: Path, repo: Path) -> Path:
    """A tree whose one method is the toy of the engine's tests."""
    (root / "lightning_modules").mkdir(exist_ok=True)
    shutil.copy(repo / "tests" / "helpers" / "toy.py", root / "lightning_modules" / "points.py")
    (root / "configs" / "points").mkdir(parents=True, exist_ok=True)
    (root / "configs" / "points" / "tiny.yaml").write_text(yaml.safe_dump(PARENT))
    return root


@pytest.mark.parametrize(
    ("words", "parent", "message"),
    [
        ([], "points", "One name"),
        (["a", "b"], "points", "One name"),
        (["my-dmd"], "points", "Python can import"),
        (["1st"], "points", "Python can import"),
        (["class"], "points", "Python can import"),
        (["MyDmd"], "points", "Python can import"),
        (["points"], "points", "exists already"),
        (["taken"], "points", "exists already"),
        (["mine"], None, "start from"),
        (["mine"], "point", "did you mean points"),
        (["mine"], "bare", "no tiny config"),
    ],
)
def test_refusals_write_nothing(repo, tmp_path, words, parent, message) -> None:
    root = with_points(tmp_path, repo)
    (root / "lightning_modules" / "bare.py").write_text('"""Bare."""\n')
    (root / "configs" / "taken").mkdir()
    (root / "configs" / "taken" / "tiny.yaml").write_text("{}")
    before = sorted(root.rglob("*"))
    with pytest.raises(UserError, match=message):
        create(words, parent, root)
    assert sorted(root.rglob("*")) == before


def test_names(repo, tmp_path) -> None:
    assert camel("my_dmd2") == "MyDmd2"
    root = with_points(tmp_path, repo)
    assert main_class(root / "lightning_modules" / "points.py", root / "configs" / "points" / "tiny.yaml") == "Toy"
    module, config = create(["toy"], "points", root)  # the class of the parent has this name already
    assert "class ToyMethod(Toy):" in module.read_text()
    assert yaml.safe_load(config.read_text())["model"]["class_path"] == "lightning_modules.toy.ToyMethod"


@pytest.mark.slow
def test_a_new_method_trains_at_once(repo, tmp_path) -> None:
    root = tmp_path / "copy"
    ignored = shutil.ignore_patterns(".*", "runs", "data", "tests", "docs", "assets", "*.egg-info", "__pycache__")
    shutil.copytree(repo, root, ignore=ignored)
    with_points(root, repo)
    environment = {**os.environ, "PYTHONPATH": "", "LIGHTNING_T2I_RUNS": str(tmp_path / "runs")}

    def train(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(root / "train.py"), *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)

    made = train("new", "my_points", "--from", "points")
    assert made.returncode == 0, made.stderr
    module, config = root / "lightning_modules" / "my_points.py", root / "configs" / "my_points" / "tiny.yaml"
    assert str(module.relative_to(root)) in made.stdout and str(config.relative_to(root)) in made.stdout
    assert "my_points" in train("list").stdout
    lint = subprocess.run([sys.executable, "-m", "ruff", "check", str(module)], capture_output=True, text=True)
    assert lint.returncode == 0, lint.stdout

    trained = train("fit", "--config", "configs/my_points/tiny.yaml", "--trainer.max_steps", "3")
    assert trained.returncode == 0, trained.stderr
    assert "lightning_modules.my_points.MyPoints" in trained.stdout
    assert (tmp_path / "runs" / "tiny" / "finished").is_file()
