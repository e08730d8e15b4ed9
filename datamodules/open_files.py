"""Files of a data set that are read again and again: the latest stay open, however many shards there are."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from lightning_t2i.errors import UserError

T = TypeVar("T")
BESIDE = 64  # files beside those of the lanes: a block may lie in two shards
SHARE = 4  # streams of a process that read files: main, pairs, real, val
MAPPED = 4096  # mapped files of a stream; a process may have 65,530 mappings


def files_for(lanes: int) -> int:
    """Files of a stream that stay open: one for each lane of its order and some, of what a process may have a quarter.

    Neighbours in a batch come from all lanes in turn, so a file less and none is open when its lane is read again.
    """
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = lanes + BESIDE
    return wanted if allowed == resource.RLIM_INFINITY else min(wanted, max(allowed // SHARE, 1))


class Latest(Generic[T]):
    """`open(path)`, kept for the paths asked for last; what is dropped closes when its last user is done with it.

    Args:
        open: at the top level of a module, for only it goes to another process, where descriptors mean nothing.
        most: how many are kept.
    """

    def __init__(self, open: Callable[[Path], T], most: int):
        self._open, self._most, self._found = open, most, lru_cache(most)(open)

    def __call__(self, path: Path) -> T:
        return self._found(path)

    def __len__(self) -> int:
        return self._found.cache_info().currsize

    def __reduce__(self) -> tuple[Any, ...]:
        return Latest, (self._open, self._most)


def check_shard(path: Path) -> None:
    """Raises UserError where a shard is not there, or is empty."""
    if not path.is_file() or path.stat().st_size == 0:
        state = "empty" if path.is_file() else "missing"
        fix = "copy the shard again, or write the data set anew"
        raise UserError(f"A shard named by the index is {state}", where=str(path.parent), given=path, fix=fix)


class Readable:
    """A shard open for reads at offsets, until nobody holds it.

    Raises:
        UserError: it is not there, or it is empty.
    """

    def __init__(self, path: Path):
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # it has gone since the streams were prepared
            check_shard(path)
            raise
        if os.fstat(self._descriptor).st_size == 0:
            check_shard(path)

    def read(self, start: int, length: int) -> bytes:
        return os.pread(self._descriptor, length, start)

    def __del__(self) -> None:
        if "_descriptor" in vars(self):  # else it could not be opened
            os.close(self._descriptor)


def mapped(path: Path) -> np.ndarray:
    """The array of a .npy file, mapped into memory; unlike NumPy's own it keeps no descriptor."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, by_columns, kind = np.lib.format.read_array_header_1_0(file)
        start = file.tell()
    content = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8).numpy()
    return content[start:].view(kind).reshape(shape, order="F" if by_columns else "C")


def mapped_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped into memory; no descriptor is kept."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
