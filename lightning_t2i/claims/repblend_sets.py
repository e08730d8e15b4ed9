"""RepBlend's sets with five more seeds: beside random pairs (arXiv 2505.14705, table 1), and as what a Wukong reads.

    arm                                 seeds   cost of a cell on one core
    experts, repblend, random, know     5       those of repblend.py
    tune-repblend                       1       likewise
    wukong-set, wukong-real             5       300 training steps of 50 pairs, texts by the set's encoder
    wukong-near, wukong-real_near       5       200 training steps of 50 pairs, a text tower of its own
    know-...                            5       retrieval of 500 pictures

Arms and thresholds of the claims 1 and 6 are those of repblend.py, whose three seeds had given students of synthetic
pairs .26 more mean recall than those of random ones, each of them on the claim's side, with an interval of -.006 to
.532: too few seeds to tell. These five are others. It was known then that 1-twice was inconclusive and 6 contradicted.

Combination d (docs/claims.md): a distilled text is a vector, and the set's own text encoder stands in for Wukong's
tower; in the rows with "near" it is read as the scene of the real caption that is nearest to it, in Chinese. No paper
claims anything of these; they are reported only.
"""

from __future__ import annotations

from typing import Any

from lightning_t2i.claims import combination_cells as cells
from lightning_t2i.claims import repblend
from lightning_t2i.claims.spec import Arm, Claim, Matrix

SEEDS = (3, 4, 5, 6, 7)
KNOWN = ("1-random", "1-twice", "6")  # claims of repblend.py


def matrix(quick: bool = False) -> Matrix:
    """The claims, or with `quick` a rehearsal of them."""
    base, frozen, own = repblend.matrix(quick), *((3, 2) if quick else (300, 200))
    still: dict[str, Any] = {"trainer.limit_val_batches": 0, "trainer.enable_progress_bar": False,
                             "samples.enabled": False, "checkpoints.keep": 1}  # fmt: skip
    schedule = "model.towers.schedule"

    def reads(kind: str, config: str, steps: int, unit_s: float, **more: Any) -> Arm:
        overrides = {**still, "trainer.max_steps": steps, f"{schedule}.total": steps, **more}
        facts = {"config": f"configs/{config}.yaml", "overrides": overrides, "of": "set", "kind": kind}
        return Arm(f"wukong-{kind}", cells.read_set, facts, steps, "training step", unit_s, ("set",))

    def knows(kind: str, language: str) -> Arm:
        facts = {"of": f"wukong-{kind}", "n": 100 if quick else 500, "language": language}
        return Arm(f"know-{kind}", cells.know, facts, 1, "test", 9.0, (f"wukong-{kind}",))

    kinds = {"set": "en", "real": "en", "near": "zh", "real_near": "zh"}
    warm = {f"{schedule}.steps": 1 if quick else 10}
    arms = (
        *(base.arm(name) for name in ("experts", "tune-repblend", "repblend", "know-repblend", "random")),
        base.arm("over-random"),
        Arm("set", cells.write_set, {"of": "repblend"}, 1, "set", 10.0, ("repblend",)),
        *(reads(kind, "wukong/tiny_set", frozen, 0.02) for kind in ("set", "real")),
        *(reads(kind, "combinations/wukong_of_set", own, 0.12, **warm) for kind in ("near", "real_near")),
        *(knows(kind, language) for kind, language in kinds.items()),
    )

    def claim(id: str, text: str, arm: str, metric: str, baseline: str | None = None) -> Claim:
        return Claim(id, text, arm, baseline, metric, None)

    claims = (
        *(one for one in base.claims if one.id in KNOWN),
        claim("d-set", "Mean recall of a Wukong on 50 distilled pairs, its texts by the set's encoder, against one on "
              "50 real ones.", "know-set", "mr", "know-real"),
        claim("d-near", "The same of its own text tower in Chinese, on the nearest captions of the distilled texts.",
              "know-near", "mr", "know-real_near"),
        *(claim(f"d-{kind}-chance", f"{kind}: mean recall above chance.", f"know-{kind}", "above_chance")
          for kind in kinds),
    )  # fmt: skip
    return Matrix("repblend_sets", arms, claims, base.data, quick, seeds=SEEDS, golden=("repblend", "wukong"))
