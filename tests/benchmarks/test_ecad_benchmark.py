"""The benchmark of caching times what it says, and its shares are time over prediction."""

from __future__ import annotations

import time

import pytest

from benchmarks import ecad
from benchmarks.ecad import Stopwatch


def test_a_stopwatch_adds_up() -> None:
    watch = Stopwatch()
    sleep = watch.watched(time.sleep)
    for _ in range(2):
        sleep(0.01)
    assert 0.02 <= watch.seconds < 0.2


@pytest.mark.slow
def test_tables_of_a_short_search() -> None:
    times, search = (table["rows"] for table in ecad.measure(quick=True)["tables"])
    assert [row[0] for row in times[:2]] == ["FORA 2", "FORA 3"] and len(times) == 2 * 5
    for _, kind, count, predicted, network, share, whole, ms in times:
        assert kind in ecad.KINDS and count == 1 and ms > 0 and whole > 0
        assert predicted > 1 and share == pytest.approx(network / predicted)
    ((generations, whole, within, overhead),) = search
    assert generations == 1 and whole > within > 0 and overhead == pytest.approx(whole / within - 1)
