"""From cells to a result: pairing, verdicts, the form of the file, what is never overwritten, and staleness."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import toy_claims
import yaml

from lightning_t2i.claims import hashes, results
from lightning_t2i.claims.__main__ import main
from lightning_t2i.claims.report import markdown
from lightning_t2i.claims.spec import Arm, Cell, Claim, Matrix, Measured, Outcome
from lightning_t2i.claims.statistics import paired_interval
from lightning_t2i.errors import UserError

CLAIM = {"id", "text", "arms", "n", "measured", "interval", "baseline", "threshold", "verdict", "passed", "seeds"}
TOP = {"claims", "machine", "wall_s", "commit", "hashes"}


def nothing(cell: Cell) -> Measured:
    return Measured()


def matrix(threshold: float | None = 0.1, direction: Any = "higher", baseline: str | None = "b") -> Matrix:
    arms = tuple(Arm(name, nothing, {}, 1, "call", 1.0) for name in ("a", "b"))
    return Matrix("toy", arms, (Claim("c", "A claim.", "a", baseline, "score", threshold, direction),))


def outcomes(a: dict[int, list[float]], b: dict[int, list[float]], prompts: str = "p") -> dict[Any, Outcome]:
    arms = {"a": (a, "p"), "b": (b, prompts)}
    return {
        (name, seed): Outcome(Measured({}, {"score": row}, ids), 0.0, 1.0)
        for name, (rows, ids) in arms.items()
        for seed, row in rows.items()
    }


BASE = {0: [0.0, 0.2], 1: [0.5, 0.7], 2: [1.0, 1.2]}


def shifted(*effects: float) -> dict[int, list[float]]:
    return {seed: [value + effect for value in BASE[seed]] for seed, effect in enumerate(effects)}


def test_effects_are_paired_by_seed_and_by_prompt() -> None:
    """The seeds' levels differ by far more than the effect; pairing takes them out."""
    found = results.judged(matrix().claims[0], matrix(), outcomes(shifted(0.2, 0.3, 0.4), BASE))
    assert found["effects"] == pytest.approx([0.2, 0.3, 0.4])
    expected = paired_interval([0.2, 0.3, 0.4])
    assert found["interval"] == pytest.approx([expected.low, expected.high])
    assert found["prompts_interval"] == pytest.approx([0.3, 0.3])  # every prompt has the same mean effect
    assert found["measured"] == pytest.approx(0.3) and found["baseline"] == pytest.approx(0.6) and found["n"] == 2


@pytest.mark.parametrize(
    ("effects", "threshold", "direction", "verdict"),
    [
        ((0.2, 0.3, 0.4), 0.1, "higher", "reproduced"),
        ((0.2, 0.3, 0.4), 0.1, "lower", "inconclusive"),
        ((-0.2, -0.21, -0.22), -0.1, "lower", "reproduced"),
        ((0.01, 0.011, 0.012), 0.1, "higher", "contradicted"),
        ((0.5, 0.5, -0.1), 0.1, "higher", "inconclusive"),
        ((0.2, 0.3, 0.4), None, "higher", "reported-only"),
    ],
)
def test_verdicts(effects: Any, threshold: float | None, direction: Any, verdict: str) -> None:
    chosen = matrix(threshold, direction)
    found = results.judged(chosen.claims[0], chosen, outcomes(shifted(*effects), BASE))
    assert (found["verdict"], found["passed"]) == (verdict, verdict == "reproduced")


def test_without_a_baseline_the_metric_is_the_effect() -> None:
    chosen = matrix(0.5, baseline=None)
    found = results.judged(chosen.claims[0], chosen, outcomes(BASE, BASE))
    assert found["effects"] == pytest.approx([0.1, 0.6, 1.1]) and found["baseline"] is None and found["arms"] == ["a"]


def test_other_prompts_are_refused() -> None:
    with pytest.raises(UserError, match="different prompts"):
        results.judged(matrix().claims[0], matrix(), outcomes(BASE, BASE, prompts="others"))


