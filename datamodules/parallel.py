"""Work on many shards in several processes, which end when their parent does."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

from lightning_t2i.errors import UserError

T = TypeVar("T")
R = TypeVar("R")


def _end_with_the_parent() -> None:
    """Ends a worker whose parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def each(run: Callable[[T], R], todo: Sequence[T], workers: int) -> Iterator[R]:
    """`run` of each in order, by so many processes; fewer than two is this process.

    Raises:
        UserError: a worker was killed.
    """
    if workers < 2:
        yield from map(run, todo)
        return
    # fsspec's thread would not survive a fork.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, context, _end_with_the_parent) as pool:
            yield from pool.map(run, todo)
    except BrokenProcessPool as error:
        fix = "the same command goes on with what is missing; if memory was short, with fewer --workers"
        raise UserError("A worker process was killed", where="--workers", given=workers, fix=fix) from error
