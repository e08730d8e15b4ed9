"""The benchmark of merging runs, and its folders have the true shapes."""

import torch

from benchmarks import merging
from lightning_t2i.networks.load import build_network
from lightning_t2i.streamed import index


def test_the_quick_benchmark_measures_a_merge() -> None:
    (table,) = merging.measure(quick=True)["tables"]
    row = dict(zip([name for name, _ in table["columns"]], table["rows"][0], strict=True))
    assert row["experts"] == 4 and row["merge, s"] > 0 and row["disk, s"] > 0
    assert row["under 2 GB"] == "yes" and row["memory, GB"] < 2


def test_random_folders_have_the_shapes_of_the_network(tmp_path) -> None:
    spec = merging.NETWORKS["quick"]
    folder = merging.random_folder(tmp_path / "a", spec, 0)
    with torch.device("meta"):
        network = build_network(spec)
    found = index(folder)
    assert {f"./{n}": tuple(p.shape) for n, p in network.state_dict().items()} == {n: e.shape for n, e in found.items()}
    assert float(found["./conv_in.weight"].read().std()) > 0
