"""Sharded networks on two gloo processes: fresh weights in every forward, whole norms, small frozen ones whole."""

import os
import sys
from pathlib import Path

import programs
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))  # for the processes that `ranks` starts

from toy import DIM, MLP, Block, Toy, adam

from lightning_t2i.errors import UserError
from lightning_t2i.group import Group
from lightning_t2i.options import EMAOptions, GroupOptions, MethodOptions
from lightning_t2i.strategies import FSDP2, shard_network
from lightning_t2i.strategies.sharding import blocks, roots, shard_frozen

X = torch.linspace(-1, 1, 4 * DIM).view(4, DIM)


def network() -> MLP:
    torch.manual_seed(3)
    return MLP(2, dropout=0.0)


def twin_outputs(rank: int, replicate: int, shard: int) -> dict:
    """Samples the EMA twin, updates it, samples again; also gradient norm, clipping and the update itself."""
    mesh = init_device_mesh("cpu", (replicate, shard), mesh_dim_names=("replicate", "shard"))
    group = Group("net", network(), GroupOptions(adam(0.1), clip=0.01, ema=EMAOptions(0.5, warmup=False)))
    for member in (group.network, group.ema):
        shard_network(member, mesh)
    group.build()
    with torch.no_grad():
        first = group.ema(X)
    local = X[rank * 2 : rank * 2 + 2]
    group.network(local).square().mean().backward()
    norm = group.gradient_norm()
    group.step(norm)
    group.average(0)
    fresh = network()
    fresh.load_state_dict({name: p.full_tensor() for name, p in group.ema.named_parameters()})
    with torch.no_grad():
        second, reloaded = group.ema(X), fresh(X)
    sharded = isinstance(group.parameters[0], DTensor) and isinstance(group.network.blocks[0], FSDPModule)
    found = {"sharded": sharded, "dimensions": group.parameters[0].device_mesh.ndim}
    return {"first": first, "second": second, "norm": norm, "reloaded": reloaded, **found}


@pytest.mark.parametrize(("mesh", "dimensions"), [((2, 1), 2), ((1, 2), 1)], ids=["2x1", "1x2"])
def test_ema_twin_is_fresh_after_an_update(ranks, mesh, dimensions):
    """With FSDP2's default the second forward would use the weights gathered for the first."""
    plain = Group("net", network(), GroupOptions(adam(0.1), clip=0.01, ema=EMAOptions(0.5, warmup=False)))
    plain.build()
    with torch.no_grad():
        first = plain.ema(X)
    plain.network(X).square().mean().backward()
    norm = plain.gradient_norm()
    plain.step(norm)
    plain.average(0)
    with torch.no_grad():
        second = plain.ema(X)
    assert not torch.allclose(first, second)
    for result in ranks(twin_outputs, *mesh):
        assert result["sharded"] and result["dimensions"] == dimensions
        torch.testing.assert_close(result["first"], first)
        torch.testing.assert_close(result["second"], second, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(result["second"], result["reloaded"], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(result["norm"], norm, rtol=1e-4, atol=1e-6)


def frozen_kinds(rank: int, limit: int) -> list:
    import lightning_t2i.strategies.sharding as sharding

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    sharding.REPLICATE_BELOW_BYTES = limit
    frozen = network().requires_grad_(False)
    shard_frozen(frozen, mesh)
    return [isinstance(next(frozen.parameters()), DTensor), frozen(X)]


def test_small_frozen_networks_stay_whole_and_large_ones_are_cut(ranks):
    expected = network()(X).detach()
    for limit, cut in ((2**31, False), (0, True)):
        for is_cut, output in ranks(frozen_kinds, limit):
            assert is_cut is cut
            torch.testing.assert_close(output, expected)


def scaled(rank: int, trained: bool) -> list:
    """A network with a parameter that has no dimension, on a mesh of its own."""
    net = network()
    net.scale = torch.nn.Parameter(torch.tensor(3.0), requires_grad=trained)
    net.outside.register_forward_hook(lambda module, given, out: out * net.scale)
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))
    try:
        shard_network(net, mesh, "bf16")
    except UserError as error:
        return [str(error)]
    return [isinstance(net.scale, DTensor), isinstance(net.inside.weight, DTensor), net(X).detach()]


