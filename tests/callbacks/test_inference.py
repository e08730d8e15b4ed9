"""What ranks with different shares of a batch have in common."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from callbacks.inference import first_records
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
    with pytest.raises(UserError, match="no prompts"):
        list(first_records(SimpleNamespace(datamodule=None, world_size=2), "val", 1, "cpu"))
