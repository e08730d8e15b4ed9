"""The order of samples: a sequence that depends only on the seed, the epoch and the data index.

    epoch    blocks of `block` consecutive rows are shuffled, rows are shuffled within each block, the result is cut
             into `lanes` contiguous lanes
    position q of an epoch reads lane q mod lanes at depth q div lanes; position p is place p mod n of epoch p div n
    batch    k of global size B holds positions [kB, (k+1)B); rank r of W takes its contiguous slice of B/W

A lane moves slowly through the shards (a few blocks are open at a time), while neighbours in a batch come from all
over the data set. Ranks and workers only slice the sequence, so neither changes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from lightning_t2i.errors import UserError


class GlobalOrder:
    """Maps positions of the endless sample sequence to rows of an index.

    The plan of one epoch is held, 2 bytes a row: the sequence is read forwards, and a batch that touches two epochs is
    the last of one.

    Args:
        n: rows of the index.
        sha: identity of the index; another index gives another order.
        seed: seed of the order; any value with a stable `str`.
        lanes: number of lanes, clipped to n. It belongs to the data set: changing it changes the order.
        block: rows per block, at most 65536, clipped to n. Larger blocks mix better and read more of a shard at a time.
        shuffle: False gives the rows in index order, every epoch.
    """

    def __init__(self, n: int, sha: str, seed: object, lanes: int = 1024, block: int = 256, shuffle: bool = True):
        if n < 1:
            raise UserError("A stream needs at least one sample", given=n)
        if lanes < 1 or not 1 <= block <= 65536:
            raise UserError(
                "Bad order", given=f"lanes={lanes}, block={block}", allowed="lanes >= 1, 1 <= block <= 65536"
            )
        self.n, self.sha, self.seed, self.shuffle = n, sha, seed, shuffle
        self.lanes, self.block = min(lanes, n), min(block, n)
        self._plans: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def rows(self, positions) -> np.ndarray:
        """Rows (int64) at `positions`, any integer array."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, places = np.divmod(positions, self.n)
        if not self.shuffle:
            return places
        # Lanes differ in length by at most one; the longer ones come first, so that the last depth is theirs alone.
        depth, longer = divmod(self.n, self.lanes)
        lane = places % self.lanes
        index = lane * depth + np.minimum(lane, longer) + places // self.lanes
        rows = np.empty_like(index)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            order, starts, offsets = self._plan(int(epoch))
            slot = np.searchsorted(starts, index[chosen], side="right") - 1
            rows[chosen] = order[slot] * self.block + offsets[order[slot], index[chosen] - starts[slot]]
        return rows

    def row(self, position: int) -> int:
        """The row at one position."""
        return int(self.rows([position])[0])

    def block_rows(self, row: int) -> Iterator[int]:
        """The rows of the block of `row`, from `row` on and around: who stands in for a bad sample, in this order."""
        start = row // self.block * self.block
        size = min(self.block, self.n - start)
        return (start + (row - start + i) % size for i in range(size))

    def ready(self, position: int) -> None:
        """Plans the epoch of a position; processes that are then forked share it until they come to the next."""
        self.row(position)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": {}}  # another process makes them sooner than it is sent them

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Blocks in reading order, where each starts in the shuffled list, and the order within each block."""
        if epoch not in self._plans:
            self._plans.clear()  # before the next one takes as much
            generator = keyed(f"{self.seed}\0{epoch}\0{self.sha}")
            blocks = -(-self.n // self.block)
            sizes: np.ndarray = np.full(blocks, self.block, dtype=np.int64)
            sizes[-1] = self.n - (blocks - 1) * self.block
            order = generator.permutation(blocks)
            offsets = np.broadcast_to(np.arange(self.block, dtype=np.uint16), (blocks, self.block)).copy()
            generator.permuted(offsets, axis=1, out=offsets)
            offsets[-1, : sizes[-1]] = generator.permutation(sizes[-1])
            starts = np.cumsum(sizes[order]) - sizes[order]
            self._plans[epoch] = order, starts, offsets
        return self._plans[epoch]


def keyed(text: str) -> np.random.Generator:
    """A generator whose draws depend on a text alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))


def batch_positions(k: int, size: int, rank: int = 0, world: int = 1, where: str = "batch_size") -> np.ndarray:
    """Positions (int64) that a rank reads for batch k of global size `size`, which is the config's `where`.

    Raises:
        UserError: the batch does not divide by the number of processes.
    """
    if size % world:
        lower = size // world * world or world
        raise UserError(
            "The batch does not divide by the number of processes",
            where=where,
            given=f"{size} samples over {world} processes",
            allowed=f"multiples of {world}, for example {lower} or {lower + world}",
        )
    share = size // world
    return np.arange(k * size + rank * share, k * size + (rank + 1) * share, dtype=np.int64)


def finite_batches(n: int, size: int, rank: int = 0, world: int = 1) -> list[range]:
    """A rank's rows of every batch of one pass over n rows in index order, each row on exactly one rank.

    All ranks get the same number of batches (FSDP and metrics would otherwise hang) and none is empty: the last batch
    is smaller, its shares differ by at most one, and fewer left-over rows than ranks join the batch before it. Nothing
    is dropped and nothing is repeated, so that metrics over the pass do not depend on the number of ranks.
    """
    if n < world:
        raise UserError("Fewer samples than processes", given=f"{n} samples over {world} processes")
    batch_positions(0, size, rank, world)  # refuses a size that does not divide
    edges = [*range(0, n, size), n]
    if len(edges) > 2 and n - edges[-2] < world:
        del edges[-2]
    batches = []
    for start, stop in pairwise(edges):
        cuts = [start + (stop - start) * r // world for r in range(world + 1)]
        batches.append(range(cuts[rank], cuts[rank + 1]))
    return batches
