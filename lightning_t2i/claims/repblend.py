"""Claims about RepBlend (arXiv 2505.14705, tables 1 to 4, figures 1 to 3), LoRS (2406.03793) and what came before.

    arm                                  seeds   cost of a cell on one core
    experts                              3       EXPERT_STEPS steps of ten experts, once more for validation
    tune-ARM                             1       three rates (and first three regimes of blending), shared by the seeds
    repblend, plain, noise               3       STEPS iterations of PAIRS pairs: InfoNCE, S = I; no blending; noise
    soft, lors                           3       the same with wBCE and a learned S, as published; without blending
    tesla, mtt                           3       wBCE with S = I, without blending; InfoNCE and the unrolled gradient
    know-..., coresets                   3       five students of each set, 100 epochs, and five on another encoder
    asymmetric                           3       experts and iterations of a whole encoder, as LoRS matches it

All arms but `asymmetric` have the same student (heads on the frozen encoders of the tiny world), the same experts of
their seed, equal iterations, and are tuned equally: three factors on the rates of pictures and texts, by mean recall on
validation with seed 100. The three regimes of blending are listed in REGIMES and were fixed before any run; noise has
the one that blending has, for noise of equal variance. Test is the split `retrieval`, on which nothing is chosen.
Collapse is measured in the space of an expert of seed 100, to which no set of the claims is matched. `asymmetric` is
compared with itself alone: its two branches have one loss, one inner loop and one number of iterations.

configs/repblend/tiny.yaml, which all arms begin with, was found on validation of seed 0 (InfoNCE, S = I, a long inner
loop): there a learned S with wBCE fell behind random pairs. Real pairs have the rate that was better there, .02 of .02
and .1.

Thresholds: 0 is the direction of the papers. 2 in `1-twice` and 1 in `3-image`, `3-text` are the spec's. No result
entered them. While the first run was on its way, before any of its results was looked at, three things were mended: the
noise's regime, the space of collapse, and what `asymmetric` is compared with.
"""

from __future__ import annotations

from typing import Any

from lightning_t2i.claims import repblend_cells as cells
from lightning_t2i.claims.repblend_asymmetric import asymmetric
from lightning_t2i.claims.spec import Arm, Claim, Matrix

CONFIG, EXPERTS = "configs/repblend/tiny.yaml", "configs/repblend/tiny_experts.yaml"
PAIRS, STEPS, TRAIN, EXPERT_STEPS = 50, 120, 4000, 606
RATES = (0.02, 0.05)  # of X and Y, times the factors
FACTORS = (0.3, 1.0, 3.0)
REGIMES = (
    {"model.blending.concentration": 1.0},  # the reference
    {"model.blending.concentration": 0.2},
    {"model.blending.each": True},
)
LEARNED: dict[str, Any] = {"model.target": "factors", "model.objective": "wbce"}
PLAIN: dict[str, Any] = {"model.blending.kind": "none"}
DISTILLED: dict[str, dict[str, Any]] = {
    "repblend": {},
    "plain": PLAIN,
    "noise": {"model.blending.kind": "noise"},
    "soft": LEARNED,
    "lors": {**PLAIN, **LEARNED},
    "tesla": {**PLAIN, "model.objective": "wbce"},
    "mtt": {**PLAIN, "model.gradient": "unrolled"},
}
CORESETS = ("random", "herding", "k_center", "forgetting")
EXPERT_S, STEP_S, KNOW_S, CORESET_S, ASYMMETRIC_S = 0.1, 0.52, 14.0, 20.0, 2.6


