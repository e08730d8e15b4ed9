"""Forward units: how many forward passes of each network one training step costs, counted and predicted.

    unit     one forward pass of a network on as many rows as the micro-batch of `main` has
    forward  1          its gradient adds 2 where the network has trained weights, 1 where the gradient only passes

Two backward passes through one forward pass add their units twice. Passes are counted where a network's own forward is
called: at the shard roots of a wrapper, and at encoder and decoder of an autoencoder, each under its own name; of
networks that share a backbone, under that of the one that answers. A pass that gradient checkpointing repeats inside a
network is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils._pytree import tree_leaves

from lightning_t2i.flops import counting


@runtime_checkable
class PredictsUnits(Protocol):
    """A method that knows what it should cost."""

    def forward_units(self) -> dict[str, float]:
        """Units of each network in a training step, the mean over a period of its groups; unnamed networks cost 0."""


@dataclass
class Units:
    """What was counted.

    rows: rows of the micro-batches; passed: rows that went through a network, weighted by 1, 2 or 3; flops: operations
    of one forward pass of one row, empty unless they were asked for.
    """

    rows: int = 0
    passed: dict[str, float] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)

    def per_step(self) -> dict[str, float]:
        """Units of each network that was called, in a training step."""
        return {name: passed / self.rows for name, passed in self.passed.items()} if self.rows else {}

    def flops_per_sample(self) -> dict[str, float]:
        """Operations that a training step spends on each network for one row of the batch."""
        return {name: units * self.flops[name] for name, units in self.per_step().items() if name in self.flops}


def counted_modules(network: nn.Module) -> dict[str, nn.Module]:
    """The modules whose calls are passes of a network, by what is appended to its name."""
    found: dict[str, nn.Module] = {}
    wholes = network.shard_roots() if hasattr(network, "shard_roots") else [network]
    for i, root in enumerate(wholes):
        name = f".{i}" if len(wholes) > 1 else ""
        parts = {part: getattr(root, part, None) for part in ("encoder", "decoder")}
        if all(isinstance(m, nn.Module) for m in parts.values()) and hasattr(root, "encode"):
            found |= {f"{name}.{part}": module for part, module in parts.items() if module is not None}
        else:
            found[name] = root
    return found


@contextmanager
def counting_units(method: Any, flops: bool = False) -> Iterator[Units]:
    """Counts the passes of a method's networks while it trains.

    Args:
        method: a MethodModule whose networks are built; its children are the networks.
        flops: count operations as well, which takes longer.

    Returns:
        Units, filled in while the context is open.
    """
    units = Units()
    with ExitStack() as stack:
        operations = stack.enter_context(counting()) if flops else None
        for name, network in method.named_children():
            mine = getattr(network, "answers", lambda: True)
            for part, module in counted_modules(network).items():
                for handle in _watch(f"{name}{part}", module, units, operations, mine):
                    stack.callback(handle.remove)
        begin = method._begin

        def begun(batch: Any) -> None:
            units.rows += len(batch["main"])
            begin(batch)

        method._begin = begun
        stack.callback(vars(method).pop, "_begin")
        yield units


def _watch(name: str, module: nn.Module, units: Units, operations: Any, mine: Callable[[], bool]) -> list[Any]:
    """Hooks that book the passes of one module, and of the gradients that come back to it."""
    before: list[int] = []

    def entered(*_: Any) -> None:
        before.append(operations.total if operations is not None else 0)

    def left(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        rows = next(len(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dim() > 0)
        spent = before.pop()
        if not mine():
            return
        if operations is not None:
            units.flops[name] = (operations.total - spent) / rows
        units.passed[name] = units.passed.get(name, 0.0) + rows
        results = [x for x in _tensors(output) if x.requires_grad]
        if results:
            cost = 2 if any(p.requires_grad for p in module.parameters()) else 1
            book = torch.no_grad()(lambda _: units.passed.__setitem__(name, units.passed[name] + cost * rows))
            register_multi_grad_hook(results, book, mode="any")

    return [
        module.register_forward_pre_hook(entered),
        module.register_forward_hook(left, with_kwargs=True),
    ]


def _tensors(output: Any) -> list[Tensor]:
    """The tensors of what a network returned: containers, and the output classes of diffusers and transformers."""
    leaves = tree_leaves(dict(output) if isinstance(output, dict) else output)
    return [x for x in leaves if isinstance(x, Tensor)]


def differences(predicted: dict[str, float], measured: dict[str, float], tolerance: float = 0.05) -> dict[str, str]:
    """Networks whose counted units are further than `tolerance` from the predicted ones, with both numbers."""
    return {
        name: f"predicted {predicted.get(name, 0.0):g}, measured {measured.get(name, 0.0):g}"
        for name in sorted(predicted.keys() | measured.keys())
        if abs(predicted.get(name, 0.0) - measured.get(name, 0.0)) > tolerance
    }


def table(units: Units, predicted: dict[str, float] | None = None) -> str:
    """Predicted beside measured, one line per network, with its share of the operations where they were counted."""
    measured, spent = units.per_step(), units.flops_per_sample()
    total = sum(spent.values())
    lines = [f"{'network':24}{'predicted':>10}{'measured':>10}{'MFLOP/sample':>14}{'share':>8}"]
    for name in sorted(measured.keys() | (predicted or {}).keys()):
        expected = "" if predicted is None else f"{predicted.get(name, 0.0):.2f}"
        cost = f"{spent[name] / 1e6:.1f}" if name in spent else ""
        share = f"{spent[name] / total:.0%}" if total and name in spent else ""
        lines.append(f"{name:24}{expected:>10}{measured.get(name, 0.0):>10.2f}{cost:>14}{share:>8}")
    return "\n".join(lines)
