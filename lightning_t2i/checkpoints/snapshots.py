"""EMA snapshots: the averaged weights alone, in bfloat16, one safetensors file each, for sampling and comparison."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_t2i.errors import UserError
from lightning_t2i.group import Group
from lightning_t2i.state_io import flush


@dataclass(frozen=True)
class SnapshotOptions:
    """When EMA snapshots are written.

    Args:
        every: training steps between two snapshots; 0 writes none.
        keep: number of snapshots kept, the newest ones.
    """

    every: int = 0
    keep: int = 10

    def __post_init__(self) -> None:
        if self.every < 0:
            raise UserError("The snapshot interval is negative", where="checkpoints.ema.every", given=self.every)
        if self.keep < 1:
            raise UserError("At least one snapshot must be kept", where="checkpoints.ema.keep", given=self.keep)


def twins(groups: Iterable[Group]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of all EMA twins."""
    for group in groups:
        yield from ((name, tensor) for name, tensor in group.tensors() if not name.startswith(f"{group.name}."))


def averages(groups: Iterable[Group], keep: bool = True) -> dict[str, Tensor]:
    """Names and whole tensors of all EMA twins on the CPU, weights in bfloat16; a collective call when sharded.

    Args:
        keep: else this process only takes part in the call, and nothing is returned.
    """
    found = {}
    for name, tensor in twins(groups):
        tensor = tensor.detach().to(torch.bfloat16) if tensor.is_floating_point() else tensor.detach()
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            found[name] = whole.cpu().clone(memory_format=torch.contiguous_format)
    return found


def write_snapshot(folder: Path, step: int, tensors: Mapping[str, Tensor], keep: int) -> None:
    """Writes `step-XXXXXXXX.safetensors`, which is complete or not there, and removes all but the newest `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.safetensors"
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(dict(tensors), temporary, metadata={"format": "pt", "step": str(step)})
        flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(folder)
    for old in sorted(folder.glob("step-*.safetensors"))[:-keep]:
        old.unlink()
