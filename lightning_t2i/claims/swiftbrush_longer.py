"""SwiftBrush and SDS with longer trainings than their matrix has (arXiv 2312.05239, section 5; claims 1 and 2).

    arm                     seeds   cost of a cell on one free core
    train-full, train-sds   3       LONG training steps of 48 prompts
    their pictures          3       420 pictures in one step, and 4 of each of 60 prompts
    teacher-25, teacher-1   3       the same of the teacher
    backgrounds             3       200 pictures of each student

The arms are those of swiftbrush.py with LONG training steps in place of 200, at a rate that falls to nothing over all
of them: there SDS was more diverse for seed 0 and hardly less for seed 1, where it should collapse.
Thresholds are those of swiftbrush.py. `score@STEP` is the shapes score of 100 validation prompts on the way.
"""

from __future__ import annotations

from dataclasses import replace

from lightning_t2i.claims import swiftbrush
from lightning_t2i.claims.spec import Arm, Cell, Claim, Matrix, Measured
from lightning_t2i.claims.training import RUN, fit
from lightning_t2i.loggers import read_lines

LONG = 800
SCORE = "eval/shapes_score/overall@n=100"


def watched(cell: Cell) -> Measured:
    """`fit`, and score@STEP of each evaluation on the way."""
    found = fit(cell)
    lines = [line for line in read_lines(cell.folder / RUN / "metrics.jsonl") if SCORE in line]
    return Measured({**found.numbers, **{f"score@{line['step']}": line[SCORE] for line in lines}})


def matrix(quick: bool = False) -> Matrix:
    """The claims, or with `quick` a rehearsal of them."""
    base, long = swiftbrush.matrix(quick), 24 if quick else LONG
    kept = {"trainer.max_steps": long, "eval.metrics": ["shapes_score"], "eval.every": long // 8, "eval.n": 100,
            "eval.max_fraction": 1.0}  # fmt: skip
    arms: list[Arm] = [base.arm("teacher-25"), base.arm("teacher-1")]
    for name in ("full", "sds"):
        arm = base.arm(f"train-{name}")
        before = arm.options["overrides"]
        totals = {key: long for key in before if key.endswith("schedule.init_args.total")}
        options = {**arm.options, "overrides": {**before, **totals, **kept}}
        arms += [replace(arm, cell=watched, units=long, options=options), base.arm(name)]
        arms.append(base.arm(f"{name}-backgrounds"))
    arms.append(base.arm("full-way"))
    known = (
        "1-score", "1-gap", "1-share", "1-share-aim", "1-diversity", "2-sds-diversity", "2-sds-fd", "backgrounds-full",
        "backgrounds-sds",
    )  # fmt: skip
    shared = tuple(claim for claim in base.claims if claim.id in known or claim.id.startswith("versus-sds"))
    what, steps = "score of 100 validation prompts after", range(long // 8, long + 1, long // 8)
    curve = tuple(
        Claim(f"curve-{name}-{step}", f"{name}: {what} {step} steps.", f"train-{name}", None, f"score@{step}", None)
        for name in ("full", "sds") for step in steps
    )  # fmt: skip
    return Matrix("swiftbrush_longer", tuple(arms), (*shared, *curve), base.data, quick, golden=("swiftbrush",))
