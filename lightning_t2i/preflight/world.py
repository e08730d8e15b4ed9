"""The processes that a training is planned for: how many, on how many nodes, and in what mesh."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from lightning_t2i.errors import UserError
from lightning_t2i.strategies import FSDP2

DEVICES = 8  # of a node, where a config says `auto`: this machine need not be the one that trains


@dataclass(frozen=True)
class World:
    """ranks processes on `nodes` nodes, in a (replicate, shard) mesh, None for one plain process.

    assumed: what was not said and so was taken for granted, a line each; gpu: whether devices are GPUs.
    """

    ranks: int
    nodes: int
    mesh: tuple[int, int] | None
    assumed: list[str] = field(default_factory=list)
    gpu: bool = False

    @property
    def per_node(self) -> int:
        return self.ranks // self.nodes

    def between_nodes(self, ranks: tuple[int, ...]) -> bool:
        """Whether a group of processes spans several nodes."""
        return len({rank // self.per_node for rank in ranks}) > 1

    @classmethod
    def of(cls, trainer: Any, ranks: int | None = None, nodes: int | None = None) -> World:
        """Of a config's `trainer` section, or of --ranks and --nodes where they are given.

        Raises:
            UserError: processes that do not divide by the nodes, no FSDP2 for several, or a mesh of another size.
        """
        assumed: list[str] = []
        gpu = trainer.accelerator in ("gpu", "cuda")
        nodes = nodes or (1 if ranks is not None and ranks < trainer.num_nodes else trainer.num_nodes)
        if ranks is None:
            devices = trainer.devices
            if isinstance(devices, list):
                devices = len(devices)
            if devices in ("auto", -1, "-1", None):
                devices = DEVICES if gpu else 1
                assumed.append(f"{devices} devices a node (trainer.devices: auto); --ranks says otherwise")
            ranks = int(devices) * nodes
        if ranks < 1 or nodes < 1 or ranks % nodes:
            what, fix = "The processes do not divide by the nodes", f"--ranks {max(ranks // nodes, 1) * nodes}"
            raise UserError(what, where="--ranks", given=f"{ranks} processes on {nodes} nodes", fix=fix)
        strategy = trainer.strategy
        if not isinstance(strategy, FSDP2):
            if ranks > 1:
                given = f"{strategy} with {ranks} processes"
                fix = "base: [../trainer/ddp.yaml], or trainer.devices: 1"
                raise UserError("Several processes run through FSDP2", where="trainer.strategy", given=given, fix=fix)
            return cls(ranks, nodes, None, assumed, gpu)
        # The strategy would learn these from the launcher and the devices of the machine.
        strategy.parallel_devices = [torch.device("cpu")] * (ranks // nodes)
        strategy.cluster_environment = SimpleNamespace(world_size=lambda: ranks)
        strategy.num_nodes = nodes
        return cls(ranks, nodes, strategy.mesh_shape(), assumed, gpu)


@contextmanager
def fake_mesh(world: World) -> Iterator[Any]:
    """The mesh as the first of the processes sees it, on a process group that exchanges nothing; None without one."""
    if world.mesh is None:
        yield None
        return
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import _sharding_prop
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world.ranks)
    try:
        # A check whose time is quadratic in the number of parameters, for strided shards, which there are none of.
        with patch(f"{_sharding_prop.__name__}._propagate_use_strided_shard_flag", lambda *_: None, create=True):
            yield init_device_mesh("cpu", world.mesh, mesh_dim_names=("replicate", "shard"))
    finally:
        dist.destroy_process_group()
