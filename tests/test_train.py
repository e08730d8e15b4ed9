"""train.py as a user calls it: what answers without torch, and that it finds its files from anywhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WITHOUT_TORCH = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from lightning_t2i.cli.main import main
code = main(sys.argv[1:])
heavy = sorted({"torch", "lightning", "numpy", "yaml", "jsonargparse", "diffusers"} & set(sys.modules))
assert not heavy, heavy
sys.exit(code)
"""


def run(*words: str, cwd: Path, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=240, **kwargs)


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["--help"], 0, "validate"),
        ([], 0, "usage: python train.py VERB"),
        (["--version"], 0, "lightning-t2i 0."),
        (["list"], 0, "configs/diffusion/tiny.yaml"),
        (["list"], 0, "Diffusion:"),
        (["fitt"], 2, "did you mean fit?"),
    ],
)
def test_quick_answers_come_before_torch_is_imported(repo, tmp_path, words, code, expected) -> None:
    done = run("-c", WITHOUT_TORCH, str(repo), *words, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert expected in done.stdout + done.stderr


def test_the_file_itself_answers(repo, tmp_path) -> None:
    done = run(str(repo / "train.py"), "--help", cwd=tmp_path)
    assert done.returncode == 0 and "fit" in done.stdout


def test_no_diffusers_with_the_command_line(repo, tmp_path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import lightning_t2i.cli.verbs; print('diffusers' in sys.modules)"
    )
    done = run("-c", code, str(repo), cwd=tmp_path)
    assert done.stdout.strip() == "False", done.stderr
