"""Aspect-ratio buckets: each picture is read at the size of a list whose shape is nearest to its own.

The sizes are a list, or those of an area: for every width that is a multiple of `step` the highest multiple whose
product stays within side^2, and the same with height and width exchanged, as NovelAI published and SDXL took up (arXiv
2307.01952, section 2.3 and appendix I; its table has a few more).

    bucket of a picture of w x h: the aspect W/H whose logarithm is nearest to that of w/h; of several sizes of this
    aspect the largest that needs no more enlargement than max_upscale; none, where each needs more

A batch holds one bucket, and the sequence of batches depends on the seed, the index and the batch size alone:

    epoch e    bucket b of n_b pictures gives the batches with the numbers floor(e n_b / B) to floor((e+1) n_b / B) - 1
               of its own; those of all buckets are shuffled
    batch j    of bucket b holds the positions [jB, (j+1)B) of the endless order of that bucket (datamodules.order)

So what an epoch of a bucket leaves over begins its next batch in the next epoch: in the long run every picture is read
as often as any other, and none is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd

import numpy as np

from datamodules.order import GlobalOrder, finite_batches, keyed
from datamodules.rows import OUT
from lightning_t2i.errors import UserError

_EPOCHS_KEPT = 2


@dataclass(frozen=True)
class Buckets:
    """Sizes of pictures.

    Args:
        sizes: [width, height] of each in pixels; None makes those of an area.
        side: side of the square whose area no size exceeds.
        step: widths and heights are multiples of it.
        max_aspect: longer side over shorter one at most.
        max_upscale: pictures that would have to be enlarged more than so many times are left out.
    """

    sizes: Sequence[Sequence[int]] | None = None
    side: int = 512
    step: int = 64
    max_aspect: float = 2.0
    max_upscale: float = 1.0

    def __post_init__(self) -> None:
        if self.sizes is None and not (1 <= self.step <= self.side and self.max_aspect >= 1):
            given = f"side={self.side}, step={self.step}, max_aspect={self.max_aspect}"
            allowed = "1 <= step <= side, max_aspect >= 1"
            raise UserError("No buckets of this area", where="buckets", given=given, allowed=allowed)
        wrong = [size for size in self.sizes or () if len(size) != 2 or min(size) < 1]
        if wrong or (self.sizes is not None and not 1 <= len(self.all) < OUT):
            given, allowed = str(wrong or f"{len(self.all)} sizes"), f"1 to {OUT - 1} sizes, each [width, height]"
            raise UserError("Not sizes of buckets", where="buckets.sizes", given=given, allowed=allowed)
        if not self.max_upscale > 0:
            raise UserError("Not a factor", where="buckets.max_upscale", given=self.max_upscale, allowed="> 0")

    @cached_property
    def all(self) -> tuple[tuple[int, int], ...]:
        """(width, height) of each bucket, from tall to wide, those of one aspect from small to large."""
        if self.sizes is not None:
            found = {(int(width), int(height)) for width, height in self.sizes}
        else:
            lengths = range(self.step, self.side**2 // self.step + 1, self.step)
            pairs = {(a, self.side**2 // a // self.step * self.step) for a in lengths}
            found = {pair for a, b in pairs if max(a, b) <= self.max_aspect * min(a, b) for pair in ((a, b), (b, a))}
        return tuple(sorted(found, key=lambda size: (size[0] / size[1], size[0])))

    @property
    def square_side(self) -> int:
        """Side of a square no smaller than the largest size: what a batch costs at most."""
        unit = gcd(*(length for size in self.all for length in size))
        largest = max(width * height for width, height in self.all)
        return -(-int(np.ceil(np.sqrt(largest))) // unit) * unit

    def of(self, width: np.ndarray, height: np.ndarray) -> np.ndarray:
        """The bucket of pictures by their sizes, uint8; `OUT` where none fits or the size is not known (0)."""
        sizes = np.array(self.all)
        aspects, groups = np.unique(sizes[:, 0] / sizes[:, 1], return_inverse=True)
        edges = np.sqrt(aspects[1:] * aspects[:-1])  # no logarithm, whose last bit differs between machines
        nearest = np.searchsorted(edges, width / np.maximum(height, 1))
        found: np.ndarray = np.full(len(nearest), OUT, np.uint8)
        known = (np.asarray(width) > 0) & (np.asarray(height) > 0)
        for smaller in range(int(np.bincount(groups).max())):  # the largest of each aspect, then the next one
            of_group = np.full(len(aspects), OUT, np.uint8)
            for group in range(len(aspects)):
                members = np.flatnonzero(groups == group)[::-1]
                of_group[group] = members[smaller] if smaller < len(members) else OUT
            bucket = of_group[nearest]
            least = np.full((2, OUT + 1), np.inf)
            least[:, : len(sizes)] = sizes.T / self.max_upscale
            fits = known & (width >= least[0].take(bucket)) & (height >= least[1].take(bucket))
            found = np.where(fits & (found == OUT), bucket, found)
        return found


class BucketOrder:
    """Maps positions of the endless sequence to rows, where the rows of a bucket lie side by side.

    Args:
        firsts: number of the first row of each bucket, and of all rows.
        size: samples of a batch.
        sha, seed, lanes, block, shuffle: see `GlobalOrder`; lanes are shared out by the sizes of buckets.
    """

    def __init__(
        self,
        firsts: Sequence[int] | np.ndarray,
        size: int,
        sha: str,
        seed: object,
        lanes: int = 1024,
        block: int = 256,
        shuffle: bool = True,
    ):
        self.firsts, self.size, self.sha, self.seed, self.shuffle = np.asarray(firsts), size, sha, seed, shuffle
        self.counts = np.diff(self.firsts)
        n = int(self.firsts[-1])
        self.orders = {
            b: GlobalOrder(int(count), sha, f"{seed}/bucket {b}", max(1, lanes * int(count) // n), block, shuffle)
            for b, count in enumerate(self.counts)
            if count
        }
        self._plans: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def rows(self, positions) -> np.ndarray:
        """Rows (int64) at `positions`, any integer array."""
        positions = np.asarray(positions, dtype=np.int64)
        if not self.shuffle:
            return positions % self.firsts[-1]
        batches, places = np.divmod(positions, self.size)
        rows = np.empty_like(positions)
        for k in np.unique(batches).tolist():
            bucket, turn = self.turn(k)
            chosen = batches == k
            rows[chosen] = self.firsts[bucket] + self.orders[bucket].rows(turn * self.size + places[chosen])
        return rows

    def turn(self, k: int) -> tuple[int, int]:
        """Bucket of batch k, and how many batches of that bucket come before it."""
        epoch, place = self._place(k)
        buckets, turns = self._plan(epoch)
        return int(buckets[place]), int(turns[place])

    def ready(self, position: int) -> None:
        """Plans, for every bucket, the epoch of the batch that is its next one at a position; see `GlobalOrder`."""
        if not self.shuffle:
            return
        epoch, place = self._place(position // self.size)
        earlier, _ = self._plan(epoch)
        for bucket, order in self.orders.items():
            turn = int(self._before(epoch)[bucket]) + int(np.count_nonzero(earlier[:place] == bucket))
            order.ready(turn * self.size)

    def _place(self, k: int) -> tuple[int, int]:
        """Epoch of batch k, and its place in that."""
        epoch = k * self.size // int(self.firsts[-1])  # not too late: what is left over delays a batch
        while self._before(epoch + 1).sum() <= k:
            epoch += 1
        return epoch, k - int(self._before(epoch).sum())

    def block_rows(self, row: int) -> Iterator[int]:
        """The rows that stand in for a bad one: those of its block, which are of its bucket."""
        bucket = int(np.searchsorted(self.firsts, row, side="right")) - 1
        first = int(self.firsts[bucket])
        return (first + other for other in self.orders[bucket].block_rows(row - first))

    def passes(self, rank: int, world: int) -> list[range]:
        """A rank's rows of every batch of one pass in the order of the rows; no batch holds two buckets.

        Raises:
            UserError: a bucket has fewer rows than there are processes.
        """
        found = []
        for bucket in self.orders:
            first, count = int(self.firsts[bucket]), int(self.counts[bucket])
            if count < world:
                fix = "leave its size out of buckets, or use fewer processes"
                given = f"{count} pictures in bucket {bucket}, {world} processes"
                raise UserError("A bucket has fewer pictures than there are processes", given=given, fix=fix)
            found += [
                range(first + part.start, first + part.stop) for part in finite_batches(count, self.size, rank, world)
            ]
        return found

    def _before(self, epoch: int) -> np.ndarray:
        """Batches of each bucket before an epoch, int64 [buckets]."""
        return epoch * self.counts // self.size

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Bucket of each batch of an epoch, and the number of the batch within it."""
        if epoch not in self._plans:
            first = self._before(epoch)
            shares = self._before(epoch + 1) - first
            generator = keyed(f"{self.seed}\0buckets {epoch}\0{self.sha}")
            buckets = generator.permutation(np.repeat(np.arange(len(shares)), shares))
            turns = np.empty_like(buckets)
            for bucket in self.orders:
                turns[buckets == bucket] = first[bucket] + np.arange(shares[bucket])
            while len(self._plans) >= _EPOCHS_KEPT:
                del self._plans[min(self._plans)]
            self._plans[epoch] = buckets, turns
        return self._plans[epoch]
