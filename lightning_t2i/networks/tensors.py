"""Tensors that are trained themselves, as a network: what it returns is whole on every process."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_t2i.state_io import copy_into, local_tensor


class Tensors(nn.Module):
    """Named trained tensors.

    Args:
        tensors: name -> initial value.
    """

    def __init__(self, **tensors: Tensor):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))

    def forward(self) -> tuple[Tensor, ...]:
        """The tensors in their order, whole; copies, since a shard's memory is given back behind this call."""
        return tuple(parameter.clone() for parameter in self.parameters())

    def set(self, **tensors: Tensor) -> None:
        """Overwrites values, on any mesh."""
        for name, tensor in tensors.items():
            copy_into(self.get_parameter(name), tensor)

    @torch.no_grad()
    def clamp(self, low: float) -> None:
        """Raises every value to `low` at least."""
        for parameter in self.parameters():
            local_tensor(parameter).clamp_(min=low)
