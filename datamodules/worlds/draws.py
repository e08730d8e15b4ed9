"""Keyed random choices: the same on every machine and library version, whatever was drawn before."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Draws:
    """A stream of choices that depends on its key alone.

    Raw Philox words (Salmon et al. 2011) are used: NumPy keeps them fixed, unlike the distributions of its Generator.
    """

    def __init__(self, *key: object):
        digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
        self._bits = np.random.Philox(key=int.from_bytes(digest, "little"))
        self._words: list[int] = []

    def below(self, n: int) -> int:
        """An integer in [0, n), n << 2^32."""
        if not self._words:
            self._words = (self._bits.random_raw(32) >> np.uint64(32)).tolist()
        return self._words.pop() * n >> 32

    def choose(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], n: int) -> list[T]:
        """`n` different items in random order."""
        rest = list(items)
        return [rest.pop(self.below(len(rest))) for _ in range(n)]
