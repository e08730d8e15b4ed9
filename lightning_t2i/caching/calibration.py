"""Calibration pictures: every prompt with every seed, cut into micro-batches that are whole on one process.

    jobs         all (prompt, seed), ordered by (prompt id, seed)
    micro-batch  the next `size` jobs; number i belongs to rank i mod W
    z            keyed by (prompt id, seed): the same noise for every candidate, batch, order and rank

Which pictures share a micro-batch depends on no process, so the bits of a picture and of its score do not either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_t2i.batch import Cond, Records
from lightning_t2i.caching.rewards import Reward
from lightning_t2i.caching.schedule import Schedule
from lightning_t2i.errors import UserError
from lightning_t2i.keys import Keys
from lightning_t2i.networks.codec import LatentCodec
from lightning_t2i.networks.denoiser import Denoiser
from lightning_t2i.processes import sample


class Uses(Protocol):
    """What is told of each schedule before a sampling."""

    def use(self, schedule: Schedule | None) -> Any: ...


@dataclass(frozen=True)
class Sampler:
    """How pictures are made: network, codec, shape (C, h, w) of a latent, steps, guidance scale and solver."""

    denoiser: Denoiser
    codec: LatentCodec
    shape: tuple[int, ...]
    steps: int
    guidance: float
    solver: str

    def times(self) -> Tensor:
        """What the transformer is called with in each step, float64 [N]; a flow's transformer takes t itself."""
        return self.denoiser.process.timesteps(self.steps)[:-1].to(torch.float64)

    @torch.no_grad()
    def pictures(self, z: Tensor, cond: Cond | None) -> Tensor:
        """[B, 3, H, W] in [-1, 1] of unit Gaussian noise z [B, C, h, w]."""
        latents = sample(self.denoiser, z, cond, self.steps, self.guidance, self.solver)
        return self.codec.decode(latents).clamp(-1, 1)


class Calibration:
    """The prompts of a search, or of an evaluation.

    Args:
        records: the prompts, in any order.
        encode: records -> their conditions.
        seeds: noises of every prompt.
        size: pictures of a micro-batch.
        keys: source of the noises.
        rank, world: the share of this process.
    """

    def __init__(
        self, records: Records, encode: Callable[[Records], Cond | None], seeds: Sequence[int], size: int, keys: Keys,
        rank: int = 0, world: int = 1,
    ):  # fmt: skip
        order = torch.argsort(records.id)
        rows = order.repeat_interleave(len(seeds))
        numbers = torch.tensor(list(seeds)).repeat(len(order))
        self.n, self.prompts, self.keys = len(rows), len(order), keys
        self.places: list[Tensor] = []  # of the jobs of each micro-batch of this process
        self.batches: list[tuple[Records, Cond | None, Tensor]] = []
        for number, places in enumerate(torch.arange(self.n).split(size)):
            if number % world == rank:
                part = records.index(rows[places])
                self.places.append(places)
                self.batches.append((part, encode(part), numbers[places]))

        quarter = max(self.n // 4, 1)
        self.first = min(-(-quarter // size) * size, self.n)  # pictures of the micro-batches that a race begins with

    def noise(self, records: Records, seeds: Tensor, shape: tuple[int, ...]) -> Tensor:
        """z [B, C, h, w] of prompts and seeds."""
        z = torch.empty(len(records), *shape, device=records.id.device)
        for seed in seeds.unique().tolist():
            chosen = seeds == seed
            z[chosen] = self.keys.normal(f"z{seed}", records.id[chosen], shape)
        return z

    def scores(
        self, sampler: Sampler, reward: Reward, executor: Uses, schedules: Sequence[Schedule | None],
        jobs: range | None = None,
    ) -> Tensor:  # fmt: skip
        """float64 [schedules, n]: of this process's pictures; 0 elsewhere, so that a sum over processes has all.

        Args:
            jobs: leave out micro-batches that do not begin within.
        """
        found = torch.zeros(len(schedules), self.n, dtype=torch.float64)
        for places, (records, cond, seeds) in zip(self.places, self.batches, strict=True):
            if jobs is not None and int(places[0]) not in jobs:
                continue
            z = self.noise(records, seeds, sampler.shape)
            for row, schedule in enumerate(schedules):
                executor.use(schedule)
                found[row, places] = reward(sampler.pictures(z, cond), records).cpu()
        executor.use(None)
        return found


def refuse_shares(prompts: int, seeds: int, batch: int, size: int, world: int) -> None:
    """A generation makes `prompts` x `seeds` pictures, which are one batch of the data; each process some of them.

    Args:
        batch: pictures of a batch of the data.
        size: pictures of a micro-batch.

    Raises:
        UserError: the batch has another number, does not divide by the processes, or has fewer micro-batches than there
            are processes.
    """
    n = prompts * seeds
    if batch != n or n % world:
        noises = min(range(1, seeds + world + 1), key=lambda s: (prompts * math.gcd(s, world) < world, abs(s - seeds)))
        step = world // math.gcd(noises, world)  # prompts come in multiples of it
        limit = prompts // step * step
        what, given = "A generation makes every prompt with every seed", f"batch_size {batch} on {world} processes"
        allowed = f"{prompts} prompts x {seeds} seeds = {n}, where that divides by the processes"
        fix = f"data.main.limit: {limit}, model.seeds: {noises}, data.main.batch_size: {limit * noises}"
        raise UserError(what, where="data.main.batch_size", given=given, allowed=allowed, fix=fix)
    if (batches := -(-n // size)) < world:
        what, given = "Some processes would make no pictures", f"{batches} micro-batches of {size} on {world} processes"
        raise UserError(what, where="model.micro_batch", given=given, fix=f"micro_batch: {n // world}, or fewer")


def finite(scores: np.ndarray, reward: Reward) -> np.ndarray:
    """The scores [k, n] of schedules.

    Raises:
        UserError: some are no numbers: nothing could be said of such a schedule, and it would stay in the search.
    """
    if bad := int((~np.isfinite(scores)).sum()):
        what, given = "A reward gave scores that are not finite", f"{type(reward).__name__}: {bad} of {scores.size}"
        fix = "another reward; or common.precision: fp32, if it is the pictures that are not finite"
        raise UserError(what, where="model.reward", given=given, allowed="finite numbers", fix=fix)
    return scores


def refuse_uneven(method: nn.Module, n: int, size: int, world: int, race: bool) -> None:
    """A network that is cut over processes is called by all of them together, so that each must have as much to do.

    Args:
        method: whose networks are called, once for the captions of a micro-batch (`text`) or in each sampling.
        n: pictures of a generation.
        size: those of a micro-batch.

    Raises:
        UserError: micro-batches do not divide, or a race would give some processes more of them than others.
    """
    cut = {
        name for name, network in method.named_children() if any(isinstance(p, DTensor) for p in network.parameters())
    }
    batches, races = -(-n // size), race and bool(cut - {"text"})
    if cut and (races or batches % world):
        what = "A network is cut over the processes, so that each must make as many micro-batches"
        given = f"{', '.join(sorted(cut))}; race {race}, {batches} micro-batches on {world} processes"
        fix = "search: {race: false}, and a micro_batch that divides, or base: ../trainer/ddp.yaml"
        raise UserError(what, where="model.micro_batch", given=given, fix=fix)