def test_wall_time_counts_overlapping_cells_once() -> None:
    times = [(0.0, 4.0), (1.0, 2.0), (3.0, 6.0), (100.0, 101.0)]
    assert results.busy_seconds({("a", i): Outcome(Measured(), *t) for i, t in enumerate(times)}) == 7.0


def test_form_of_the_file_and_its_views(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([toy_claims.NAME]) == 0
    file = toy / "results" / "toy.json"
    found = json.loads(file.read_text())
    assert found.keys() >= TOP and all(claim.keys() >= CLAIM for claim in found["claims"])
    gain, too_much, level = found["claims"]
    assert gain["arms"] == ["better", "base"] and gain["n"] == 20 and gain["seeds"] == [0, 1, 2]
    assert gain["effects"] == pytest.approx([0.5, 0.51, 0.52]) and gain["verdict"] == "reproduced" and gain["passed"]
    assert too_much["verdict"] == "contradicted" and not too_much["passed"]
    assert level["n"] is None and level["prompts_interval"] is None and level["verdict"] == "reported-only"
    assert found["hashes"].keys() == {"golden", "configs", "data"} and found["mode"] == "full"
    page = file.with_suffix(".md").read_text()
    for text in (
        "+0.5100",
        "**reproduced**",
        "**contradicted**",
        "at least +0.4",
        "0.5, 0.51, 0.52",
        "no cell of this",
    ):
        assert text in page, text
    picture = file.with_suffix(".png").read_bytes()
    assert picture[:4] == b"\x89PNG"
    # The views come from the JSON file alone: no cell has to be there.
    (toy / "runs").rename(toy / "elsewhere")
    found["claims"][0]["text"] = "Another sentence."
    file.write_text(json.dumps(found))
    file.with_suffix(".png").unlink()
    assert main([toy_claims.NAME, "--report"]) == 0
    assert "Another sentence." in file.with_suffix(".md").read_text() and file.with_suffix(".png").is_file()


def test_quick_does_not_overwrite_a_full_result(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = toy / "results" / "toy.json"
    full.parent.mkdir()
    full.write_text('{"mode": "full"}')
    assert main([toy_claims.NAME, "--quick", "--out", str(full.parent)]) == 2
    assert "A full result is only replaced by a full one" in capsys.readouterr().err
    assert not (toy / "steer" / "calls").exists()
    assert main([toy_claims.NAME, "--quick"]) == 0
    quick = toy / "runs" / "claims" / "toy" / "quick" / "toy.json"
    assert json.loads(quick.read_text())["mode"] == "quick" and full.read_text() == '{"mode": "full"}'
    assert "A rehearsal" in quick.with_suffix(".md").read_text()


def test_each_hash_makes_a_result_stale(
    toy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, config, data = toy / "base.yaml", toy / "config.yaml", toy / "data"
    base.write_text("trainer: {max_steps: 3}\n")
    config.write_text("base: base.yaml\nmodel: {init_args: {network: net.json}}\n")
    (toy / "net.json").write_text("{}")
    data.mkdir()
    (data / "dataset.json").write_text('{"sha256": "0123456789abcdef"}')
    monkeypatch.chdir(toy)
    monkeypatch.setenv("TOY_CONFIG", "config.yaml")
    source = toy / "own_claims" / "toy.py"
    source.write_text(source.read_text().replace("quick=quick)", f'data=("{data}",), quick=quick)'))
    assert main([toy_claims.NAME, "--check"]) == 2
    assert "There is no result" in capsys.readouterr().err
    assert main([toy_claims.NAME]) == 0

    def check() -> tuple[int, str]:
        capsys.readouterr()
        return main([toy_claims.NAME, "--check"]), capsys.readouterr().out

    fresh = check()
    assert fresh[0] == 0 and "fresh" in fresh[1]
    base.write_text("# a comment\ntrainer:\n  max_steps: 3\n  log_every_n_steps: 7  # which the arm overrides\n")
    assert check() == fresh
    for file, content, key in (
        (base, "trainer: {max_steps: 4}\n", "configs.base: "),
        (toy / "net.json", '{"width": 1}', "configs.base: "),
        (data / "dataset.json", '{"sha256": "f0"}', f"data.{data}: 0123456789ab -> f0"),
        (toy / "golden" / "toy.json", '{"losses": []}', "golden: absent -> "),
    ):
        old = file.read_text() if file.exists() else None
        file.write_text(content)
        code, shown = check()
        assert code == 1 and "stale" in shown and key in shown, (file, shown)
        if old is None:
            file.unlink()
        else:
            file.write_text(old)
        assert check() == fresh


def test_cells_are_kept_under_all_that_decides_them() -> None:
    arms = (Arm("a", nothing, {"x": 1}, 1, "call", 1.0), Arm("b", nothing, {}, 1, "call", 1.0, ("a",)))
    chosen = Matrix("toy", arms, (Claim("c", "A claim.", "a", "b", "score", 0.1),))
    found: dict[str, Any] = {"golden": "g", "configs": {}, "data": {"d": "1"}}
    first = [hashes.cell_key(chosen, arm, found) for arm in chosen.arms]

    def differs(other: Matrix, hashed: dict[str, Any]) -> list[bool]:
        return [hashes.cell_key(other, a, hashed) != key for a, key in zip(other.arms, first, strict=True)]

    assert differs(replace(chosen, arms=(replace(arms[0], options={"x": 2}), arms[1])), found) == [True, True]
    assert differs(replace(chosen, arms=(arms[0], replace(arms[1], options={"y": 1}))), found) == [False, True]
    assert differs(replace(chosen, arms=(replace(arms[0], units=9), arms[1])), found) == [False, False]
    assert differs(replace(chosen, claims=(replace(chosen.claims[0], threshold=0.2),)), found) == [False, False]
    for changed in ({"golden": "h"}, {"data": {"d": "2"}}):
        assert differs(chosen, found | changed) == [True, True]


def test_config_that_is_missing_or_not_readable_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        hashes.config_hash("configs/diffusion/tinny.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not readable"):
        hashes.config_hash(str(tmp_path / "bad.yaml"))
    (tmp_path / "good.yaml").write_text(yaml.safe_dump({"trainer": {"max_steps": 1}}))
    assert len(hashes.config_hash(str(tmp_path / "good.yaml"))) == 12


def test_thresholds_are_registered_once_and_with_their_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        return subprocess.run(["git", *identity, *words], cwd=tmp_path, capture_output=True, text=True).stdout.strip()

    file = tmp_path / "file.py"
    file.write_text("first")
    git("init", "-q")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "source_of", lambda name: str(file))
    assert results.register(tmp_path / "a", "toy", matrix(), 0)["commit"] is None  # not committed
    git("add", "file.py")
    git("commit", "-q", "-m", "m")
    found = results.register(tmp_path / "b", "toy", matrix(), 0)
    assert found["commit"] == git("rev-parse", "HEAD") and found["measured"] == 0
    file.write_text("changed")
    assert results.register(tmp_path / "b", "toy", matrix(), 9) == found  # the first note counts
    later = results.register(tmp_path / "b", "toy", matrix(threshold=0.01), 9)
    assert later["commit"] is None and later["measured"] == 9


def test_a_threshold_that_came_after_the_cells_is_told() -> None:
    result: dict[str, Any] = {
        "method": "toy", "mode": "full", "claims": [], "machine": "m", "wall_s": 1.0, "commit": None, "arms": {},
        "hashes": {"golden": "g", "configs": {}, "data": {}},
        "thresholds": {"spec": "s", "commit": None, "time": "t", "measured": 9},
    }  # fmt: skip
    assert "in no commit when they were first used; 9 cells of this matrix had been measured" in markdown(result)
