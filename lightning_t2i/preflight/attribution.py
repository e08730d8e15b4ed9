"""Which network an operation belongs to, and which gradients are complete, while a method trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from lightning_t2i.forward_units import counted_modules
from lightning_t2i.preflight.allocator import Allocator


def owners(method: Any) -> dict[str, nn.Module]:
    """Name -> module whose calls are passes of a network; of networks that share it, the first trained one has it."""
    children = sorted(method.named_children(), key=lambda child: child[0] not in method.groups)
    named = {f"{name}{part}": m for name, network in children for part, m in counted_modules(network).items()}
    first: dict[int, str] = {}
    for name, module in named.items():
        first.setdefault(id(module), name)
    return {name: named[name] for name in first.values()}


@contextmanager
def attributing(method: Any, allocator: Allocator) -> Iterator[None]:
    """Tells the allocator whose forward or backward pass runs.

    A backward pass belongs to the network whose output got its gradient last, recomputed passes too. Networks with
    other entries than `forward` are known by all of their parts.
    """
    outer: list[str] = []
    with ExitStack() as stack:
        for name, module in owners(method).items():

            def entered(*_: Any, name: str = name) -> None:
                outer.append(allocator.owner)
                allocator.owner = name

            def left(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                allocator.owner = outer.pop()
                if allocator.owner == name:
                    return
                leaves = tree_leaves(dict(output) if isinstance(output, dict) else output)
                results = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
                if results:
                    register_multi_grad_hook(results, lambda _: setattr(allocator, "owner", name), mode="any")

            for part in module.modules() if hasattr(module, "shard_forward_methods") else (module,):
                stack.callback(part.register_forward_pre_hook(entered).remove)
                stack.callback(part.register_forward_hook(left).remove)
        yield


@contextmanager
def filing_gradients(method: Any, allocator: Allocator) -> Iterator[None]:
    """Files each gradient as one as soon as it is complete."""
    parameters = [p for group in method.groups.values() for p in group.parameters]
    sharded = [m for group in method.groups.values() for m in group.network.modules() if isinstance(m, FSDPModule)]
    backward = method.backward

    def filed(parameter: Tensor) -> None:
        if parameter.grad is not None:
            allocator.adopt([parameter.grad], "gradients")

    def then_filed(*args: Any, **kwargs: Any) -> None:
        backward(*args, **kwargs)
        allocator.owner = ""
        for parameter in parameters:  # of sharded networks, whose hooks run before gradients are reduced
            filed(parameter)
        allocator.adopt(unreduced(sharded), "gradients")

    handles = [p.register_post_accumulate_grad_hook(filed) for p in parameters if not isinstance(p, DTensor)]
    method.backward = then_filed
    try:
        yield
    finally:
        del method.backward
        for handle in handles:
            handle.remove()


def unreduced(modules: list[Any]) -> Iterator[Tensor]:
    """Whole gradients that sharded networks keep until the last micro-batch; these names are private in torch."""
    for module in modules:
        for group in getattr(module._get_fsdp_state(), "_fsdp_param_groups", ()):
            for held in group.fsdp_params:
                if held.unsharded_accumulated_grad is not None:
                    yield held.unsharded_accumulated_grad
                elif hasattr(held, "_unsharded_param") and held.unsharded_param.grad is not None:
                    yield held.unsharded_param.grad
