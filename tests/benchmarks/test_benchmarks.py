"""The benchmarks run, and what they compare does the same work."""

from __future__ import annotations

import copy
import importlib.util
import re
import sys

import pytest
import torch

from lightning_t2i.keys import Keys
from lightning_t2i.processes import DDPM, Uniform


@pytest.fixture(scope="module")
def step_overhead(repo):
    spec = importlib.util.spec_from_file_location("step_overhead", repo / "benchmarks" / "step_overhead.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_both_loops_do_the_same_updates(step_overhead, tmp_path) -> None:
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


def test_table_of_two_steps(step_overhead) -> None:
    lines = step_overhead.table([1], repeats=1, pairs=2, block=1).splitlines()
    cells = [float(x) for x in re.findall(r"\d+\.\d+", lines[2])]
    assert len(lines) == 3 and lines[2].startswith("| 1 |") and lines[2].endswith("| 2 |")
    assert all(cell > 0 for cell in cells)
