"""The set-up script: what it installs where, when it does nothing, and what it says when it cannot work.

A stand-in for Python records every call and passes on what is neither `-m venv` nor `-m pip` nor a module under test.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

STAND_IN = f"""#!/usr/bin/env bash
printf '%s\\n' "$*" | head -n 1 >>"$CALLS"
case "${{1:-}} ${{2:-}}" in
    "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip")
        for file in "$@"; do
            case "$file" in "$TMPDIR"/tmp.*) cp "$file" "$CALLS.constraints" ;; esac
        done
        exit "${{PIP_EXIT:-0}}" ;;
    "-m ruff"|"-m mypy"|"-m pytest"|"-m lightning_t2i.proof")
        printf '%s\\n' "${{OMP_NUM_THREADS:-}}" >>"$CALLS.threads"
        exit "${{TOOL_EXIT:-0}}" ;;
    *) exec {sys.executable} "$@" ;;
esac
"""

TOO_OLD = """#!/usr/bin/env bash
if [ "$1" = --version ]; then echo "Python 3.9.18"; exit 0; fi
exit 1
"""


class Clone:
    """A copy of the files that set-up reads, with a stand-in interpreter as the only Python on the path."""

    def __init__(self, repo: Path, folder: Path, interpreter: str = STAND_IN):
        self.root, self.calls_file, self.programs = folder / "clone", folder / "calls", folder / "bin"
        self.root.mkdir()
        self.programs.mkdir()
        for name in ("run", "pyproject.toml"):
            shutil.copy(repo / name, self.root / name)
        shutil.copytree(repo / "constraints", self.root / "constraints")
        (self.root / "train.py").write_text(
            "import os, sys; print('train', sys.argv[1:], os.environ['OMP_NUM_THREADS'])"
        )
        for name in ("dirname", "cat", "cksum", "mktemp", "rm", "mkdir", "cp", "head", "flock", "bash", "env"):
            if program := shutil.which(name):
                (self.programs / name).symlink_to(program)
        self.program("python3", interpreter)

    def program(self, name: str, text: str) -> Path:
        file = self.programs / name
        file.write_text(text)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        return file

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.programs), "CALLS": str(self.calls_file), "TMPDIR": str(self.root.parent)}
        return subprocess.run(
            [shutil.which("bash") or "bash", str(self.root / "run"), *arguments],
            env=environment | variables,
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self, start: str = "") -> list[str]:
        """The calls so far that begin with `start`; forgets them."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return [line for line in lines if line.startswith(start)]


@pytest.fixture
def clone(repo: Path, tmp_path: Path) -> Clone:
    return Clone(repo, tmp_path)


def test_first_run_installs_then_trains(clone: Clone) -> None:
    done = clone.run("fit", "--config", "configs/quickstart.yaml")
    assert done.returncode == 0, done.stderr
    assert "train ['fit', '--config', 'configs/quickstart.yaml'] 1" in done.stdout
    installs = clone.calls("-m ")
    assert installs[0] == f"-m venv {clone.root}/.venv"
    assert installs[1] == "-m pip install --quiet torch==2.13.0"
    assert re.fullmatch(rf"-m pip install --quiet -e {clone.root}\[test\] -c \S+", installs[2])
    assert "torch==2.13.0" in Path(f"{clone.calls_file}.constraints").read_text()


def test_second_run_installs_nothing(clone: Clone) -> None:
    clone.run("fit")
    clone.calls()
    assert "train ['validate'] 1" in clone.run("validate").stdout
    assert clone.calls("-m ") == []


@pytest.mark.parametrize("file", ["pyproject.toml", "constraints/cpu.txt", "constraints/gpu.txt"])
def test_changed_requirements_install_again(clone: Clone, file: str) -> None:
    clone.run("setup")
    clone.calls()
    with (clone.root / file).open("a") as stream:
        stream.write("# changed\n")
    clone.run("setup")
    assert len(clone.calls("-m pip")) == 2


def test_failed_installation_is_repeated(clone: Clone) -> None:
    assert clone.run("setup", PIP_EXIT="1").returncode != 0
    clone.calls()
    assert clone.run("setup").returncode == 0
    assert len(clone.calls("-m pip")) == 2


def test_torch_spec_selects_the_gpu_constraints(clone: Clone) -> None:
    clone.run("setup", TORCH_SPEC="torch")
    assert "-m pip install --quiet torch" in clone.calls("-m pip")
    constraints = Path(f"{clone.calls_file}.constraints").read_text()
    assert "torch==2.13.0" not in constraints and "torch>=2.11" in constraints


def test_active_environment_is_used_and_keeps_its_versions(clone: Clone, tmp_path: Path) -> None:
    active = tmp_path / "active"
    (active / "bin").mkdir(parents=True)
    shutil.copy(clone.programs / "python3", active / "bin" / "python")
    assert clone.run("setup", VIRTUAL_ENV=str(active)).returncode == 0
    installs = clone.calls("-m ")
    assert not (clone.root / ".venv").exists() and (active / ".lightning-t2i-setup").exists()
    # The interpreter behind the stand-in is the one of these tests: its torch is recent, so it stays, unconstrained.
    assert len(installs) == 1 and "[test]" in installs[0]
    assert "torch" not in Path(f"{clone.calls_file}.constraints").read_text().replace("torchmetrics", "")


