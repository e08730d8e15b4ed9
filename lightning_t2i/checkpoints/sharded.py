"""The sharded form: every process writes its part of the tensors through torch.distributed.checkpoint (DCP).

Beside `state.pt`, which holds all plain values and the names of the tensors, a folder has one `__RANK_0.distcp` per
process and `.metadata`, which tells where each part of each tensor lies. A load may happen on any mesh: a process reads
the parts that it needs. DCP's own loader unpickles whatever `.metadata` and entries of bytes hold; here `.metadata` may
name a few classes and nothing else, and there are no entries of bytes.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from lightning_t2i.checkpoints.ranks import Ranks
from lightning_t2i.errors import UserError
from lightning_t2i.state_io import Stored, write_state

STORED = "tensor in the files beside this one"  # key of the entry that stands for a tensor in state.pt
METHOD = ("state_dict", "t2i")  # keys of what `Saved` puts into a checkpoint
ALLOWED = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}


@dataclass
class Shard:
    """This process's part of a tensor.

    Args:
        local: the part; empty where another process writes it.
        chunk: where it lies in the whole.
        size: shape of the whole.
    """

    local: Tensor
    chunk: ChunkStorageMetadata
    size: torch.Size

    @classmethod
    def of(cls, tensor: DTensor) -> Shard:
        (chunk,) = tensor.__create_chunk_list__()
        return cls(tensor.detach().to_local(), chunk, tensor.size())

    def __create_write_items__(self, name: str, unused: Any) -> list[WriteItem]:
        """DCP asks for it."""
        if self.local.numel() == 0:
            return []
        data = TensorWriteData(self.chunk, TensorProperties(dtype=self.local.dtype), self.size)
        return [WriteItem(MetadataIndex(name, self.chunk.offsets), WriteItemType.SHARD, tensor_data=data)]


class _SavePlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Tensor:
        found = self.state_dict[index.fqn]
        return found.local if isinstance(found, Shard) else found


class _Writer(FileSystemWriter):
    def storage_meta(self) -> None:
        """Nothing: it would be the folder's temporary name."""


def write_sharded(state: dict[str, Any], folder: Path, ranks: Ranks) -> None:
    """Writes this process's files into a folder that all processes see; on rank 0 also what belongs to no process.

    A process that fails, at whatever it writes, fails all of them. Rank 0 alone plans and hears what was written.

    Args:
        state: a nest of plain values, tensors that are equal on all ranks, and `Shard`s.
    """
    tensors: dict[str, Tensor | Shard] = {}
    plain = _split(state, (), tensors)
    planner = _SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(tensors, is_coordinator=ranks.rank == 0)
    writer = _Writer(folder, sync_files=True)

    def plan() -> Any:
        if not folder.is_dir():
            raise UserError("A sharded checkpoint needs a folder that all processes see", where=str(folder))
        return planner.create_local_plan()

    plans = ranks.gather(plan)
    mine = planner.finish_plan(ranks.scatter(lambda: writer.prepare_global_plan(planner.create_global_plan(plans)[0])))
    results = ranks.gather(lambda: writer.write_data(mine, planner).wait())

    def finish() -> None:
        if ranks.rank == 0:
            writer.finish(planner.metadata, results)
            write_state(plain, folder)

    ranks.gather(finish)


def _split(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor | Shard]) -> Any:
    """A nest without its tensors, which go into `tensors`; single numbers and empty tensors stay."""
    if isinstance(value, Shard) or (isinstance(value, Tensor) and value.dim() > 0 and value.numel() > 0):
        name = "/".join(path)
        if name in tensors:
            raise ValueError(f"Two tensors of a checkpoint are called {name}")
        tensors[name] = value
        return {STORED: name}
    if isinstance(value, dict):
        return {k: _split(v, (*path, str(k)), tensors) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_split(v, (*path, str(i)), tensors) for i, v in enumerate(value))
    return value


class _Unpickler(pickle.Unpickler):
    """Knows the classes that `.metadata` is made of, and data types."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if name not in ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f".metadata of a checkpoint names {module}.{name}, which has no place there")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    def read_metadata(self, *unused: Any, **also_unused: Any) -> Metadata:
        with (self.path / ".metadata").open("rb") as stream:
            metadata = _Unpickler(stream).load()
        if any(Path(info.relative_path).name != info.relative_path for info in metadata.storage_data.values()):
            raise pickle.UnpicklingError(".metadata of a checkpoint names a file outside of its folder")
        return metadata


class _InFiles(Stored):
    """A tensor of a sharded checkpoint."""

    def __init__(self, name: str, reader: FileSystemReader, metadata: Metadata):
        self.name, self.reader, self.metadata = name, reader, metadata
        found = metadata.state_dict_metadata.get(name)
        if not isinstance(found, TensorStorageMetadata):  # DCP would unpickle it
            raise pickle.UnpicklingError(f"{name} of a checkpoint is no tensor")
        self.shape, self.dtype = found.size, found.properties.dtype

    def into(self, target: Tensor) -> None:
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner({self.name: target.detach()}, self.metadata)
        self.reader.read_data(planner.create_local_plan(), planner)


def joined(state: dict[str, Any], folder: Path, whole: bool) -> dict[str, Any]:
    """What `state.pt` of a sharded checkpoint holds, with its tensors.

    Args:
        whole: read them all; else those of the method are `Stored`, for `load_tensor` and `copy_into`.
    """
    reader = _Reader(folder)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, is_coordinator=True)

    def join(value: Any, whole: bool) -> Any:
        if isinstance(value, dict):
            if value.keys() == {STORED}:
                stored = _InFiles(value[STORED], reader, metadata)
                return stored.whole() if whole else stored
            return {k: join(v, whole) for k, v in value.items()}
        return type(value)(join(v, whole) for v in value) if isinstance(value, list | tuple) else value

    return {key: join(value, whole or key not in METHOD) for key, value in state.items()}
