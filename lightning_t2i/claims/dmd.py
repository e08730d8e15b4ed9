"""Claims about DMD and DMD2 (arXiv 2311.18828, tables 2 and 3, section 4.2; arXiv 2405.14867, sections 4.1 to 4.3).

    arm                          seeds   cost of a cell on one free core
    full and its ablations       3       training steps of `STEPS`, see `matrix`
    teacher-25, teacher-1        3       420 pictures
    measures of students         3       420 pictures in one step

All students start from assets/tiny/sd, see its pairs and the same prompts, and are measured on 420 test prompts with
the noise of their seed: share of pictures that are as their prompt says (shapes score), Fréchet distance and recall
against the test pictures, in features of the metric network. Arms of DMD have equal training steps. A step of DMD2 with
r = 5 costs 5/9 of one with r = 1, so those arms have 9/5 of the steps: equal cost, and .36 of the student's updates.

`no-regression` is also DMD2 with r = 1: the classes are equal there (tests/lightning_modules/test_dmd2.py). The sweep
of guidance is about the real estimate of such students; pairs at other scales would be other data. Claim 4 is figure 3,
see dmd_toy.py.
"""

from __future__ import annotations

import json
import shutil
import statistics
from dataclasses import replace
from typing import Any

from lightning_t2i.claims import dmd_toy
from lightning_t2i.claims.spec import Arm, Cell, Claim, Matrix, Measured
from lightning_t2i.claims.training import RUN, fit, measure
from lightning_t2i.cli.restore import trained
from lightning_t2i.paths import resolve

TEACHER, EARLY, GUIDANCE = "assets/tiny/sd", "unet_early", 4.5


def teach(cell: Cell) -> Measured:
    """The metrics of a pipeline's own pictures: options network, guidance, steps, and those of `measure`."""
    from lightning_modules.teacher import Teacher

    options = dict(cell.options)
    folder = cell.after["early"] / EARLY if options.pop("early", False) else options["network"]
    teacher = Teacher(str(folder), guidance=options["guidance"], steps=options["steps"])
    teacher.configure_model()
    return measure(teacher.eval(), options["split"], options["n"], cell.seed, options["metrics"])


