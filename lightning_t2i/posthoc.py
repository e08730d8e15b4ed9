"""Averages that no run kept: a power-function average of any width, put together from stored ones (arXiv 2312.02696).

    p_i(k) = (gamma + 1) k^gamma / t^(gamma + 1),  0 < k <= t      profile of average i after t updates        eq. 7
    <p_i, p_j> = (g_i + 1)(g_j + 1) / (g_i + g_j + 1) * min(t_i, t_j)^(g_i + g_j + 1) / (t_i^(g_i+1) t_j^(g_j+1))
    x = argmin |sum_i x_i p_i - p|^2,  A x = b,  A_ij = <p_i, p_j>,  b_i = <p_i, p>                     section 3.2
    average = sum_i x_i average_i

The i are snapshots of two widths or more at several steps; none may be younger than the average that is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from lightning_t2i.ema import PowerFunction, gamma_of, power_label
from lightning_t2i.errors import UserError
from lightning_t2i.group import Group
from lightning_t2i.state_io import copy_into, full_tensor


@dataclass(frozen=True)
class Snapshot:
    """A power-function average that is there.

    Args:
        sigma_rel: its relative width.
        updates: updates of the average up to then, at least 1.
        read: name of a parameter -> its tensor.
    """

    sigma_rel: float
    updates: int
    read: Callable[[str], Tensor]


def inner_product(gamma_a: np.ndarray, updates_a: np.ndarray, gamma_b: np.ndarray, updates_b: np.ndarray) -> np.ndarray:
    """<p_a, p_b> of profiles, broadcast."""
    power = gamma_a + gamma_b + 1
    logarithm = power * np.log(np.minimum(updates_a, updates_b))
    logarithm = logarithm - (gamma_a + 1) * np.log(updates_a) - (gamma_b + 1) * np.log(updates_b)
    return (gamma_a + 1) * (gamma_b + 1) / power * np.exp(logarithm)


def coefficients(stored: Sequence[tuple[float, int]], sigma_rel: float, updates: int) -> np.ndarray:
    """x: what each average (sigma_rel, updates) contributes to the one of this width after so many updates."""
    gamma = np.array([gamma_of(width) for width, _ in stored])
    t = np.array([count for _, count in stored], dtype=np.float64)
    a = inner_product(gamma[:, None], t[:, None], gamma[None], t[None])
    return np.linalg.lstsq(a, inner_product(gamma, t, np.array(gamma_of(sigma_rel)), np.array(float(updates))))[0]


def reconstruct(
    stored: Sequence[Snapshot], names: Iterable[str], sigma_rel: float, updates: int
) -> Iterable[tuple[str, Tensor]]:
    """(name, float32 tensor on the CPU) of the average of this width after so many updates, one after the other.

    Raises:
        UserError: fewer than two averages are stored, or all are younger.
    """
    usable = [s for s in stored if 0 < s.updates <= updates]
    if len(usable) < 2:
        raise UserError(
            "Too few snapshots for an average of another width",
            where="--ema",
            given=f"{len(usable)} stored averages up to update {updates}",
            fix="train with ema: {sigma_rel: [0.05, 0.1]} and checkpoints.ema.every",
        )
    shares = coefficients([(s.sigma_rel, s.updates) for s in usable], sigma_rel, updates)
    for name in names:
        total: Any = 0.0
        for share, s in zip(shares, usable, strict=True):
            total = total + float(share) * s.read(name).double()
        yield name, total.float()


def updates_until(step: int, group: Group) -> int:
    """How often the averages of a group that never began anew were updated in the first `step` training steps."""
    assert group.options.ema is not None
    every, start = group.options.every, max(group.options.start, group.options.ema.start)
    return max(-(-step // every) - -(-start // every), 0)


def updates_at(then: int, group: Group, step: int) -> int:
    """How many updates a group's averages had at training step `then`, known at `step`; 0 or less before a restart."""
    assert group.averages is not None
    count = group.averages.count or updates_until(step, group)  # 0: the weights alone were loaded
    return count - (updates_until(step, group) - updates_until(then, group))


def stored_averages(folder: Path, group: Group, step: int) -> list[Snapshot]:
    """The power-function averages of a group, and those in the snapshots that its run wrote before.

    Args:
        folder: of the snapshots `step-XXXXXXXX.safetensors`.
        step: training steps done; snapshots of later steps belong to work that came after it.
    """
    averages, found = group.averages, []
    assert averages is not None
    for k, (profile, tensors) in enumerate(zip(averages.profiles, [averages.first, *averages.others], strict=True)):
        if not isinstance(profile, PowerFunction):
            continue
        now = dict(zip(averages.names, tensors, strict=True))
        found.append(Snapshot(profile.sigma_rel, updates_at(step, group, step), partial(_taken, now)))
        prefix = f"{averages.name}[{profile.label}]." if k else f"{averages.name}."
        for file in sorted(folder.glob("step-*.safetensors")):
            if (then := int(file.stem.removeprefix("step-"))) < step:
                updates = updates_at(then, group, step)
                found.append(Snapshot(profile.sigma_rel, updates, partial(_read, file, prefix)))
    return found


def _taken(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    return full_tensor(tensors[name])


def _read(file: Path, prefix: str, name: str) -> Tensor:
    with safe_open(file, "pt") as stream:
        return stream.get_tensor(prefix + name)


@torch.no_grad()
def use_average(groups: Iterable[Group], label: str, folder: Path, step: int) -> None:
    """Gives the twins of all groups with averages another average: one that the run kept, or one made from snapshots.

    For sampling and export, on any mesh; a training cannot go on from it.

    Args:
        label: a decay, or sigma_rel=WIDTH.
        folder, step: see `stored_averages`.

    Raises:
        UserError: no group has averages, one has not this one, or there are too few snapshots to make it.
    """
    averaged = [(group, group.averages) for group in groups if group.averages is not None]
    if not averaged:
        raise UserError("No group of this method has an EMA", where="--ema", given=label)
    width = _width(label)
    for group, averages in averaged:
        kept = [profile.label for profile in averages.profiles]
        if width is None or power_label(width) in kept:
            averages.select(label if width is None else power_label(width))
            continue
        stored, updates = stored_averages(folder, group, step), updates_at(step, group, step)
        made = dict(zip(averages.names, averages.first, strict=True))
        for name, tensor in reconstruct(stored, averages.names, width, updates):
            copy_into(made[name], tensor)


def _width(label: str) -> float | None:
    """WIDTH of sigma_rel=WIDTH; None of any other label."""
    name, is_width, text = label.partition("=")
    try:
        width = float(text) if is_width and name == "sigma_rel" else None
    except ValueError:
        width = -1.0
    if width is not None and not 0 < width < 0.288:
        raise UserError("Not a width", where="--ema", given=label, allowed="sigma_rel=0.12, between 0 and 0.288")
    return width
