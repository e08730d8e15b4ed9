"""The benchmarks run, and what they compare does the same work."""

from __future__ import annotations

import copy

import torch

from benchmarks import step_overhead
from benchmarks.running import quartiles
from lightning_t2i.keys import Keys
from lightning_t2i.processes import DDPM, Uniform


def test_both_loops_do_the_same_updates(tmp_path) -> None:
    """With the draws of the keys the bare loop ends at the weights of ours, so no side does less than the other."""
    data, network = step_overhead.batches(2), step_overhead.Stack(1)
    bare, before = step_overhead.Bare(copy.deepcopy(network)), copy.deepcopy(network.state_dict())
    step_overhead.train(step_overhead.Ours(network), data, 2, [], tmp_path)
    for step, batch in enumerate(data):
        main, keys = batch["main"], Keys(0, step)
        eps = keys.normal("eps", main.position, step_overhead.SHAPE)
        bare.step(main.latent, Uniform()(DDPM(), keys, main.position), eps)
    for name, weight in network.state_dict().items():
        torch.testing.assert_close(weight, bare.network.state_dict()[name])
        assert not torch.equal(weight, before[name])


def test_quartiles_of_two_pairs_lie_between_them(monkeypatch) -> None:
    """On a loaded machine one pair may be far off, and no share of time is negative."""
    monkeypatch.setattr(step_overhead, "compare", lambda *_: [(1.0, 1.0), (20.0, 1.0)])
    monkeypatch.setattr(step_overhead, "seconds_of_draws", lambda: 0.0)
    middle, low, high = step_overhead.row(1, 1, 2, 1)[3:6]
    assert 1 < low < middle < high < 20


def test_step_overhead_of_two_pairs() -> None:
    found = step_overhead.result([1], repeats=1, pairs=2, block=1)["tables"][0]
    depth, *cells, pairs = found["rows"][0]
    assert (len(found["rows"]), depth, pairs) == (1, 1, 2)
    assert len(cells) + 2 == len(found["columns"]) and all(cell > 0 for cell in cells)


def test_quartiles_lie_between_the_values() -> None:
    assert quartiles([3.0, 1.0]) == (1.5, 2.0, 2.5)
    assert quartiles([2.0]) == (2.0, 2.0, 2.0)
