"""Health signals: numbers that go wrong before the metrics do, and one warning line when one of them does.

Pictures of a few fixed prompts at fixed noise tell whether a method saturates, flickers or collapses; the gradient
norms of its groups and the gap between its real and fake estimates tell whether two networks that train each other
still keep pace. docs/health.md says what each signal means and what to try.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import lightning as L
import torch
from torch import Tensor

from callbacks.budget import Budget
from callbacks.inference import log_metrics, shared_records, undisturbed
from lightning_t2i.batch import Records
from lightning_t2i.errors import UserError
from lightning_t2i.protocols import Generates

log = logging.getLogger(__name__)

GUIDE = "docs/health.md"
SATURATED = 0.99  # pictures are in [-1, 1]; real ones rarely reach the ends
REMEMBERED = 8  # measurements of brightness that the swing looks back on
# Signal -> the side of its limit on which it is bad; the limit is the option of the same name.
ALARMS = {
    "saturation": "above",
    "brightness": "above",  # in either sign
    "swing": "above",
    "diversity": "below",
    "gradient_ratio": "above",
    "gap": "above",  # in either sign
}


@dataclass(frozen=True)
class HealthOptions:
    """What is watched, and when it is reported as unhealthy; a limit of null never is.

    Args:
        enabled: watch at all.
        every: training steps between two measurements.
        prompts: number of prompts, the first ones of the validation data, or of a training batch without any; fewer,
            with a warning, where these have fewer.
        noises: pictures of each prompt.
        max_fraction: share of the training time that making the pictures may take; they are left out beyond it.
        saturation: largest share of values at the ends of the range.
        brightness: largest absolute mean of the pictures, in [0, 1].
        swing: largest back and forth of the brightness between two measurements.
        diversity: smallest distance between two pictures of one prompt, root mean square over values.
        gradient_ratio: largest ratio of the gradient norms of two groups.
        gap: largest absolute gap between real and fake; its scale is the method's own.
    """

    enabled: bool = False
    every: int = 200
    prompts: int = 4
    noises: int = 4
    max_fraction: float = 0.02
    saturation: float | None = 0.5
    brightness: float | None = 0.9
    swing: float | None = 0.2
    diversity: float | None = 0.02
    gradient_ratio: float | None = 1000.0
    gap: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("prompts", 1), ("noises", 2)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}", where=f"health.{name}", given=getattr(self, name))
        if not 0 < self.max_fraction <= 1:
            raise UserError("The share is out of range", where="health.max_fraction", given=self.max_fraction)


def saturation(images: Tensor) -> Tensor:
    """Share of the values of pictures in [-1, 1] that lie at the ends of the range or beyond, in [0, 1]: a scalar."""
    return (images.abs() >= SATURATED).float().mean()


def diversity(images: Tensor) -> Tensor:
    """Root mean square distance of two pictures of one prompt, mean over pairs and prompts: [N, K, ...] -> scalar."""
    flat = images.flatten(2)
    return torch.stack([torch.pdist(one).mean() for one in flat]).mean() / flat.shape[2] ** 0.5


def swing(values: Sequence[float]) -> float:
    """Way back and forth per measurement beyond the way made good: +-a alternating gives 2a, any steady drift 0."""
    way = sum(abs(b - a) for a, b in pairwise(values))
    return (way - abs(values[-1] - values[0])) / (len(values) - 1)


class Health(L.Callback):
    """Logs `health/<signal>` every n training steps and warns once when a signal leaves its limit.

    The pictures of a measurement depend on the run's seed and the weights alone, and training does not notice them.
    A gap is what the method notes under a name that is or ends in `gap`; gradient norms are those before clipping, of
    the latest update of each group.

    Args:
        options: what and when.
        clock: seconds, for tests.
    """

    def __init__(self, options: HealthOptions | None = None, clock: Callable[[], float] = time.monotonic):
        self.options = options or HealthOptions()
        self.budget = Budget(self.options.max_fraction, clock)
        self.values: dict[str, float] = {}
        self.alarms: set[str] = set()
        self._brightness: deque[float] = deque(maxlen=REMEMBERED)
        self._norms: dict[str, Tensor] = {}
        self._gap: Tensor | float | None = None
        self._subjects: list[Records] = []
        self._last = 0

    # ---- Lightning's hooks ---------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._last = pl_module.counters.step
        if self.options.enabled:
            self.budget.start()
            self._listen(pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = pl_module.counters.step
        if self.options.enabled and step != self._last and step % self.options.every == 0:
            self._measure(trainer, pl_module, batch["main"])
        self._last = step

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._release(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._release(pl_module)

    # ---- what the engine says ------------------------------------------------------------------------------------

    def _listen(self, module: Any) -> None:
        """Hears the gradient norm given to each group's step and what the method notes; both stay on the device."""
        for name, group in module.groups.items():
            group.step = partial(self._stepped, name, group.step)
        module.note = partial(self._noted, module.note)

    def _release(self, module: Any) -> None:
        for group in module.groups.values():
            vars(group).pop("step", None)
        vars(module).pop("note", None)

    def _stepped(self, name: str, step: Callable[[Tensor], None], norm: Tensor) -> None:
        self._norms[name] = norm.detach()
        step(norm)

    def _noted(self, note: Callable[..., None], /, **scalars: Tensor | float) -> None:
        for name, value in scalars.items():
            if name.rpartition("/")[2] == "gap":
                self._gap = value.detach() if isinstance(value, Tensor) else value
        note(**scalars)

    # ---- measurements --------------------------------------------------------------------------------------------

    def _measure(self, trainer: L.Trainer, module: Any, current: Records) -> None:
        self.values = self._of_networks(trainer, module)
        if isinstance(module, Generates) and self.budget.allows(trainer):
            with self.budget.spending(), undisturbed(module):
                self.values |= self._of_pictures(trainer, module, current)
        self._warn(trainer, module.counters.step)
        if self.values:
            values = self.values | {"alarms": float(len(self.alarms))}
            log_metrics(trainer, {f"health/{k}": v for k, v in values.items()}, module.counters.step)

    def _of_networks(self, trainer: L.Trainer, module: Any) -> dict[str, float]:
        values = {}
        # A norm that is not a number stays one in torch's extremes, unlike in Python's.
        norms = torch.tensor([float(norm) for norm in self._norms.values()])
        norms = norms[norms != 0]  # groups at rest, such as an adversary whose weight is 0
        if len(norms) > 1:
            values["gradient_ratio"] = float(norms.max() / norms.min().clamp_min(1e-12))
        if self._gap is not None:
            gap = torch.as_tensor(self._gap, dtype=torch.float32, device=module.device)
            values["gap"] = float(trainer.strategy.reduce(gap, reduce_op="mean"))
        return values

    def _of_pictures(self, trainer: L.Trainer, module: Any, current: Records) -> dict[str, float]:
        """All ranks make the same pictures: sampling may be collective."""
        keys, n, k = module.keys.fork("health"), self.options.prompts, self.options.noises
        if not self._subjects:
            self._subjects = shared_records(trainer, "val", n, current, "health.prompts")
        made: list[Tensor] = []
        for subjects in self._subjects:
            cond = module.condition(subjects.to(module.device))
            places = (sum(len(x) for x in made) + torch.arange(len(subjects), device=module.device)) * k
            made.append(torch.stack([module.sample(cond, keys, places + j).float() for j in range(k)], dim=1))
        images = torch.cat(made)
        self._brightness.append(float(images.mean()))
        values = {
            "saturation": float(saturation(images)),
            "brightness": self._brightness[-1],
            "diversity": float(diversity(images)),
        }
        if len(self._brightness) > 2:
            values["swing"] = swing(list(self._brightness))
        return values

    def _warn(self, trainer: L.Trainer, step: int) -> None:
        for name, side in ALARMS.items():
            limit = getattr(self.options, name)
            if limit is None or name not in self.values:
                continue
            value = self.values[name]
            if value >= limit if side == "below" else abs(value) <= limit:
                self.alarms.discard(name)
                continue  # a value that is not a number is on neither side
            if name not in self.alarms and trainer.is_global_zero:
                log.warning(
                    "Health alarm at step %d: %s is %.4g, %s its limit of %g (health.%s), see %s#%s",
                    step, name, value, side, limit, name, GUIDE, name,
                )  # fmt: skip
            self.alarms.add(name)