def matrix(quick: bool = False) -> Matrix:
    """The claims, or with `quick` a rehearsal of them."""
    steps, train, expert_steps = (3, 200, 24) if quick else (STEPS, TRAIN, EXPERT_STEPS)
    limits = {"world": "shapes", "train": train, "val": 50 if quick else 300, "test": 50 if quick else None}
    students = {"nets": 2 if quick else 5, "epochs": 5 if quick else 100, "judge": cells.TUNING}
    still = {"trainer.enable_progress_bar": False, "data.main.limit": train, "data.val.limit": limits["val"],
             "model.common.validate_first": False}  # fmt: skip
    each = max(1, steps // 4)
    sets = {**still, "trainer.max_steps": steps, "trainer.val_check_interval": each, "checkpoints.every": each,
            "checkpoints.keep": 5, "model.protocol.nets": 2, "model.protocol.epochs": students["epochs"],
            "model.pairs": PAIRS, "model.common.log_every": 1 if quick else 5,
            "model.max_start": 1 if quick else 3}  # fmt: skip
    first = {**still, "trainer.max_steps": expert_steps, "trainer.val_check_interval": expert_steps,
             "checkpoints.every": expert_steps, "model.batch_size": 64 if quick else 128}  # fmt: skip
    first.pop("model.common.validate_first")

    def distilled(name: str) -> tuple[Arm, ...]:
        blended = name in ("repblend", "noise")
        regimes = [list(map(list, r.items())) for r in REGIMES] if blended else []
        facts = {"config": CONFIG, "overrides": {**sets, **DISTILLED[name]}, "rates": list(RATES), "regimes": regimes}
        runs, tuned = (
            len(FACTORS) + (len(REGIMES) - 1 if name == "repblend" else 0),
            {**facts, "factors": list(FACTORS)},
        )
        known, first = {**limits, **students, "of": name, "other": name == "repblend"}, ["experts"]
        if name == "noise":
            tuned, first = {**tuned, "regime_of": "tune-repblend"}, ["experts", "tune-repblend"]
        return (
            Arm(f"tune-{name}", cells.tune, tuned, runs * steps, "iteration", STEP_S / 3, tuple(first)),
            Arm(name, cells.distil, {**facts, "tuned": f"tune-{name}"}, steps, "iteration", STEP_S,
                ("experts", f"tune-{name}")),
            Arm(f"know-{name}", cells.know, known, 1, "test", KNOW_S, ("experts", name)),
        )  # fmt: skip

    def chosen(kind: str) -> Arm:
        facts = {**limits, **students, "config": CONFIG, "kind": kind, "pairs": PAIRS, "other": kind == "random"}
        return Arm(kind, cells.coreset, facts, 1, "test", CORESET_S, ("experts",))

    whole: dict[str, Any] = {
             **limits, "config": CONFIG, "batch": 32, "epoch": 2 if quick else 16, "epochs": 1 if quick else 3,
             "steps": 2 if quick else 30, "pairs": PAIRS, "rates": list(RATES), "inner_batch": 10,
             "rate": 0.1}  # fmt: skip
    identity = {**limits, **students, "of": "soft", "identity": True}
    arms = (
        Arm("experts", cells.experts, {"config": EXPERTS, "overrides": first}, expert_steps * 4 // 3, "training step",
            EXPERT_S),
        *(arm for name in DISTILLED for arm in distilled(name)),
        Arm("know-identity", cells.know, identity, 1, "test", KNOW_S, ("experts", "soft")),
        *map(chosen, CORESETS),
        Arm("asymmetric", asymmetric, whole, whole["steps"], "iteration", ASYMMETRIC_S),
        Arm("over-random", cells.compare, {"metric": "mean", "arm": "know-repblend", "baseline": "random"}, 1, "ratio",
            0.1, ("know-repblend", "random")),
    )  # fmt: skip
    ours, plain, soft, lors = "know-repblend", "know-plain", "know-soft", "know-lors"

    def lower(id: str, text: str, metric: str) -> Claim:
        return Claim(id, text, ours, plain, metric, 0.0, "lower")

    claims = (
        *(Claim(f"1-{kind}", f"Students of the synthetic pairs retrieve better than of {kind} real ones.", ours, kind,
                "mean", 0.0) for kind in CORESETS),
        Claim("1-twice", "Twice as well as of random ones.", "over-random", None, "ratio", 2.0),
        Claim("1-published", "With wBCE and a learned similarity, as published, they beat random ones.", soft, "random",
              "mean", 0.0),
        Claim("2", "The learned similarity is better than I, with the same pairs.", soft, "know-identity", "mean", 0.0),
        Claim("2-lors", "LoRS is better than TESLA-VL, which has no similarity.", lors, "know-tesla", "mean", 0.0),
        Claim("3-image", "Heads alone: the matching loss of the picture branch falls.", "repblend", None, "image", 1.0,
              "lower"),
        Claim("3-text", "And that of the text branch.", "repblend", None, "text", 1.0, "lower"),
        Claim("3-asymmetric", "With a whole encoder the picture branch stays above the text's.", "asymmetric", None,
              "excess", 0.0),
        Claim("3-whole", "The loss of that picture branch.", "asymmetric", None, "image", None),
        Claim("3-parameters", "Parameters of a snapshot of the whole encoder over those of heads.", "asymmetric", None,
              "parameters", None),
        Claim("3-seconds", "Seconds of a step with the whole encoder.", "asymmetric", None, "seconds", None),
        lower("4-intra", "Blending lowers the similarity within modalities.", "intra"),
        lower("4-gap", "And the gap between them.", "gap"),
        lower("4-cr42", "And the concentration.", "cr42"),
        Claim("4-stripes", "And the stripes of a learned similarity.", soft, lors, "stripes", 0.0, "lower"),
        Claim("4-recall", "Blending raises the mean recall.", ours, plain, "mean", 0.0),
        Claim("4-soft", "It does so with wBCE and a learned similarity.", soft, lors, "mean", 0.0),
        Claim("5", "Noise of equal variance leaves a larger gap than blending.", "know-noise", ours, "gap", 0.0),
        Claim("6", "The pairs beat random ones with another encoder.", ours, "random", "other", 0.0),
        Claim("7-mtt", "RepBlend is better than MTT-VL.", ours, "know-mtt", "mean", 0.0),
        Claim("7-tesla", "And than TESLA-VL.", ours, "know-tesla", "mean", 0.0),
        *(Claim(f"7-published-{name}", f"As published, it is better than {name.upper()}-VL.", soft, f"know-{name}",
                "mean", 0.0) for name in ("mtt", "tesla")),
        *(Claim(f"last-{name}", f"{name}: mean recall after the last epoch.", f"know-{name}", None, "last", None)
          for name in DISTILLED),
        *(Claim(f"reference-{name}", f"{name}: after the epoch that is best on test.", f"know-{name}", None,
                "reference", None) for name in DISTILLED),
        *(Claim(f"regime-{i}", f"Validation of blending's regime {i}.", "tune-repblend", None, f"regime-{i}", None)
          for i in range(len(REGIMES))),
    )  # fmt: skip
    return Matrix("repblend", arms, claims, data=("shapes",), quick=quick)
