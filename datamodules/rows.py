"""Which rows of an index a stream reads, found by their number without a list of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

OUT = 255  # class of a row that is not read
CHUNK = 4096  # rows between two counts
PIECE = 1 << 20  # rows of a piece; of an index that has no more all rows are listed


class Rows:
    """Rows of an index: those of class 0 in the order of the index, then those of class 1, and so on.

    `rows[number]` is a row (int64), `rows[numbers]` and `rows[slice]` are arrays. A byte for each row of the index is
    an eighth of a list of rows, which only a small index affords; without classes nothing is held.

    Args:
        n: rows of the index.
        classes: uint8 [n], class of each row or `OUT`; None takes all rows in their order.
        count: number of classes.
    """

    def __init__(self, n: int, classes: np.ndarray | None = None, count: int = 1):
        self.classes = classes
        self._listed: np.ndarray | None = None
        if classes is None:
            self.firsts = np.array([0, n])
            return
        held = np.concatenate([_counts(classes[s : s + PIECE], count) for s in range(0, n, PIECE)], 1)
        self._before = np.concatenate([np.zeros((count, 1), np.int64), held.cumsum(1)], 1)  # class, chunk
        self.firsts = np.concatenate([[0], self._before[:, -1].cumsum()])  # number of the first row of each class
        if n <= PIECE:
            self._listed = np.concatenate([np.empty(0, np.int64), *self.pieces()])

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def class_of(self, number: Any) -> Any:
        """The class of one or several numbers."""
        return self.firsts.searchsorted(number, side="right") - 1

    def __getitem__(self, number: Any) -> Any:
        if self._listed is not None:
            return self._listed[number]
        if isinstance(number, slice):
            number = np.arange(*number.indices(len(self)))
        numbers = np.asarray(number)
        if np.any((numbers < 0) | (numbers >= len(self))):
            raise IndexError(f"a row of {len(self)}")
        if self.classes is None:
            return numbers if numbers.ndim else np.int64(numbers)
        found = np.array([self._row(self.classes, one) for one in numbers.reshape(-1).tolist()], np.int64)
        return found.reshape(numbers.shape) if numbers.ndim else found[0]

    def _row(self, classes: np.ndarray, number: int) -> int:
        """The row with a number, found by the count of its class before each chunk."""
        c = int(self.class_of(number))
        local = number - int(self.firsts[c])
        before = self._before[c]
        chunk = int(before.searchsorted(local, side="right")) - 1
        held = (classes[chunk * CHUNK : (chunk + 1) * CHUNK] == c).nonzero()[0]
        return chunk * CHUNK + int(held[local - before[chunk]])

    def digest(self) -> str:
        """A hash of what is read in which order, 16 hex digits: of the list of rows, or of several classes."""
        found = hashlib.blake2b(digest_size=8)
        if self.classes is not None and len(self.firsts) > 2:
            found.update(self.classes)
        else:
            for piece in self.pieces():
                found.update(piece)
        return found.hexdigest()

    def pieces(self) -> Iterator[np.ndarray]:
        """All rows in their order, a part at a time (int64)."""
        if self.classes is None:
            yield from (np.arange(s, min(s + PIECE, len(self))) for s in range(0, len(self), PIECE))
            return
        for c in range(len(self.firsts) - 1):
            for start in range(0, len(self.classes), PIECE):
                yield np.flatnonzero(self.classes[start : start + PIECE] == c) + start

    def tolist(self) -> list[int]:
        return self[:].tolist()


def _counts(classes: np.ndarray, count: int) -> np.ndarray:
    """How many rows of each class are in each chunk: int64 [count, chunks]."""
    chunks = np.full((-(-len(classes) // CHUNK), CHUNK), OUT, np.uint8)
    chunks.reshape(-1)[: len(classes)] = classes
    return np.stack([np.count_nonzero(chunks == c, axis=1) for c in range(count)])
