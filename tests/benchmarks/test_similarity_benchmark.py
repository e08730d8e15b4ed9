"""The benchmark of token-wise similarity compares equal losses, and its bars hold on tensors without data."""

import torch

from benchmarks import similarity


def test_both_losses_are_one_loss() -> None:
    torch.manual_seed(0)
    images, texts, mask = similarity.features(5, 7, 3)
    found = []
    for way in similarity.WAYS:
        images.grad = texts.grad = None
        there, back = similarity.FUNCTIONS[way](images, texts, mask)
        (there.square().sum() + back.square().sum()).backward()
        found.append([there.detach(), back.detach(), images.grad.clone(), texts.grad.clone()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_tiled_loss_keeps_a_twentieth_at_the_large_size() -> None:
    for rows in (similarity.large_rows([(128, 4096, 256)]), similarity.large_rows([(128, 4096, 24)])):
        by_way = {row[3]: row[4] for row in rows}
        assert by_way["dense"] > 20 * by_way["tiled"] > 0


def test_tables_are_whole() -> None:
    found = similarity.measure(quick=True)
    for table in found["tables"]:
        assert table["rows"] and all(len(row) == len(table["columns"]) for row in table["rows"])
    (row,) = found["tables"][2]["rows"]
    assert 0 < row[3] < row[4]


def test_a_search_stays_below_its_bound_whatever_the_sizes() -> None:
    few, many = (similarity.retrieval_rows([(n, 300, 4)])[0] for n in (512, 1536))
    assert few[3] < few[4] and many[3] < many[4]
    slope = (many[3] - few[3]) * 1e6 / 1024  # bytes of a picture more
    assert slope < 240
    assert similarity.bound(30_000, 5000, 49) < 1e9 / 20 and similarity.bound(30_000, 5000, 256) < 1e9 / 10
