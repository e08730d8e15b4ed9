"""Remote samples, read with their neighbours: rows of a block that lie side by side in a shard are one extent."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from datamodules.disk_cache import DiskCache
from datamodules.index_file import Index
from datamodules.remote import RemoteOptions, fetch
from datamodules.rows import Rows
from lightning_t2i.paths import resolve

log = logging.getLogger(__name__)
GAP = 1 << 16  # bytes between two samples that are read rather than skipped by a request of their own
BLOCKS_KNOWN = 4096  # blocks whose extents are remembered
EVERYTHING = ("", "json_", "txt_")  # members of a sample by the first part of their columns' names
TOGETHER = 16  # extents that are fetched at once and held until they are in the cache


class Extent(NamedTuple):
    """Bytes [start, end) of a shard."""

    shard: int
    start: int
    end: int


class Extents:
    """Reads the members of samples through extents, which a folder or the memory keeps up to a limit.

    Every lane of the order has one block open at a time. Where the open blocks of all lanes fit the limit, a sample's
    neighbours are read with it and no byte is read twice; where they do not, they would be gone before their turn, and
    each sample is read alone.

    Args:
        index: of the split.
        rows: the index rows that filters left.
        options: see `RemoteOptions`.
        lanes, block: of the order.
        parts: members that are read; a stream of prompts needs no pictures.
    """

    def __init__(
        self,
        index: Index,
        rows: Rows,
        options: RemoteOptions,
        lanes: int,
        block: int,
        parts: Sequence[str] = EVERYTHING,
    ):
        self.index, self.rows, self.options, self.block, self.parts = index, rows, options, block, parts
        folder = options.cache
        self.disk = DiskCache(resolve(folder), int(options.cache_gb * 1e9)) if folder is not None else None
        self.limit = int(options.memory_mb * 1e6)
        self._memory: OrderedDict[Extent, bytes] = OrderedDict()
        self._held = 0
        self._known: OrderedDict[int, list[Extent]] = OrderedDict()
        self.open_bytes = self._bytes_of_open_blocks(lanes)
        limit = options.cache_gb * 1e9 if self.disk else self.limit
        self.ahead = self.open_bytes <= limit
        if not self.ahead:
            log.warning(
                "open blocks of all lanes are %.1f GB and the cache holds %.1f: each sample is a request of its own. "
                "Raise remote.%s, or lower lanes or block",
                *(self.open_bytes / 1e9, limit / 1e9, "cache_gb" if self.disk else "memory_mb (or name remote.cache)"),
            )

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_memory": OrderedDict(), "_held": 0}

    @property
    def held(self) -> int:
        """Bytes that this process keeps in memory."""
        return self._held

    def _bytes_of_open_blocks(self, lanes: int) -> int:
        some = self.rows[:: max(1, len(self.rows) // 1024)]
        starts, ends = self._spans(some)
        return int((ends - starts).mean() * min(lanes * self.block, len(self.rows)))

    def _spans(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First and last byte of all members of index rows."""
        starts, ends = [], []
        for name in self.parts:
            if f"{name}offset" in self.index.columns:
                offsets, sizes = self.index[f"{name}offset"][rows], self.index[f"{name}size"][rows]
                starts.append(np.where(sizes > 0, offsets, np.iinfo(np.int64).max))
                ends.append(np.where(sizes > 0, offsets + sizes, 0))
        last = np.max(ends, axis=0)
        return np.minimum(np.min(starts, axis=0), last), last  # nothing, where a sample has none of the members

    def _extents(self, row: int) -> list[Extent]:
        """The extents of the block of a row; blocks are cut within each bucket, as the order cuts them."""
        bucket = int(self.rows.class_of(row))
        first, end = int(self.rows.firsts[bucket]), int(self.rows.firsts[bucket + 1])
        number = row - (row - first) % self.block
        if number not in self._known:
            rows = self.rows[number : min(number + self.block, end)]
            starts, ends = self._spans(rows)
            found: list[Extent] = []
            for shard, start, end in zip(
                self.index["shard"][rows].tolist(), starts.tolist(), ends.tolist(), strict=True
            ):
                last = found[-1] if found else None
                joins = last is not None and last.shard == shard and last.end <= start <= last.end + GAP
                if last is not None and joins and end - last.start <= self.options.read_mb * 1e6:
                    found[-1] = last._replace(end=end)
                else:
                    found.append(Extent(shard, start, end))
            self._known[number] = found
            while len(self._known) > BLOCKS_KNOWN:
                self._known.popitem(last=False)
        return self._known[number]

    def extent_of(self, row: int) -> Extent:
        """The extent that holds the members of a row of the order."""
        starts, ends = self._spans(self.rows[row : row + 1])
        shard, start, end = int(self.index["shard"][self.rows[row]]), int(starts[0]), int(ends[0])
        if self.ahead:
            for extent in self._extents(row):
                if extent.shard == shard and extent.start <= start and end <= extent.end:
                    return extent
        return Extent(shard, start, end)

    def prepare(self, rows: Iterable[int]) -> None:
        """Fetches what is missing of the extents of `rows`, many at once."""
        wanted = [e for e in dict.fromkeys(self.extent_of(row) for row in rows) if not self._has(e)]
        for first in range(0, len(wanted), TOGETHER):
            some = wanted[first : first + TOGETHER]
            for extent, data in zip(some, fetch([self._range(e) for e in some], self.options), strict=True):
                self._keep(extent, data)

    def read(self, row: int, offset: int, size: int) -> bytes:
        """`size` bytes at `offset` of the shard of a row, which belong to its members; less where the shard ends."""
        extent = self.extent_of(row)
        if self.disk is not None:
            found = self.disk.read(self._name(extent), extent.end - extent.start, offset - extent.start, size)
            if found is not None:
                return found
        data = self._memory.get(extent)
        if data is None:
            (data,) = fetch([self._range(extent)], self.options)
            self._keep(extent, data)
        else:
            self._memory.move_to_end(extent)
        return data[offset - extent.start : offset - extent.start + size]

    def _range(self, extent: Extent) -> tuple[str, int, int]:
        return str(self.index.shards[extent.shard]), extent.start, extent.end

    def _name(self, extent: Extent) -> str:
        return f"{self.index.sha}/{self.index.shards[extent.shard]}/{extent.start}-{extent.end}"

    def _has(self, extent: Extent) -> bool:
        if extent in self._memory:
            return True
        return self.disk is not None and self.disk.has(self._name(extent), extent.end - extent.start)

    def _keep(self, extent: Extent, data: bytes) -> None:
        whole = len(data) == extent.end - extent.start  # else the shard is cut, and may be mended
        if self.disk is not None and whole:
            self.disk.write(self._name(extent), data)
            if self._has(extent):
                return
        self._memory[extent] = data
        self._held += len(data)
        while self._held > self.limit and len(self._memory) > 1:
            self._held -= len(self._memory.popitem(last=False)[1])
