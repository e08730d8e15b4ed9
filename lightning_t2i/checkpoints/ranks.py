"""The processes that write one checkpoint together and hear of each other's failures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Ranks:
    """The processes of a gloo group that is used for nothing else, so that any thread may talk in it.

    Results go to rank 0 alone: what each process sends and reads does not grow with their number. Failures go to all.

    Args:
        group: None is this process alone.
    """

    def __init__(self, group: Any = None):
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Does `work` on every rank; the results of all, by rank, on rank 0, and an empty list on the others.

        Raises:
            Exception: what `work` raised here; else a RuntimeError that names the ranks on which it failed.
        """
        if self.group is None:
            return [work()]
        failure, mine = None, None
        try:
            mine = work()
        except Exception as error:  # the others wait for this rank's word
            failure = error
        found: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object((mine, failure and _told(failure)), found, group=self.group, group_dst=0)
        failed = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(found or ()) if text is not None]
        word = [failed]
        dist.broadcast_object_list(word, group=self.group, group_src=0)
        if failure is not None:
            raise failure
        if word[0]:
            raise RuntimeError(f"A checkpoint was not written. {'; '.join(word[0])}")
        return [result for result, _ in found or ()]

    def scatter(self, work: Callable[[], list[T]]) -> T:
        """Does `work` on rank 0, which returns a result for each rank, and gives every rank its own.

        Raises:
            Exception: on rank 0 what `work` raised, on the others a RuntimeError that says so.
        """
        if self.group is None:
            return work()[0]
        failure: Exception | None = None
        parts: list[Any] | None = None
        if self.rank == 0:
            try:
                parts = [(part, None) for part in work()]
            except Exception as error:  # the others wait for their parts
                failure, parts = error, [(None, _told(error))] * self.size
        mine: list[Any] = [None]
        dist.scatter_object_list(mine, parts, group=self.group, group_src=0)
        if failure is not None:
            raise failure
        part, text = mine[0]
        if text is not None:
            raise RuntimeError(f"A checkpoint was not written. rank 0: {text}")
        return part


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


ALONE = Ranks()
