"""Facts about torch's FSDP2 that the design stands on, on two gloo processes. docs/platform.md has them as a table.

A test that fails here after an update of torch names what the engine may no longer rely on, or no longer has to.
"""

import copy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "helpers"))  # for the processes that `ranks` starts

from tiny_networks import backbone
from toy import DIM, MLP

X = torch.linspace(-1, 1, 4 * DIM).view(4, DIM)
STEPS = 6


def network() -> MLP:
    torch.manual_seed(3)
    return MLP(2, dropout=0.0)


def mesh_of(replicate: int, shard: int):
    return init_device_mesh("cpu", (replicate, shard), mesh_dim_names=("replicate", "shard"))


def sharded(net: nn.Module, **options) -> nn.Module:
    mesh = mesh_of(1, 2)
    for block in net.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options)


def raised(call: Callable[[], object]) -> str:
    """Kind and text of the error that a call ends with; empty when there is none."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def losses(net: nn.Module, rank: int) -> list[float]:
    """The loss of one half of X in each of a few steps, averaged over both."""
    optimizer, found = torch.optim.AdamW(net.parameters(), lr=0.05), []
    for _ in range(STEPS):
        loss = (net(X[2 * rank : 2 * rank + 2]) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        found.append(float(total) / 2)
    return found


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


# ---- the experiments: each runs on both processes and returns what its test looks at ---------------------------------


def training(rank: int) -> dict:
    hybrid = network()
    for module in (*hybrid.blocks, hybrid):
        fully_shard(module, mesh=mesh_of(2, 1))
    return {
        "ddp": losses(DistributedDataParallel(network()), rank),
        "fsdp": losses(sharded(network()), rank),
        "hsdp": losses(hybrid, rank),
    }


def stale(rank: int, **options) -> bool:
    """Whether a forward without gradients misses an update of the root's weights that came after an earlier one."""
    net = sharded(network(), **options)
    shards = [p.to_local() for name, p in net.named_parameters() if "blocks" not in name]
    with torch.no_grad():
        before = net(X)
        torch._foreach_mul_(shards, 2.0)
        return torch.equal(before, net(X))


def copied(rank: int) -> str:
    return raised(lambda: copy.deepcopy(sharded(network())))


def two_dtypes(rank: int) -> str:
    net = network()
    net.inside.to(torch.bfloat16)
    fully_shard(net, mesh=mesh_of(1, 2))
    return raised(lambda: net(X))


def frozen_and_trained(rank: int) -> dict:
    net = network().requires_grad_(False)
    net.outside.requires_grad_(True)
    sharded(net)
    net(X).square().mean().backward()
    gradients = {name: p.grad is not None for name, p in net.named_parameters()}
    return {
        "trained": gradients["outside.weight"],
        "frozen": any(v for k, v in gradients.items() if "outside" not in k),
    }


def empty_buffers(rank: int) -> bool:
    """Whether `to_empty` leaves a buffer that no checkpoint holds."""
    net = backbone("pixart")
    assert "pos_embed.pos_embed" not in net.state_dict()
    before = net.pos_embed.pos_embed.clone()
    return torch.equal(net.to_empty(device="cpu").pos_embed.pos_embed, before)


def broadcast(rank: int) -> bool:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    reference = backbone("unet")
    with torch.device("meta"):
        net = type(reference).from_config(reference.config)
    fully_shard(net, mesh=mesh_of(1, 2)).to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(net, reference.state_dict() if rank == 0 else {}, options=options)
    return all(torch.equal(whole(t), reference.state_dict()[name]) for name, t in net.state_dict().items())


def averages(rank: int) -> list[torch.Tensor]:
    """An average of every parameter, by DTensors and by their local shards."""
    weights = list(sharded(network()).parameters())
    by_dtensor, by_shard = ([p.detach() * 0 for p in weights] for _ in range(2))
    torch._foreach_lerp_(by_dtensor, [p.detach() for p in weights], 0.25)
    torch._foreach_lerp_([t.to_local() for t in by_shard], [p.detach().to_local() for p in weights], 0.25)
    return [torch.cat([whole(t).flatten() for t in tensors]) for tensors in (by_dtensor, by_shard)]


def optimized(rank: int) -> dict:
    """Parameters after one clipped step of fused AdamW, and the norm that clipping found."""
    plain, cut = network(), sharded(network())
    found = {}
    for name, net in (("plain", plain), ("sharded", cut)):
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, fused=True)
        net(X).square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 0.01)
        optimizer.step()
        found[name] = torch.cat([whole(p).flatten() for p in net.parameters()])
        found[f"{name}_norm"], found[f"{name}_kind"] = whole(norm), type(norm).__name__
    return found


