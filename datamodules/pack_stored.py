"""Pictures that lie in parquet files (Hugging Face datasets, img2dataset) or tars (webdataset), to be packed anew."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from datamodules.index_rows import beside
from datamodules.layouts import Truncated, open_shard, read_parts, samples, told_in
from datamodules.left_out import LeftOut
from datamodules.pack_sources import Place, Told, add_splits, split_named
from datamodules.pack_tables import CAPTION, open_parquet, plain
from datamodules.remote import RemoteOptions
from lightning_t2i.errors import UserError

BYTES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "image_bytes", "bytes")  # columns of pictures


@dataclass
class Stored:
    """Pictures by name, what is told of them, what is no picture, and the names of classes where they are known."""

    places: dict[str, Place] = field(default_factory=dict)
    told: dict[str, Told] = field(default_factory=dict)
    left_out: LeftOut = field(default_factory=LeftOut)
    classes: list[str] = field(default_factory=list)


def find_stored(folder: Path, language: str) -> Stored:
    """Pictures in the parquet files or tars of a folder and below it, or in one such file.

    A picture is named by its file and row, or its file and key. Splits are those of a column, or of the files' names.

    Raises:
        UserError: both kinds of files, or one that cannot be read.
    """
    tars, tables = archives(folder)
    if tars and tables:
        given = f"{tables[0].name}, {tars[0].name}"
        raise UserError(
            "Pictures lie in parquet files and in tars", where=str(folder), given=given, fix="pack them apart"
        )
    base = folder.parent if folder.is_file() else folder
    found, splits = Stored(), dict[str, str | None]()
    for path in tars or tables:
        stem = path.relative_to(base).with_suffix("").as_posix()
        known = len(found.places)
        (_from_tar if tars else _from_parquet)(found, path, stem, language)
        splits |= dict.fromkeys(itertools.islice(found.told, known, None), split_named(stem))
    add_splits(found.told, splits)
    return found


def archives(folder: Path) -> tuple[list[Path], list[Path]]:
    """Tars, and parquet files with a column of pictures, of a folder and below it, or the one file."""
    files = [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if not _hidden(path, folder))
    tables = [path for path in files if path.suffix == ".parquet" and picture_column(open_parquet(path).schema_arrow)]
    return [path for path in files if path.suffix == ".tar"], tables


def read_stored(places: Sequence[Place]) -> Iterator[Place | bytes]:
    """The bytes of pictures in parquet files, a row group at a time; other places as they are."""
    for (file, group), some in itertools.groupby(places, key=lambda place: (place.file, place.group)):
        if group < 0:
            yield from some
            continue
        source = open_parquet(Path(file))
        name = picture_column(source.schema_arrow)
        assert name is not None
        column = source.read_row_group(group, columns=[name])[name.split(".")[0]]
        for place in some:
            value = column[place.start].as_py()
            yield value["bytes"] if isinstance(value, dict) else value


def read_bytes(place: Place) -> bytes:
    """The bytes of a picture that is a file, or lies in a tar."""
    with open(place.file, "rb") as file:
        file.seek(place.start)
        return file.read(place.size)


def picture_column(schema: pa.Schema) -> str | None:
    """The column of encoded pictures, `image.bytes` of a struct as in Hugging Face's datasets; None: there is none."""
    structs = [f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    binary = [f.name for f in schema if pa.types.is_binary(f.type) or pa.types.is_large_binary(f.type)]
    binary = [name for name in binary if name in BYTES]
    for name in sorted(structs + binary, key=lambda n: BYTES.index(n) if n in BYTES else len(BYTES)):
        return f"{name}.bytes" if name in structs else name
    return None


def _from_parquet(found: Stored, path: Path, stem: str, language: str) -> None:
    source, stamp = open_parquet(path), path.stat().st_mtime_ns
    schema, pictures = source.schema_arrow, str(picture_column(source.schema_arrow))
    structs = [f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    columns = [f.name for f in schema if f.name not in structs and not pa.types.is_binary(f.type)]
    columns = [name for name in columns if not pa.types.is_large_binary(schema.field(name).type)]
    classes = _class_label(schema)
    label = "label" if "label" in classes or len(classes) != 1 else next(iter(classes))
    found.classes = classes.get(label, found.classes)
    number = 0
    for group in range(source.num_row_groups):
        missing = _rows_without_bytes(source, group, pictures)
        for row, cells in enumerate(_cells(source, group, columns)):
            name, number = f"{stem}/{number:08d}.parquet", number + 1
            facts = {("label" if n == label else n): v for n, v in plain(cells).items()}
            if facts.get("status", "success") != "success" or row in missing:
                found.left_out.add("no picture in the row", [name])
                continue
            entry = Told()
            entry.add_row(facts, f"{path}, row {number - 1}", language)
            if entry.more.get("label", 0) < 0:  # how test sets say that they do not tell it
                del entry.more["label"]
            if found.classes and 0 <= entry.more.get("label", -1) < len(found.classes) and not entry.captions:
                entry.add(language, [found.classes[entry.more["label"]].replace("_", " ")])
            found.places[name], found.told[name] = Place(str(path), stamp, row, 0, group), entry


def _cells(source: pq.ParquetFile, group: int, columns: Sequence[str]) -> list[dict[str, Any]]:
    if not columns:
        return [{} for _ in range(source.metadata.row_group(group).num_rows)]
    return source.read_row_group(group, columns=list(columns)).to_pylist()


def _rows_without_bytes(source: pq.ParquetFile, group: int, pictures: str) -> set[int]:
    """Rows whose cell is empty; the pictures are read for it only where the statistics say that there are some."""
    facts = source.metadata.row_group(group)
    (column,) = [c for c in map(facts.column, range(facts.num_columns)) if c.path_in_schema == pictures]
    if column.statistics is not None and column.statistics.has_null_count and not column.statistics.null_count:
        return set()
    name, _, inner = pictures.partition(".")
    column = source.read_row_group(group, columns=[pictures])[name]
    values = [cell["bytes"] if inner and cell else cell for cell in column.to_pylist()]
    return {row for row, value in enumerate(values) if not value}


def _class_label(schema: pa.Schema) -> dict[str, list[str]]:
    """Columns of class numbers and the classes' names, as Hugging Face's datasets note them."""
    told = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = told.get("info", {}).get("features", {})
    return {n: f["names"] for n, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"}


def _from_tar(found: Stored, path: Path, stem: str, language: str) -> None:
    stamp, known = path.stat().st_mtime_ns, beside(str(path))
    try:
        with open_shard(str(path), RemoteOptions()) as file:
            for sample in samples(file):
                name = f"{stem}/{sample.key}.tar"
                if sample.ext is None or name in found.told:
                    found.left_out.add("key used before" if sample.ext else "no picture among the members", [name])
                    continue
                beside_it = known.get(sample.key.rsplit("/", 1)[-1], {})
                try:
                    facts, captions = told_in(read_parts(file, sample), language, beside_it)
                except ValueError:
                    found.left_out.add("its .json or .cls cannot be read", [name])
                    continue
                facts = {n: v for n, v in plain(facts).items() if n not in CAPTION}
                entry = Told()
                entry.add_row({**facts, "caption": captions}, f"{path}, {sample.key}", language)
                start, size = sample.members[sample.ext]
                found.places[name], found.told[name] = Place(str(path), stamp, start, size), entry
    except Truncated as error:
        raise UserError(f"A shard is cut: {error}", where=str(path), fix="bring it whole, or move it away") from error


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)
