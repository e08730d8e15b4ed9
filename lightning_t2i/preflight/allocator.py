"""A simulated allocator: how many bytes of tensor storage are alive, and how many were at the worst moment.

It watches what is dispatched, as torch's own MemTracker does, and follows each storage from the operation that returns
it until Python and autograd let go of it. Tensors may be fake (no data) or real. What a kernel allocates and frees
inside one operation is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from lightning_t2i.flops import Operations
from lightning_t2i.preflight.remembered import DEVICE, Remembered

OTHER = "activations"  # whatever nobody adopted: saved for the backward pass, or temporary
# Collective -> bytes that a process sends or receives on a ring of n, as multiples of the larger buffer / n.
RING: dict[str, Callable[[int], int]] = {
    "_allgather_base_": lambda n: n - 1,
    "_reduce_scatter_base_": lambda n: n - 1,
    "allreduce_": lambda n: 2 * (n - 1),
}


class Allocator(Operations):
    """Follows storages and counts operations (`total`) while it is entered.

    Args:
        remembered: what operations returned to allocators before this one.

    Attributes:
        live, at_peak: bytes by category, now and when their sum was largest.
        alive, peak: those sums in bytes.
        owner: network that runs; flops_of: operations by owner.
        moved: bytes that collectives moved through this process, by (name, ranks of the group).
    """

    def __init__(self, remembered: Remembered | None = None) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self.alive = self.peak = 0
        self.owner = ""
        self.flops_of: Counter[str] = Counter()
        self.moved: Counter[tuple[str, tuple[int, ...]]] = Counter()
        self._call = remembered or Remembered()
        self._known: dict[int, tuple[int, str]] = {}  # address of the C++ storage -> bytes, category

    def adopt(self, tensors: Iterable[Tensor], category: str) -> int:
        """Files tensors under a category, also those seen before; returns the bytes that are new to it."""
        added = 0
        for tensor in tensors:
            storage = _local(tensor).untyped_storage()
            size, old = self._known.get(storage._cdata, (0, None))
            if old is None:
                self._add(storage, category)
                added += storage.nbytes()
            elif old != category:
                self._known[storage._cdata] = size, category
                self.live[old] -= size
                self.live[category] += size
                added += size
        return added

    def forget_peak(self) -> None:
        """Starts to look for the worst moment again, from now."""
        self.peak, self.at_peak = self.alive, self.live.copy()

    def _add(self, storage: Any, category: str = OTHER) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = 0, category
        weakref.finalize(storage, self._free, key).atexit = False
        self._resize(key, storage.nbytes())

    def _resize(self, key: int, size: int) -> None:
        old, category = self._known[key]
        self._known[key] = size, category
        self.live[category] += size - old
        self.alive += size - old
        if self.alive > self.peak:
            self.peak, self.at_peak = self.alive, self.live.copy()

    def _free(self, key: int) -> None:
        size, category = self._known.pop(key)
        self.live[category] -= size
        self.alive -= size

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the guard against it costs as much as the rest

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE and isinstance(args[0], FakeTensor):  # half of all calls; this is the whole answer
            return args[0].fake_device
        # A sharded tensor's operation runs unseen: DTensor tries each out at its full size first, on fakes of its own.
        sharded = any(issubclass(kind, DTensor) for kind in types)
        if sharded:
            with self._call:
                out = func(*args, **(kwargs or {}))
        else:
            out = self._call(func, args, kwargs or {})
        if func.namespace == "c10d":
            self._count(func, args)
        for leaf in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(_local(leaf).untyped_storage())
        before = self.total
        if not sharded:
            self.add(func, args, kwargs or {}, out)
        if self.total > before:
            self.flops_of[self.owner] += self.total - before
        return out

    def _count(self, func: Any, args: Any) -> None:
        name = func._overloadpacket.__name__
        if name not in RING:
            return
        group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject) and _is_group(a))
        ranks = tuple(dist.get_process_group_ranks(group))
        largest = max(x.nbytes for x in tree_leaves(args) if isinstance(x, Tensor))
        self.moved[name, ranks] += largest * RING[name](len(ranks)) // len(ranks)

    def __enter__(self) -> Any:
        """FSDP2 frees gathered weights by resizing their storage, which no operation tells."""
        resize = self._resize_ = torch.UntypedStorage.resize_

        def resized(storage: Any, size: int) -> Any:
            out = resize(storage, size)
            if storage._cdata in self._known:
                self._resize(storage._cdata, size)
            return out

        torch.UntypedStorage.resize_ = resized
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize_
        super().__exit__(*error)


def _is_group(value: Any) -> bool:
    return "ProcessGroup" in str(value._type())


def _local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
