"""Which rows of an index a stream reads, found by their number without a list of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

OUT = 255  # class of a row that is not read
CHUNK = 4096  # rows between two counts
PIECE = 1 << 20  # rows of a piece


class Rows:
    """Rows of an index: those of class 0 in the order of the index, then those of class 1, and so on.

    `rows[number]` is a row (int64), `rows[numbers]` and `rows[slice]` are arrays. A byte for each row of the index is
    an eighth of a list of rows; without classes nothing is held.

    Args:
        n: rows of the index.
        classes: uint8 [n], class of each row or `OUT`; None takes all rows in their order.
        count: number of classes.
    """

    def __init__(self, n: int, classes: np.ndarray | None = None, count: int = 1):
        self.classes = classes
        if classes is None:
            self.firsts = np.array([0, n])
            return
        held = np.concatenate([_counts(classes[s : s + PIECE], count) for s in range(0, n, PIECE)], 1)
        self._before = np.concatenate([np.zeros((count, 1), np.int64), held.cumsum(1)], 1)  # class, chunk
        self.firsts = np.concatenate([[0], self._before[:, -1].cumsum()])  # number of the first row of each class

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def class_of(self, number: Any) -> Any:
        """The class of one or several numbers."""
        return np.searchsorted(self.firsts, number, side="right") - 1

    def __getitem__(self, number: Any) -> Any:
        numbers = np.arange(*number.indices(len(self))) if isinstance(number, slice) else np.asarray(number)
        if np.any((numbers < 0) | (numbers >= len(self))):
            raise IndexError(f"a row of {len(self)}")
        if self.classes is None:
            return numbers if numbers.ndim else np.int64(numbers)
        found = np.empty(numbers.size, np.int64)
        flat = numbers.reshape(-1)
        kinds = self.class_of(flat)
        for c in np.unique(kinds).tolist():
            places = np.flatnonzero(kinds == c)
            local = flat[places] - self.firsts[c]
            chunks = np.searchsorted(self._before[c], local, side="right") - 1
            order = np.argsort(chunks, kind="stable")
            for some in np.split(order, np.flatnonzero(np.diff(chunks[order])) + 1):
                chunk = int(chunks[some[0]])
                held = np.flatnonzero(self.classes[chunk * CHUNK : (chunk + 1) * CHUNK] == c)
                found[places[some]] = chunk * CHUNK + held[local[some] - self._before[c, chunk]]
        return found.reshape(numbers.shape) if numbers.ndim else found[0]

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
