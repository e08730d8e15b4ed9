"""Processes that share the shards of a cache make each of them once."""

from __future__ import annotations

import numpy as np

from datamodules.caches import Cache
from datamodules.records import Shards


def test_a_slow_process_makes_no_shard_of_a_finished_cache_again(make_data_set):
    shards, made = Shards(make_data_set(50), "train"), []

    def filled(cache: Cache) -> bool:
        def make(rows: np.ndarray, path) -> dict:
            made.append(int(rows[0]))
            path.write_bytes(b"")
            return {}

        return cache.fill(lambda: make, lambda reports: {})

    class Slow(Cache):
        """Others finish the cache when it is about to take its first shard."""

        def _lock(self, name: str, timeout: float = -1):
            if name == self.names[0] and not made:
                assert filled(Cache(*given))
            return super()._lock(name, timeout)

    given = (shards.folder / "cache", shards, {}, "things", "", ".npy")
    assert filled(Slow(*given))
    assert made == [0, 20, 40]