def eight_bits(rank: int) -> str:
    import bitsandbytes

    net = fully_shard(nn.Linear(128, 128), mesh=mesh_of(1, 2))
    optimizer = bitsandbytes.optim.AdamW8bit(net.parameters())
    net(torch.ones(2, 128)).square().mean().backward()
    return raised(optimizer.step)


def mixed_precision(rank: int) -> dict:
    net = sharded(network(), mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    out = net(X)
    out.square().mean().backward()
    weight = net.outside.weight
    return {"out": str(out.dtype), "weight": str(weight.dtype), "gradient": str(weight.grad.dtype)}


def other_methods(rank: int) -> list:
    class Coder(MLP):
        def encode(self, x):
            return self.forward(x)

    torch.manual_seed(3)
    net = sharded(Coder(2, dropout=0.0))
    before = raised(lambda: net.encode(X))
    register_fsdp_forward_method(net, "encode")
    return [before, net.encode(X).detach()]


def compiled_names(rank: int) -> bool:
    net = network()
    for block in net.blocks:
        block.compile(backend="eager")
    return list(sharded(net).state_dict()) == list(network().state_dict())


def two_networks_in_ddp(rank: int) -> str:
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = network(), network()

        def forward(self, x):
            return self.first(x)

    net = DistributedDataParallel(Two())

    def two_steps() -> None:
        for _ in range(2):
            net(X).square().mean().backward()

    return raised(two_steps)


EXPERIMENTS = (
    training, copied, two_dtypes, frozen_and_trained, empty_buffers, broadcast, averages, optimized, eight_bits,
    mixed_precision, other_methods, compiled_names, two_networks_in_ddp,
)  # fmt: skip


def experiments(rank: int) -> dict:
    found = {experiment.__name__: experiment(rank) for experiment in EXPERIMENTS}
    return found | {"stale": [stale(rank), stale(rank, reshard_after_forward=True)]}


_found: list[dict] = []


@pytest.fixture
def facts(ranks) -> list[dict]:
    """What the experiments found on each process; run once for all tests of the file."""
    if not _found:
        _found.extend(ranks(experiments))
    return _found


# ---- what holds ------------------------------------------------------------------------------------------------------


def test_ddp_fsdp_and_hsdp_have_the_same_losses(facts):
    for found in facts:
        assert found["training"]["fsdp"] == pytest.approx(found["training"]["ddp"], rel=1e-6)
        assert found["training"]["hsdp"] == pytest.approx(found["training"]["ddp"], rel=1e-6)
        assert found["training"]["ddp"][-1] < found["training"]["ddp"][0]


def test_by_default_a_forward_without_gradients_leaves_the_root_whole_and_stale(facts):
    assert [found["stale"] for found in facts] == [[True, False]] * 2


def test_a_sharded_network_cannot_be_copied(facts):
    assert all("deepcopy" in found["copied"] for found in facts)


def test_a_group_has_one_dtype(facts):
    assert all("uniform original parameter dtype" in found["two_dtypes"] for found in facts)


def test_frozen_and_trained_weights_may_share_a_group(facts):
    assert [found["frozen_and_trained"] for found in facts] == [{"trained": True, "frozen": False}] * 2


def test_to_empty_destroys_buffers_that_are_not_persistent(facts):
    assert not any(found["empty_buffers"] for found in facts)


def test_weights_of_rank_0_reach_a_network_from_meta(facts):
    assert all(found["broadcast"] for found in facts)


def test_averages_of_dtensors_and_of_shards_agree(facts):
    for found in facts:
        by_dtensor, by_shard = found["averages"]
        assert torch.equal(by_dtensor, by_shard)
        assert by_shard.abs().sum() > 0


def test_fused_adamw_and_clipping_are_right_on_dtensors(facts):
    for found in (f["optimized"] for f in facts):
        torch.testing.assert_close(found["sharded"], found["plain"])
        torch.testing.assert_close(found["sharded_norm"], found["plain_norm"])
        assert found["sharded_kind"] == "DTensor"


def test_optimizers_of_bitsandbytes_refuse_dtensors(facts):
    assert all(found["eight_bits"] for found in facts)


def test_mixed_precision_keeps_float32_weights_and_gradients(facts):
    expected = {"out": "torch.bfloat16", "weight": "torch.float32", "gradient": "torch.float32"}
    assert [found["mixed_precision"] for found in facts] == [expected] * 2


def test_another_method_than_forward_has_to_be_registered(facts):
    for found in facts:
        before, after = found["other_methods"]
        assert "mixed torch.Tensor and DTensor" in before
        torch.testing.assert_close(after, network()(X).detach())


def test_compiled_blocks_keep_their_names_when_sharded(facts):
    assert all(found["compiled_names"] for found in facts)


def test_ddp_refuses_networks_that_rest(facts):
    assert all("Expected to have finished reduction" in found["two_networks_in_ddp"] for found in facts)
