"""Writes what the quickstart gave into docs: results/quickstart.json, the picture, and the figures of quickstart.md.

    ./run fit --config configs/quickstart.yaml && .venv/bin/python -m benchmarks.quickstart runs/quickstart

`tests/test_quickstart.py` repeats the first steps and compares them with the JSON. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.rendering import render
from benchmarks.running import processor
from lightning_t2i.errors import UserError
from lightning_t2i.loggers import read_lines
from lightning_t2i.paths import ROOT
from lightning_t2i.report import duration, series, with_interval

SCORE = "shapes_score/overall@n="
CURVES = ("student/loss", "student/regression", "fake/loss", "val/distance")
PACKAGES = ("python", "torch", "lightning", "diffusers", "transformers")


def result(run: Path, machine: str) -> dict[str, Any]:
    """What is kept of a run: its curves, the scores of teacher and student, its cost, and where it ran.

    Raises:
        UserError: the run has not come to its comparison.
    """
    if not (run / "comparison.json").is_file():
        raise UserError("This run has no comparison", where=str(run), fix="fit --config configs/quickstart.yaml")
    files = {name: json.loads((run / f"{name}.json").read_text()) for name in ("comparison", "cost", "env")}
    config = yaml.safe_load((run / "config.yaml").read_text())
    arms, cost, env = files["comparison"]["arms"], files["cost"], files["env"]
    found = series(read_lines(run / "metrics.jsonl"))
    curves = {name: dict(zip(*found[name], strict=True)) for name in CURVES}
    score = next(name for name in next(iter(arms.values())) if name.startswith(SCORE))
    scores = [[title, arm["guidance"] or "", with_interval(arm, score)] for title, arm in arms.items()]
    distances = [[step, round(value, 3)] for step, value in curves["val/distance"].items()]
    columns = [["", ""], ["guidance", ""], [f"shapes score of {score.removeprefix(SCORE)} prompts (95 %)", ""]]
    return {
        "title": "Quickstart",
        "tables": [
            {"columns": columns, "rows": scores},
            {"columns": [["training step", ""], ["val/distance", ".3f"]], "rows": distances},
        ],
        "machine": machine,
        "cores": env["hardware"]["cpus"],
        "threads": env["hardware"]["threads"],
        "versions": {name: env["versions"][name] for name in PACKAGES},
        "command": env["starts"][-1]["command"].replace(f"{ROOT}/", ""),
        "date": env["starts"][-1]["time"][:10],
        "commit": env["git"]["commit"][:7] + (" with changes" if env["git"]["changed"] else ""),
        "note": f"{cost['steps']} training steps and the comparison took {duration(cost['seconds'])}.",
        "seconds": cost["seconds"],
        "steps": cost["steps"],
        "seed": config["model"]["init_args"]["common"]["seed"],
        "curves": curves,
        "arms": arms,
    }


def main(arguments: Sequence[str] | None = None, docs: Path = ROOT / "docs") -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quickstart", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--machine", help="where it ran, and what else ran there; default: this processor")
    given = parser.parse_args(arguments)
    found = result(given.run, given.machine or processor())
    page = docs / "quickstart.md"
    text = render(page.read_text(encoding="utf-8"), {"quickstart": found})
    (docs / "results" / "quickstart.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    shutil.copyfile(given.run / "comparison.png", docs / "images" / "quickstart.png")
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
