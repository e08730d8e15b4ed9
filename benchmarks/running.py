"""Runs benchmarks, each in a process of its own, and says where it ran."""

from __future__ import annotations

import ast
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from lightning_t2i.cli.runs import git_state
from lightning_t2i.errors import UserError

FOLDER = Path(__file__).resolve().parent
PACKAGES = ("torch", "lightning", "diffusers", "webdataset", "pillow")
# The result is the last line: libraries print what they like.
CHILD = """
import importlib, json, sys, torch
torch.set_num_threads(1)
torch.manual_seed(0)
module, function, arguments = sys.argv[1:]
result = getattr(importlib.import_module(module), function)(**json.loads(arguments))
print("\\n" + json.dumps(result))
"""


def benchmarks(folder: Path = FOLDER) -> list[str]:
    """The scripts that have a `measure` with the argument `quick`, by name."""
    found = []
    for file in sorted(folder.glob("*.py")):
        functions = [n for n in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(n, ast.FunctionDef)]
        if any(f.name == "measure" and [a.arg for a in f.args.args] == ["quick"] for f in functions):
            found.append(file.stem)
    return found


def isolated(module: str, function: str, **arguments: Any) -> Any:
    """What a function returns in a new process with one thread, so that memory and caches are its own.

    Raises:
        UserError: it failed; with the end of what it printed.
    """
    command = [sys.executable, "-c", CHILD, module, function, json.dumps(arguments)]
    # An allocator that is tuned from outside changes the figures.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=FOLDER.parent, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError("The benchmark failed", where=f"{module}.{function}", given="\n" + done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def measured(name: str, quick: bool = False) -> dict[str, Any]:
    """The result of a benchmark with where, when and how it was measured."""
    state = {"busy_cores": busy_cores(), **surroundings()}
    result = isolated(f"benchmarks.{name}", "measure", quick=quick)
    return {**result, "command": f"python -m benchmarks --only {name}", **state}


def surroundings() -> dict[str, Any]:
    """Machine, versions, commit and date."""
    git = git_state()
    commit = git["commit"][:7] + (" with changes" if git["changed"] else "") if git else ""
    versions = {"Python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}
    return {
        "machine": processor(),
        "cores": os.cpu_count(),
        "threads": 1,
        "versions": versions,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def processor() -> str:
    """Name of the processor, or its kind where it has none."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.machine())


def busy_cores(seconds: float = 1.0) -> float | None:
    """How many cores other work keeps busy at the moment; None where the system does not tell."""
    if not Path("/proc/stat").is_file():
        return None
    before = _times()
    time.sleep(seconds)
    idle, total = (b - a for a, b in zip(before, _times(), strict=True))
    return round((os.cpu_count() or 1) * (1 - idle / max(total, 1)), 2)


def _times() -> tuple[int, int]:
    """(idle, all) ticks of all cores since the start of the system; waiting for a disk is idle."""
    ticks = [int(x) for x in Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile, between the least and the greatest value; of one value that value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high
