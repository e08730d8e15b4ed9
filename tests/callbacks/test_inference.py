"""What ranks with different shares of a batch have in common."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from types import SimpleNamespace

import pytest
import torch

from callbacks.inference import first_records, records_of, shared_records
from datamodules.streams import Streams
from lightning_t2i.batch import Records
from lightning_t2i.errors import UserError

SHARES = [[3, 2, 3, 1], [1, 2, 3, 1]]  # records of each rank in each batch


def batches_taken(rank: int, n: int, world: int = 2) -> list[int]:
    """The sizes of a rank's batches; a fake `reduce` adds what the other rank has in the batch of that call."""
    calls = iter(SHARES[1 - rank])
    strategy = SimpleNamespace(root_device="cpu", reduce=lambda count, reduce_op: count + next(calls))
    if world == 1:
        strategy.reduce = lambda *_, **__: pytest.fail("one process has nobody to ask")
    rows = (torch.arange(count) for count in SHARES[rank])
    data = SimpleNamespace(val_dataloader=lambda: ({"main": Records(id=r, position=r)} for r in rows))
    trainer = SimpleNamespace(datamodule=data, world_size=world, strategy=strategy)
    return [len(records) for records in first_records(trainer, "val", n, "cpu")]


@pytest.mark.parametrize(("n", "taken"), [(4, 1), (5, 2), (8, 2), (14, 3), (15, 4), (99, 4)])
def test_all_ranks_stop_after_the_same_batch(n, taken) -> None:
    assert [batches_taken(rank, n) for rank in (0, 1)] == [share[:taken] for share in SHARES]


def test_one_process_counts_alone() -> None:
    assert batches_taken(0, 4, world=1) == [3, 2]


@pytest.mark.parametrize("data", [None, Streams()], ids=["none", "streams"])
def test_a_split_that_is_not_there_has_no_records(data) -> None:
    trainer = SimpleNamespace(datamodule=data, world_size=2)
    assert list(records_of(trainer, "val")) == []
    with pytest.raises(UserError, match="no prompts"):
        list(first_records(trainer, "val", 1, "cpu"))


def places_taken(n: int, shares: list[list[int]], current: list[int]) -> list[list[list[int]]]:
    """Positions of the parts that each rank gets, a thread for each.

    Args:
        shares: how many records each rank has of each batch.
        current: the same of a training batch.
    """
    world, box = len(current), {}
    barrier = Barrier(world, timeout=20)

    def records(sizes: list[int], rank: int, first: int) -> Records:
        rows = first + torch.arange(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        return Records(id=rows, position=rows)

    def of_rank(rank: int) -> list[list[int]]:
        def broadcast(given: Records, source: int) -> Records:
            if rank == source:
                box["given"] = given
            barrier.wait()
            found = box["given"]
            barrier.wait()
            return found

        batches = [records(sizes, rank, sum(map(sum, shares[:k]))) for k, sizes in enumerate(shares)]
        data = SimpleNamespace(val_dataloader=lambda: ({"main": batch} for batch in batches))
        strategy = SimpleNamespace(broadcast=broadcast)
        trainer = SimpleNamespace(datamodule=data, world_size=world, strategy=strategy, is_global_zero=rank == 0)
        parts = shared_records(trainer, "val", n, records(current, rank, 100), "samples.count")
        return [part.position.tolist() for part in parts]

    with ThreadPoolExecutor(world) as threads:
        return list(threads.map(of_rank, range(world)))


@pytest.mark.parametrize(
    ("n", "shares", "taken"),
    [
        (8, [[2, 2, 2, 2]] * 3, [[0, 1], [2, 3], [4, 5], [6, 7]]),  # a batch of 8 on 4 ranks: one process has it whole
        (3, [[2, 2, 2, 2]] * 3, [[0, 1], [2]]),
        (9, [[2, 2, 2, 2], [3, 3, 2, 2]], [[0, 1], [2, 3], [4, 5], [6, 7], [8]]),
        (2, [[4, 4, 4, 4]], [[0, 1]]),
        (6, [], [[100, 101], [102, 103], [104, 105]]),  # no validation data
    ],
)
def test_all_ranks_take_the_first_records_of_all(n, shares, taken, caplog) -> None:
    assert places_taken(n, shares, [2, 2, 2, 2]) == [taken] * 4
    assert caplog.records == []


@pytest.mark.parametrize(("shares", "there"), [([[1, 1], [1, 1]], 4), ([], 6)])
def test_fewer_records_than_asked_for_are_told_once(shares, there, caplog) -> None:
    places_taken(7, shares, [3, 3])
    assert [r.getMessage() for r in caplog.records] == [
        f"samples.count is 7, but the data have {there} samples to take"
    ]
