"""report.md of a run: curves, the last pictures, metrics and what it cost; a view of the run's other files."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_t2i.loggers import read_lines, write_csv

CURVES = 12  # panels of the picture, losses first


def series(lines: Sequence[dict[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Name -> (training steps, values), in the order of first appearance."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name not in ("step", "samples", "time"):
                steps, values = found.setdefault(name, ([], []))
                steps.append(line["step"])
                values.append(value)
    return found


def importance(name: str) -> int:
    """Losses and scores first, then learning rates and speed."""
    order = ("loss", "val", "grad_norm")
    return next((i for i, part in enumerate(order) if part in name), len(order))


def draw_curves(curves: dict[str, tuple[list[int], list[float]]], target: Path) -> bool:
    """Draws the curves with at least two points; False when there are none or matplotlib is not installed."""
    shown = sorted((n for n, (steps, _) in curves.items() if len(steps) > 1), key=importance)[:CURVES]
    if not shown:
        return False
    try:
        from matplotlib.figure import Figure  # no pyplot: no global state, no display
    except ImportError:
        return False
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.8 * rows))
    figure.subplots_adjust(0.06, 0.25 / rows, 0.98, 1 - 0.12 / rows, wspace=0.25, hspace=0.35)
    for number, name in enumerate(shown, 1):
        axis = figure.add_subplot(rows, columns, number)
        axis.plot(*curves[name], linewidth=1)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
    figure.supxlabel("training step", fontsize=9)
    figure.savefig(target, dpi=100)
    return True


def size_of(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else 0


def duration(seconds: float) -> str:
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min {seconds % 60:.0f} s"


def cost_rows(folder: Path) -> list[tuple[str, str]]:
    """Wall time, speed, memory and checkpoint size."""
    rows = []
    if (file := folder / "cost.json").is_file():
        cost = json.loads(file.read_text())
        seconds = cost["seconds"]
        rows += [
            ("training steps", f"{cost['steps']:,}"),
            ("samples", f"{cost['samples']:,}"),
            ("wall time", duration(seconds)),
            ("samples per second", f"{cost['samples'] / max(seconds, 1e-9):.1f}"),
            ("processes", str(cost["processes"])),
            ("peak memory", f"{cost['peak_memory_bytes'] / 2**30:.2f} GiB"),
        ]
    checkpoints = sorted(p for p in (folder / "checkpoints").glob("step-*") if p.is_dir())
    if checkpoints:
        rows.append(("checkpoint", f"{size_of(checkpoints[-1]) / 1e6:.1f} MB"))
    return rows


def table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_interval(values: Mapping[str, Any], name: str) -> str:
    """A metric with its interval, if it has one: "0.787 (0.767 to 0.807)"; empty where the metric is not given."""
    if values.get(name) is None:
        return ""
    metric, at, facts = name.partition("@")
    low, high = (values.get(f"{metric}_{end}{at}{facts}") for end in ("low", "high"))
    return f"{values[name]:.3g}" + (f" ({low:.3g} to {high:.3g})" if low is not None and high is not None else "")


def comparison(folder: Path) -> str:
    """The section of `comparison.json`: the picture and a table with a column for each arm; empty without that file."""
    if not (file := folder / "comparison.json").is_file():
        return ""
    found = json.loads(file.read_text())
    arms = found["arms"]
    every = dict.fromkeys(name for values in arms.values() for name in values)
    names = [name for name in every if not name.partition("@")[0].endswith(("_low", "_high"))]
    rows = [(name, *(with_interval(values, name) for values in arms.values())) for name in names]
    about = f"After step {found['step']}, on prompts of {found['data']}, at equal noise; in brackets 95 % intervals."
    picture = "![teacher and student](comparison.png)"
    return f"## Teacher and student\n\n{picture}\n\n{about}\n\n{table(rows, ('', *arms))}"


def write_report(folder: Path, method: Any = None) -> Path:
    """Writes report.md, curves.png and metrics.csv into a run folder and returns the report's path.

    Args:
        folder: run folder.
        method: the trained method, for its title; the config names it otherwise.
    """
    lines = read_lines(folder / "metrics.jsonl")
    write_csv(folder / "metrics.jsonl", folder / "metrics.csv")
    curves = series(lines)
    config = yaml.safe_load((folder / "config.yaml").read_text()) if (folder / "config.yaml").is_file() else {}
    environment = json.loads((folder / "env.json").read_text()) if (folder / "env.json").is_file() else {}
    model = config.get("model") or {}
    title = sys.modules[type(method).__module__].__doc__ if method is not None else None
    parts = [f"# {folder.name}", (title or "").strip().partition("\n")[0]]
    about = [("class", model.get("class_path", "")), ("data", (config.get("data") or {}).get("class_path", ""))]
    if starts := environment.get("starts"):
        about.append(("command", f"`{starts[-1]['command']}`"))
        about.append(("starts", f"{len(starts)}, at steps {', '.join(str(s['step']) for s in starts)}"))
    if environment:
        git = environment.get("git") or {}
        about.append(("commit", git.get("commit", "none") + (" with changes" if git.get("changed") else "")))
        about.append(("config hash", environment["config_hash"]))
    parts.append(table([(k, v) for k, v in about if v], ("run", "")))
    parts.append("Full config: [config.yaml](config.yaml). Versions and hardware: [env.json](env.json).")
    parts.append(comparison(folder))
    if draw_curves(curves, folder / "curves.png"):
        parts.append("## Curves\n\n![curves](curves.png)")
    if grids := sorted((folder / "samples").glob("*.png")):
        parts.append(f"## Samples\n\n![samples](samples/{grids[-1].name})")
    metrics = [
        (name, f"{values[-1]:.5g}", str(steps[-1]), f"{min(values):.5g}", f"{max(values):.5g}")
        for name, (steps, values) in sorted(curves.items(), key=lambda item: importance(item[0]))
        if not name.startswith("comparison/")  # they have their own section
    ]
    if metrics:
        parts.append("## Metrics\n\n" + table(metrics, ("name", "last", "at step", "least", "greatest")))
    if cost := cost_rows(folder):
        parts.append("## Cost\n\n" + table(cost, ("", "")))
    target = folder / "report.md"
    target.write_text("\n\n".join(p for p in parts if p) + "\n", encoding="utf-8")
    return target
