"""Makes the shards of a data-set folder by several processes; a run that was killed goes on with the missing ones.

While it is made the folder holds, in `.pieces/`, the index of each finished shard with a hash of all that the shard is
made from: names, sizes and times of the files, captions. A shard is made again when one of them is another.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from datamodules.index_file import FORMAT, Index, index_path, joined
from datamodules.pack_sources import Place
from datamodules.pack_stored import read_bytes, read_stored
from datamodules.parallel import each
from datamodules.shards import ShardWriter, shard_name, write_index
from datamodules.upright import UNDECODED, loaded

# An MPO is a JPEG with further pictures behind it, as phones write them: readers get the first.
KEPT = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
PIECES = ".pieces"
THREADS = 4  # pictures of a process that are decoded at once


@dataclass(frozen=True)
class Sample:
    """A sample to write: its key, where its picture is, its JSON and its columns of the index."""

    key: str
    place: Place
    meta: dict[str, Any]
    columns: dict[str, float]


@dataclass(frozen=True)
class Job:
    """A shard to make: its split, its number and its samples."""

    split: str
    number: int
    samples: tuple[Sample, ...]

    @property
    def tar(self) -> str:
        return shard_name(self.split, self.number)

    @cached_property
    def hash(self) -> str:
        """Of all that the shard is made from."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def make_shards(part: Path, jobs: Sequence[Job], workers: int) -> list[str]:
    """Makes those shards that are missing; returns "name: reason" of the pictures that cannot be decoded.

    Raises:
        UserError: a worker was killed.
    """
    (part / PIECES).mkdir(exist_ok=True)
    todo = [job for job in jobs if not _is_made(part, job)]
    total, left = (sum(len(job.samples) for job in some) for some in (jobs, todo))
    with tqdm(total=total, initial=total - left, desc="pack", unit="picture") as bar:
        for job, _ in zip(todo, each(partial(_make, part), todo, workers), strict=True):
            bar.update(len(job.samples))
    return [line for job in jobs for line in _facts(_piece(part, job))["world"]["undecoded"]]


def join(part: Path, jobs: Sequence[Job], about: Mapping[str, Any]) -> dict[str, Index]:
    """Writes the index of every split that has a sample; removes what an earlier call made that is no longer wanted."""
    for path in {*part.glob("*.tar"), *part.glob("index-*.parquet")} - {part / job.tar for job in jobs}:
        path.unlink()
    indices = {}
    for split in sorted({job.split for job in jobs}):
        pieces = [_piece(part, job) for job in jobs if job.split == split and (part / job.tar).is_file()]
        if not pieces:
            continue
        table: pa.Table = joined([pq.read_table(piece, use_threads=False) for piece in pieces])
        shas = {name: sha for piece in pieces for name, sha in _facts(piece)["sha256"].items()}
        facts = {"format": FORMAT, "split": split, "shards": list(shas), "sha256": shas, "world": dict(about)}
        indices[split] = write_index(part, table, {**facts, "n": len(table)})
    return indices


def read_picture(source: Place | bytes) -> tuple[bytes, str] | str:
    """Bytes and file ending of a picture that decodes to its end, or why it does not."""
    try:
        data = source if isinstance(source, bytes) else read_bytes(source)
        with Image.open(io.BytesIO(data)) as image:
            picture = loaded(image)
            if image.format in KEPT:
                return data, KEPT[image.format]
            png = io.BytesIO()
            picture.convert("RGBA" if picture.has_transparency_data else "RGB").save(png, "png")
            return png.getvalue(), "png"
    except UnidentifiedImageError:
        return "unknown format"
    except UNDECODED as error:
        return str(error)


def _read_all(places: Sequence[Place]) -> Iterator[tuple[bytes, str] | str]:
    """What `read_picture` says, in order; a few are decoded at once."""
    with ThreadPoolExecutor(THREADS) as pool:
        sources = read_stored(places)
        while batch := list(itertools.islice(sources, 64)):
            yield from pool.map(read_picture, batch)


def _make(part: Path, job: Job) -> None:
    """Makes a shard; its index appears last, under the name that says that it is made."""
    piece, folder, undecoded = _piece(part, job), _piece(part, job).with_suffix(""), []
    piece.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with ShardWriter(folder, job.split, len(job.samples), first=job.number) as writer:
        for sample, found in zip(job.samples, _read_all([s.place for s in job.samples]), strict=True):
            if isinstance(found, str):
                undecoded.append(f"{sample.meta['file']}: {found}")
                continue
            writer.write(sample.key, *found, sample.meta, sample.columns)
        writer.world = {"hash": job.hash, "undecoded": undecoded}
    (part / job.tar).unlink(missing_ok=True)
    if len(writer):
        os.replace(folder / job.tar, part / job.tar)
    os.replace(index_path(folder, job.split), piece)
    shutil.rmtree(folder)


def _piece(part: Path, job: Job) -> Path:
    return part / PIECES / Path(job.tar).with_suffix(".parquet")


def _facts(piece: Path) -> dict[str, Any]:
    return json.loads(pq.read_schema(piece).metadata[b"t2i"])


def _is_made(part: Path, job: Job) -> bool:
    piece = _piece(part, job)
    if not piece.is_file():
        return False
    facts = _facts(piece)
    return facts["world"]["hash"] == job.hash and (facts["n"] == 0 or (part / job.tar).is_file())
