"""Claims about diffusion: averaged weights are better than raw ones, and guidance has an interior optimum.

    arm                      seeds   cost of a cell on one free core          core minutes
    train                    3       1,000 training steps x 0.32 s            16.0
    tune-ema, tune-raw       3       5 scales x 120 pictures x 0.09 s          2.7 each
    ema, raw, strongest      3       420 pictures x 0.09 s                     1.9 each
    unguided                 3       420 pictures x 0.05 s                     1.1
    all                                                                       28.1; 16 minutes on two cores

The rate is constant: one that decays to nearly nothing averages the weights by itself, and there would be no fair raw
arm. The EMA is that of configs/diffusion/tiny.yaml, whose decay is (1 + n) / (10 + n) after n updates up to 0.999, so
that it spans about the last tenth of the training. Each of both kinds of weights is sampled at the guidance that is
best for it on validation prompts; test prompts are seen by the claims alone.

Thresholds, set before the first full run: what a reader would call an improvement, half to two thirds of what a pilot
showed. The pilot was one training with seed 100, read at step 700 on 120 validation prompts, where a score has a
standard error of about 0.03: averaged weights 0.133 at guidance 3, 0.075 at 1, 0.083 at 15; raw weights 0.092 at
guidance 3. The arms train for longer, since few pictures are right at step 700.
"""

from __future__ import annotations

from typing import Any

from lightning_t2i.claims.spec import Arm, Claim, Matrix
from lightning_t2i.claims.training import fit, generate, tune

INTERIOR, LARGEST = (1.5, 2.0, 3.0, 5.0, 8.0), 15.0  # guidance scales; the lower end is 1, no guidance


def training(steps: int) -> dict[str, Any]:
    """Options of the one training that all arms share."""
    groups = ("model.denoiser", "model.text_encoder")
    return {
        "config": "configs/diffusion/tiny.yaml",
        "overrides": {
            **{f"{group}.schedule.{key}": value for group in groups for key, value in (("steps", 50), ("total", None))},
            "trainer.max_steps": steps,
            "trainer.limit_val_batches": 0,
            "trainer.enable_progress_bar": False,
            "samples.enabled": False,
            "checkpoints.every": 100,
            "checkpoints.keep": 1,
        },
    }


def matrix(quick: bool = False) -> Matrix:
    """The claims, or with `quick` a rehearsal of them."""
    steps, choosing, n, scales = (40, 24, 48, INTERIOR[1:3]) if quick else (1000, 120, 420, INTERIOR)
    measured = {"split": "test", "n": n, "metrics": ["shapes_score", "fd"]}
    chosen = {"split": "val", "n": choosing, "guidance": list(scales)}
    ema, raw = {"weights": "ema"}, {"weights": "raw"}
    pictures = len(scales) * choosing
    arms = (
        Arm("train", fit, training(steps), steps, "training step", 0.32),
        Arm("tune-ema", tune, chosen | ema, pictures, "picture", 0.09, ("train",)),
        Arm("tune-raw", tune, chosen | raw, pictures, "picture", 0.09, ("train",)),
        Arm("ema", generate, measured | ema | {"guidance": "tune-ema"}, n, "picture", 0.09, ("train", "tune-ema")),
        Arm("raw", generate, measured | raw | {"guidance": "tune-raw"}, n, "picture", 0.09, ("train", "tune-raw")),
        Arm("unguided", generate, measured | ema | {"guidance": 1.0}, n, "picture", 0.05, ("train",)),
        Arm("strongest", generate, measured | ema | {"guidance": LARGEST}, n, "picture", 0.09, ("train",)),
    )
    optimum = "Guidance has an interior optimum: the scale chosen on validation prompts beats"
    claims = (
        Claim("ema", "Averaged weights beat the raw weights of their training.", "ema", "raw", "shapes_score", 0.02),
        Claim("optimum-low", f"{optimum} no guidance.", "ema", "unguided", "shapes_score", 0.03),
        Claim("optimum-high", f"{optimum} scale {LARGEST:g}.", "ema", "strongest", "shapes_score", 0.03),
    )
    return Matrix("diffusion", arms, claims, data=("shapes",), quick=quick)
