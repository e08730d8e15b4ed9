"""The benchmark of RepBlend compares iterations of equal size, and what is counted holds its bar."""

import torch

from benchmarks import repblend


def test_chunks_give_the_gradients_of_whole_batches() -> None:
    torch.manual_seed(0)
    contest = repblend.Contest((32, 2, 2, 32), 20, 2, 4)
    found = {way: contest.iteration(way) for way in ("heads", "most", "chunks")}
    for way in ("most", "chunks"):
        for a, b in zip(found["heads"], found[way], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_both_sides_move_all_parts_of_the_set() -> None:
    torch.manual_seed(0)
    contest = repblend.Contest((32, 2, 2, 32), 10, 2, 4)
    for way in ("encoder", "heads"):
        found = contest.iteration(way)
        assert found[0].shape == contest.pixels.shape
        assert all(float(g.abs().max()) > 0 for g in (found[0], found[1], found[4]))


def test_an_expert_takes_less_than_half_of_the_room() -> None:
    shares = {row[0]: row[2] for row in repblend.storage()}
    assert shares["heads"] <= 0.45


def test_the_tables_are_whole() -> None:
    for table in repblend.measure(quick=True)["tables"]:
        assert table["rows"] and all(len(row) == len(table["columns"]) for row in table["rows"])
