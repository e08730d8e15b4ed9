"""Combinations of methods: what one makes of what another one left. No paper claims them; all is reported only.

    arm                                         seeds   cost of a cell on one core
    (a) experts of sd, merge, pairs, two DMDs   3       320 training steps, 2 x 400 pairs, 2 x 240 training steps
    (b) experts of pixart, merge, two searches  3       320 training steps, 2 x 148 candidates x 30 pictures
    (c) pairs and reflow of flux, two searches  3       400 pairs, 200 training steps, 2 x 148 candidates x 30 pictures
    (e) a Wukong and a SwiftBrush as judged     3       600 and 200 training steps, 8 x 400 pictures

In each the same is done with and without the first method: DMD of the merged teacher and of the plain one, on as many
pairs of each; ECAD on the merged PixArt and on the plain one in 10 steps, on the reflowed FLUX and on the plain one in
8; pictures of students and of their teacher as a Wukong reads them. It is trained on whole scenes in Chinese, of which
an English prompt tells a part. (d), Wukong on RepBlend's pairs, is in repblend_sets.py.
"""

from __future__ import annotations

from typing import Any

from lightning_t2i.claims import combination_cells as cells
from lightning_t2i.claims import deme_cells, ecad_cells, instaflow_cells
from lightning_t2i.claims.spec import Arm, Claim, Matrix
from lightning_t2i.claims.training import fit

METHODS = ("deme", "dmd", "ecad", "fluid", "instaflow", "swiftbrush", "wukong")
SD, PIXART, FLUX = "assets/tiny/sd", "assets/tiny/pixart", "assets/tiny/flux"
PICTURE_S, GUIDED_S, PAIR_S, JUDGED_S = 0.02, 0.09, 0.16, 0.018  # one step; 25 guided steps; a pair; under a schedule


