"""The loader's benchmark: which figure is held against which goal."""

from benchmarks.loader import goals


def test_goals_are_read_from_the_right_columns():
    rows = [
        ["small", 0, "ours, decoded", 120.0, 1.2, 1.0],
        ["small", 0, "ours, latents", 900.0, 9.0, 7.5],
        ["large", 2, "ours, decoded", 130.0, 1.3, 1.0],
        ["large", 2, "webdataset, decoded", 100.0, 1.0, 0.77],
        ["large", 2, "ours, latents", 5000.0, 50.0, 38.5],
        ["large", 2, "ours, latents, captions in memory", 7000.0, 70.0, 53.8],
    ]
    assert goals(rows) == [
        ["small", 0, "decoded, against webdataset", 1.2, 1.3, "no"],
        ["large", 2, "decoded, against webdataset", 1.3, 1.3, "yes"],
        ["large", 2, "latents, against decoded", 38.5, 50.0, "no"],
        ["large", 2, "latents, captions in memory, against decoded", 53.8, 50.0, "yes"],
    ]
