"""Rank 0 alone reads weights: the other processes build their networks without any and are sent rank 0's.

    with alone(several, method):     while a method builds its networks
        reads()                      whether this process opens the files
        agreed(make)                 what `make` returns on rank 0, on every process
    receive(network, device)         rank 0's parameters and buffers, on every process

Without weights means parameters on the meta device. Buffers are real everywhere: they may be in no file, and code that
builds a network may look at them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

T = TypeVar("T")
_state = {"alone": False}


@contextmanager
def alone(several: bool, built: nn.Module | None = None) -> Iterator[None]:
    """Inside, rank 0 reads weights for all processes, where there are several.

    Args:
        built: what has to have all its weights in the end.

    Raises:
        RuntimeError: it has not: nobody sent those of a network that was read.
    """
    _state["alone"] = several and _world() > 1
    try:
        yield
    finally:
        _state["alone"] = False
    for name, parameter in built.named_parameters() if built is not None else ():
        if parameter.is_meta:
            raise RuntimeError(f"{name} has no weights: its network was read, but not added to the method")


def reads() -> bool:
    """Whether this process reads weights from files."""
    return not _state["alone"] or dist.get_rank() == 0


def agreed(make: Callable[[], T]) -> T:
    """A plain value that is costly to find: rank 0 finds it for all while it reads alone, else each process does."""
    if not _state["alone"]:
        return make()
    found = [make() if reads() else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]  # type: ignore[return-value]


def without_weights(build: Callable[[], nn.Module]) -> nn.Module:
    """A network with parameters on the meta device and real buffers."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        network = build()
    if hasattr(network, "tie_weights"):  # a parameter that is assigned twice became two on the way
        network.tie_weights()
    return network


@torch.no_grad()
def receive(network: nn.Module, device: torch.device | str, buffers: bool = True) -> None:
    """Gives every process rank 0's weights, one tensor after the other; what is sharded already stays as it is.

    Parameters on meta become real where they are: copies that share them see that too.

    Args:
        device: where the processes exchange tensors; the weights then lie there.
        buffers: send the buffers too.

    Raises:
        RuntimeError: the network is not the same one on all processes.
    """
    if _world() == 1:
        return
    found = [*network.parameters(), *(network.buffers() if buffers else ())]
    tensors = [t for t in found if not isinstance(t, DTensor)]
    architecture = _digest([(tuple(t.shape), str(t.dtype)) for t in tensors])
    everyone: list[Any] = [None] * _world()
    dist.all_gather_object(everyone, architecture)
    if len(set(everyone)) > 1:
        raise RuntimeError(f"{type(network).__name__} has not the same architecture on all processes: {everyone}")
    for tensor in tensors:
        whole = _exchanged(tensor, device)
        dist.broadcast(whole, src=0)
        if tensor.is_meta:
            torch.utils.swap_tensors(tensor, nn.Parameter(whole, tensor.requires_grad))
        else:
            tensor.data = whole


def _digest(facts: Any) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:8]


def _exchanged(tensor: Tensor, device: torch.device | str) -> Tensor:
    if tensor.is_meta:
        return torch.empty_like(tensor, device=device)
    return tensor.detach().to(device).contiguous()


def _world() -> int:
    """Number of processes; a fake process group, which plans for many, has one."""
    there = dist.is_available() and dist.is_initialized() and dist.get_backend() != "fake"
    return dist.get_world_size() if there else 1
