"""The benchmark of checkpoints measures saves that happened, at once and in the background."""

from __future__ import annotations

import pytest

from benchmarks import checkpointing
from benchmarks.rendering import tables


@pytest.mark.parametrize("asynchronous", [False, True])
def test_every_save_is_measured(asynchronous) -> None:
    lines = checkpointing.saved("sharded", asynchronous, width=16, layers=1, steps=2, saves=3)
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:  # weights, EMA and two moments in float32, and a little more
        assert line["checkpoint/bytes"] > 4 * 4 * (256 * 16 + 16 + 16 * 16 + 16)
        waited = line["checkpoint/stall_seconds"] / line["checkpoint/seconds"]
        assert waited > 0 and (asynchronous or waited > 0.9)


def test_a_row_has_a_cell_for_every_column() -> None:
    row = checkpointing.row("single", 1, width=16, layers=1, steps=2)
    assert len(row) == len(checkpointing.COLUMNS) and row[-1] == 1
    assert row[4] == row[5] == row[6] == pytest.approx(row[3] / row[2])
    assert row[7] == ("yes" if row[4] < 0.1 else "no")
    assert "| single | 0 |" in tables({"tables": [{"columns": checkpointing.COLUMNS, "rows": [row]}]})
