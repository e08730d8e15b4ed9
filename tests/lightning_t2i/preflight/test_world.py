"""The processes that are planned for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lightning_t2i.errors import UserError
from lightning_t2i.preflight.world import World, fake_mesh
from lightning_t2i.strategies import FSDP2


def trainer(strategy="auto", devices=1, nodes=1, accelerator="cpu"):
    return SimpleNamespace(strategy=strategy, devices=devices, num_nodes=nodes, accelerator=accelerator)


@pytest.mark.parametrize(
    ("given", "asked", "expected"),
    [
        (trainer(), {}, (1, 1, None)),
        (trainer(FSDP2(), devices=4, nodes=2), {}, (8, 2, (2, 4))),
        (trainer(FSDP2(shard=1), devices=[0, 1]), {}, (2, 1, (2, 1))),
        (trainer(FSDP2(replicate=1), devices="auto", accelerator="gpu"), {}, (8, 1, (1, 8))),
        (trainer(FSDP2(), devices=8, nodes=4), {"ranks": 16, "nodes": 2}, (16, 2, (2, 8))),
        (trainer(FSDP2(), devices=8, nodes=4), {"ranks": 2}, (2, 1, (1, 2))),
    ],
)
def test_of_a_config_or_of_the_command_line(given, asked, expected):
    world = World.of(given, **asked)
    assert (world.ranks, world.nodes, world.mesh) == expected
    assert bool(world.assumed) == (given.devices == "auto")


@pytest.mark.parametrize(
    ("given", "asked", "message"),
    [
        (trainer(FSDP2(), devices=2, nodes=2), {"ranks": 3}, "do not divide by the nodes"),
        (trainer(FSDP2(), devices=2), {"ranks": -1}, "do not divide"),
        (trainer(devices=2), {}, "through FSDP2"),
        (trainer(FSDP2(replicate=3, shard=2), devices=4), {}, "mesh does not match"),
    ],
)
def test_what_cannot_be_is_told(given, asked, message):
    with pytest.raises(UserError, match=message):
        World.of(given, **asked)


def test_groups_between_nodes_and_the_fake_mesh():
    world = World(8, 2, (2, 4))
    assert world.between_nodes((0, 4)) and not world.between_nodes((0, 1, 2, 3))
    with fake_mesh(world) as mesh:
        assert mesh["shard"].size() == 4 and torch.distributed.get_world_size() == 8
    assert not torch.distributed.is_initialized()
    with fake_mesh(World(1, 1, None)) as mesh:
        assert mesh is None
