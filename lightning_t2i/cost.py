"""What the papers' experiments would cost: docs/cost.md, of plans that `train.py check` makes without weights and data.

    python -m lightning_t2i.cost --refresh [--config CONFIG ...]    plans again, writes docs/results/cost.json, the page
    python -m lightning_t2i.cost                                    writes the page from what is planned

    device hours = steps x operations of a training step on all devices / (SHARE x peak of the device) / 3600

Operations are counted on fake tensors, two for a multiplication with an addition.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from lightning_t2i.paths import ROOT
from lightning_t2i.report import table
from lightning_t2i.state_io import write_atomically

RESULT, PAGE = ROOT / "docs" / "results" / "cost.json", ROOT / "docs" / "cost.md"
SHARE = 0.4  # of the peak that trainings of this size reach
PEAKS = {"H100 SXM": 989e12, "A100": 312e12}  # dense bf16 operations per second, by their makers' data sheets
# config -> (devices, nodes, what the paper or its authors say)
PLANS: dict[str, tuple[int, int, str]] = {
    "fluid/369m": (64, 8, "1.4e21 operations"),
    "fluid/1b": (64, 8, "4.1e21 operations"),
    "fluid/10b": (512, 64, ""),
    "swiftbrush/sd21": (1, 1, "99 A100 hours"),
    "dmd/sd15_laion625": (72, 9, "2,592 A100 hours"),
    "dmd2/sdxl_4step": (128, 16, ""),
    "instaflow/sd15_reflow": (8, 1, "269 A100 hours, without the pairs"),
    "instaflow/sd15_reflow_large": (32, 4, "1,536 A100 hours"),
    "instaflow/sd15_distill": (32, 4, "2,592 A100 hours"),
    "deme/sd14": (8, 1, ""),
    "ecad/pixart_alpha_256": (8, 1, "39.6 million pictures"),
    "ecad/flux1_dev_256": (8, 1, "6.0 million pictures"),
    "wukong/vit_b32": (32, 4, ""),
    "wukong/vit_l14": (32, 4, "32 to 40 cards for 3 to 10 days, as recalled"),
}
# Operations of a generation of a search: candidates x pictures x operations of a picture with all computed, half of
# which a schedule leaves out (MACs of a picture: docs/ecad.md).
SEARCHED = {"ecad/pixart_alpha_256": 72 * 1000 * 2 * 5.962e12 / 2, "ecad/flux1_dev_256": 24 * 1000 * 2 * 103.48e12 / 2}
TINY = ("fluid", "swiftbrush", "dmd", "instaflow", "deme", "ecad", "wukong")  # RepBlend's step depends on values
Planned = dict[str, Any]


def plan(config: str, ranks: int, nodes: int) -> Planned:
    """What `train.py check` says of a config, as far as the page shows it.

    Raises:
        RuntimeError: the check failed.
    """
    words = ["--config", f"configs/{config}.yaml", "--ranks", str(ranks), "--nodes", str(nodes), "--json"]
    done = subprocess.run([sys.executable, "train.py", "check", *words], capture_output=True, text=True, cwd=ROOT)
    if done.returncode or not done.stdout.lstrip().startswith("{"):
        raise RuntimeError(f"the check of {config} failed:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    found = json.loads(done.stdout)
    return {
        "ranks": ranks,
        "mesh": found["mesh"],
        "steps": found["steps"],
        "operations": SEARCHED.get(config, found["flops_per_step_and_rank"]["total"] * ranks),
        "memory": found["memory_per_rank"]["peak"],
        "checkpoint": found["checkpoint"],
    }


def hours(planned: Planned, peak: float) -> float:
    """Device hours of a training on devices with so many operations per second at their peak."""
    found: float = planned["steps"] * planned["operations"] / (SHARE * peak) / 3600
    return found


def page(results: dict[str, Planned], measured: Sequence[Sequence[Any]]) -> str:
    """docs/cost.md.

    Args:
        results: config -> plan.
        measured: rows (method, batch, seconds of a step, samples/s, MB, units predicted, ...) of the benchmark.
    """
    rows = []
    for config, (_, _, told) in PLANS.items():
        if config in results:
            p = results[config]
            mesh = " x ".join(map(str, p["mesh"]))
            rows.append([
                f"`{config}`", str(p["ranks"]), mesh, f"{p['steps']:,}", f"{p['operations'] / 1e15:,.3g}",
                f"{p['memory'] / 1e9:,.1f}", f"{p['checkpoint'] / 1e9:,.1f}",
                *(f"{hours(p, peak):,.3g}" for peak in PEAKS.values()), told,
            ])  # fmt: skip
    speed = {row[0]: row for row in measured}
    tiny = []
    for method in TINY:
        planned, row = results.get(f"{method}/tiny"), speed.get(method)
        if planned is not None:
            shown = [f"{row[6]:.2f}", f"{row[2]:.3f}", f"{row[3]:,.1f}"] if row else ["", "", ""]
            tiny.append(
                [f"`{method}`", *shown, f"{planned['memory'] / 1e6:,.0f}", f"{planned['checkpoint'] / 1e6:,.1f}"]
            )
    head = ("config", "devices", "mesh", "steps", "PFLOP a step", "GB a device", "checkpoint, GB",
            *(f"{device} hours" for device in PEAKS), "the paper or its authors")  # fmt: skip
    peaks = ", ".join(f"{peak / 1e12:g} TFLOP/s ({device})" for device, peak in PEAKS.items())
    parts = [
        "# What it costs",
        "Made by `python -m lightning_t2i.cost --refresh` from plans of `train.py check`, which needs neither weights "
        "nor data nor GPUs. Nothing of it was run with real weights.",
        f"```\ndevice hours = steps x operations of a training step on all devices / ({SHARE:g} x peak) / 3600\n```",
        f"Peaks are dense, in bf16, by the makers' data sheets: {peaks}. Operations are counted on fake tensors, two "
        "for a multiplication with an addition; time for data, collectives, validation and checkpoints comes on top. "
        "Memory is that of the worst moment of a step on the mesh (replicate x shard); where it is more than a card "
        "has, `check` says what to change. A step of ECAD is a generation; half of its computations are taken to be "
        "reused, and its memory has the values that a schedule keeps at most. Frozen text encoders run in the "
        "training, T5-XXL in Fluid's; the figures of Fluid's paper leave it out. Steps of InstaFlow with a perceptual "
        "loss are counted as those without.",
        "## The papers' experiments",
        table(rows, head),
        "## The tiny configs on one CPU core",
        table(tiny, ("method", "forward units", "s a step", "samples/s", "memory, MB", "checkpoint, MB")),
        "Units, seconds and samples are measured ([performance.md](performance.md#forward-units)); memory and "
        "checkpoint are planned. RepBlend is in neither table: which experts and pairs a step takes depends on values, "
        "which a plan does not have.",
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    every = {**{config: given[:2] for config, given in PLANS.items()}, **{f"{m}/tiny": (1, 1) for m in TINY}}
    parser = argparse.ArgumentParser("python -m lightning_t2i.cost", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--refresh", action="store_true", help="plan, and write the result and the page")
    parser.add_argument("--config", nargs="+", choices=list(every), default=list(every), help="(default: all)")
    given = parser.parse_args(arguments)
    results = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    if given.refresh:
        for config in given.config:
            results[config] = plan(config, *every[config])
            print(config, json.dumps(results[config]), flush=True)
            write_atomically(
                RESULT, (json.dumps({c: results[c] for c in every if c in results}, indent=1) + "\n").encode()
            )
    write_atomically(PAGE, page(results, speeds()).encode())
    return 0


def speeds() -> list[list[Any]]:
    """Rows of the benchmark `forward_units`."""
    found = json.loads((ROOT / "docs" / "results" / "performance.json").read_text(encoding="utf-8"))
    rows: list[list[Any]] = found["forward_units"]["tables"][0]["rows"]
    return rows


if __name__ == "__main__":
    sys.exit(main())
