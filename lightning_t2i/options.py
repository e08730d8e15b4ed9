"""The options that all methods share, as typed dataclasses for the config."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch.optim.lr_scheduler import LRScheduler

from lightning_t2i.errors import UserError
from lightning_t2i.quantization import Bits


@dataclass(frozen=True)
class EMAOptions:
    """Running averages of a group's weights, see lightning_t2i/ema.py. All but the first cost memory alone.

    Args:
        decay: share of the old average that each update keeps. Of several values the first is what is sampled and what
            methods take as a target, the others can be exported (`--ema`); null or none: the first of `sigma_rel` is.
        start: training step after which averaging begins; before it the average equals the weights.
        warmup: limit each decay to (1 + n) / (10 + n) after n updates, so that early weights are forgotten.
        power: limit each decay to 1 - (1 + n)^-power instead, as diffusers' training scripts do with 0.75.
        sigma_rel: relative widths of power-function averages (arXiv 2312.02696). From snapshots of two of them, 0.05
            and 0.1 there, averages of other widths can be made when the training is over.
    """

    decay: float | list[float] | None = 0.999
    start: int = 0
    warmup: bool = True
    power: float | None = None
    sigma_rel: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        for value in self.decays:
            if not 0 <= value < 1:
                raise UserError("The EMA decay is out of range", where="ema.decay", given=value, allowed="[0, 1)")
        if self.power is not None and self.power <= 0:
            raise UserError("The EMA power is not positive", where="ema.power", given=self.power, fix="ema.power: 0.75")
        for width in self.sigma_rel:
            if not 0 < width < 0.288:  # gamma is 0 at 1 / sqrt(12)
                raise UserError(
                    "The EMA width is out of range", where="ema.sigma_rel", given=width, allowed="between 0 and 0.288"
                )
        found = [*self.decays, *map(str, self.sigma_rel)]
        if not found or len(set(found)) < len(found):
            given = f"decay {self.decay}, sigma_rel {self.sigma_rel}"
            raise UserError("Averages are missing or repeated", where="ema", given=given, fix="ema: null")

    @property
    def decays(self) -> list[float]:
        """The values of `decay` as a list."""
        return self.decay if isinstance(self.decay, list) else [] if self.decay is None else [self.decay]


@dataclass(frozen=True)
class GroupOptions:
    """How the weights of one trained network are updated.

    Args:
        optimizer: class and arguments of the optimizer, without its parameters.
        schedule: learning-rate scheduler, stepped once per training step; a warm-up of 500 means 500 training steps.
        clip: largest norm of the group's gradient, all parameters together; null leaves it as it is.
        every: update the group only in training steps that this number divides (the first step is 0).
        start: first training step in which the group is updated; before it, its weights stay as they are.
        ema: keep a running average of the weights as a second, callable network, and others beside it.
    """

    optimizer: OptimizerCallable = field(default=lambda params: torch.optim.AdamW(params, lr=1e-4))
    schedule: Callable[[torch.optim.Optimizer], LRScheduler] | None = None
    clip: float | None = 1.0
    every: int = 1
    start: int = 0
    ema: EMAOptions | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError("A group must be updated every n >= 1 training steps", where="every", given=self.every)
        if self.start < 0:
            raise UserError("Training steps begin at 0", where="start", given=self.start)
        if self.clip is not None and self.clip <= 0:
            raise UserError("The gradient norm limit must be positive", where="clip", given=self.clip, fix="clip: null")


@dataclass(frozen=True)
class MethodOptions:
    """Options of the engine.

    Args:
        seed: seed of every draw of the run, the initial weights included.
        accumulate: micro-batches per training step.
        log_every: training steps between two log lines, which are written in steps in which all groups are updated.
        compile: compile the repeated blocks of trained networks with torch.compile.
        precision: "bf16" computes in bfloat16 with float32 master weights and float32 gradient reduction; it needs the
            FSDP2 strategy, which also runs with one process.
        validate_first: run the validation once before the first training step, as the curve's first point.
        check_finite: stop before an update when a loss or a gradient norm is not finite; costs one host
            synchronisation per training step.
        quantize: formats of frozen networks' weights by the names that the method gives them, such as
            {teacher: nf4, text: int8}; see docs/quantization.md.
    """

    seed: int = 0
    accumulate: int = 1
    log_every: int = 10
    compile: Literal["none", "blocks"] = "none"
    precision: Literal["fp32", "bf16"] = "fp32"
    validate_first: bool = False
    check_finite: bool = True
    quantize: dict[str, Bits] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1", where=f"common.{name}", given=getattr(self, name))


Plain = dict[str, Any]  # a nest of dicts and lists of tensors, numbers and strings: all that a checkpoint may hold
