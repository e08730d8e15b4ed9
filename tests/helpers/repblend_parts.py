"""A tiny RepBlend: random encoders, noise pictures with two captions each, and inner problems in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from pictures import CAPTIONS, PictureStream, fit
from torch import Tensor

from datamodules.streams import Streams
from lightning_modules.experts import Experts, Recipe
from lightning_modules.repblend import RepBlend
from lightning_t2i.blending import Blending, Plan
from lightning_t2i.keys import Keys
from lightning_t2i.networks.classifier import ClassifierConfig, ShapesClassifier
from lightning_t2i.networks.frozen_pair import Encoders
from lightning_t2i.networks.projection import Student
from lightning_t2i.options import GroupOptions, MethodOptions
from lightning_t2i.retrieval_student import Protocol
from lightning_t2i.soft_contrast import wbce
from lightning_t2i.trajectory_matching import Segment

SIDE, PAIRS, BATCH, STEPS = 8, 10, 4, 3
TEXT = "assets/tiny/pixart"


class TwoCaptions(PictureStream):
    """Noise pictures with two captions each."""

    size = SIDE

    def __init__(self, batch_size: int = 4, count: int = 16):
        super().__init__(batch_size, SIDE, label=False)
        self.count = count

    def __len__(self) -> int:
        return self.count

    @property
    def identity(self) -> dict[str, Any]:
        return {"two captions": self.count}

    def fetch(self, rows, positions):
        found = super().fetch(rows, positions)
        words = [f"{CAPTIONS[row % 4]} and {row}" for row in rows]
        return replace(found, caption=words, captions=[[word, f"it has {word}"] for word in words])


def streams(batch_size: int = 4, count: int = 16, accumulate: int = 1) -> Streams:
    val, test = TwoCaptions(4, 8), TwoCaptions(4, 12)
    return Streams(TwoCaptions(batch_size, count), val=val, test=test, accumulate=accumulate)


def encoders(folder: Path, name: str = "encoder", **options: Any) -> Encoders:
    """A classifier of random weights as a folder, and the text encoder of the tiny world."""
    if not (folder / name).is_dir():
        torch.manual_seed(3)
        ShapesClassifier(ClassifierConfig(widths=(8, 8, 8))).save_pretrained(folder / name)
    return Encoders(str(folder / name), TEXT, **options)


def sgd(rate: float) -> GroupOptions:
    return GroupOptions(lambda p: torch.optim.SGD(p, lr=rate, momentum=0.5), clip=None)


def repblend(folder: Path, common: MethodOptions | None = None, **options: Any) -> Any:
    """A RepBlend of few pairs, on experts that it trains itself."""
    rates = {"images": 1.0, "texts": 1.0, "rates": 1e-3, "similarity": 0.1}
    given: dict[str, Any] = {
        "encoders": encoders(folder), "recipe": Recipe(3, epochs=3, batch_size=16), "pairs": PAIRS, "size": SIDE,
        "inner_batch": BATCH, "inner_steps": STEPS, "rank": 2, "protocol": Protocol(nets=2, epochs=4, drop=3, every=2),
        **{name: sgd(rate) for name, rate in rates.items()}, **options,
    }  # fmt: skip
    return RepBlend(common=common or MethodOptions(log_every=1), **given)


def trained(folder: Path, module: Any, steps: int, **options: Any) -> Any:
    data = streams(options.pop("batch_size", 4), accumulate=module.common.accumulate)
    return fit(folder, module, steps, data, limit_val_batches=options.pop("val", 0), **options)


def experts(folder: Path, common: MethodOptions | None = None, **options: Any) -> Experts:
    return Experts(
        encoders(folder), **{"count": 2, "batch_size": 16, **options}, common=common or MethodOptions(seed=4)
    )


# ---- inner problems --------------------------------------------------------------------------------------------------


class Problem:
    """An inner loop on given features: leaves, rates, segment and plan in float64; `loss()` is that of RepBlend.

    Args:
        blending: none unless told.
        factors: how many factors S has: 3, 1 or 0.
    """

    def __init__(
        self,
        steps: int = STEPS,
        blending: Blending | None = None,
        objective: Any = wbce,
        factors: int = 3,
        alpha: float = 3.0,
    ):
        self.student, self.steps = Student.of(5, 4, 6), steps
        keys, places = Keys(1), torch.arange(PAIRS)

        def draw(name: str, *shape: int) -> Tensor:
            return keys.normal(name, places, shape, torch.float64)

        a = 1 + 0.1 * draw("a")
        every = {3: [a, draw("left", 2), 0.1 * draw("right", 2)], 1: [torch.diag(a)], 0: []}[factors]
        self.leaves = [t.requires_grad_() for t in (draw("f", 5), draw("y", 4), *every)]
        self.rates = torch.tensor([0.3, 0.5], dtype=torch.float64)
        ends = [tuple(w[0].double() for w in self.student.initial(keys, torch.tensor([n]))) for n in (0, 1)]
        near = tuple(a + 0.05 * (b - a) for a, b in zip(*ends, strict=True))
        self.segment = Segment(ends[0], near)
        self.blending = blending or Blending("none")
        plan = Plan.draw(Keys(2, step=5), "test", PAIRS, steps, BATCH, self.blending)
        self.plan = replace(plan, used=places, place=places)  # all features are leaves
        self.stub: Any = SimpleNamespace(student=self.student, objective=objective, blending=self.blending, alpha=alpha)

    def loss(self, leaves: list[Tensor] | None = None, plan: Plan | None = None, anew: bool = False) -> Any:
        return RepBlend.inner(self.stub, leaves or self.leaves, plan or self.plan, anew)
