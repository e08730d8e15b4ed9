"""AdamW whose moments take a byte each, by bitsandbytes: on whole weights, or on this process's shards of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor

from lightning_t2i.errors import UserError
from lightning_t2i.options import Plain
from lightning_t2i.state_io import local_tensor

SMALLEST = 4096  # elements; bitsandbytes keeps the moments of smaller tensors in float32
BLOCK = 256  # elements that share a scale
RESET = "--reset_optimizer keeps weights, EMA and counters and starts the optimizer states anew"


@cache
def _works(device: str) -> bool:
    """Whether bitsandbytes makes a step on a device; warns once if not."""
    try:
        from bitsandbytes.optim import AdamW8bit as Inner

        probe = nn.Parameter(torch.zeros(SMALLEST, device=device))
        probe.grad = torch.ones_like(probe)
        Inner([probe]).step()
    except Exception as error:  # a library that does not load fails in many ways
        rank_zero_warn(f"bitsandbytes does not work on {device}, torch.optim.AdamW takes its place: {error!r}")
        return False
    return True


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with 8-bit moments, quantised in blocks of 256 values (arXiv 2110.02861).

    Tensors of fewer than 4096 elements keep float32 moments. Sharded weights (DTensors) are updated shard by shard:
    blocks are then cut otherwise, and the states belong to this number of shards (see `parts`). Where bitsandbytes does
    not work, torch's AdamW takes its place with one warning.

    Args:
        params: parameters or groups of them, as for any optimizer.
        lr, betas, eps, weight_decay: as of `torch.optim.AdamW`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.mesh: Any = next((p.device_mesh for p in parameters if isinstance(p, DTensor)), None)
        self._planned = any(
            isinstance(local_tensor(p), FakeTensor) for p in parameters
        )  # `train.py check` has no values
        self.kind = "AdamW8bit" if self._planned or _works(parameters[0].device.type) else "AdamW"
        # What the inner optimizer updates: the parameters, or parameters of their own that share the shards' memory.
        self._inside: dict[nn.Parameter, nn.Parameter] = {p: p for p in parameters}
        make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
        if self.kind == "AdamW8bit" and not self._planned:
            import bitsandbytes

            make = bitsandbytes.optim.AdamW8bit
            self._inside |= {p: nn.Parameter(local_tensor(p)) for p in parameters if isinstance(p, DTensor)}
        self._inner = make([{**g, "params": [self._inside[p] for p in g["params"]]} for g in self.param_groups])

    @property
    def parts(self) -> int:
        """Into how many shards the states are cut for good; 0 for states of whole tensors that fit any mesh."""
        if self.kind == "AdamW":
            return 0
        return 1 if self.mesh is None else self.mesh["shard"].size()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Updates the weights; a closure is not called. Weights without values get states of the right size alone."""
        if self._planned:
            self.state.update({p: _states_of(local_tensor(p)) for p in self._inside})
            return
        for own, inner in zip(self.param_groups, self._inner.param_groups, strict=True):
            inner.update({k: v for k, v in own.items() if k != "params"})
        for parameter, inside in self._inside.items():
            if inside is not parameter:
                inside.data, inside.grad = local_tensor(parameter), _shard_of_gradient(parameter)
            if parameter in self.state:  # what a checkpoint brought
                self._inner.state[inside] = self.state[parameter]
        self._inner.step()
        for parameter, inside in self._inside.items():
            if inside is not parameter:
                inside.grad = None
            if inside in self._inner.state:
                self.state[parameter] = self._inner.state[inside]

    def gathered(self, states: dict[str, Plain]) -> dict[str, Plain]:
        """States of all shards by parameter names, equal on all processes: entry `x` of shard 1 is called `1/x`.

        A single shard's entries keep their names. A collective call when sharded, for one parameter after the other:
        NCCL sends through the GPU's memory, where the states of all would not fit.
        """
        if self.parts < 2:
            return states
        group, whole = self.mesh["shard"].get_group(), {}
        for name, entries in states.items():
            found: list[Any] = [None] * self.parts
            mine = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in entries.items()}
            dist.all_gather_object(found, mine, group)
            whole[name] = {f"{i}/{k}": v for i, part in enumerate(found) for k, v in part.items()}
        return whole

    def mine(self, entries: Plain) -> Plain:
        """This shard's entries of what `gathered` returned for a parameter."""
        if self.parts < 2:
            return entries
        prefix = f"{self.mesh['shard'].get_local_rank()}/"
        return {k.removeprefix(prefix): v for k, v in entries.items() if k.startswith(prefix)}

    def inside(self, parameter: nn.Parameter) -> Tensor:
        """What the states of a parameter are shaped like: itself, or this process's shard of it."""
        return self._inside[parameter]


def _states_of(parameter: Tensor) -> Plain:
    """Moments and scales of the sizes that bitsandbytes gives them; its maps of 2 KB are shared by all."""
    eight = parameter.numel() >= SMALLEST
    moments = {f"state{i}": torch.zeros_like(parameter, dtype=torch.uint8 if eight else torch.float32) for i in (1, 2)}
    blocks = -(-parameter.numel() // BLOCK)
    return moments | ({f"absmax{i}": parameter.new_zeros(blocks, dtype=torch.float32) for i in (1, 2)} if eight else {})


def _shard_of_gradient(parameter: nn.Parameter) -> Tensor | None:
    """None also for an empty shard, of which bitsandbytes has no blocks."""
    if parameter.grad is None:
        return None
    local = local_tensor(parameter.grad)
    return local if local.numel() else None


def kind_of(optimizer: torch.optim.Optimizer) -> str:
    """Whose states an optimizer has; the same on every mesh."""
    return optimizer.kind if isinstance(optimizer, AdamW8bit) else type(optimizer).__name__


def parts_of(optimizer: torch.optim.Optimizer) -> int:
    """See `AdamW8bit.parts`; 0 for every other optimizer."""
    return optimizer.parts if isinstance(optimizer, AdamW8bit) else 0


def refuse_foreign(name: str, saved: Plain, optimizer: torch.optim.Optimizer) -> None:
    """Refuses states that are another optimizer's, or cut for another number of shards.

    Args:
        name: of the group.
        saved: what `Group.state` returned.

    Raises:
        UserError: names both.
    """
    if saved["optimizer"] != kind_of(optimizer):
        raise UserError(
            f"The states of the group '{name}' are those of another optimizer",
            where=f"{name}.optimizer",
            given=kind_of(optimizer),
            allowed=saved["optimizer"],
            fix=RESET,
        )
    parts = saved.get("parts", 0)
    if parts != parts_of(optimizer):
        raise UserError(
            f"The 8-bit states of the group '{name}' fit the number of shards that they were made with and no other",
            where="trainer.strategy",
            given=f"{parts_of(optimizer)} shards",
            allowed=f"{parts} shards",
            fix=f"go on with shard: {parts}, or {RESET}",
        )