def test_conda_base_is_left_alone(clone: Clone, tmp_path: Path) -> None:
    clone.run("setup", CONDA_PREFIX=str(tmp_path), CONDA_DEFAULT_ENV="base")
    assert f"-m venv {clone.root}/.venv" in clone.calls()


def test_old_python_is_named(repo: Path, tmp_path: Path) -> None:
    done = Clone(repo, tmp_path, TOO_OLD).run("fit")
    assert done.returncode == 1
    assert "Python 3.11 or newer is needed, found: Python 3.9.18" in done.stderr and "PYTHON=" in done.stderr


def test_newer_python_beside_an_old_one_is_found(repo: Path, tmp_path: Path) -> None:
    clone = Clone(repo, tmp_path, TOO_OLD)
    clone.program("python3.12", STAND_IN)
    assert clone.run("setup").returncode == 0
    assert (clone.root / ".venv/bin/python").read_text() == STAND_IN


def test_test_runs_every_check_even_when_one_fails(clone: Clone) -> None:
    done = clone.run("test", "-k", "keys", TOOL_EXIT="1")
    assert done.returncode == 1
    assert clone.calls("-m ")[3:] == [
        "-m ruff check .",
        "-m ruff format --check .",
        "-m mypy",
        "-m pytest -n 2 --dist worksteal --durations=40 -k keys",
    ]
    assert Path(f"{clone.calls_file}.threads").read_text().splitlines()[-1] == "1"


def test_threads_of_the_user_are_kept(clone: Clone) -> None:
    assert "train ['fit'] 7" in clone.run("fit", OMP_NUM_THREADS="7").stdout


def test_slurm_tests_run_where_slurm_is(clone: Clone) -> None:
    clone.program("sbatch", "#!/usr/bin/env bash\n")
    assert clone.run("slurm-test", "-k", "array").returncode == 0
    assert clone.calls("-m pytest") == ["-m pytest -m slurm -k array tests/slurm"]
    assert clone.run("slurm-test", TOOL_EXIT="1").returncode == 1


def test_the_proof_takes_its_words(clone: Clone) -> None:
    assert clone.run("proof", "dmd", "--kills", "3").returncode == 0
    assert clone.calls("-m lightning_t2i") == ["-m lightning_t2i.proof dmd --kills 3"]


APT = """#!/usr/bin/env bash
printf '%s\\n' "apt-get $*" >>"$CALLS"
if [ "$1" = install ]; then
    echo "E: Unable to locate package"
    [ -z "${APT_EXIT:-}" ] || exit "$APT_EXIT"
    printf '' >"$(dirname "$0")/sbatch" && chmod +x "$(dirname "$0")/sbatch"
fi
"""


def test_slurm_is_installed_by_apt_or_its_tests_are_left_out_with_the_reason(clone: Clone) -> None:
    done = clone.run("slurm-test")
    assert done.returncode == 0
    assert "left out: SLURM is not installed, and there is no apt-get" in done.stdout
    clone.program("apt-get", APT)
    clone.program("sudo", '#!/usr/bin/env bash\nshift\nexec "$@"\n')
    for name in ("tail", "chmod"):
        (clone.programs / name).symlink_to(shutil.which(name) or name)
    done = clone.run("slurm-test", APT_EXIT="100")
    assert done.returncode == 0
    assert "left out: apt-get could not install SLURM: E: Unable to locate package" in done.stdout
    assert clone.calls("-m pytest") == []
    assert clone.run("slurm-test").returncode == 0
    calls = clone.calls()
    assert "apt-get install -y --no-install-recommends slurm-wlm munge" in calls
    assert calls[-1] == "-m pytest -m slurm tests/slurm"


def test_ci_calls_exactly_the_test_commands(repo: Path) -> None:
    commands = [line for line in (repo / ".ci/run").read_text().splitlines() if not line.startswith("#")]
    assert commands == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "./run test", "./run slurm-test"]
    assert os.access(repo / ".ci/run", os.X_OK) and os.access(repo / "run", os.X_OK)
    assert "- run: ./run test" in (repo / ".github/workflows/test.yml").read_text()


def test_constraints_cover_the_requirements(repo: Path) -> None:
    project = tomllib.loads((repo / "pyproject.toml").read_text())["project"]
    requirements = project["dependencies"] + project["optional-dependencies"]["test"]
    normal = [re.sub(r"[-_.]+", "-", re.split(r"[\[=<>~!]", r)[0]).lower() for r in requirements]
    lines = (repo / "constraints/cpu.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    pinned = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    assert sorted(set(normal) - pinned.keys()) == []
    assert pinned["torch"] == "2.13.0" and "torch==2.13.0" in (repo / "run").read_text()
    gpu = (repo / "constraints/gpu.txt").read_text().splitlines()
    assert gpu[1] == "torch>=2.11" and gpu[2:] == lines[2:]