def matrix(quick: bool = False) -> Matrix:
    """The combinations, or with `quick` a rehearsal of them."""
    n, few, pairs = (48, 12, 48) if quick else (420, 100, 400)
    deme, dmd, flow, wukong = (8, 8, 8, 6) if quick else (320, 240, 200, 600)
    candidates, generations = (4, 2) if quick else (16, 8)
    still: dict[str, Any] = {"trainer.limit_val_batches": 0, "trainer.enable_progress_bar": False}
    quiet: dict[str, Any] = {**still, "samples.enabled": False, "checkpoints.keep": 1}
    brief: dict[str, Any] = {**quiet, "health.enabled": False, "comparison.enabled": False}

    def trained(name: str, cell: Any, config: str, steps: int, unit_s: float, after: tuple[str, ...] = (),
                overrides: dict[str, Any] | None = None, **options: Any) -> Arm:  # fmt: skip
        given = {**quiet, "trainer.max_steps": steps, **(overrides or {})}
        facts = {"config": f"configs/{config}.yaml", "overrides": given, **options}
        return Arm(name, cell, facts, steps, "training step", unit_s, after)

    def merged(name: str, config: str, step_s: float, blocks: str) -> tuple[Arm, Arm, Arm]:
        changed = {"model.steps_per_range": deme // 4, "merge.enabled": False, "data.main.batch_size": 32,
                   "checkpoints.every": 40, "model.projection": {"blocks": blocks}}  # fmt: skip
        limit = 4 if quick else 25
        choice = {"of": f"{name}-experts", "search": "gradient", "n": 100, "limit": limit}
        return (
            trained(f"{name}-experts", fit, config, deme, step_s, (), changed),
            Arm(f"{name}-weights", deme_cells.choose, choice, limit, "evaluation", 0.7, (f"{name}-experts",)),
            Arm(f"{name}-merged", cells.merge, {"of": f"{name}-experts", "weights": f"{name}-weights"}, 1, "merge", 1.0,
                (f"{name}-experts", f"{name}-weights")),
        )  # fmt: skip

    def students(teacher: str, name: str) -> tuple[Arm, ...]:
        of = (teacher,) if "/" not in teacher else ()
        about = {"config": "configs/pairs/sd.yaml", "teacher": teacher, "n": pairs, "guidance": 4.5, "solver": "ddim"}
        totals = {f"model.{group}.schedule.init_args.total": dmd for group in ("student", "fake")}
        measured = {"split": "test", "n": n, "metrics": ["shapes_score", "fd"]}
        return (
            Arm(f"pairs-{name}", instaflow_cells.make_pairs, about, pairs, "pair", PAIR_S, of),
            trained(f"dmd-{name}", cells.distil, "dmd/tiny", dmd, 0.75, (*of, f"pairs-{name}"), {**brief, **totals},
                    teacher=teacher, pairs=f"pairs-{name}"),
            Arm(f"teacher-{name}", cells.teach, {**measured, "network": teacher, "guidance": 4.5, "steps": 25}, n,
                "picture", GUIDED_S, of),
            Arm(f"student-{name}", cells.draw, {**measured, "of": f"dmd-{name}"}, n, "picture", PICTURE_S,
                (f"dmd-{name}",)),
        )  # fmt: skip

    def searched(name: str, config: str, network: str) -> tuple[Arm, Arm]:
        of = (network,) if "/" not in network else ()
        overrides = {**quiet, "trainer.max_steps": generations, "model.search.population": candidates}
        facts = {"config": f"configs/{config}.yaml", "overrides": overrides, "network": network}
        made, at = (candidates * generations + 20) * 30, [generations]
        judged = {"of": f"search-{name}", "n": few, "generations": at, "baselines": True}
        return (
            Arm(f"search-{name}", cells.search, facts, made, "picture", 0.02, of),
            Arm(f"front-{name}", ecad_cells.held_out, judged, 17 * few, "picture", JUDGED_S, (*of, f"search-{name}")),
        )

    reflow = {**brief, "data.main.batch_size": 32, "model.student.schedule.init_args.total": flow,
              "checkpoints.every": 100}  # fmt: skip
    flux_pairs = {"config": "configs/pairs/instaflow_flux.yaml", "teacher": FLUX, "n": pairs, "guidance": 3.0,
                  "solver": "euler"}  # fmt: skip
    swift = {f"model.{group}.schedule.init_args.total": dmd - dmd // 6 for group in ("student", "lora")}
    judges: dict[str, tuple[str | None, dict[str, Any], float]] = {
        "real": (None, {}, 0.005),
        "other": (None, {"shuffled": True}, 0.005),
        "teacher": (SD, {"guidance": 4.5, "steps": 25}, GUIDED_S),
        "fluid": ("assets/tiny/fluid", {"tokens": True}, 0.06),
        "dmd": ("assets/tiny/dmd", {"guidance": 1.0, "steps": 1}, PICTURE_S),
        "swiftbrush": ("swiftbrush", {}, PICTURE_S),
    }
    seen = 100 if quick else 400
    arms = (
        *merged("sd", "deme/tiny", 0.22, "foldable"),
        *students("sd-merged", "merged"),
        *students(SD, "plain"),
        *merged("pixart", "deme/tiny_pixart", 0.3, "none"),  # none of a transformer's can be folded
        *searched("merged", "combinations/ecad_of_merged", "pixart-merged"),
        *searched("pixart", "combinations/ecad_of_merged", PIXART),
        Arm("pairs-flux", instaflow_cells.make_pairs, flux_pairs, pairs, "pair", 0.2),
        trained("reflowed", instaflow_cells.train, "instaflow/tiny_flux", flow, 0.4, ("pairs-flux",), reflow,
                teacher=FLUX, pairs="pairs-flux"),
        *searched("reflowed", "combinations/ecad_of_reflowed", "reflowed"),
        *searched("flux", "combinations/ecad_of_reflowed", FLUX),
        trained("judge", fit, "wukong/tiny", wukong, 0.13, (), {"model.towers.schedule.total": wukong}),
        trained("swiftbrush", fit, "swiftbrush/tiny", dmd - dmd // 6, 0.7, (), {**brief, **swift}),
        *(Arm(f"seen-{name}", cells.judge, {"judge": "judge", "of": of, "n": seen, **facts}, seen, "picture", unit_s,
              ("judge", "swiftbrush") if of == "swiftbrush" else ("judge",))
          for name, (of, facts, unit_s) in judges.items()),
    )  # fmt: skip

    def claim(id: str, text: str, arm: str, metric: str, baseline: str | None = None) -> Claim:
        return Claim(id, text, arm, baseline, metric, None, "lower" if metric == "fd" else "higher")

    hv = f"hv@{generations}"
    claims = (
        *(claim(f"a-{who}-{metric}", f"A {who} after DeMe's merge against one without it: {metric}.", f"{who}-merged",
                metric, f"{who}-plain") for who in ("teacher", "student") for metric in ("shapes_score", "fd")),
        claim("b-front", "ECAD's front in 10 steps on a merged PixArt against one on the plain one.", "front-merged",
              hv, "front-pixart"),
        *(claim(f"b-{k}", f"Its schedule against FORA {k}, in standard errors.", "front-merged", f"FORA {k} detector")
          for k in (2, 3)),
        claim("c-front", "ECAD's front in 8 steps on a reflowed FLUX against one on the plain one.", "front-reflowed",
              hv, "front-flux"),
        *(claim(f"c-{k}", f"Its schedule against FORA {k}, in standard errors.", "front-reflowed", f"FORA {k} detector")
          for k in (2, 3)),
        *(claim(f"e-{name}", f"How often a Wukong finds the caption of a picture, {about}.", f"seen-{name}", "found")
          for name, about in (("real", "real pictures"), ("other", "those of other captions"),
                              ("teacher", "the teacher of 25 steps"), ("fluid", "Fluid"), ("dmd", "DMD in one step"),
                              ("swiftbrush", "SwiftBrush in one step"))),
    )  # fmt: skip
    return Matrix("combinations", arms, claims, ("shapes",), quick, golden=METHODS)