def distilled(cell: Cell) -> Measured:
    """The metrics of a student's pictures, and how much the brightness of its samples swung during training.

    The swing is the standard deviation of the logged mean of x over the second half of the training.
    """
    run = cell.after[cell.options["of"]] / RUN
    found = measure(trained(run), cell.options["split"], cell.options["n"], cell.seed, cell.options["metrics"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    brightness = [line["student/brightness"] for line in lines if "student/brightness" in line]
    swing = statistics.pstdev(brightness[len(brightness) // 2 :])
    return Measured({**found.numbers, "swing": swing}, found.scores, found.prompts)


def early(cell: Cell) -> Measured:
    """The teacher's pipeline with the U-Net that it had at a tenth of its first training."""
    folder = cell.folder / EARLY
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(resolve(TEACHER), folder, ignore=shutil.ignore_patterns("unet"))
    (folder / EARLY).rename(folder / "unet")
    return Measured()


def fit_early(cell: Cell) -> Measured:
    """`fit` with the under-trained teacher."""
    teacher = {"model.teacher": str(cell.after["early"] / EARLY)}
    return fit(replace(cell, options={**cell.options, "overrides": {**cell.options["overrides"], **teacher}}))


def matrix(quick: bool = False) -> Matrix:
    """The claims, or with `quick` a rehearsal of them."""
    steps, n = (20, 48) if quick else (400, 420)
    measured = {"split": "test", "n": n, "metrics": ["shapes_score", "fd", "recall"]}
    common = {
        "trainer.limit_val_batches": 0,
        "trainer.enable_progress_bar": False,
        "samples.enabled": False,
        "checkpoints.every": 100,
        "checkpoints.keep": 1,
    }

    def student(name: str, length: int, step_s: float, config: str = "dmd", **overrides: Any) -> tuple[Arm, Arm]:
        """A training and the measures of its student."""
        changed = {f"model.{key}": value for key, value in overrides.items()}
        options = {
            "config": f"configs/{config}/tiny.yaml",
            "overrides": {**common, "trainer.max_steps": length, **changed},
        }
        of_early = name.startswith("early")
        train = Arm(
            f"train-{name}", fit_early if of_early else fit, options, length, "training step", step_s,
            ("early",) if of_early else (),
        )  # fmt: skip
        return train, Arm(name, distilled, {**measured, "of": train.name}, n, "picture", 0.02, (train.name,))

    def teacher(name: str, number: int, **options: Any) -> Arm:
        options = {**measured, "network": TEACHER, "guidance": GUIDANCE, "steps": number, **options}
        return Arm(name, teach, options, n, "picture", 0.01 + 0.0032 * number, ("early",) if "early" in options else ())

    plain: dict[str, Any] = {"regression_weight": 0.0}
    longer = steps * 9 // 5
    arms = (
        Arm("early", early, {}, 1, "copy", 0.1),
        teacher("teacher-25", 25),
        teacher("teacher-1", 1),
        teacher("early-teacher-25", 25, early=True),
        *student("full", steps, 0.75),
        *student("no-regression", steps, 0.6, **plain),
        *student("regression-only", steps, 0.2, matching_weight=0.0),
        *student("sigma", steps, 0.75, dm_weight="sigma_over_alpha"),
        *student("sigma3", steps, 0.75, dm_weight="sigma3_over_alpha"),
        *student("guidance-1", steps, 0.55, guidance=1.0, **plain),
        *student("guidance-8", steps, 0.6, guidance=8.0, **plain),
        *student("r-5", longer, 0.35, "dmd2", gan_weight=0.0),
        *student("early-r-5", longer, 0.35, "dmd2", gan_weight=0.0),
        *student("early-gan", longer, 0.6, "dmd2"),
        *(replace(arm, name=f"toy-{arm.name}") for arm in dmd_toy.arms(*([steps] if quick else []))),
    )

    def claim(id: str, text: str, arm: str, baseline: str, metric: str, threshold: float | None = None) -> Claim:
        return Claim(id, text, arm, baseline, metric, threshold, "lower" if metric in ("fd", "swing") else "higher")

    claims = (
        claim("1-one-step", "A student in one step beats its teacher in one.", "full", "teacher-1", "fd"),
        claim("1-many-steps", "It comes near its teacher in 25 steps.", "full", "teacher-25", "fd"),
        claim("1-score", "It keeps the score of its teacher in 25 steps.", "full", "teacher-25", "shapes_score"),
        claim("2-no-regression", "The regression makes pictures better.", "full", "no-regression", "fd"),
        claim("2-regression-only", "Matching makes pictures better.", "full", "regression-only", "fd"),
        claim("2-recall", "Without regression modes are lost.", "full", "no-regression", "recall"),
        claim("3-sigma", "DMD's weight is no worse than DreamFusion's.", "full", "sigma", "fd"),
        claim("3-sigma3", "DMD's weight is no worse than ProlificDreamer's.", "full", "sigma3", "fd"),
        *(replace(c, arm=f"toy-{c.arm}", baseline=c.baseline and f"toy-{c.baseline}") for c in dmd_toy.CLAIMS),
        claim("5-swing", "Five updates of the fake network calm the student.", "r-5", "no-regression", "swing"),
        claim("5-r-5", "With five updates no regression is needed.", "r-5", "full", "fd"),
        claim("5-gan", "Real pictures help where the teacher is poor.", "early-gan", "early-r-5", "fd"),
        claim("5-beats", "The student beats its poor teacher.", "early-gan", "early-teacher-25", "fd"),
        claim("6-accuracy", "Guidance makes pictures more accurate.", "no-regression", "guidance-1", "shapes_score"),
        claim("6-recall", "Strong guidance covers less than none.", "guidance-1", "guidance-8", "recall"),
        claim("6-low", "Moderate guidance has a better distance than none.", "no-regression", "guidance-1", "fd"),
        claim("6-high", "Moderate guidance has a better distance than 8.", "no-regression", "guidance-8", "fd"),
    )
    return Matrix("dmd", arms, claims, data=("shapes", "assets/tiny/pairs", dmd_toy.PAIRS), quick=quick)
