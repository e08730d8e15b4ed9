"""Calls side by side in copies of this process, which begin with all that it holds and change nothing in it."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
_function: Callable[[Any], Any]


def in_copies(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """[function(item) for item in items], each in a copy of this process, one for each core; results are pickled.

    A single call, or a single core, needs no copy; so does a system that is not Linux, where copies are not safe.

    Raises:
        Exception: what a call raised.
    """
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1
    workers = min(len(items), cores)
    if workers < 2:
        return [function(item) for item in items]
    with multiprocessing.get_context("fork").Pool(workers, _adopt, (function,)) as pool:
        return pool.map(_call, items, chunksize=1)


def _adopt(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function


def _call(item: Any) -> Any:
    return _function(item)
