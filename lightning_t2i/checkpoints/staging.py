"""What a save keeps of a training's tensors: whole or in parts, as copies that the training does not touch."""

from __future__ import annotations

import copy
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_t2i.state_io import full_tensor

THREADS = 4
LARGE = 2**16  # elements from which a copy is worth a thread


class Staging:
    """Takes tensors for a checkpoint, see `Saved.take`.

    Copies for a save in the background are written into the same memory at every save: fresh memory would cost the
    training thread more than the copy does. It is as large as what this process writes. Large tensors of the CPU are
    copied by several threads: the training waits, and one thread does not use all of the memory's bandwidth.

    A part that several processes hold is kept by one of them: by the copy that has the fewest bytes so far. All
    processes take the same tensors in the same order, so that they agree without a word.

    Args:
        sharded: keep this process's part of a tensor; else the whole, for which all processes talk.
        asynchronous: copy; else the state is written before the training goes on, and parts need no copy.
        writes: whether this process writes whole tensors, which rank 0 does; the others keep nothing of them.
    """

    def __init__(self, sharded: bool, asynchronous: bool, writes: bool = True):
        self.sharded, self.asynchronous, self.writes = sharded, asynchronous, writes
        self._buffers: list[Tensor] = []
        self._taken: list[Any] = []
        self._threads = ThreadPoolExecutor(THREADS) if asynchronous else None
        self._copies: list[Future[Tensor]] = []

    def begin(self) -> None:
        """Starts a save; what was taken for the one before is overwritten."""
        self._used = 0
        self._taken = []
        self._bytes: dict[int, list[int]] = {}  # number of copies -> what each of them writes

    def take(self, tensor: Tensor) -> Any:
        """A tensor on the CPU, or a `Shard`, empty where another process writes it, or None in place of a whole tensor
        that this process does not write. A copy has its values when the state is `settled`."""
        if self.sharded and isinstance(tensor, DTensor):
            from lightning_t2i.checkpoints.sharded import Shard  # takes a while to import

            found: Any = Shard.of(tensor)
            if not self._falls_here(tensor, found.local.nbytes):
                found.local = found.local.new_empty(0)
            elif self.asynchronous:
                found.local = self._copy(found.local)
        else:
            tensor = tensor.detach()
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            found = None
            if self.writes:
                found = self._copy(tensor) if self.asynchronous else full_tensor(tensor)
        self._taken.append(found)
        return found

    def _falls_here(self, tensor: DTensor, size: int) -> bool:
        """Whether this process is the one that writes its part of a tensor, which has so many bytes."""
        here, copies = 0, 1
        coordinate = tensor.device_mesh.get_coordinate() or ()
        for at, length, placement in zip(coordinate, tensor.device_mesh.shape, tensor.placements, strict=True):
            if placement.is_replicate():
                here, copies = here * length + at, copies * length
        written = self._bytes.setdefault(copies, [0] * copies)
        writer = written.index(min(written))
        written[writer] += size
        return writer == here

    def _copy(self, tensor: Tensor) -> Tensor:
        if self._used == len(self._buffers):
            self._buffers.append(torch.empty(0))
        buffer = self._buffers[self._used]
        if (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[self._used] = buffer
        self._used += 1
        if self._threads is not None and tensor.device.type == "cpu" and tensor.numel() >= LARGE:
            self._copies.append(self._threads.submit(buffer.copy_, tensor))
        else:
            buffer.copy_(tensor)
        return buffer

    def settled(self, state: dict[str, Any]) -> dict[str, Any]:
        """A copy of a state that does not change when the training goes on; what was taken is not copied again."""
        kept = copy.deepcopy(state, {id(found): found for found in self._taken})
        while self._copies:
            self._copies.pop().result()
        return kept
