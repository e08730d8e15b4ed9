"""Calls side by side in copies of the process."""

from __future__ import annotations

import os

import pytest

from lightning_t2i.errors import UserError
from lightning_t2i.preflight.copies import in_copies


@pytest.mark.parametrize("cores", [1, 2])
def test_results_are_in_order_and_copies_change_nothing_here(cores, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    seen: list[int] = []

    def call(item):
        seen.append(item)
        return item**2, os.getpid()

    squares, processes = zip(*in_copies(call, [3, 1, 2]), strict=True)
    assert squares == (9, 1, 4)
    assert (set(processes) == {os.getpid()}) == (cores == 1) and seen == ([3, 1, 2] if cores == 1 else [])


def test_a_mistake_in_a_copy_is_told(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})

    def call(item):
        raise UserError("No such thing", where="there", fix="another")

    with pytest.raises(UserError, match="No such thing\n  where:   there\n  fix:     another"):
        in_copies(call, [1, 2])
