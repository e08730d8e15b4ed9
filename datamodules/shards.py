"""Data-set folders: webdataset shards with a Parquet index, written with the same bytes on every machine.

A folder holds `<split>-000000.tar`, …, one `index-<split>.parquet` per split and, written last, `dataset.json`. In a
shard each sample is two members, `KEY.EXT` (the picture's own bytes) and `KEY.json`; the index has the byte offset of
both, so that a sample is one `pread` and any order costs the same.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from PIL import Image

from datamodules.index_file import FORMAT, Index, index_path
from datamodules.upright import UNDECODED, upright_size
from lightning_t2i.errors import UserError

BLOCK = 512  # tar pads every member to blocks
RECORD = 20 * BLOCK  # and the archive to records
TYPES = {"shard": pa.int32(), "offset": pa.int64(), "size": pa.int64(), "json_offset": pa.int64()}
TYPES |= {"json_size": pa.int64(), "key": pa.string(), "ext": pa.string(), "width": pa.int32(), "height": pa.int32()}


def picture_size(data: bytes) -> tuple[int, int]:
    """Width and height from a picture's header, of the upright picture; (0, 0) when no decoder knows it."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return upright_size(image)
    except UNDECODED:
        return 0, 0


class ShardWriter:
    """Writes one split of a data-set folder, sample by sample; as a context manager it closes itself.

    Args:
        folder: data-set folder, which exists.
        split: name of the split.
        samples_per_shard: samples of a shard; the last one may have fewer.
        world: parameters that made the data, stored in the index.
        first: number of the first shard, for a writer that makes a part of the shards.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        samples_per_shard: int = 1000,
        world: Mapping[str, Any] | None = None,
        first: int = 0,
    ):
        self.folder, self.split, self.samples_per_shard = Path(folder), split, samples_per_shard
        self.world, self.first = dict(world or {}), first
        self._columns: dict[str, list[Any]] = {name: [] for name in TYPES}
        self._extra: list[Mapping[str, Any]] = []
        self._languages: list[frozenset[str]] = []
        self._sha256: dict[str, str] = {}
        self._keys: set[str] = set()
        self._file: BinaryIO | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.close()
        elif self._file is not None:  # no index: the split stays unreadable
            self._file.close()

    def __len__(self) -> int:
        return len(self._extra)

    def write(
        self,
        key: str,
        image: bytes,
        ext: str,
        meta: Mapping[str, Any],
        columns: Mapping[str, bool | int | float | str] | None = None,
    ) -> None:
        """Adds a sample.

        Args:
            key: name, unique in the split, without a dot or slash, at most 90 bytes.
            image: the encoded picture, stored as it is.
            ext: its file ending without a dot, such as png, jpg or webp.
            meta: what the sample's JSON says; `caption` holds lists of texts by language.
            columns: further columns of the index, the same names in every sample.

        Raises:
            UserError: the key is taken or cannot be a member's name.
        """
        self._take(key)
        text = json.dumps(meta, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")  # half characters
        width, height = picture_size(image)
        row = {
            "offset": self._member(f"{key}.{ext}", image),
            "size": len(image),
            "json_offset": self._member(f"{key}.json", text),
            "json_size": len(text),
            "ext": ext,
            "width": width,
            "height": height,
        }
        self._add(key, row, meta, columns or {})

    def _take(self, key: str) -> None:
        """Takes the key of the next sample, and begins its shard where it is the first of one."""
        if not key or {".", "/", "\0"} & set(key) or len(key.encode()) > 90:
            raise UserError(
                "Not a key of a sample", where="key", given=repr(key), allowed="1-90 bytes without dot or slash"
            )
        if key in self._keys:
            raise UserError("Two samples of a split have the same key", where=self.split, given=key)
        self._keys.add(key)
        if len(self) % self.samples_per_shard == 0:
            self._next_shard()

    def _add(self, key: str, row: Mapping[str, Any], meta: Mapping[str, Any], columns: Mapping[str, Any]) -> None:
        """Adds a sample to the index: where its bytes are (`row`), its languages and its further columns."""
        for name, value in {"shard": len(self._sha256), "key": key, **row}.items():
            self._columns[name].append(value)
        self._languages.append(frozenset(name for name, texts in meta.get("caption", {}).items() if any(texts)))
        self._extra.append(dict(columns))

    def close(self) -> Index:
        """Ends the last shard, writes the index and returns it."""
        self._end_shard()
        columns = {name: pa.array(values, TYPES[name]) for name, values in self._columns.items()}
        for language in sorted(frozenset().union(*self._languages)):
            columns[f"caption_{language}"] = pa.array([language in found for found in self._languages], pa.bool_())
        for name in self._extra[0] if self._extra else ():
            columns[name] = pa.array([extra[name] for extra in self._extra])
        facts = {
            "format": FORMAT,
            "split": self.split,
            "shards": list(self._sha256),
            "sha256": self._sha256,
            "world": self.world,
            "n": len(self),
        }
        return write_index(self.folder, pa.table(columns), facts)

    def _next_shard(self) -> None:
        self._end_shard()
        self._name = shard_name(self.split, self.first + len(self._sha256))
        self._file, self._hash, self._offset = (self.folder / self._name).open("wb"), hashlib.sha256(), 0

    def _end_shard(self) -> None:
        if self._file is None:
            return
        end = self._offset + 2 * BLOCK
        self._put(bytes(2 * BLOCK + -end % RECORD))
        self._file.close()
        self._file = None
        self._sha256[self._name] = self._hash.hexdigest()

    def _member(self, name: str, data: bytes) -> int:
        """Appends a member that says nothing of who wrote it or when; returns the offset of its data."""
        info = tarfile.TarInfo(name)  # owner 0, time 0, mode 0644
        info.size = len(data)
        self._put(info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape"))
        start = self._offset
        self._put(data + bytes(-len(data) % BLOCK))
        return start

    def _put(self, data: bytes) -> None:
        assert self._file is not None
        self._file.write(data)
        self._hash.update(data)
        self._offset += len(data)


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


def write_index(folder: Path, table: pa.Table, facts: Mapping[str, Any]) -> Index:
    """Writes the index of a split (columns as in `TYPES` and more, `facts` as in `Index`) and returns it."""
    path = index_path(folder, facts["split"])
    table = table.replace_schema_metadata({b"t2i": json.dumps(facts, ensure_ascii=False).encode()})
    pq.write_table(table, f"{path}.part", compression="zstd")
    os.replace(f"{path}.part", path)
    return Index.load(folder, facts["split"])


def finish(
    folder: Path, name: str, splits: Mapping[str, Index], licence: str, parameters: Mapping[str, Any], **more: Any
) -> None:
    """Writes `dataset.json`, which makes the folder complete."""
    shas = json.dumps({split: index.facts["sha256"] for split, index in splits.items()}, sort_keys=True)
    about = {
        "name": name,
        "splits": {split: len(index) for split, index in splits.items()},
        "sha256": hashlib.sha256(shas.encode()).hexdigest(),
        "licence": licence,
        "parameters": dict(parameters),
        **more,
    }
    part = folder / "dataset.json.part"
    part.write_text(json.dumps(about, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(part, folder / "dataset.json")


def build(folder: Path, write: Callable[[Path], None], goes_on: bool = False) -> Path:
    """`folder`, made by `write` unless it is complete already; it appears whole or not at all.

    Of several processes that ask at once one builds and the others wait. What a killed build left is removed, or given
    to `write` again where it `goes_on` from there.

    Raises:
        UserError: something else lies there.
    """
    if (folder / "dataset.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if (folder / "dataset.json").is_file():
            return folder
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            fix = "name a new folder, or move what is there out of the way"
            raise UserError("The folder to write to is not empty and is no data set", where=str(folder), fix=fix)
        part = folder.parent / f".{folder.name}.part"
        if not goes_on:
            shutil.rmtree(part, ignore_errors=True)
        part.mkdir(exist_ok=True)
        write(part)
        os.replace(part, folder)
    return folder
