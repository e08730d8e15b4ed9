"""Group: one trained network with its optimizer, schedule, clipping, rhythm and EMA twin."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_t2i.options import GroupOptions, Plain
from lightning_t2i.state_io import full_tensor, load_tensor


class Group:
    """The trained parameters of one network and everything that updates them.

    Args:
        name: "student", "fake", …; the prefix of its entries in logs and checkpoints.
        network: holds the parameters; may be a frozen network with trained adapters inside.
        options: optimizer, schedule, clip norm, rhythm, EMA.
        parameters: which trainable parameters belong to the group, by name; all by default.

    Membership is decided per parameter when the group is made: `requires_grad` then is what "trained" means, and it is
    never toggled afterwards.
    """

    def __init__(
        self, name: str, network: nn.Module, options: GroupOptions, parameters: Callable[[str], bool] | None = None
    ):
        self.name, self.network, self.options = name, network, options
        self.names = [
            n for n, p in network.named_parameters() if p.requires_grad and (parameters is None or parameters(n))
        ]
        if not self.names:
            raise ValueError(f"Group '{name}' has no trainable parameter")
        self.owns_all = len(self.names) == sum(1 for _ in network.parameters())
        self.ema = self._twin() if options.ema else None
        self.updates = self.averages = 0  # optimizer steps, EMA updates
        # Kept once they are final, so that a step does not walk the module tree: the parameters; twin and weights.
        self._final: list[nn.Parameter] | None = None
        self._averaged: tuple[list[Tensor], list[Tensor]] | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.scheduler: torch.optim.lr_scheduler.LRScheduler | None = None

    def _twin(self) -> nn.Module:
        """A copy of the network that shares all that others train; made before sharding, which forbids copies."""
        trained = set(self.names)
        shared = {id(p): p for n, p in self.network.named_parameters() if n not in trained}
        twin = copy.deepcopy(self.network, memo=shared).eval()
        for name, parameter in twin.named_parameters():
            if name in trained:  # what is shared may be trained by another group
                parameter.requires_grad_(False)
        return twin

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters in their order of declaration; shards of them once the network is sharded."""
        if self._final is not None:
            return self._final
        found = dict(self.network.named_parameters())
        return [found[n] for n in self.names]

    def build(self) -> None:
        """Makes optimizer and scheduler; called when the parameters are in their final place."""
        self._final = self.parameters
        self.optimizer = self.options.optimizer(self._final)
        self.scheduler = self.options.schedule(self.optimizer) if self.options.schedule else None

    def due(self, step: int) -> bool:
        return step % self.options.every == 0

    def gradient_norm(self) -> Tensor:
        """L2 norm over all gradients of the group, over all shards: a scalar tensor."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def step(self, norm: Tensor) -> None:
        """Clips to the norm limit and updates the weights; `norm` is what `gradient_norm` returned."""
        assert self.optimizer is not None
        if self.options.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.options.clip, norm)
        self.optimizer.step()
        self.updates += 1

    def advance_schedule(self) -> None:
        if self.scheduler is not None:
            self.scheduler.step()

    def clear_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def average(self, step: int) -> None:
        """Moves the EMA twin towards the weights, on local shards (EMA: arXiv 1412.6980 section 7.2)."""
        if self.ema is None or self.options.ema is None:
            return
        ema, n = self.options.ema, self.averages
        decay = min(ema.decay, (1 + n) / (10 + n)) if ema.warmup else ema.decay
        if self._averaged is None:
            twin = dict(self.ema.named_parameters())
            self._averaged = [_local(twin[name]) for name in self.names], [_local(p) for p in self.parameters]
        averages, weights = self._averaged
        if step < ema.start:
            torch._foreach_copy_(averages, weights)
        else:
            torch._foreach_lerp_(averages, weights, 1 - decay)
            self.averages += 1
        if self.owns_all:
            for target, source in zip(self.ema.buffers(), self.network.buffers(), strict=True):
                target.copy_(source)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the checkpoint, tensor) of all that training changes: weights, buffers, EMA."""
        for prefix, network in ((self.name, self.network), (f"{self.name}_ema", self.ema)):
            if network is None:
                continue
            found = dict(network.named_parameters())
            yield from ((f"{prefix}.{n}", found[n]) for n in self.names)
            if self.owns_all:
                persistent = network.state_dict(keep_vars=True).keys()
                yield from ((f"{prefix}.{n}", b) for n, b in network.named_buffers() if n in persistent)

    def state(self) -> Plain:
        """Optimizer state keyed by parameter names, whole tensors on the CPU; a collective call when sharded."""
        assert self.optimizer is not None
        per_parameter = {}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            entries = self.optimizer.state.get(parameter, {})
            per_parameter[name] = {k: full_tensor(v) if isinstance(v, Tensor) else v for k, v in entries.items()}
        settings = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        return {
            "updates": self.updates,
            "averages": self.averages,
            "optimizer": type(self.optimizer).__name__,
            "states": per_parameter,
            "settings": settings,
            "schedule": self.scheduler.state_dict() if self.scheduler else None,
        }

    def load(self, state: Plain) -> None:
        """Restores what `state` returned, onto any mesh."""
        assert self.optimizer is not None
        self.updates, self.averages = state["updates"], state["averages"]
        for name, parameter in zip(self.names, self.parameters, strict=True):
            self.optimizer.state[parameter] = {
                k: load_tensor(v, parameter) if isinstance(v, Tensor) else v for k, v in state["states"][name].items()
            }
        for group, saved in zip(self.optimizer.param_groups, state["settings"], strict=True):
            group.update(saved)
        if self.scheduler is not None and state["schedule"] is not None:
            self.scheduler.load_state_dict(state["schedule"])

    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"]) if self.optimizer else math.nan


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
