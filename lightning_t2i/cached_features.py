"""A loss over the features of all micro-batches of a training step, as if they were one batch.

    pass 1   features of each micro-batch as it comes, without gradients; inputs are kept
    loss     on the last micro-batch: of all features together, with its gradient g_i to the features f_i of each
    pass 2   f_i again, with gradients: sum f_i g_i has the gradient of the large batch by f_i

Activations of one micro-batch alone are alive (arXiv 2101.06983). The draws of pass 1 come again in pass 2, since the
engine seeds them by training step, micro-batch and rank. Gradients are reduced over processes once, at the last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_t2i.strategies.sharding import set_gradient_sync

if TYPE_CHECKING:
    from lightning_t2i.method import MethodModule

Columns = tuple[Tensor, ...]


class CachedFeatures:
    """Gives the engine the gradient of a loss over `common.accumulate` micro-batches together.

    Args:
        method: its counters, keys and `backward` are used.
        encode: inputs of a micro-batch -> features, tensors whose rows can be joined.
        loss: joined features -> a scalar, and values to log beside it.
    """

    def __init__(
        self,
        method: MethodModule,
        encode: Callable[..., Columns],
        loss: Callable[[Columns], tuple[Tensor, dict[str, Tensor]]],
    ):
        self.method, self.encode, self.loss = method, encode, loss
        self._inputs: list[tuple[Any, ...]] = []
        self._features: list[Columns] = []

    def backward(self, names: tuple[str, ...], *inputs: Any) -> None:
        """Takes a micro-batch; on the last one of a training step the named groups get their gradients."""
        method, count = self.method, self.method.common.accumulate
        if count == 1:
            loss, scalars = self.loss(self.encode(*inputs))
            method.backward(names, loss, **scalars)
            return
        if method.counters.micro == 0:
            self._inputs, self._features = [], []
        with torch.no_grad():
            self._features.append(self.encode(*inputs))
        self._inputs.append(inputs)
        if len(self._inputs) == count:
            self._second_pass(names, count)

    def _second_pass(self, names: tuple[str, ...], count: int) -> None:
        method = self.method
        leaves = [[f.detach().requires_grad_(f.is_floating_point()) for f in found] for found in self._features]
        loss, scalars = self.loss(tuple(torch.cat(column) for column in zip(*leaves, strict=True)))
        floating = [f for found in leaves for f in found if f.requires_grad]
        gradients = iter(torch.autograd.grad(loss, floating, materialize_grads=True))
        for micro, inputs in enumerate(self._inputs):
            for name in names:
                set_gradient_sync(method.groups[name].network, micro == count - 1)
            method.keys.seed_globals(micro, method.global_rank)
            found = [f for f in self.encode(*inputs) if f.is_floating_point()]
            value = torch.stack([(f * next(gradients)).sum() for f in found]).sum()
            method.backward(names, loss.detach() + count * (value - value.detach()), **scalars)
        self._inputs, self._features = [], []
