"""The command line: where options may stand, and what the parts become."""

from __future__ import annotations

import sys
from pathlib import Path

import programs
import pytest

from lightning_t2i.cli.listing import configs, method_classes, methods, published
from lightning_t2i.cli.main import main, parse
from lightning_t2i.errors import UserError


@pytest.mark.parametrize(
    "words",
    [
        "fit --config a.yaml --config b.yaml --trainer.max_steps 5",
        "--config a.yaml fit --config b.yaml --trainer.max_steps=5",
        "--config a.yaml --config=b.yaml --trainer.max_steps 5 fit",
        "-c a.yaml --trainer.max_steps 5 fit -c b.yaml",
    ],
)
def test_config_stands_before_or_after_the_verb(words) -> None:
    request = parse(words.split())
    assert (request.verb, request.configs) == ("fit", [Path("a.yaml"), Path("b.yaml")])
    assert request.overrides == [("trainer.max_steps", "5")]


def test_values_flags_and_help() -> None:
    request = parse(
        ["fit", "--model.shift", "-0.5", "--samples.enabled", "--fresh", "--run", "x", "--data.help", "A.B"]
    )
    assert request.overrides == [("model.shift", "-0.5"), ("samples.enabled", None)]
    assert request.fresh and request.run == "x" and request.help == ["--data.help", "A.B"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ft"], "did you mean fit?"),
        (["--config", "a.yaml"], "No verb was given"),
        (["fit", "validate"], "one verb per command: validate"),
        (["fit", "--config"], "could not be read"),
    ],
)
def test_mistakes_on_the_command_line(words, message) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        parse(words)


def test_user_errors_end_with_code_2_and_without_traceback(capsys) -> None:
    assert main(["fitt"]) == 2
    assert capsys.readouterr().err.startswith("error: Unknown verb")
    assert main(["fitt", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_listing_reads_docstrings_and_comments(tmp_path) -> None:
    (tmp_path / "lightning_modules").mkdir()
    (tmp_path / "lightning_modules" / "abc.py").write_text(
        '"""Abc: a method.\n\nMore.\n"""\nclass Abc(Base):\n    pass\n'
    )
    (tmp_path / "lightning_modules" / "_hidden.py").write_text('"""No."""\n')
    (tmp_path / "configs" / "abc").mkdir(parents=True)
    (tmp_path / "configs" / "abc" / "tiny.yaml").write_text("# In minutes.\nmodel: {}\n")
    (tmp_path / "configs" / "part.yaml").write_text("# Trains nothing.\ntrainer: {}\n")
    assert methods(tmp_path) == {"abc": "Abc: a method."}
    assert method_classes(tmp_path) == ["lightning_modules.abc.Abc"]
    assert configs(tmp_path) == {"configs/abc/tiny.yaml": "In minutes."}
    assert published(tmp_path) == set()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "methods.md").write_text("| method | paper |\n|---|---|\n| [abc](abc.md) | x |\n")
    assert published(tmp_path) == {"abc"}


def test_a_crash_in_machine_code_names_the_python_lines_that_led_there(tmp_path, repo) -> None:
    crash = ["import ctypes, runpy", "import lightning_t2i.cli.main as cli"]
    crash += ["def main(): ctypes.string_at(0)", "cli.main = main"]
    crash += [f"runpy.run_path({str(repo / 'train.py')!r}, run_name='__main__')"]
    (tmp_path / "crash.py").write_text("\n".join(crash))
    crashed = programs.run([sys.executable, tmp_path / "crash.py"], cwd=tmp_path)
    assert crashed.returncode == -11
    assert "Segmentation fault" in crashed.stderr and 'crash.py", line 3 in main' in crashed.stderr
