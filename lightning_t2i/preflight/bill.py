"""What a training costs one process, and which networks a method has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_t2i.checkpoints.snapshots import twins
from lightning_t2i.forward_units import counted_modules
from lightning_t2i.preflight.attribution import owners
from lightning_t2i.state_io import local_tensor


@dataclass(frozen=True)
class Network:
    """A network of a method: parameters and those that are trained, over all processes; bytes of one process.

    kind: trained, frozen, EMA, or the name of the network whose weights it has.
    """

    name: str
    kind: str
    parameters: int
    trained: int
    precision: str
    bytes: int


@dataclass(frozen=True)
class Encoding:
    """The captions of one process's part of a micro-batch in a frozen text encoder.

    rows; flops: operations; width, pooled: channels of a token and of the pooled output (0: none).
    """

    rows: int
    flops: int
    width: int
    pooled: int


@dataclass
class Bill:
    """What a training costs one process.

    networks; memory: bytes by category at the worst moment, and peak their sum; worst: the training step it was in;
    flops_of: operations of a mean training step on one process, by network (autoencoders by half); moved: bytes of its
    collectives in a mean step, by (name, spans nodes); checkpoint: bytes of one, whole tensors; snapshot: bytes of one
    of the averages, in bf16; optimizers: group -> class; batch: stream -> bytes of one process's part of a micro-batch;
    absent: see `Noted`; encodings: of the streams with captions, whether or not they are cached.
    """

    networks: list[Network] = field(default_factory=list)
    memory: Counter[str] = field(default_factory=Counter)
    peak: int = 0
    worst: int = 0
    flops_of: Counter[str] = field(default_factory=Counter)
    moved: Counter[tuple[str, bool]] = field(default_factory=Counter)
    checkpoint: int = 0
    snapshot: int = 0
    optimizers: dict[str, str] = field(default_factory=dict)
    batch: dict[str, int] = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)
    encodings: dict[str, Encoding] = field(default_factory=dict)


def networks(method: Any) -> Iterator[Network]:
    """The networks of a method; what several share is counted with the first that has it."""
    seen: set[int] = set()
    first = {id(module): name for name, module in owners(method).items()}
    trained = {id(p) for group in method.groups.values() for p in group.parameters}
    for name, network in method.named_children():
        own = [p for p in network.parameters() if id(p) not in seen]
        seen |= {id(p) for p in own}
        counted = sum(p.numel() for p in own if id(p) in trained)
        kind = "trained" if name in method.groups else "frozen" if name in method.frozen_identities else "EMA"
        if not own and (whose := [first[id(m)] for m in counted_modules(network).values()]):
            kind = whose[0]
        sizes: Counter[str] = Counter()
        for p in own:
            sizes[str(p.dtype).removeprefix("torch.")] += p.numel()
        precision = " + ".join(dtype for dtype, _ in sizes.most_common()) or "-"
        local = sum(local_tensor(p).nbytes for p in own)
        yield Network(name, kind, sum(p.numel() for p in own), counted, precision, local)


def checkpoint_bytes(method: Any) -> int:
    """Bytes of weights, averages and optimizer states of all groups, as whole tensors."""
    groups = method.groups.values()
    tensors = [tensor for group in groups for _, tensor in group.tensors()]
    states = [x for group in groups for x in tensors_of(group.optimizer.state)]
    return sum(x.numel() * x.element_size() for x in [*tensors, *states])


def snapshot_bytes(method: Any) -> int:
    """Bytes of the averages of all groups as bf16."""
    return sum(2 * tensor.numel() for _, tensor in twins(method.groups.values()))


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in nested mappings, sequences and records."""
    if isinstance(value, Tensor):
        return [value]
    if hasattr(value, "__dataclass_fields__"):
        value = vars(value)
    if isinstance(value, dict):
        return [x for child in value.values() for x in tensors_of(child)]
    return [x for child in value for x in tensors_of(child)] if isinstance(value, list | tuple) else []
