"""From finished cells to a result: effects, intervals, verdicts, and what they rest on."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_t2i.claims.hashes import Hashes, digest
from lightning_t2i.claims.runner import Key
from lightning_t2i.claims.spec import Claim, Matrix, Outcome, source_of
from lightning_t2i.claims.statistics import bootstrap, judge
from lightning_t2i.cli.runs import git_state
from lightning_t2i.errors import UserError
from lightning_t2i.keys import Keys
from lightning_t2i.paths import ROOT
from lightning_t2i.state_io import write_atomically

Result = dict[str, Any]  # what the JSON file holds, see docs/claims.md
Outcomes = Mapping[Key, Outcome]


def result_of(matrix: Matrix, found: Hashes, outcomes: Outcomes, registration: Mapping[str, Any], mode: str) -> Result:
    """The result of a matrix whose cells are all there.

    Args:
        registration: when the thresholds were set, see `register`.
        mode: full, quick, or pilot for seeds that are not the matrix's.
    """
    return {
        "method": matrix.method,
        "mode": mode,
        "claims": [judged(claim, matrix, outcomes) for claim in matrix.claims],
        "machine": machine(),
        "wall_s": round(busy_seconds(outcomes), 1),
        "commit": git_state().get("commit"),
        "hashes": found,
        "thresholds": dict(registration),
        "arms": {arm.name: _arm(arm.name, matrix, outcomes) for arm in matrix.arms},
    }


def judged(claim: Claim, matrix: Matrix, outcomes: Outcomes) -> dict[str, Any]:
    """A claim's effects, one per seed, with both intervals and the verdict.

    Raises:
        UserError: arm and baseline were measured on different prompts.
    """
    arm = [outcomes[(claim.arm, seed)].measured for seed in matrix.seeds]
    base = [outcomes[(claim.baseline, seed)].measured for seed in matrix.seeds] if claim.baseline else []
    sets = {cell.prompts for cell in [*arm, *base] if claim.metric in cell.scores}
    if len(sets) > 1:
        given = ", ".join(map(str, sets))
        raise UserError("Arm and baseline have different prompts", where=f"the claim {claim.id}", given=given)
    scores, baselines = [m.of(claim.metric) for m in arm], [m.of(claim.metric) for m in base]
    effects = [a - b for a, b in zip(scores, baselines, strict=True)] if base else scores
    found = judge(effects, claim.threshold, claim.direction, paired=bool(base))
    rows = _per_prompt(claim.metric, [m.scores for m in arm], [m.scores for m in base])
    prompts = bootstrap(rows, Keys(0).fork(f"claims/{claim.id}")) if rows is not None else None
    return {
        "id": claim.id,
        "text": claim.text,
        "arms": [claim.arm, *([claim.baseline] if claim.baseline else [])],
        "n": len(rows) if rows is not None else None,
        "measured": found.interval.estimate,
        "interval": [_finite(found.interval.low), _finite(found.interval.high)],
        "baseline": sum(baselines) / len(baselines) if base else None,
        "threshold": claim.threshold,
        "verdict": found.verdict,
        "passed": found.passed,
        "seeds": list(matrix.seeds),
        "metric": claim.metric,
        "direction": claim.direction,
        "effects": effects,
        "prompts_interval": [prompts.low, prompts.high] if prompts else None,
    }


def _per_prompt(metric: str, arm: list[Any], base: list[Any]) -> torch.Tensor | None:
    """Effects [prompts, seeds], or None for a metric without scores per prompt."""
    if not all(metric in scores for scores in [*arm, *base]):
        return None
    rows = torch.tensor([scores[metric] for scores in arm], dtype=torch.float64)
    return (rows - torch.tensor([s[metric] for s in base], dtype=torch.float64) if base else rows).T


def _finite(bound: float) -> float | None:
    return bound if math.isfinite(bound) else None  # JSON has no infinity


def _arm(name: str, matrix: Matrix, outcomes: Outcomes) -> dict[str, Any]:
    """What an arm is, what it measured with each seed, and its cost against the budget."""
    arm, cells = matrix.arm(name), [outcomes[(name, seed)] for seed in matrix.seeds]
    metrics = [*cells[0].measured.scores, *cells[0].measured.numbers]
    return {
        "options": dict(arm.options),
        "after": list(arm.after),
        "numbers": {metric: [cell.measured.of(metric) for cell in cells] for metric in metrics},
        "seconds": [round(cell.ended - cell.began, 1) for cell in cells],
        "budget_s": arm.seconds,
    }


def busy_seconds(outcomes: Outcomes) -> float:
    """Wall time during which at least one cell ran; of a cell that was killed, its last start counts."""
    total, until = 0.0, -math.inf
    for began, ended in sorted((o.began, o.ended) for o in outcomes.values()):
        total += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return total


def machine() -> str:
    """Processor, cores and versions, in words."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cores = f"{os.cpu_count()} cores, 1 thread per cell"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{names[0] if names else platform.machine()}, {cores}, {versions}"


def register(folder: Path, name: str, matrix: Matrix, measured: int) -> dict[str, Any]:
    """Notes, once for each set of claims, at which commit they stood when they were first run in full.

    Args:
        folder: where the note is kept.
        name: method or module of the claims file.
        matrix: the claims.
        measured: cells that were there already.

    Returns:
        spec: hash of arms, claims and seeds; commit: the last that changed the claims file, None when the file has
        changes that no commit holds; time: of the note, UTC; measured: cells that were known by then.
    """
    spec = digest(matrix.plain())
    note = folder / f"thresholds-{spec}.json"
    if not note.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        facts = {"spec": spec, "commit": committed(source_of(name)), "time": now, "measured": measured}
        write_atomically(note, (json.dumps(facts) + "\n").encode())
    kept: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
    return kept


def committed(file: str | None) -> str | None:
    """The last commit that changed a file of the repository, or None when the file is not as in it."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words, "--", str(file)], cwd=ROOT, capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    return git("log", "-1", "--format=%H") or None if git("status", "--porcelain") == "" else None


def read_result(file: Path) -> Result:
    """Reads a result.

    Raises:
        UserError: there is none.
    """
    if not file.is_file():
        fix = f"python -m lightning_t2i.claims {file.stem}"
        raise UserError("There is no result", where=str(file), fix=fix)
    found: Result = json.loads(file.read_text(encoding="utf-8"))
    return found


def target(folder: Path, method: str, mode: str) -> Path:
    """The file for a result, METHOD.json.

    Raises:
        UserError: a full result is there and this would be none.
    """
    file = folder / f"{method}.json"
    if mode != "full" and file.is_file() and read_result(file)["mode"] == "full":
        what, fix = "A full result is only replaced by a full one", "--out ANOTHER_FOLDER, or no --out"
        raise UserError(what, where=str(file), given=mode, fix=fix)
    return file


def write_result(file: Path, result: Result) -> None:
    """Writes the JSON file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, (json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
