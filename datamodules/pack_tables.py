"""Rows of the files that name pictures and their captions: jsonl, csv, parquet, and the annotations of COCO's kind.

Every reader yields (place for messages, row); a row has the fields `file_name`, `caption` and so on of docs/data.md.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_t2i.errors import UserError

FILE = ("file_name", "file", "image", "path")  # names of the field that says which picture
CAPTION = ("caption", "captions", "text", "prompt")  # its caption; the first that is there counts
KINDS = (".jsonl", ".csv", ".parquet", ".json")
Row = tuple[str, Mapping[str, Any]]


def rows_of(table: Path) -> Iterator[Row]:
    """Rows of a file of captions.

    Raises:
        UserError: not there, of another kind, or not to be understood, with file and line.
    """
    if not table.is_file():
        raise UserError("No such file of captions", where="--captions", given=table)
    kind = table.suffix.lower()
    if kind not in KINDS:
        raise UserError("Not a kind of file for captions", where="--captions", given=table, allowed=KINDS)
    return {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet, ".json": _annotations}[kind](table)


def tables_in(folder: Path) -> list[Path]:
    """Files in a folder that may name its pictures; a parquet counts where a column of texts can do so."""
    found = [path for path in folder.iterdir() if path.suffix.lower() in (".jsonl", ".csv")]
    return sorted(found + [path for path in folder.glob("*.parquet") if _names_pictures(path)])


def read_text(path: Path) -> str:
    """A file of UTF-8, with or without its mark, whose ends of lines stay as they are.

    Raises:
        UserError: it is of another encoding.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"Not UTF-8 text: {error.reason} at byte {error.start}", where=str(path)) from error


def lines_of(text: str) -> list[str]:
    """Lines that end with LF or CR LF alone: str.splitlines also cuts captions at U+2028, U+0085 and control codes."""
    return [line.removesuffix("\n").removesuffix("\r") for line in io.StringIO(text)]


def open_parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"Not a parquet file that can be read: {error}", where=str(path)) from error


def picture_named(row: Mapping[str, Any], where: str) -> str:
    """The picture of a row, as a path relative to the folder."""
    given = next((row[name] for name in FILE if row.get(name)), None)
    if not isinstance(given, str):
        raise UserError(
            "The row names no picture", where=where, given=list(row), allowed=f"a field {' or '.join(FILE)}"
        )
    path = PurePosixPath(given.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise UserError("A picture is named relative to the folder and lies in it", where=where, given=given)
    return path.as_posix()


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a parquet file as JSON knows it: without empty cells, other kinds of values as texts."""
    full = {n: v for n, v in row.items() if v is not None and not (isinstance(v, float) and math.isnan(v))}
    return json.loads(json.dumps(full, default=str))


def _names_pictures(path: Path) -> bool:
    kinds = {field.name: field.type for field in open_parquet(path).schema_arrow}
    return any(pa.types.is_string(kind) or pa.types.is_large_string(kind) for kind in map(kinds.get, FILE) if kind)


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(lines_of(read_text(path)), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"Not valid JSON: {error}", where=f"{path}:{number}", given=line[:80]) from error
        if not isinstance(row, dict):
            raise UserError("Not a JSON object", where=f"{path}:{number}", given=line[:80])
        yield f"{path}:{number}", row


def _csv(path: Path) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise UserError("Not as many cells as columns", where=where, fix="quote texts that hold commas")
            yield where, row
    except csv.Error as error:
        raise UserError(f"Not valid CSV: {error}", where=f"{path}, after line {reader.line_num}") from error


def _parquet(path: Path) -> Iterator[Row]:
    number = 0
    for batch in open_parquet(path).iter_batches():
        for row in batch.to_pylist():
            yield f"{path}, row {number}", plain(row)
            number += 1


def _annotations(path: Path) -> Iterator[Row]:
    """Karpathy's dataset_coco.json and dataset_flickr30k.json, and COCO's own captions_train2017.json."""
    try:
        told = json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"Not valid JSON: {error}", where=str(path)) from error
    images = told.get("images") if isinstance(told, dict) else None
    try:
        if images and "sentences" in images[0]:
            for image in images:
                # restval: pictures of COCO's validation set that everybody trains on.
                split = {"restval": "train"}.get(image["split"], image["split"])
                yield (
                    f"{path}, image {image['filename']}",
                    {
                        "file_name": str(PurePosixPath(image.get("filepath", "")) / image["filename"]),
                        "captions": [sentence["raw"] for sentence in image["sentences"]],
                        "split": split,
                        **{name: image[name] for name in ("imgid", "cocoid") if name in image},
                    },
                )
            return
        if images and "annotations" in told:
            names = {image["id"]: image["file_name"] for image in images}
            for entry in told["annotations"]:
                name = names[entry["image_id"]]
                yield f"{path}, image {name}", {"file_name": name, "caption": entry["caption"]}
            return
    except (KeyError, TypeError) as error:
        raise UserError("A field of the annotations is missing", where=str(path), given=str(error)) from error
    forms = "images with split and sentences (Karpathy), or images and annotations with captions (COCO)"
    raise UserError("Not annotations that are known", where=str(path), allowed=forms, fix="write a .jsonl instead")
