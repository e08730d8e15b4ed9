"""Reads a folder of pictures with captions: a jsonl or csv file that names the pictures, or one .txt beside each."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lightning_t2i.errors import UserError

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TABLES = (".jsonl", ".csv")
FILE = ("file_name", "file", "image", "path")  # names of the field that says which picture
CAPTION = ("caption", "captions", "text", "prompt")


@dataclass
class Told:
    """What is told of a picture: captions by language, its split if it has one, further fields."""

    captions: dict[str, list[str]] = field(default_factory=dict)
    split: str | None = None
    more: dict[str, Any] = field(default_factory=dict)

    def add(self, language: str, texts: Iterable[object]) -> None:
        """Adds captions that are not empty and not known."""
        known = self.captions.setdefault(language, [])
        known += [
            text for text in dict.fromkeys(str(t).strip() for t in texts if t is not None) if text and text not in known
        ]
        if not known:
            del self.captions[language]


def find_pictures(folder: Path) -> list[str]:
    """Pictures under a folder, as sorted paths relative to it; hidden files and folders are left out.

    Raises:
        UserError: no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise UserError("No such folder", where="FOLDER", given=folder)
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    names = sorted(p.as_posix() for p in found if not any(part.startswith(".") for part in p.parts))
    if not names:
        kinds = ", ".join(PICTURES)
        raise UserError("No pictures in the folder or below it", where="FOLDER", given=folder, allowed=kinds)
    return names


def read_captions(folder: Path, pictures: Iterable[str], table: Path | None, language: str) -> dict[str, Told]:
    """What is told of each picture, by its path relative to `folder`; pictures of which nothing is told are missing.

    Args:
        folder: the folder of pictures.
        pictures: their paths relative to it.
        table: the jsonl or csv file; None takes the only one that lies in `folder`, else the .txt files.
        language: that of captions which do not say theirs.

    Raises:
        UserError: several tables to choose from, or one that cannot be understood, with file and line.
    """
    if table is None:
        tables = sorted(path for path in folder.iterdir() if path.suffix.lower() in TABLES)
        if len(tables) > 1:
            names = ", ".join(path.name for path in tables)
            raise UserError(
                "Several files may hold the captions", where=str(folder), given=names, fix="--captions FILE"
            )
        table = tables[0] if tables else None
    if table is None:
        return dict(_beside(folder, pictures, language))
    if not table.is_file():
        raise UserError("No such file of captions", where="--captions", given=table)
    if table.suffix.lower() not in TABLES:
        raise UserError("Not a kind of file for captions", where="--captions", given=table, allowed=TABLES)
    told: dict[str, Told] = {}
    for where, row in (_jsonl if table.suffix.lower() == ".jsonl" else _csv)(table):
        name = _path(row, where)
        _add(told.setdefault(name, Told()), row, where, language)
    return told


def _beside(folder: Path, pictures: Iterable[str], language: str) -> Iterator[tuple[str, Told]]:
    for name in pictures:
        text = (folder / name).with_suffix(".txt")
        if text.is_file():
            told = Told()
            told.add(language, _text(text).splitlines())
            yield name, told


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"Not UTF-8 text: {error.reason} at byte {error.start}", where=str(path)) from error


def _jsonl(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"Not valid JSON: {error}", where=f"{path}:{number}", given=line[:80]) from error
        if not isinstance(row, dict):
            raise UserError("Not a JSON object", where=f"{path}:{number}", given=line[:80])
        yield f"{path}:{number}", row


def _csv(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    reader = csv.DictReader(_text(path).splitlines(keepends=True), strict=True)
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise UserError("Not as many cells as columns", where=where, fix="quote texts that hold commas")
            yield where, row
    except csv.Error as error:
        raise UserError(f"Not valid CSV: {error}", where=f"{path}, after line {reader.line_num}") from error


def _path(row: Mapping[str, Any], where: str) -> str:
    given = next((row[name] for name in FILE if row.get(name)), None)
    if not isinstance(given, str):
        raise UserError(
            "The row names no picture", where=where, given=list(row), allowed=f"a field {' or '.join(FILE)}"
        )
    path = PurePosixPath(given.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise UserError("A picture is named relative to the folder and lies in it", where=where, given=given)
    return path.as_posix()


def _add(told: Told, row: Mapping[str, Any], where: str, language: str) -> None:
    """Adds a row; `caption_zh` and {"caption": {"zh": ...}} say the language, further fields are kept."""
    for name, value in row.items():
        if name in CAPTION:
            by_language = value if isinstance(value, dict) else {language: value}
        elif name.startswith("caption_"):
            by_language = {name.removeprefix("caption_"): value}
        elif name == "split":
            told.split = str(value) or None
            continue
        elif name not in FILE:
            told.more[name] = _label(value, where) if name == "label" else value
            continue
        else:
            continue
        for spoken, texts in by_language.items():
            told.add(spoken, texts if isinstance(texts, list) else [texts])


def _label(value: Any, where: str) -> int:
    try:
        return int(value)
    except (TypeError, ValueError) as error:
        raise UserError("A label is the number of a class", where=where, given=value) from error