def test_a_frozen_scalar_stays_whole_and_a_trained_one_is_refused(ranks):
    ((is_cut, others_are, output),) = ranks(scaled, False, world=1)
    assert not is_cut and others_are
    torch.testing.assert_close(output.float(), 3 * network()(X).detach(), rtol=0.05, atol=0.05)
    ((message,),) = ranks(scaled, True, world=1)
    assert "without dimensions" in message and "scale" in message


def test_blocks_are_found_innermost_first_and_roots_declared():
    net = network()
    assert [type(b) for b in blocks(net)] == [Block, Block]
    assert roots(net) == [net]


def accumulated(rank: int, order: list[str]) -> dict[str, list[torch.Tensor]]:
    """Gradients of two groups after two micro-batches, with a `backward` of each named loss in this order."""
    module = Toy(MethodOptions(accumulate=2, precision="bf16"), dropout=0.0)
    module._device_mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))
    module.configure_model()
    for module.counters.micro in range(2):
        x = X + module.counters.micro
        module._begin({})
        losses = {
            "generator": lambda x=x: -module.critic(module.generator(x)).mean(),
            "critic": lambda x=x: module.critic(x).square().mean(),
        }
        for name in order:
            module.backward(name, losses[name]())
    grads = {name: [p.grad for p in g.parameters if p.grad is not None] for name, g in module.groups.items()}
    return {name: [grad.full_tensor() for grad in found] for name, found in grads.items()}


def test_no_gradient_reaches_another_sharded_group_over_micro_batches(ranks):
    """The generator's loss runs through the critic, also in micro-batches before the last."""
    one = {name: ranks(accumulated, [name], world=1)[0] for name in ("generator", "critic")}
    assert not one["generator"]["critic"] and not one["critic"]["generator"]
    for order in (["generator", "critic"], ["critic", "generator"]):
        (both,) = ranks(accumulated, order, world=1)
        for name in order:
            assert len(both[name]) == len(one[name][name]) > 0
            assert all(torch.equal(a, b) for a, b in zip(both[name], one[name][name], strict=True)), (order, name)


def strategy(world: int, nodes: int = 1, **mesh) -> FSDP2:
    class Sized(FSDP2):
        world_size = world
        num_processes = world // nodes

    made = Sized(**mesh)
    made.num_nodes = nodes
    return made


@pytest.mark.parametrize(
    ("world", "nodes", "mesh", "shape"),
    [
        (1, 1, {}, (1, 1)),
        (8, 1, {}, (1, 8)),
        (8, 1, {"shard": 1}, (8, 1)),
        (8, 1, {"replicate": 2}, (2, 4)),
        (16, 2, {}, (2, 8)),  # hybrid on several nodes: cut inside a node, copied over nodes
        (16, 2, {"replicate": 1}, (1, 16)),
    ],
)
def test_mesh_shapes(world, nodes, mesh, shape):
    assert strategy(world, nodes, **mesh).mesh_shape() == shape


def test_a_mesh_that_does_not_fit_names_the_numbers():
    with pytest.raises(UserError, match="replicate 3 x shard 2 = 6") as error:
        strategy(8, replicate=3, shard=2).mesh_shape()
    assert "8 = trainer.devices" in str(error.value)


AT_THE_END = """
import atexit, sys
import torch.distributed as dist
from toy import Toy, ToyData, trainer_for

atexit.register(lambda: print("still there:", dist.is_initialized()))
trainer_for(sys.argv[1], 1, fsdp=True).fit(Toy(), ToyData())
print("before:", dist.is_initialized())
"""


def test_a_process_leaves_its_groups_before_it_ends(tmp_path, repo) -> None:
    (tmp_path / "script.py").write_text(AT_THE_END)
    environment = {**os.environ, "PYTHONPATH": f"{repo}:{repo / 'tests/helpers'}", "OMP_NUM_THREADS": "1"}
    done = programs.run([sys.executable, str(tmp_path / "script.py"), str(tmp_path)], env=environment)
    assert done.stdout.splitlines()[-2:] == ["before: True", "still there: False"], done.stderr
