"""The rows of one shard's index, with what img2dataset's statistics and metadata beside the shard say of them."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from datamodules.layouts import Sample, Truncated, class_number, open_shard, read_parts, samples, told_in
from datamodules.left_out import spelled
from datamodules.remote import RemoteOptions, filesystem, is_remote
from datamodules.shards import TYPES, picture_size
from lightning_t2i.errors import UserError

HEAD = 1 << 16  # bytes of a picture that mostly hold its size
NAMED = 20  # samples of a shard that are named in the report
BESIDE = ("_stats.json", ".parquet")  # what img2dataset writes with a shard
KINDS = {name: kind for name, kind in TYPES.items() if name != "shard"}
HASHED = ("key", "offset", "size", "json_size", "txt_offset", "txt_size")
KINDS |= {"txt_offset": pa.int64(), "txt_size": pa.int64(), "caption_length": pa.int32()}


def part_path(out: Path, split: str, shard: str) -> Path:
    """Where the rows of a shard lie until all are joined."""
    return out / f".parts-{split}" / f"{hashlib.sha256(shard.encode()).hexdigest()[:24]}.parquet"


def stamp(shard: str) -> list[list[int] | None] | None:
    """Bytes and time of change (ns) of a local shard and of what lies beside it, None for what is not there.

    A remote shard has none, since not every server tells: its rows are kept by its name.
    """
    if is_remote(shard):
        return None
    paths = [Path(shard), *(Path(f"{shard.removesuffix('.tar')}{ending}") for ending in BESIDE)]
    facts = [path.stat() if path.is_file() else None for path in paths]
    return [found and [found.st_size, found.st_mtime_ns] for found in facts]


def is_indexed(shard: str, out: Path, split: str) -> bool:
    """Whether the rows of a shard are there and it is the one that they were made from."""
    part = part_path(out, split, shard)
    return part.is_file() and json.loads(pq.read_schema(part).metadata.get(b"stamp", b"null")) == stamp(shard)


def index_shard(shard: str, out: Path, split: str, language: str, options: RemoteOptions = RemoteOptions()) -> None:
    """Writes the rows of a shard, and a report of what was left out and why, as one file that appears whole."""
    rows: list[dict[str, Any]] = []
    content: list[list[Any]] = []  # of which the identity is a hash
    report: dict[str, Any] = {"error": None, "skipped": 0, "reasons": {}, "counts": Counter()}
    keys = set[str]()
    made_from = stamp(shard)  # before it is read: a change meanwhile is noticed by the next call
    try:
        known = beside(shard)
        stats = known.pop("", {})
        with open_shard(shard, options) as file:
            for sample in samples(file):
                parts = read_parts(file, sample)
                try:
                    row = row_of(sample, file, parts, known.get(sample.key.rsplit("/", 1)[-1], {}), language)
                    if sample.key in keys:
                        raise ValueError("another sample has this key")
                except UserError:  # of the network, not of the sample
                    raise
                except ValueError as reason:
                    report["skipped"] += 1
                    report["counts"][str(reason)] += 1
                    if len(report["reasons"]) < NAMED:
                        report["reasons"][spelled(sample.key)] = str(reason)
                    continue
                keys.add(sample.key)
                rows.append(row)
                # Padded to blocks, another text lies where the old one lay: the bytes tell them apart, not the places.
                told = hashlib.sha256(b"".join(data for _, data in sorted(parts.items()))).hexdigest()
                content.append([*(row[name] for name in HASHED), row.get("label"), told])
        found = len(rows) + report["skipped"]
        if stats.get("successes", found) != found:
            report["error"] = f"its statistics say {stats['successes']} samples, it holds {found}"
    except Truncated as error:
        report["error"] = f"it is cut after {len(rows)} samples: {error}"
    except UserError as error:
        if error.what not in ("There is no such remote file", "A shard cannot be opened"):
            raise  # a server that does not answer is not a shard that is not there
        report["error"] = error.what
    names = list(KINDS) + sorted({name for row in rows for name in row} - set(KINDS))
    columns = {}
    for name in names:
        if name.startswith("caption_") and name not in KINDS:
            columns[name] = pa.array([bool(row.get(name)) for row in rows], pa.bool_())
        else:
            columns[name] = pa.array([row.get(name) for row in rows], KINDS.get(name, pa.float64()))
    report |= {"rows": len(rows), "hash": hashlib.sha256(json.dumps(content).encode()).hexdigest()}
    facts = {b"report": json.dumps(report).encode(), b"stamp": json.dumps(made_from).encode()}
    table = pa.table(columns).replace_schema_metadata(facts)
    path = part_path(out, split, shard)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(table, temporary, compression="zstd")
    os.replace(temporary, path)


def row_of(
    sample: Sample, data: BinaryIO, parts: dict[str, bytes], known: dict[str, Any], language: str
) -> dict[str, Any]:
    """The row of a sample.

    Args:
        sample: its members.
        data: the shard, to read the picture's head from.
        parts: JSON, text and class, see `read_parts`.
        known: what metadata beside the shard says of it.
        language: of captions that do not say theirs.

    Raises:
        ValueError: why the sample is left out.
    """
    if sample.ext is None:
        raise ValueError(f"no picture among its members {', '.join(sorted(sample.members))}")
    if spelled(sample.key) != sample.key:
        raise ValueError("its name is not UTF-8")
    row: dict[str, Any] = {"key": sample.key, "ext": sample.ext}
    for name, ext in (("", sample.ext), ("json_", "json"), ("txt_", "txt")):
        row[f"{name}offset"], row[f"{name}size"] = sample.members.get(ext, (0, 0))
    meta, captions = told_in(parts, language, known)
    if meta.get("status", "success") != "success":
        raise ValueError(f"status {meta['status']}")
    row |= {f"caption_{spoken}": True for spoken in captions}
    row["caption_length"] = max((len(text) for texts in captions.values() for text in texts), default=0)
    numbers = {n: float(v) for n, v in meta.items() if isinstance(v, bool | int | float)}
    numbers.pop("label", None)
    if (label := class_number(meta.get("label"))) is not None:
        numbers["label"] = float(label)
    # Not those of the JSON, which may be of the picture before it was made smaller.
    row["width"], row["height"] = _size(data, row["offset"], row["size"])
    return row | {n: v for n, v in numbers.items() if n not in row and not n.startswith("caption_")}


def _size(data: BinaryIO, offset: int, size: int) -> tuple[int, int]:
    for length in dict.fromkeys((min(size, HEAD), size)):
        width, height = picture_size(_read(data, offset, length))
        if width:
            return width, height
    raise ValueError("its picture has no header that can be read")


def _read(data: BinaryIO, offset: int, size: int) -> bytes:
    data.seek(offset)
    return data.read(size)


def beside(shard: str) -> dict[str, dict[str, Any]]:
    """Rows of `NAME.parquet` by key, and `NAME_stats.json` under the empty key, where they lie beside a shard."""
    stem, found = shard.removesuffix(".tar"), dict[str, dict[str, Any]]()
    for ending in BESIDE:
        content = _whole(f"{stem}{ending}")
        if content is None:
            continue
        if ending == ".parquet":
            found |= {str(row["key"]): row for row in _rows(content)}
        else:
            found[""] = json.loads(content)
    return found


def _rows(content: bytes) -> Iterator[dict[str, Any]]:
    table = pq.read_table(io.BytesIO(content))
    return iter(table.to_pylist()) if "key" in table.column_names else iter(())


def _whole(name: str) -> bytes | None:
    if not is_remote(name):
        return Path(name).read_bytes() if Path(name).is_file() else None
    system, path = filesystem(name)
    try:
        return system.cat_file(path)
    except FileNotFoundError:
        return None
