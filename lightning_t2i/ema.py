"""Running averages of a group's weights (EMA): several at once, of which the first is a callable network, the twin.

    m <- b m + (1 - b) w                      after each update of the weights w, on this process's shards alone
    b = d                                     exponential; with warm-up at most (1 + n) / (10 + n), n averages so far,
                                              or 1 - (1 + n)^-power
    b = (1 - 1/t)^(gamma + 1),  t = n + 1     power function, arXiv 2312.02696 eq. 4: the weights of update k count
                                              in proportion to k^gamma, whatever the length of the training
    sigma_rel = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3))          its relative width, eq. 6 and algorithm 2

lightning_t2i/posthoc.py makes averages of other widths from stored ones.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lightning_t2i.errors import UserError
from lightning_t2i.options import EMAOptions
from lightning_t2i.state_io import local_tensor


class Profile(Protocol):
    """How much of an average each update keeps."""

    @property
    def label(self) -> str:
        """What the average is called in checkpoints and on the command line."""

    def decay(self, n: int) -> float:
        """b of the update that comes after n others."""


@dataclass(frozen=True)
class Exponential:
    value: float
    warmup: bool
    power: float | None = None

    @property
    def label(self) -> str:
        return f"{self.value:g}"

    def decay(self, n: int) -> float:
        if self.power is not None:
            return min(self.value, 1 - (1 + n) ** -self.power)
        return min(self.value, (1 + n) / (10 + n)) if self.warmup else self.value


@dataclass(frozen=True)
class PowerFunction:
    sigma_rel: float

    @property
    def label(self) -> str:
        return power_label(self.sigma_rel)

    def decay(self, n: int) -> float:
        return (1 - 1 / (n + 1)) ** (gamma_of(self.sigma_rel) + 1)


def power_label(sigma_rel: float) -> str:
    return f"sigma_rel={sigma_rel:g}"


def gamma_of(sigma_rel: float) -> float:
    """The exponent of a power-function average of relative width 0 < sigma_rel < 0.289 (arXiv 2312.02696, alg. 2)."""
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def profiles(options: EMAOptions) -> list[Profile]:
    """The averages that the options ask for; the twin's comes first."""
    return [
        *(Exponential(value, options.warmup, options.power) for value in options.decays),
        *(PowerFunction(width) for width in options.sigma_rel),
    ]


class Averages:
    """The running averages of some parameters of a network.

    Args:
        name: prefix of their names in checkpoints.
        network: not yet sharded, for a sharded network cannot be copied.
        names: of the averaged parameters.
        options: which averages, and when they begin.

    Attributes:
        twin: the first average, in a copy of the network that shares everything else with it; shard it like the
            network. The other averages are tensors only, shards like its own.
        count: updates of the averages so far.
    """

    def __init__(self, name: str, network: nn.Module, names: Sequence[str], options: EMAOptions):
        self.name, self.names, self.options = name, list(names), options
        self.profiles = profiles(options)
        self.count = 0
        trained = set(names)
        shared = {id(p): p for n, p in network.named_parameters() if n not in trained}
        self.twin = copy.deepcopy(network, memo=shared).eval()
        for n, parameter in self.twin.named_parameters():
            if n in trained:  # what is shared may be trained by another group
                parameter.requires_grad_(False)
        self._others: list[list[Tensor]] = []
        self._local: tuple[list[list[Tensor]], list[Tensor]] | None = None  # of each average; of the weights

    @property
    def first(self) -> list[Tensor]:
        """The averaged parameters of the twin."""
        found = dict(self.twin.named_parameters())
        return [found[n] for n in self.names]

    @property
    def others(self) -> list[list[Tensor]]:
        """The tensors of the second average, the third, ...; made from the twin when they are first asked for.

        Before that the twin has to be in its final place, sharded where it is going to be.
        """
        first = self.first
        if not self._others:
            self._others = [[p.detach().clone() for p in first] for _ in self.profiles[1:]]
        elif any(t.device != p.device for t, p in zip(self._others[0], first, strict=True)):
            self._others = [[t.to(p.device) for t, p in zip(o, first, strict=True)] for o in self._others]
        return self._others

    def named_others(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the checkpoint, tensor) of the averages beside the twin: NAME[LABEL].PARAMETER."""
        for profile, tensors in zip(self.profiles[1:], self.others, strict=True):
            yield from ((f"{self.name}[{profile.label}].{n}", t) for n, t in zip(self.names, tensors, strict=True))

    @torch.no_grad()
    def update(self, weights: Sequence[Tensor], step: int) -> None:
        """Moves every average towards the weights, which are those of `names`, after training step `step`."""
        if self._local is None:
            averages = [[local_tensor(t) for t in tensors] for tensors in (self.first, *self.others)]
            self._local = averages, [local_tensor(w) for w in weights]
        averages, local = self._local
        if step < self.options.start:
            for tensors in averages:
                torch._foreach_copy_(tensors, local)
            return
        for profile, tensors in zip(self.profiles, averages, strict=True):
            torch._foreach_lerp_(tensors, local, 1 - profile.decay(self.count))
        self.count += 1

    @torch.no_grad()
    def restart(self, weights: Sequence[Tensor]) -> None:
        """Every average becomes the weights, as it was before the first update."""
        for tensors in (self.first, *self.others):
            for target, weight in zip(tensors, weights, strict=True):
                local_tensor(target).copy_(local_tensor(weight))
        self.count = 0

    @torch.no_grad()
    def select(self, label: str) -> None:
        """Gives the twin the weights of another average; for sampling and export, not in a training.

        Raises:
            UserError: there is no such average.
        """
        labels = [profile.label for profile in self.profiles]
        if label not in labels:
            raise UserError("The run has no such average", where="--ema", given=label, allowed=labels)
        if (chosen := labels.index(label)) > 0:
            for target, source in zip(self.first, self.others[chosen - 1], strict=True):
                local_tensor(target).copy_(local_tensor(source))
