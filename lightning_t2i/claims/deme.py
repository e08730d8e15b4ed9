"""Claims about DeMe (arXiv 2410.06664, tables 1 to 3, figures 2 and 5), from a converged base and from an early one.

    arm                              seeds   cost of a cell on one core
    experts, both bases              3       4 x 80 training steps of 32 pictures
    joint, both bases                3       320 training steps of 32 pictures
    p = 0, lambda = 0, no projection 3       4 x 80 training steps, converged base
    N = 1, with and without          3       320 training steps, converged base
    five weights of the joint loss   3       320 training steps, converged base
    weights of the merges            3       L-BFGS on 100 validation pictures
    losses                           3       300 test pictures on 4 ranges, of each network
    pictures                         3       420 test prompts, 12 guided steps

The converged base is assets/tiny/sd, the early one the U-Net that it had at a tenth of its training. All trainings have
the same number of updates, optimizer, EMA and batches. A merge's weights are chosen by the held-out loss on validation
pictures; what is claimed is measured on test pictures and prompts with other noise, by the loss and by the Fréchet
distance, which no search saw. To first order a merge cannot lower the loss of a base that has converged (docs/deme.md):
the claims are the paper's all the same, and either sign is a result. Of the spec's controls one is not here: joint
fine-tuning with weights of the ranges that are searched as a merge's are, which would cost a training an evaluation.

Thresholds: 0 is the direction that the paper reports; those without one are reported only, as the paper says nothing of
them or the spec asks not to assert them. No pilot entered them. Seconds are those of STEP_S and below, measured on one
core that other work shared.
"""

from __future__ import annotations

from typing import Any

from lightning_t2i.claims import deme_cells as cells
from lightning_t2i.claims.spec import Arm, Claim, Matrix
from lightning_t2i.claims.training import fit

RANGES, STEPS, BATCH = 4, 80, 32
STEP_S = {"experts": 0.22, "lambda": 0.17, "joint": 0.17}  # seconds of a training step
PICTURE_S, LOSS_S, SEARCH_S, GRADIENT_S = 0.05, 0.0025, 0.7, 0.008  # a picture; a picture on a range; an evaluation
WEIGHTINGS = ("min_snr", "truncated_snr", "snr_plus_one", "p2", "uncertainty")
BASES = {"sd": ("tiny", "joint"), "early": ("tiny_early", "joint_early")}  # base -> configs of experts and joint


