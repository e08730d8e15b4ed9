"""The simulated allocator: what is alive, what it was at the worst moment, operations and collectives."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile

from benchmarks.preflight_memory import highest
from lightning_t2i.preflight.allocator import Allocator
from lightning_t2i.preflight.world import World, fake_mesh

KB = 1000  # 250 float32


def test_peak_is_the_largest_sum_of_what_lives():
    with Allocator() as allocator:
        a = torch.zeros(250)
        b = a + 1
        view = b.view(10, 25)
        del b
        assert (allocator.alive, allocator.peak) == (2 * KB, 2 * KB)
        c = torch.cat([a, a])
        del view, a
        assert (allocator.alive, allocator.peak) == (2 * KB, 4 * KB)
        allocator.forget_peak()
        del c
    assert (allocator.alive, allocator.peak) == (0, 2 * KB)


def test_categories_add_up_at_the_peak():
    weight, known = torch.zeros(250, requires_grad=True), torch.zeros(500)
    with Allocator() as allocator:
        assert allocator.adopt([weight, weight.view(5, 50), known], "frozen") == 3 * KB
        assert allocator.adopt([weight], "weights") == KB
        (weight * known[:250]).square().sum()
    assert allocator.at_peak["weights"] == KB and allocator.at_peak["frozen"] == 2 * KB
    assert sum(allocator.at_peak.values()) == allocator.peak > 3 * KB


@pytest.mark.parametrize("fake", [False, True])
def test_a_backward_pass_has_the_peak_that_torch_measures(fake):
    def step():
        network = nn.Sequential(nn.Linear(40, 300), nn.SiLU(), nn.Linear(300, 300), nn.SiLU(), nn.Linear(300, 5))
        optimizer = torch.optim.AdamW(network.parameters())
        for _ in range(2):
            network(torch.zeros(64, 40)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    if fake:
        with FakeTensorMode(), Allocator() as allocator:
            step()
    else:
        with Allocator() as allocator:
            step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert allocator.peak == pytest.approx(highest(profiler), rel=0.01)


def test_operations_belong_to_the_owner():
    with FakeTensorMode(), Allocator() as allocator:
        x = torch.zeros(8, 10)
        allocator.owner = "first"
        y = x @ torch.zeros(10, 20)
        allocator.owner = "second"
        y @ torch.zeros(20, 30)
    assert allocator.flops_of == {"first": 2 * 8 * 10 * 20, "second": 2 * 8 * 20 * 30}


def test_collectives_of_a_sharded_network_on_four_processes():
    """A ring of n sends (n - 1) / n of what is gathered or reduced, and twice that for an all-reduce."""
    world, rows, size = World(4, 2, (2, 2)), 8, 64 * 64 * 4
    with fake_mesh(world) as mesh, FakeTensorMode(allow_non_fake_inputs=True), Allocator() as allocator:
        network = fully_shard(nn.Linear(64, 64, bias=False), mesh=mesh, reshard_after_forward=True)
        held = allocator.alive
        network(torch.zeros(rows, 64)).sum().backward()
        left = allocator.alive - held
    moved = {(name, world.between_nodes(ranks)): size for (name, ranks), size in allocator.moved.items()}
    assert moved == {
        ("_allgather_base_", False): 2 * size // 2,  # forward and backward
        ("_reduce_scatter_base_", False): size // 2,
        ("allreduce_", True): size // 2,  # of its half, between two nodes
    }
    assert size // 2 <= held < size and allocator.peak >= held + 2 * size  # gathered weight and its gradient
    assert left == pytest.approx(size // 2, abs=100), "gathered weights are given back, the gradient's shard stays"
