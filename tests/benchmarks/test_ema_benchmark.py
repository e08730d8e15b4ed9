"""The benchmarks of averages and of FSDP2 with one process run, and what they compare does the same work."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import init_device_mesh

from benchmarks import ema, fsdp_overhead
from lightning_t2i.ema import Averages
from lightning_t2i.options import EMAOptions
from lightning_t2i.strategies import shard_network


def both(rank: int) -> dict:
    """The averages of both ways after two updates, and the row of a small contest."""
    torch.manual_seed(0)
    network, options = ema.Stack(1), EMAOptions([0.5, 0.9], warmup=False)
    ours = Averages("ema", network, [name for name, _ in network.named_parameters()], options)
    for member in (network, ours.twin):
        shard_network(member, init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard")))
    weights = list(network.parameters())
    theirs = ema.Gathered(weights, [0.5, 0.9])
    for step in range(2):
        with torch.no_grad():
            torch._foreach_add_([w.to_local() for w in weights], 1.0)
        ours.update(weights, step)
        theirs.update(weights)
    found = [[ema._whole(t) for t in average] for average in (ours.first, *ours.others)]
    same = all(
        torch.equal(a, b) for x, y in zip(found, theirs.averages, strict=True) for a, b in zip(x, y, strict=True)
    )
    moved = float((weights[0].full_tensor() - found[0][0]).abs().mean())
    return {"same": same, "moved": moved, "row": ema.contest(1, options, 2)}


def test_gathering_and_shards_give_the_same_averages(ranks) -> None:
    for found in ranks(both):
        assert found["same"] and found["moved"] > 0.1
        row = dict(zip([name for name, _ in ema.COLUMNS], found["row"], strict=True))
        assert row["averages"] == 2 and row["gathered / shards"] > 0
        whole = row["weights, MB"]
        assert row["shards keep, MB a process"] == whole and row["gathered keep, MB a process"] == 2 * whole
        assert row["gathered in an update, MB a process"] == whole


def test_fsdp_and_plain_steps_take_turns() -> None:
    row = dict(
        zip([name for name, _ in fsdp_overhead.COLUMNS], fsdp_overhead.row(fsdp_overhead.Ours, 1, 2), strict=True)
    )
    assert (row["layers"], row["pairs"]) == (fsdp_overhead.BLOCKS, 2)
    assert row["plain, ms"] > 0 and row["FSDP2 / plain"] > 0
