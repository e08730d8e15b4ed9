"""Frozen networks: teachers, encoders, autoencoders. Never trained, never in a checkpoint, known by their identity."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from lightning_t2i import rank0
from lightning_t2i.errors import UserError


def freeze(network: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Puts a network into eval mode without gradients, for good; `dtype` converts its floating-point weights."""
    network.requires_grad_(False).eval()
    return network.to(dtype) if dtype is not None else network


def folder_identity(
    source: str | Path, revision: str | None = None, parts: tuple[str, ...] = ("",),
    known: Mapping[Path, bytes] | None = None,
) -> str:  # fmt: skip
    """What a frozen network's weights are known by: the hash of its folder, or hub id and revision.

    The hash covers names and contents of the weight and config files, so that a moved folder keeps its identity.

    Args:
        parts: how the paths of the files begin that count.
        known: SHA-256 of files that need not be read for it.
    """
    folder = Path(source)
    if not folder.is_dir():
        return f"{source}@{revision or 'main'}"
    return rank0.agreed(lambda: _hash_of(folder, parts, known or {}))


def _hash_of(folder: Path, parts: tuple[str, ...], known: Mapping[Path, bytes]) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.suffix not in {".json", ".safetensors", ".txt", ".model"} or not name.startswith(parts):
            continue
        digest.update(name.encode())
        digest.update(known.get(file) or _digest_of(file))
    return f"sha256:{digest.hexdigest()[:16]}"


def _digest_of(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def check_identities(saved: dict[str, str], current: dict[str, str]) -> None:
    """Refuses a checkpoint that was trained against other frozen networks.

    Raises:
        UserError: names the first network that differs.
    """
    for name in sorted(saved.keys() | current.keys()):
        if saved.get(name) != current.get(name):
            raise UserError(
                f"The checkpoint was trained with another frozen network '{name}'",
                given=current.get(name, "none"),
                allowed=saved.get(name, "none"),
                fix="restore the folder the run was started with, or start a new run with --run NAME",
            )
