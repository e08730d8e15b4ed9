"""Checkpoints: whole tensors on any mesh, folders that are complete or absent, files that run no code when read.

A checkpoint is a folder `step-00001000` with `state.pt` (tensors and plain types only) and `complete.json`, which is
written last. The folder is built under a hidden name beside its final place, flushed to disk and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_t2i.errors import UserError

STATE, MARKER = "state.pt", "complete.json"


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor on the CPU; a collective call when it is sharded."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().clone()


def load_tensor(saved: Tensor, like: Tensor) -> Tensor:
    """`saved` (whole) on the device and mesh of `like`; values of another shape (step counts) stay on the CPU."""
    if saved.shape != like.shape or saved.dim() == 0:
        return saved.clone()
    if not isinstance(like, DTensor):
        return saved.to(like.device, copy=True)
    moved = saved.to(like.device_mesh.device_type)
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


def copy_into(target: Tensor, saved: Tensor) -> None:
    """Overwrites `target` (any mesh) with `saved` (whole)."""
    with torch.no_grad():
        if isinstance(target, DTensor):
            target.to_local().copy_(load_tensor(saved, target).to_local())
        else:
            target.copy_(saved)


def flush(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that readers see the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    flush(temporary)
    os.replace(temporary, path)
    flush(path.parent)


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's plug-in for the files; `trainer.save_checkpoint(folder)` and `fit(ckpt_path=folder)` use it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes a checkpoint folder; an error leaves every earlier checkpoint untouched and is raised."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            torch.save(checkpoint, temporary / STATE)
            flush(temporary / STATE)
            step = int(checkpoint.get("global_step", 0))
            write_atomically(
                temporary / MARKER,
                json.dumps({"step": step, "bytes": (temporary / STATE).stat().st_size, "form": "single"}).encode(),
            )
            if path.exists():
                self.remove_checkpoint(path)
            os.replace(temporary, path)
            flush(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Reads a complete checkpoint folder without running code from it.

        Raises:
            UserError: the folder is not a complete checkpoint of this repository.
        """
        if not is_complete(Path(path)):
            raise UserError(
                "This is not a complete checkpoint",
                where=str(path),
                allowed=f"a folder with {STATE} and {MARKER}",
                fix="name a folder under runs/NAME/checkpoints, or train from the start with --fresh",
            )
        return torch.load(Path(path) / STATE, map_location=map_location, weights_only=True)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes a checkpoint; the marker goes first, so that a half-removed folder never looks complete."""
        (Path(path) / MARKER).unlink(missing_ok=True)
        shutil.rmtree(path)


def is_complete(path: Path) -> bool:
    """Whether a folder holds a finished checkpoint of the size that its marker names."""
    try:
        marker = json.loads((path / MARKER).read_text())
        return (path / STATE).stat().st_size == marker["bytes"]
    except (OSError, ValueError, KeyError):
        return False


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if not p.name.startswith(".") and is_complete(p)]
    return sorted(found, key=lambda p: json.loads((p / MARKER).read_text())["step"])


def newest(folder: Path) -> Path | None:
    """The complete checkpoint of the latest training step, or None."""
    found = complete_checkpoints(folder)
    return found[-1] if found else None


def clean_leftovers(folder: Path) -> None:
    """Removes what a killed process left behind; for rank 0, before the first save."""
    if folder.is_dir():
        for path in folder.glob(".*.tmp"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
