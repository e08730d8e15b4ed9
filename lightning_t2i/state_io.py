"""Checkpoints: one state on any mesh, folders that are complete or absent, files that run no code when read.

A checkpoint is a folder `step-00001000` with `state.pt` (tensors and plain types only) and `complete.json`, which is
written last and names the other files with their sizes. The folder is built under a hidden name beside its final place,
flushed to disk and renamed. In the sharded form the tensors are in files beside `state.pt`, see checkpoints/sharded.py.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_t2i.checkpoints.ranks import ALONE, Ranks
from lightning_t2i.errors import UserError

STATE, MARKER = "state.pt", "complete.json"


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor on the CPU; a collective call when it is sharded."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().clone()


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, without a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Stored(ABC):
    """A tensor in the files of a checkpoint, of which every process reads what it needs."""

    shape: torch.Size
    dtype: torch.dtype

    @abstractmethod
    def into(self, target: Tensor) -> None:
        """Overwrites a tensor of the same shape, on any device and mesh; reads this process's part of it alone."""

    def whole(self) -> Tensor:
        """All of it, on the CPU."""
        self.into(target := torch.empty(self.shape, dtype=self.dtype))
        return target


def load_tensor(saved: Tensor | Stored, like: Tensor) -> Tensor:
    """`saved` on the device and mesh of `like`; values of another shape (step counts) stay on the CPU."""
    if saved.shape != like.shape or like.dim() == 0:
        return saved.whole() if isinstance(saved, Stored) else saved.clone()
    if isinstance(saved, Stored):
        saved.into(target := torch.empty_like(like, dtype=saved.dtype, requires_grad=False))
        return target
    if not isinstance(like, DTensor):
        return saved.to(like.device, copy=True)
    copies = all(placement.is_replicate() for placement in like.placements)  # else a part is cut out, which copies
    moved = saved.to(like.device_mesh.device_type, copy=copies)
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


def copy_into(target: Tensor, saved: Tensor | Stored) -> None:
    """Overwrites `target` (any mesh) with `saved`."""
    with torch.no_grad():
        if isinstance(saved, Stored):
            saved.into(target)
        elif isinstance(target, DTensor):
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
    try:
        temporary.write_bytes(data)
        flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


def write_state(state: dict[str, Any], folder: Path) -> None:
    """Writes `state.pt` and waits until it is on the disk."""
    with (folder / STATE).open("wb") as stream:  # given a path, torch calls a full disk a wrong position
        try:
            torch.save(state, stream)
        except RuntimeError as error:  # which it does as well where it ends a file of which a part is missing
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
    flush(folder / STATE)


def write_folder(path: Path, step: int, form: str, fill: Callable[[Path], None], ranks: Ranks = ALONE) -> None:
    """Builds a checkpoint folder under a hidden name and renames it when all is on the disk.

    An error leaves every earlier checkpoint untouched and is raised on every rank.

    Args:
        fill: writes the files into a folder and flushes them; called on every rank.
        ranks: who writes; rank 0 makes, marks and renames the folder.
    """
    temporary = path.with_name(f".{path.name}.tmp")

    def begin() -> None:
        if ranks.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()

    def finish() -> None:
        if ranks.rank == 0:
            files = {p.name: p.stat().st_size for p in sorted(temporary.iterdir())}
            marker = {"step": step, "form": form, "files": files}
            write_atomically(temporary / MARKER, json.dumps(marker).encode())
            if path.exists():
                remove(path)
            os.replace(temporary, path)
            flush(path.parent)

    try:
        ranks.gather(begin)
        fill(temporary)
        ranks.gather(finish)
    except BaseException as error:
        if ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)
        raise


def remove(path: Path) -> None:
    """Removes a checkpoint; the marker goes first, so that a half-removed folder never looks complete."""
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path)


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's plug-in for the files; `trainer.save_checkpoint(folder)` and `fit(ckpt_path=folder)` use it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes a checkpoint folder; an error leaves every earlier checkpoint untouched and is raised.

        Args:
            storage_options: a `Saving` decides about form and time; None writes the single-file form at once.
        """
        if storage_options is not None:
            storage_options.save(checkpoint, Path(path))
        else:
            write_folder(Path(path), int(checkpoint.get("global_step", 0)), "single", partial(write_state, checkpoint))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True, whole: bool = True
    ) -> dict[str, Any]:
        """Reads a complete checkpoint folder of any form without running code from it.

        Args:
            whole: read all tensors; else those of the method stay in their files until they are used: as `Stored` in
                the sharded form, mapped into memory in the other, so that the processes of a node share what they read.
                What is kept of them has to be a copy, as `load_tensor` and `copy_into` make it: files are removed.

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
        sharded = read_marker(Path(path))["form"] == "sharded"
        mapped = not (whole or sharded)
        state = torch.load(Path(path) / STATE, map_location=map_location, weights_only=True, mmap=mapped)
        if sharded:
            from lightning_t2i.checkpoints.sharded import joined  # takes a while to import

            return joined(state, Path(path), whole)
        if mapped:  # all but weights and optimizer states may be kept as it comes
            large = (state.get("state_dict"), state.get("t2i", {}).get("groups"))
            return copy.deepcopy(state, {id(part): part for part in large})
        return state

    def remove_checkpoint(self, path: str | Path) -> None:
        remove(Path(path))


def read_marker(path: Path) -> dict[str, Any]:
    """Step, form and {file: bytes} of a checkpoint folder, as its marker tells them."""
    marker = json.loads((path / MARKER).read_text())
    # Checkpoints of the first format told one size.
    return {"form": "single", **marker, "files": marker.get("files") or {STATE: marker["bytes"]}}


def _complete_step(path: Path) -> int | None:
    """The training step of a finished checkpoint, whose files all have the size that the marker names; else None."""
    try:
        marker = read_marker(path)
        files = marker["files"]
        whole = STATE in files and all((path / name).stat().st_size == size for name, size in files.items())
        return marker["step"] if whole else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def is_complete(path: Path) -> bool:
    """Whether a folder holds a finished checkpoint."""
    return _complete_step(path) is not None


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first; a training beside may remove some meanwhile."""
    if not folder.is_dir():
        return []
    steps = {p: _complete_step(p) for p in folder.iterdir() if not p.name.startswith(".")}
    return [path for step, path in sorted((step, path) for path, step in steps.items() if step is not None)]


def newest(folder: Path) -> Path | None:
    """The complete checkpoint of the latest training step, or None."""
    found = complete_checkpoints(folder)
    return found[-1] if found else None


def clean_leftovers(folder: Path) -> None:
    """Removes what a killed process left behind, half-written or half-removed; for rank 0, before the first save."""
    if folder.is_dir():
        unmarked = (path for path in folder.glob("step-*") if path.is_dir() and not (path / MARKER).exists())
        for path in [*folder.glob(".*.tmp"), *unmarked]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
