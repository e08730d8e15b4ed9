"""What the data of a training takes: samples and shards, memory of the loaders, caches that are still to be made."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq

from datamodules import worlds
from datamodules.encode import latent_folder
from datamodules.index_file import IN_MEMORY
from datamodules.prompts import SUFFIXES
from datamodules.records import data_folder
from datamodules.shards import index_path
from lightning_t2i.networks import load
from lightning_t2i.networks.codec import factor_of
from lightning_t2i.paths import resolve

TEXT = 64  # bytes of a short string in an array of Python objects
READ_AHEAD = 2  # batches that each worker of a DataLoader prepares
LATENT_BYTES, PLAN_BYTES = 2, 2  # fp16; uint16 for each row of the epoch that an order has planned
CLASS_BYTES = 1  # of a row of an index that is mapped, not held


@dataclass(frozen=True)
class Source:
    """Where a stream reads.

    there: whether it can be read now; rows, shards: None where that is not known; index: bytes of a row of the index;
    kept: bytes of all decoded pictures, where the stream keeps them.
    """

    name: str
    place: str
    there: bool
    rows: int | None = None
    shards: int | None = None
    index: int = 0
    kept: int = 0


def source_of(name: str, stream: Any) -> Source:
    """What is known of a stream's data without opening it; an embedded world is made on first use and so is there."""
    place = getattr(stream, "source", None)
    if place is None:  # made up as it is asked for
        return Source(name, type(stream).__name__, True)
    if Path(place).suffix in SUFFIXES:
        file = resolve(place)
        if not file.is_file():
            return Source(name, place, False)
        if file.suffix == ".parquet":
            rows = _limited(stream, pq.read_metadata(file).num_rows)
        else:
            with file.open("rb") as lines:
                rows = _limited(stream, sum(1 for _ in lines))
        return Source(name, place, True, rows, index=2 * TEXT)
    folder = folder_of(place)
    file = index_path(folder, stream.split)
    if not file.is_file():
        return Source(name, place, place in worlds.NAMES)
    schema = pq.read_schema(file)
    facts = json.loads((schema.metadata or {}).get(b"t2i", b"{}"))
    whole = pq.read_metadata(file).num_rows
    rows = _limited(stream, whole)
    width = (
        CLASS_BYTES
        if whole > IN_MEMORY
        else sum(field.type.bit_width / 8 if pa.types.is_primitive(field.type) else TEXT for field in schema)
    )
    kept = rows * 3 * stream.size**2 if getattr(stream, "in_memory", False) and stream.latents is None else 0
    return Source(name, place, True, rows, len(facts.get("shards", ())) or None, math.ceil(width), kept)


def folder_of(place: str) -> Path:
    """The folder of a data set or of an embedded world, which is not made here."""
    with patch.object(worlds, "build", lambda folder, write: folder):
        return data_folder(place) if place in worlds.NAMES else resolve(place)


def _limited(stream: Any, rows: int) -> int:
    limit = getattr(stream, "limit", None)
    return rows if limit is None else min(rows, limit)


def latent_shape(source: str, size: int) -> tuple[int, int, int]:
    """(C, h, w) of latents of square pictures by the config of an autoencoder's folder, or of a pipeline's."""
    config = load.read_json(source, "config.json") or load.read_json(source, "vae/config.json") or {}
    factor = factor_of(config)
    return config["latent_channels"], size // factor, size // factor


def ram_per_process(sources: list[Source], batch: dict[str, int], workers: int) -> int:
    """Bytes of host memory that the loaders of one process hold.

    Index and pictures that are kept (forked workers share them), the batches that are read ahead, and the plan of an
    epoch: the training process keeps that of the first one, which its workers share, and each worker makes the next.

    Args:
        batch: stream -> bytes of one process's part of a micro-batch.
        workers: of each stream.
    """
    held = sum((s.rows or 0) * (s.index + PLAN_BYTES * (1 + workers)) + s.kept for s in sources)
    return held + sum(batch.values()) * max(READ_AHEAD * workers, 1)


def machine_ram() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Store:
    """Something that the training writes: bytes (None: not known) in a place, and the key that decides them."""

    what: str
    place: Path
    bytes: int | None
    key: str


def caches(streams: dict[str, Any]) -> Iterator[Store]:
    """Latents that are still to be made."""
    for name, stream in streams.items():
        if (vae := getattr(stream, "latents", None)) is not None:
            folder = folder_of(stream.source)
            cache = latent_folder(folder, vae, stream.size, stream.views)
            file = cache / f"{stream.split}.json"
            if file.is_file() and json.loads(file.read_text()).get("complete"):
                continue
            source = source_of(name, stream)
            size = math.prod(latent_shape(vae, stream.size)) * LATENT_BYTES * len(stream.views)
            whole = source.rows * size if source.rows is not None else None
            yield Store(f"latents of {name}", cache, whole, f"data.{name}.latents")


def free_bytes(place: Path) -> int:
    """Free bytes on the disk where a folder is or will be."""
    there = next(p for p in (place.absolute(), *place.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free
