"""What fronts are compared with, on equal prompts, seeds and solver; and held-out scores of a front's picks.

no cache            in N steps, and in fewer
FORA 2, 3, 4, TGATE  schedules written by hand
FLUX only           diffusers' first-block cache and TaylorSeer; their MACs are counted while they run
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from torch import Tensor

from lightning_t2i.batch import Records
from lightning_t2i.caching.front import picks
from lightning_t2i.caching.heuristics import baselines
from lightning_t2i.caching.schedule import Schedule
from lightning_t2i.flops import Operations

if TYPE_CHECKING:
    from lightning_modules.ecad import ECAD

FEWER = (0.75, 0.5, 0.4, 0.3)  # shares of the steps
FIRST_BLOCK, TAYLOR = 0.1, 3  # threshold; interval


def fewer_steps(steps: int) -> list[int]:
    """Numbers of steps that cost about as much as cached sampling does."""
    return sorted({max(round(steps * share), 1) for share in FEWER} - {steps}, reverse=True)


def compared(method: ECAD, found: dict[str, Any]) -> dict[str, Any]:
    """A front with `fresh_quality` of each schedule on the method's calibration, and `baselines`; collective."""
    cost, sdpa = method.progress.cost, method.options.sdpa
    full, known = cost.full(method.steps, sdpa), baselines(cost.layout, method.steps)
    front = [Schedule.from_plain(point["schedule"]) for point in found["front"]]
    quality = method.measure([None, *known.values(), *front]).mean(1).tolist()
    entries = {"no cache": {"quality": quality[0], "relative_macs": 1.0}}
    for (name, schedule), value in zip(known.items(), quality[1:], strict=False):
        entries[name] = {"quality": value, "relative_macs": cost.macs(schedule, sdpa) / full}
    for steps in fewer_steps(method.steps):
        value = method.measure([None], sampler=replace(method.sampler, steps=steps)).mean()
        entries[f"{steps} steps"] = {"quality": float(value), "relative_macs": steps / method.steps}
    if hasattr(method.denoiser.backbone, "enable_cache"):
        entries |= stock_caches(method)
    points = [{**point, "fresh_quality": value}
              for point, value in zip(found["front"], quality[1 + len(known) :], strict=True)]  # fmt: skip
    return {**found, "front": points, "baselines": entries}


def stock_caches(method: ECAD) -> dict[str, dict[str, float]]:
    """diffusers' own caches for FLUX, on the same pictures. Their MACs always include those within attention."""
    from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig

    taylor = TaylorSeerCacheConfig(cache_interval=TAYLOR, taylor_factors_dtype=torch.float32)
    kinds = {f"first block {FIRST_BLOCK}": FirstBlockCacheConfig(FIRST_BLOCK), f"TaylorSeer {TAYLOR}": taylor}
    entries, whole = {}, method.progress.cost.full(method.steps)
    backbone: Any = method.denoiser.backbone
    for name, config in kinds.items():
        method.executor.detach()
        backbone.enable_cache(config)
        with counted(backbone) as macs:
            quality = method.measure([None], executor=Fresh(backbone)).mean()
        backbone.disable_cache()
        method.executor.attach()
        spent = torch.tensor([sum(macs)], dtype=torch.float64, device=method.device)  # calls differ between processes
        each = float(method.gathered(spent).sum()) / method.calibration.n
        entries[name] = {"quality": float(quality), "relative_macs": each / whole}
    return entries


class Fresh:
    """Empties diffusers' caches before each sampling, and opens their context."""

    def __init__(self, backbone: Any):
        self.backbone = backbone

    def use(self, schedule: Schedule | None) -> None:
        self.backbone._reset_stateful_cache()
        _set_cache_context(self.backbone, CacheContext("sampling"))


@contextmanager
def counted(backbone: torch.nn.Module) -> Iterator[list[float]]:
    """MACs of the calls of a network while the context is open, a number for each call."""
    calls: list[float] = []
    open_modes: list[Operations] = []

    def enter(*unused: Any) -> None:
        open_modes.append(Operations())
        open_modes[-1].__enter__()

    def leave(*unused: Any) -> None:
        operations = open_modes.pop()
        operations.__exit__(None, None, None)
        calls.append(operations.total / 2)

    handles = [backbone.register_forward_pre_hook(enter), backbone.register_forward_hook(leave)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def held_out(method: ECAD, records: Records) -> dict[str, float]:
    """Mean judgement of pictures for other prompts, by name: without a cache, and of each pick of the front.

    `NAME/closeness` is minus the mean squared distance to the picture without a cache, which has the same noise.
    """
    if not method.judge.identity:
        method.judge.setup(method.device)
    cond = method.condition(records)
    z = method.keys.fork("validation").normal("z", records.position, method.sampler.shape)
    front = method.found()["front"]
    named = {name: Schedule.from_plain(front[i]["schedule"]) for name, i in picks(front).items()} if front else {}
    plain = drawn(method, None, z, cond)
    found = {"no_cache": float(method.judge(plain, records).mean())}
    for name, schedule in named.items():
        images = drawn(method, schedule, z, cond)
        found[name] = float(method.judge(images, records).mean())
        found[f"{name}/closeness"] = -float((images - plain).square().mean())
    return found


def drawn(method: ECAD, schedule: Schedule | None, z: Tensor, cond: Any) -> Tensor:
    """Pictures [B, 3, H, W] of noise z under a schedule."""
    method.executor.use(schedule)
    images = method.sampler.pictures(z, cond)
    method.executor.use(None)
    return images
