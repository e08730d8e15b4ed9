"""LAMB by hand, its norms over shards, and decay of matrices alone."""

import copy
import math

import pytest
import torch
from torch import nn

from lightning_t2i.lamb import LAMB, MatrixDecayAdamW


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))


def with_gradients(net: nn.Module, seed: int = 1) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return net


def test_two_steps_by_hand():
    net = network()
    weight, bias = net[0].weight, net[0].bias
    optimizer = LAMB(net.parameters(), lr=0.1, betas=(0.8, 0.9), eps=1e-4, weight_decay=0.3)
    expected = {p: [p.detach().clone(), 0.0, 0.0] for p in (weight, bias)}
    for step in (1, 2):
        with_gradients(net, step)
        for p, own in expected.items():
            w, m, v = own
            m, v = 0.8 * m + 0.2 * p.grad, 0.9 * v + 0.1 * p.grad**2
            r = (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-4)
            ratio = 1.0
            if p is weight:
                r = r + 0.3 * w
                ratio = w.norm() / r.norm()
            own[:] = [w - 0.1 * ratio * r, m, v]
        optimizer.step()
    for p, own in expected.items():
        torch.testing.assert_close(p.detach(), own[0])


@pytest.mark.parametrize(("size", "ratio"), [(0.0, 1.0), (1e3, 10.0)], ids=["zero", "large"])
def test_the_ratio_of_zero_and_of_large_weights(size, ratio):
    weight = nn.Parameter(torch.full((4, 4), size))
    weight.grad = torch.ones(4, 4)
    LAMB([weight], lr=1.0, weight_decay=0.0, eps=0.0).step()
    norm = 4.0 if ratio > 1 else 1.0  # the direction is all ones: |r| = 4
    torch.testing.assert_close(weight.detach(), torch.full((4, 4), size - ratio / norm))


def test_vectors_do_not_decay():
    net = network()
    for make in (LAMB, MatrixDecayAdamW):
        own = copy.deepcopy(net)
        optimizer = make(own.parameters(), lr=0.1, weight_decay=0.5)
        for parameter in own.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        assert torch.equal(own[0].bias, net[0].bias)
        assert not torch.equal(own[0].weight, net[0].weight)
        assert [len(g["params"]) for g in optimizer.param_groups] == [2, 2]


def sharded(rank: int, replicate: int) -> list[torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = network()
    mesh = init_device_mesh("cpu", (replicate, 2 // replicate), mesh_dim_names=("replicate", "shard"))
    fully_shard(net, mesh=mesh)
    optimizer = LAMB(net.parameters(), lr=0.1, weight_decay=0.3)
    for step in (1, 2):
        whole = with_gradients(network(), step)
        for p, q in zip(net.parameters(), whole.parameters(), strict=True):
            from torch.distributed.tensor import distribute_tensor

            p.grad = distribute_tensor(q.grad, p.device_mesh, p.placements)
        optimizer.step()
    return [p.full_tensor().detach() for p in net.parameters()]


@pytest.mark.parametrize("replicate", [1, 2])
def test_shards_are_updated_as_whole_tensors_are(ranks, replicate):
    net = network()
    optimizer = LAMB(net.parameters(), lr=0.1, weight_decay=0.3)
    for step in (1, 2):
        with_gradients(net, step)
        optimizer.step()
    for found in ranks(sharded, replicate):
        for a, b in zip(found, net.parameters(), strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-6, atol=1e-7)


def test_a_small_regression_is_learned():
    torch.manual_seed(0)
    weight, x = nn.Parameter(torch.randn(4, 4)), torch.randn(64, 4)
    goal = torch.randn(4, 4)
    optimizer = LAMB([weight], lr=0.02, weight_decay=0.0)
    losses = []
    for _ in range(200):
        loss = (x @ (weight - goal)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0] and not math.isnan(losses[-1])
