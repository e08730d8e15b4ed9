"""How networks are spread over processes."""

from lightning_t2i.strategies.fsdp2 import FSDP2
from lightning_t2i.strategies.sharding import shard_network

__all__ = ["FSDP2", "shard_network"]