def matrix(quick: bool = False) -> Matrix:
    """The claims, or with `quick` a rehearsal of them."""
    steps, n, tested, searched, limit = (3, 24, 100, 100, 4) if quick else (STEPS, 420, 300, 100, 25)
    common: dict[str, Any] = {
        "data.main.batch_size": BATCH,
        "trainer.limit_val_batches": 0,
        "trainer.enable_progress_bar": False,
        "samples.enabled": False,
        "checkpoints.every": 40,
        "checkpoints.keep": 1,
    }

    def training(name: str, config: str, number: int, step_s: float, **overrides: Any) -> Arm:
        changed = {f"model.{key}": value for key, value in overrides.items()}
        options = {
            "config": f"configs/deme/{config}.yaml",
            "overrides": {**common, "trainer.max_steps": number, **changed},
        }
        return Arm(name, fit, options, number, "training step", step_s)

    def experts(name: str, config: str, ranges: int = RANGES, kind: str = "experts", **overrides: Any) -> Arm:
        length = RANGES * steps // ranges
        overrides = {"num_ranges": ranges, "steps_per_range": length, **overrides}
        arm = training(name, config, RANGES * steps, STEP_S[kind], **overrides)
        return Arm(arm.name, fit, {**arm.options, "overrides": {**arm.options["overrides"], "merge.enabled": False}},
                   arm.units, arm.unit, arm.unit_s)  # fmt: skip

    def losses(name: str, of: str, networks: int, *others: str, ranges: int = RANGES, **options: Any) -> Arm:
        units = networks * ranges * tested
        return Arm(name, cells.losses, {"of": of, "n": tested, **options}, units, "loss", LOSS_S, (of, *others))

    def drawn(name: str, of: str, model: str, *others: str, **options: Any) -> Arm:
        facts = {"of": of, "model": model, "split": "test", "n": n, "steps": 12, **options}
        return Arm(name, cells.draw, facts, n, "picture", PICTURE_S, (of, *others))

    arms: list[Arm] = []
    for base, (ours, joint) in BASES.items():
        at = {part: f"{base}-{part}" for part in ("experts", "train-joint", "weights")}
        arms += [
            experts(at["experts"], ours),
            training(at["train-joint"], joint, RANGES * steps, STEP_S["joint"]),
            Arm(at["weights"], cells.choose,
                {"of": at["experts"], "search": "gradient", "n": searched, "limit": limit}, limit, "evaluation",
                SEARCH_S * searched / 100, (at["experts"],)),
            losses(f"{base}-losses", at["experts"], 12, at["weights"], at["train-joint"], weights=at["weights"],
                   joint=at["train-joint"]),
            drawn(f"{base}-base", at["experts"], "base"),
            drawn(f"{base}-merged", at["experts"], "merged", at["weights"], weights=at["weights"]),
            drawn(f"{base}-switched", at["experts"], "switched"),
            drawn(f"{base}-joint", at["train-joint"], "joint"),
        ]  # fmt: skip
    arms += [
        experts("experts-p0", "tiny", p_global=0.0),
        experts("experts-lambda0", "tiny", kind="lambda", lambda_cons=0.0),
        experts("experts-plain", "tiny", projection={"blocks": "none"}),
        experts("experts-one", "tiny", 1),
        experts("experts-one-plain", "tiny", 1, projection={"blocks": "none"}),
        *(losses(f"losses-{name}", f"experts-{name}", 6) for name in ("p0", "lambda0", "plain")),
        *(losses(f"losses-{name}", f"experts-{name}", 3, ranges=1) for name in ("one", "one-plain")),
        *(training(f"train-{w}", "joint", RANGES * steps, STEP_S["joint"], weighting=w) for w in WEIGHTINGS),
        *(drawn(w, f"train-{w}", "joint") for w in WEIGHTINGS),
        Arm("gradients", cells.gradients, {"config": "configs/deme/tiny.yaml", "n": 200 if quick else 600,
                                           "times": 8 if quick else 12},
            (8 * 200 if quick else 12 * 600), "gradient", GRADIENT_S),
    ]  # fmt: skip

    def claim(id: str, text: str, arm: str, baseline: str | None, metric: str, limit: float | None = None) -> Claim:
        lower = ("fd", "rise", "drift", "switched")
        return Claim(id, text, arm, baseline, metric, limit, "lower" if metric in lower else "higher")

    claims: list[Claim] = []
    for b in BASES:
        claims += [
            claim(f"1-{b}-own", "Each expert lowers the held-out loss of its range.", f"{b}-losses", None,
                  "least_gain", 0.0),
            *(claim(f"1-{b}-own-{i}", f"Share that expert {i} lowers it by.", f"{b}-losses", None, f"gain_{i}")
              for i in range(RANGES)),
            claim(f"2-{b}-base", "The merged model has a lower distance than the base.", f"{b}-merged", f"{b}-base",
                  "fd", 0.0),
            claim(f"2-{b}-base-loss", "And a lower loss on data that the search did not see.", f"{b}-losses", None,
                  "loss_gain_over_base", 0.0),
            claim(f"2-{b}-base-score", "Its score against the base's.", f"{b}-merged", f"{b}-base", "shapes_score"),
            claim(f"2-{b}-flipped", "Deltas with flipped signs have a higher loss.", f"{b}-losses", None,
                  "loss_gain_over_flipped", 0.0),
            claim(f"2-{b}-uniform", "What the search gains over equal weights.", f"{b}-losses", None,
                  "loss_gain_over_uniform"),
            claim(f"3-{b}-joint", "It has a lower distance than joint fine-tuning with as many updates.", f"{b}-merged",
                  f"{b}-joint", "fd", 0.0),
            claim(f"3-{b}-joint-loss", "Its loss against that of joint fine-tuning.", f"{b}-losses", None,
                  "loss_gain_over_joint"),
            claim(f"4-{b}-switched", "It has a lower distance than experts in turn.", f"{b}-merged", f"{b}-switched",
                  "fd", 0.0),
        ]  # fmt: skip
    claims += [
        claim("5-global", "Without global samples experts lose more outside of their range.", "sd-losses", "losses-p0",
              "rise", 0.0),
        claim("5-consistency-drift", "Consistency keeps experts nearer to the base.", "sd-losses", "losses-lambda0",
              "drift", 0.0),
        claim("5-consistency-rise", "And keeps what they lose outside smaller.", "sd-losses", "losses-lambda0", "rise",
              0.0),
        claim("5-projection", "What projections change of experts in turn.", "sd-losses", "losses-plain", "switched"),
        claim("5-projection-one", "And of a single range.", "losses-one", "losses-one-plain", "switched"),
        *(claim(f"6-{w}", f"The merged model has a lower distance than the {w} loss.", "sd-merged", w, "fd", 0.0)
          for w in WEIGHTINGS),
        claim("7-banded", "Gradients of near times agree more than those of distant ones.", "gradients", None, "banded",
              0.0),
        claim("7-local", "And more within a quarter of the times than over all.", "gradients", None, "local", 0.0),
    ]  # fmt: skip
    return Matrix("deme", tuple(arms), tuple(claims), data=("shapes",), quick=quick)
