"""Claims whose cells need no training, as a module of one's own: `own_claims.toy` in a folder on the path.

`install(folder)` writes the module there. What its cells do is steered by files in the folder `steer`, which the
environment variable TOY_CLAIMS names: `fail-ARM-SEED` makes a cell fail, `slow` makes `base` cells count slowly.
"""

from __future__ import annotations

from pathlib import Path

NAME = "own_claims.toy"
SOURCE = '''
import os, sys, time
from pathlib import Path
from lightning_t2i.claims.spec import Arm, Claim, Matrix, Measured

def steer(name):
    return (Path(os.environ["TOY_CLAIMS"]) / name).exists()

def note(cell, name):
    with (Path(os.environ["TOY_CLAIMS"]) / "calls").open("a") as file:
        file.write(f"{name} {cell.seed}\\n")

def base(cell):
    """Counts to ten and keeps the count, so that it goes on where it was killed."""
    kept = cell.folder / "count"
    done = int(kept.read_text()) if kept.exists() else 0
    note(cell, f"base@{done}")
    for count in range(done, 10):
        time.sleep(0.2 if steer("slow") else 0)
        kept.write_text(str(count + 1))
    return scored(cell, 0.0)

def better(cell):
    note(cell, "better")
    if steer(f"fail-better-{cell.seed}"):
        print("about to fail")
        raise ValueError("the cell is broken")
    return scored(cell, cell.measured("base").numbers["level"] + cell.options["gain"] + 0.01 * cell.seed)

def last(cell):
    note(cell, "last")
    return Measured({"level": cell.measured("better").numbers["level"]})

def scored(cell, level):
    scores = [level + 0.001 * cell.seed * (-1) ** prompt for prompt in range(20)]
    return Measured({"level": level, "threads": float(os.environ["OMP_NUM_THREADS"])}, {"score": scores}, "the prompts")

def matrix(quick=False):
    size, config = 1 if quick else 2, os.environ.get("TOY_CONFIG", "configs/trainer/cpu.yaml")
    overrides = {"trainer.log_every_n_steps": 5}
    return Matrix("toy", (
        Arm("base", base, {"size": size, "config": config, "overrides": overrides}, 10, "count", 0.2),
        Arm("better", better, {"gain": 0.5, "size": size}, 1, "call", 1.0, ("base",)),
        Arm("last", last, {}, 1, "call", 1.0, ("better",)),
    ), (
        Claim("gain", "It is better.", "better", "base", "score", 0.4),
        Claim("too-much", "It is much better.", "better", "base", "score", 0.9),
        Claim("level", "Its level.", "last", None, "level", None),
    ), quick=quick)
'''


def install(folder: Path) -> None:
    """Writes the module below `folder`, which must be on the path."""
    (folder / "own_claims").mkdir(parents=True)
    (folder / "own_claims" / "toy.py").write_text(SOURCE, encoding="utf-8")
