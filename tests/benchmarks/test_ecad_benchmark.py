"""The benchmark of caching times what it says, and its shares are time over prediction."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks import ecad
from benchmarks.ecad import Stopwatch


def test_a_stopwatch_adds_up(monkeypatch) -> None:
    times = iter([1.0, 1.5, 7.0, 7.25])
    monkeypatch.setattr(ecad, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    watch = Stopwatch()
    double = watch.watched(lambda x: 2 * x)
    assert [double(3), double(4)] == [6, 8]
    assert watch.seconds == 0.75


@pytest.mark.slow
def test_tables_of_a_short_search() -> None:
    times, search = (table["rows"] for table in ecad.measure(quick=True)["tables"])
    assert [row[0] for row in times[:2]] == ["FORA 2", "FORA 3"] and len(times) == 2 * 5
    for _, kind, count, predicted, network, share, whole, ms in times:
        assert kind in ecad.KINDS and count == 1 and ms > 0 and whole > 0
        assert predicted > 1 and share == pytest.approx(network / predicted)
    ((generations, whole, within, overhead),) = search
    assert generations == 1 and whole > within > 0 and overhead == pytest.approx(whole / within - 1)
