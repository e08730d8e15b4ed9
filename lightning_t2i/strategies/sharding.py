"""Sharding of one network: blocks first, then its root, on the mesh of the strategy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from lightning_t2i.errors import UserError
from lightning_t2i.rank0 import receive

REPLICATE_BELOW_BYTES = 2 * 2**30  # a frozen network under this size is kept whole on every process


def roots(network: nn.Module) -> list[nn.Module]:
    """The modules whose own forward is called: `network.shard_roots()` where a wrapper defines it; the parts of an
    autoencoder, whose decoder's backward would else give back the weights that its encoder's still needs; or itself."""
    if declared := getattr(network, "shard_roots", None):
        return declared()
    if any(kind.__name__ == "AutoencoderMixin" for kind in type(network).__mro__):  # diffusers' takes long to import
        return [part for part in network.children() if next(part.parameters(), None) is not None]
    return [network]


def blocks(root: nn.Module) -> Iterator[nn.Module]:
    """The repeated blocks of a diffusers or transformers network, innermost first, as its class declares them."""
    return _named(root, getattr(root, "_no_split_modules", None) or ())


def _named(root: nn.Module, names: Iterable[str]) -> Iterator[nn.Module]:
    """The modules below a root whose classes have these names, innermost first."""
    names = set(names)
    for module in reversed(list(root.modules())):
        if type(module).__name__ in names and module is not root:
            yield module


def compile_blocks(network: nn.Module) -> None:
    """Compiles each repeated block in place; parameter names stay as they are."""
    for root in roots(network):
        found = list(blocks(root)) or [root]
        for module in found:
            module.compile()


def shard_network(network: nn.Module, mesh: DeviceMesh, precision: str = "fp32") -> None:
    """Shards a network in place, each root on its own.

    Every root gives its memory back after each forward (`reshard_after_forward=True`): with FSDP2's default a forward
    without gradients leaves the root whole, and later forwards silently use the weights of that moment.

    A mesh of one process that computes in float32 has nothing to cut or to cast: its networks stay plain.

    Rank 0's weights are sent block by block, so that no other process ever holds a whole network.

    Args:
        network: not yet sharded, of the same architecture on all processes.
        mesh: of the dimensions replicate and shard, or of shard alone.
        precision: "bf16" computes in bfloat16 and reduces gradients in float32.

    Raises:
        UserError: weights of two precisions, such as float32 adapters in a bfloat16 backbone; trained ones without
            dimensions.
    """
    if mesh.size() == 1 and precision == "fp32":
        receive(network, mesh.device_type)
        return
    if mesh.ndim > 1 and mesh["replicate"].size() == 1:
        mesh = mesh["shard"]  # over two dimensions DTensor weighs every pair of placements, at each new shape
    policy = root_policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = root_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if hasattr(network, "compute_dtype"):  # it casts its inputs itself, but for times, which bf16 would round
            network.compute_dtype = torch.bfloat16
            root_policy = replace(policy, cast_forward_inputs=False)
    for root in roots(network):
        if isinstance(root, FSDPModule):
            continue
        if len(dtypes := {str(parameter.dtype) for parameter in root.parameters()}) > 1:
            what, fix = "A network with weights of two precisions cannot be sharded", "one precision, or one process"
            raise UserError(what, where=type(root).__name__, given=", ".join(sorted(dtypes)), fix=fix)
        whole = _left_whole(root)
        # Layers that stay in float32, as the root declares them, are units of their own and take their inputs as given.
        kept = [
            (layer, MixedPrecisionPolicy(cast_forward_inputs=False))
            for layer in _named(root, getattr(root, "_keep_in_fp32_blocks", ()))
        ]
        for block, chosen in [*kept, *((block, policy) for block in blocks(root))]:
            receive(block, mesh.device_type, buffers=False)
            fully_shard(block, mesh=mesh, mp_policy=chosen, reshard_after_forward=True, ignored_params=whole)
        receive(root, mesh.device_type, buffers=False)
        fully_shard(root, mesh=mesh, mp_policy=root_policy, reshard_after_forward=True, ignored_params=whole)
        for method in getattr(root, "shard_forward_methods", ("encode", "decode")):
            if hasattr(root, method):
                register_fsdp_forward_method(root, method)
    receive(network, mesh.device_type)


def _left_whole(root: nn.Module) -> set[nn.Parameter]:
    """Frozen parameters without dimensions, which FSDP2 cannot cut: they stay as they are on every process."""
    scalars = {name: parameter for name, parameter in root.named_parameters() if parameter.dim() == 0}
    if trained := [name for name, parameter in scalars.items() if parameter.requires_grad]:
        what, fix = "A trained parameter without dimensions cannot be sharded", "give it the shape [1], see Towers"
        raise UserError(what, where=type(root).__name__, given=", ".join(trained), fix=fix)
    return set(scalars.values())


def shard_frozen(network: nn.Module, mesh: DeviceMesh, precision: str = "fp32", whole: bool = False) -> None:
    """Shards a large frozen network over the shard dimension alone; a small one, or `whole`, stays so everywhere."""
    size = sum(p.numel() * p.element_size() for p in network.parameters())
    if size >= REPLICATE_BELOW_BYTES and not whole:
        shard_network(network, mesh["shard"], precision)
    else:
        receive(network, mesh.device_type)


@contextmanager
def unsharded(network: nn.Module) -> Iterator[None]:
    """Keeps the weights of the roots whole: for a backward pass that begins inside a network, not at its output.

    FSDP2 gathers a root's weights when a gradient comes to its output. The weights of blocks come by themselves.
    """
    sharded = [root for root in roots(network) if isinstance(root, FSDPModule)]
    for root in sharded:
        root.unshard()
    yield
    for root in sharded:
        root.reshard()


def set_gradient_sync(network: nn.Module, enabled: bool) -> None:
    """Whether the next backward passes reduce gradients over the processes; nothing to do for a plain network."""
    for root in roots(network):
        if isinstance(root, FSDPModule):
            root.set_requires_gradient_sync(enabled)
