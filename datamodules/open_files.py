"""Files of a data set that are read again and again: the latest stay open, however many shards there are."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

T = TypeVar("T")
OPEN = 256  # files of a stream that stay open; a process may have 1024 on many machines


class Latest(Generic[T]):
    """`open(path)`, kept for the paths asked for last; what is dropped closes when its last user is done with it.

    Args:
        open: at the top level of a module, for only it goes to another process, where descriptors mean nothing.
    """

    def __init__(self, open: Callable[[Path], T]):
        self._open, self._found = open, lru_cache(OPEN)(open)

    def __call__(self, path: Path) -> T:
        return self._found(path)

    def __len__(self) -> int:
        return self._found.cache_info().currsize

    def __reduce__(self) -> tuple[Any, ...]:
        return Latest, (self._open,)


class Readable:
    """A file open for reads at offsets, until nobody holds it."""

    def __init__(self, path: Path):
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, start: int, length: int) -> bytes:
        return os.pread(self._descriptor, length, start)

    def __del__(self) -> None:
        if "_descriptor" in vars(self):  # else it could not be opened
            os.close(self._descriptor)


def mapped(path: Path) -> np.ndarray:
    """The array of a .npy file, mapped into memory."""
    return np.asarray(np.load(path, mmap_mode="r"))
