"""The processes that write one checkpoint together and hear of each other's failures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Ranks:
    """The processes of a gloo group that is used for nothing else, so that any thread may talk in it.

    Args:
        group: None is this process alone.
    """

    def __init__(self, group: Any = None):
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Does `work` on every rank and returns the results of all, by rank.

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
        found: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(found, (mine, failure and f"{type(failure).__name__}: {failure}"), group=self.group)
        if failure is not None:
            raise failure
        if failed := [f"rank {rank}: {text}" for rank, (_, text) in enumerate(found) if text is not None]:
            raise RuntimeError(f"The checkpoint was not written. {'; '.join(failed)}")
        return [result for result, _ in found]


ALONE = Ranks()
