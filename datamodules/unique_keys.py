"""Whether all samples of many shards have keys of their own: by eight bytes a sample, not by the keys themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq


def _hashes(keys: list[str]) -> np.ndarray:
    """uint64 [keys]."""
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, np.uint64)


def _keys(part: Path) -> list[str]:
    return pq.read_table(part, columns=["key"], use_threads=False)["key"].to_pylist()


def shared_key(parts: Mapping[str, Path]) -> tuple[str, str, str] | None:
    """A key that two shards have, with the first and the second of them.

    Args:
        parts: shard -> Parquet file of its rows, whose keys differ within a shard.
    """
    counts = [pq.read_metadata(part).num_rows for part in parts.values()]
    found, start = np.empty(sum(counts), np.uint64), 0
    for part, count in zip(parts.values(), counts, strict=True):
        found[start : start + count] = _hashes(_keys(part))
        start += count
    found.sort()
    twice = np.unique(found[1:][found[1:] == found[:-1]])
    owners: dict[str, str] = {}
    for shard, part in parts.items() if len(twice) else ():  # two keys may have one hash: the keys themselves decide
        keys = _keys(part)
        for place in np.flatnonzero(np.isin(_hashes(keys), twice)).tolist():
            first = owners.setdefault(keys[place], shard)
            if first != shard:
                return keys[place], first, shard
    return None
