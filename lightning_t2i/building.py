"""How the networks of a method are built: once, from weights that rank 0 alone reads, frozen ones in their own form."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_t2i import rank0
from lightning_t2i.frozen import freeze
from lightning_t2i.quantization import Bits, quantize_frozen, refuse_unknown
from lightning_t2i.strategies.fsdp2 import mesh_of
from lightning_t2i.strategies.sharding import shard_frozen

if TYPE_CHECKING:
    from lightning_t2i.method import MethodModule


def once(build: Callable[[Any], None]) -> Callable[[Any], None]:
    """Lightning calls `configure_model` again on every entry: build once, from weights that only the seed decides."""

    @functools.wraps(build)
    def configure_model(self: MethodModule) -> None:
        if self.groups or self.frozen_identities:
            return
        self.keys.seed_globals()
        with rank0.alone(mesh_of(self) is not None, self):
            build(self)
        refuse_unknown(self.common.quantize, self.frozen_identities)

    return configure_model


def place_frozen(network: nn.Module, dtype: torch.dtype | None, mesh: DeviceMesh | None, bits: Bits | None) -> None:
    """Freezes a network for good, in place: cut over the mesh if it is large, or quantised and then whole everywhere.

    Args:
        dtype: own precision of its weights.
        mesh: (replicate, shard), None in a single plain process.
        bits: format of the weights of its Linear layers.
    """
    freeze(network, None if bits else dtype)
    if mesh is not None:
        shard_frozen(network, mesh, whole=bits is not None)
    if bits is not None:  # from whole weights, which no other process may lack
        freeze(quantize_frozen(network, bits), dtype)
