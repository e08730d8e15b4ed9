"""One execution path for several processes: FSDP2 on a (replicate, shard) mesh."""

from __future__ import annotations

import atexit
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.utilities.distributed import _destroy_dist_connection
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout

from lightning_t2i.errors import UserError
from lightning_t2i.state_io import AtomicCheckpointIO
from lightning_t2i.strategies import roll_call


class FSDP2(ModelParallelStrategy):
    """Data parallelism over replicate x shard processes; weights are cut into `shard` parts.

    shard = 1 is what DDP does, replicate = 1 is fully sharded, both above 1 is hybrid sharding. Networks are sharded
    where a method adds them, each as a root of its own; checkpoints know tensors by names, whatever the mesh.

    Args:
        replicate: number of copies; null: world size / shard.
        shard: parts of each copy; null: world size / replicate, on several nodes the devices of one node.
        timeout: how long a collective call waits for a missing process, in every group; null: torch's defaults.
    """

    def __init__(
        self, replicate: int | None = None, shard: int | None = None, timeout: timedelta | None = default_pg_timeout
    ):
        super().__init__(save_distributed_checkpoint=False, timeout=timeout)
        self.replicate, self.shard, self.timeout = replicate, shard, timeout
        self.checkpoint_io = AtomicCheckpointIO()

    def mesh_shape(self) -> tuple[int, int]:
        """(replicate, shard) for this world size.

        Raises:
            UserError: the product is not the number of processes.
        """
        world = self.world_size
        replicate, shard = self.replicate, self.shard
        if shard is None:
            shard = world // replicate if replicate else (self.num_processes if self.num_nodes > 1 else world)
        replicate = replicate or world // shard
        if replicate * shard != world:
            raise UserError(
                "The mesh does not match the number of processes",
                where="trainer.strategy",
                given=f"replicate {replicate} x shard {shard} = {replicate * shard}",
                allowed=f"{world} = trainer.devices x trainer.num_nodes",
                fix="set one of replicate and shard to null",
            )
        return replicate, shard

    def setup_environment(self) -> None:
        Strategy.setup_environment(self)
        self._setup_distributed()
        # While the interpreter ends, a thread of gloo that holds tensors can crash it (pytorch/pytorch#179291): the
        # threads end before. Lightning does it for NCCL alone.
        atexit.register(_destroy_dist_connection)
        roll_call.begin(_get_default_store(), self.global_rank)
        self._device_mesh = init_device_mesh(
            self.root_device.type, self.mesh_shape(), mesh_dim_names=("replicate", "shard")
        )
        for group in self._device_mesh.get_all_groups() if self.timeout is not None else ():
            _set_pg_timeout(self.timeout, group)  # the mesh makes its groups with torch's own
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    def on_exception(self, exception: BaseException) -> None:
        """Adds to the error of a collective call which processes are missing."""
        if dist.is_initialized() and self.world_size > 1:
            for line in roll_call.roll_call(exception, _get_default_store(), self.global_rank, self.world_size):
                exception.add_note(line)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    # The module gathers and spreads its own state, so these take the plain way of a single device.
    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        path = self.broadcast(filepath)
        if self.is_global_zero or storage_options is not None:  # a `Saving` has something to do for every rank
            self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path, whole=False)  # each process reads its part


def mesh_of(module: L.LightningModule) -> Any:
    """The (replicate, shard) mesh that the strategy set on the module, or None in a single plain process."""
    return getattr(module, "_device_mesh", None)
