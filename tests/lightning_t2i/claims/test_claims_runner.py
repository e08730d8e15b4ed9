"""Cells: the budget comes first, what is done is kept, a killed command goes on, a failing cell stops no other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy_claims
from filelock import FileLock

from lightning_t2i.claims.__main__ import main
from lightning_t2i.claims.runner import Runner, folders, root_of
from lightning_t2i.claims.spec import Outcome, load


def calls(toy: Path) -> list[str]:
    file = toy / "steer" / "calls"
    return sorted(file.read_text().splitlines()) if file.is_file() else []


def test_budget_comes_first_and_a_second_call_runs_nothing(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([toy_claims.NAME]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("| arm | seeds | cost of a cell | core minutes |\n")
    assert "| base | 3 | 10 x 0.2 s per count | 0.1 |" in shown
    assert shown.index("minutes on 2 free cores") < shown.index("begins  base seed 0")
    assert calls(toy) == [f"{arm} {seed}" for arm in ("base@0", "better", "last") for seed in (0, 1, 2)]
    result = (toy / "results" / "toy.json").read_text()
    assert main([toy_claims.NAME]) == 0
    assert "9 of 9 cells are kept" in capsys.readouterr().out
    assert len(calls(toy)) == 9
    assert (toy / "results" / "toy.json").read_text() == result


def test_dry_run_prints_the_budget_and_runs_nothing(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([toy_claims.NAME, "--dry-run", "--workers", "1"]) == 0
    assert "9 cells, 0.2 core minutes; 0.2 minutes on 1 free cores" in capsys.readouterr().out
    assert calls(toy) == [] and not (toy / "runs").exists()


def test_a_killed_command_leaves_no_process_and_goes_on_inside_the_cell(toy: Path) -> None:
    (toy / "steer" / "slow").touch()
    command = [sys.executable, "-m", "lightning_t2i.claims", toy_claims.NAME, "--out", str(toy / "out")]
    path = os.pathsep.join([str(toy), *(p for p in sys.path if p)])
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.DEVNULL)
    kept = root_of("toy")
    end = time.monotonic() + 60
    while not any(int(f.read_text() or 0) >= 2 for f in kept.glob("base-*/seed-0/count")):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (count,) = kept.glob("base-*/seed-0/count")
    with FileLock(count.parent / ".lock", timeout=60):  # the cell has ended
        at = int(count.read_text())
    assert at < 10, "the cell went on without its command"
    (toy / "steer" / "slow").unlink()
    assert main([toy_claims.NAME]) == 0
    starts = [call for call in calls(toy) if call.startswith("base@") and call.endswith(" 0")]
    assert starts == ["base@0 0", f"base@{at} 0"]


def test_a_failing_cell_is_told_and_the_others_go_on(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = toy / "steer" / "fail-better-1"
    broken.touch()
    assert main([toy_claims.NAME]) == 1
    shown = capsys.readouterr().out
    assert "FAILED  better seed 1" in shown and "about to fail" in shown
    assert "ValueError: the cell is broken" in shown and "log.txt" in shown
    assert "2 of 9 cells are missing, so there is no result: better seed 1, last seed 1" in shown
    assert "last 2" in calls(toy) and "last 1" not in calls(toy)
    assert not (toy / "results").exists()
    broken.unlink()
    assert main([toy_claims.NAME]) == 0
    assert calls(toy).count("better 1") == 2 and len(calls(toy)) == 10


def test_workers_run_side_by_side_with_one_thread_each(toy: Path) -> None:
    matrix = load(toy_claims.NAME)
    places = folders(matrix, {"golden": "", "configs": {}, "data": {}})
    most = 0

    def watch(line: str) -> None:
        nonlocal most
        most = max(most, len(runner.running))

    runner = Runner(matrix, places, 2, watch)
    assert runner.run() == {} and most == 2
    assert {Outcome.load(place).measured.numbers.get("threads", 1.0) for place in places.values()} == {1.0}


def test_two_commands_do_not_run_one_matrix(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root_of("toy").mkdir(parents=True)
    with FileLock(root_of("toy") / ".lock"):
        assert main([toy_claims.NAME]) == 2
    assert "another command runs the cells" in capsys.readouterr().err
    assert calls(toy) == []


def test_a_pilot_has_other_seeds_and_leaves_the_result_alone(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([toy_claims.NAME, "--seeds", "1", "7"]) == 2
    assert "A pilot takes other seeds than the claims" in capsys.readouterr().err
    assert main([toy_claims.NAME, "--seeds", "7"]) == 0
    found = json.loads((root_of("toy") / "pilot" / "toy.json").read_text())
    assert found["mode"] == "pilot" and found["claims"][0]["seeds"] == [7] and found["thresholds"] == {}
    assert found["claims"][0]["interval"] == [None, None]
    assert not (toy / "results").exists()


def test_no_worker_is_a_mistake(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([toy_claims.NAME, "--workers", "0"]) == 2
    assert "--workers" in capsys.readouterr().err
