"""Group: one trained network with its optimizer, schedule, clipping, rhythm and EMA twin."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_t2i.ema import Averages
from lightning_t2i.optimizers import AdamW8bit, kind_of, parts_of, refuse_foreign
from lightning_t2i.options import GroupOptions, Plain
from lightning_t2i.state_io import Stored, full_tensor, load_tensor


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
        self.averages = Averages(f"{name}_ema", network, self.names, options.ema) if options.ema else None
        self.ema = self.averages.twin if self.averages else None
        self.updates = 0  # optimizer steps
        self._final: list[nn.Parameter] | None = None  # kept once final, so that a step does not walk the module tree
        self.optimizer: torch.optim.Optimizer | None = None
        self.scheduler: torch.optim.lr_scheduler.LRScheduler | None = None

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
        return step >= self.options.start and step % self.options.every == 0

    def gradient_norm(self) -> Tensor:
        """L2 norm over all gradients of the group, over all shards: a scalar tensor."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if not gradients:  # of nothing torch makes a norm on the CPU, which is not stacked with those of a GPU
            return torch.zeros((), device=self.parameters[0].device)
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
        """Moves the averages towards the weights, and gives the twin the network's buffers."""
        if self.averages is None:
            return
        self.averages.update(self.parameters, step)
        if self.owns_all:
            for target, source in zip(self.averages.twin.buffers(), self.network.buffers(), strict=True):
                target.copy_(source)

    def restart(self) -> None:
        """Begins anew from the present weights: averages equal them; optimizer, schedule and counts are fresh."""
        self.build()
        self.updates = 0
        if self.averages is not None:
            self.averages.restart(self.parameters)

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
        if self.averages is not None:
            yield from self.averages.named_others()

    def state(self, take: Callable[[Tensor], Any] = full_tensor) -> Plain:
        """Optimizer state keyed by parameter names, whole tensors on the CPU; a collective call when sharded.

        Args:
            take: what is kept of a tensor, see `Saved.take`.
        """
        assert self.optimizer is not None
        found = {n: self.optimizer.state.get(p, {}) for n, p in zip(self.names, self.parameters, strict=True)}
        if isinstance(self.optimizer, AdamW8bit):
            found = self.optimizer.gathered(found)
        settings = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        return {
            "updates": self.updates,
            "averages": self.averages.count if self.averages else 0,
            "optimizer": kind_of(self.optimizer),
            "parts": parts_of(self.optimizer),
            "states": {n: {k: take(v) if isinstance(v, Tensor) else v for k, v in e.items()} for n, e in found.items()},
            "settings": settings,
            "schedule": self.scheduler.state_dict() if self.scheduler else None,
        }

    def load(self, state: Plain, reset: bool = False) -> None:
        """Restores what `state` returned, onto any mesh but for 8-bit states, see `AdamW8bit.parts`.

        Args:
            reset: start the optimizer's states anew; counts, learning rate and schedule go on.

        Raises:
            UserError: the states do not fit this optimizer or its number of shards.
        """
        assert self.optimizer is not None
        self.updates = state["updates"]
        if self.averages is not None:
            self.averages.count = state["averages"]
        if not reset:
            refuse_foreign(self.name, state, self.optimizer)
        for group, saved in zip(self.optimizer.param_groups, state["settings"], strict=True):
            group.update({k: v for k, v in saved.items() if not reset or k in ("lr", "initial_lr")})
        if not reset:
            self._load_states(state["states"])
        if self.scheduler is not None and state["schedule"] is not None:
            self.scheduler.load_state_dict(state["schedule"])

    def _load_states(self, states: dict[str, Plain]) -> None:
        optimizer = self.optimizer
        assert optimizer is not None
        # Step counts stay on the CPU, as torch keeps them, but for kernels that read them on the device.
        counts_move = {p: g.get("capturable") or g.get("fused") for g in optimizer.param_groups for p in g["params"]}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            entries, like = states[name], parameter
            if isinstance(optimizer, AdamW8bit):
                entries, like = optimizer.mine(entries), optimizer.inside(parameter)
            found = {k: load_tensor(v, like) if isinstance(v, Tensor | Stored) else v for k, v in entries.items()}
            moves = [k for k, v in found.items() if isinstance(v, Tensor) and (k != "step" or counts_move[parameter])]
            optimizer.state[parameter] = found | {k: found[k].to(like.device) for k in moves}

    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"]) if self.optimizer else math.nan
