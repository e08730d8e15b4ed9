"""Finds the pictures of a folder and what is told of them: by a table, by files beside them, by their folders.

Pictures inside of parquet files and tars are those of `datamodules.pack_stored`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from stat import S_ISDIR
from typing import Any, NamedTuple

from PIL import Image

from datamodules.layouts import captions_of, class_number, cleaned, read_json
from datamodules.left_out import listed
from datamodules.pack_tables import CAPTION, FILE, lines_of, picture_named, read_text, rows_of, tables_in
from lightning_t2i.errors import UserError

NO_PICTURES = {"BUFR", "GRIB", "HDF5", "MPEG"}  # weather, tables and films, whose endings Pillow knows too
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(("val", "valid", "validation", "dev"), "val")  # names of files and folders -> splits


@dataclass
class Told:
    """What is told of a picture: captions by language, its split if it has one, further fields."""

    captions: dict[str, list[str]] = field(default_factory=dict)
    split: str | None = None
    more: dict[str, Any] = field(default_factory=dict)

    def add(self, language: str, texts: Iterable[object]) -> None:
        """Adds captions that are not empty and not known."""
        known = self.captions.setdefault(language, [])
        known += [t for t in dict.fromkeys(cleaned(t) for t in texts if t is not None) if t and t not in known]
        if not known:
            del self.captions[language]

    def add_row(self, row: Mapping[str, Any], where: str, language: str) -> None:
        """Adds a row; `caption_zh` and {"caption": {"zh": ...}} say the language, further fields are kept."""
        for name, value in row.items():
            if name in CAPTION:
                by_language = value if isinstance(value, dict) else {language: value}
            elif name.startswith("caption_"):
                by_language = {name.removeprefix("caption_"): value}
            elif name == "split":
                self.split = str(value) or None
                continue
            elif name not in FILE:
                self.more[name] = label_of(value, where) if name == "label" else value
                continue
            else:
                continue
            for spoken, texts in by_language.items():
                self.add(cleaned(spoken), texts if isinstance(texts, list) else [texts])


class Place(NamedTuple):
    """Where a picture's bytes are: a whole file, a piece of a tar, or a row in a row group of a parquet file."""

    file: str
    stamp: int  # when the file was changed last, in ns
    start: int = 0  # first byte, or row in the row group
    size: int = 0  # bytes; 0 in a parquet file
    group: int = -1  # row group; -1 elsewhere


def picture_endings() -> set[str]:
    """Endings of the files that are taken for pictures: all that Pillow opens, and those that a plugin of it would."""
    known = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN.keys() - NO_PICTURES}
    return known | {".heic", ".heif"}


def find_pictures(folder: Path) -> tuple[dict[str, Place], list[str]]:
    """Pictures under a folder, and each .txt that lies beside none, by their sorted paths relative to it.

    Hidden files and folders are left out.
    """
    pictures = picture_endings()
    endings = {*pictures, ".txt"}
    found = ((path.relative_to(folder), path) for path in folder.rglob("*") if path.suffix.lower() in endings)
    names = sorted((p.as_posix(), path) for p, path in found if not any(part.startswith(".") for part in p.parts))
    places, texts = {}, dict[str, str]()
    for name, path in names:
        facts = path.stat()
        if path.suffix.lower() not in pictures:
            texts[name.rpartition(".")[0]] = name
        elif not S_ISDIR(facts.st_mode):
            places[name] = Place(str(path), facts.st_mtime_ns, 0, facts.st_size)
    beside = {name.rpartition(".")[0] for name in places}
    return places, [name for stem, name in texts.items() if stem not in beside]


def read_captions(folder: Path, pictures: Iterable[str], table: Path | None, language: str) -> dict[str, Told]:
    """What is told of each picture, by its path relative to `folder`; pictures of which nothing is told are missing.

    Args:
        folder: the folder of pictures.
        pictures: their paths relative to it.
        table: the file that names them; None takes the only one that lies in `folder`, else the files beside them.
        language: that of captions which do not say theirs.

    Raises:
        UserError: several tables to choose from, or one that cannot be understood, with file and line.
    """
    if table is None:
        tables = tables_in(folder)
        if len(tables) > 1:
            names = ", ".join(path.name for path in tables)
            raise UserError(
                "Several files may hold the captions", where=str(folder), given=names, fix="--captions FILE"
            )
        table = tables[0] if tables else None
    if table is None:
        return dict(_beside(folder, pictures, language))
    told: dict[str, Told] = {}
    for where, row in rows_of(table):
        told.setdefault(picture_named(row, where), Told()).add_row(row, where, language)
    if table.suffix.lower() == ".json":
        return _at_their_places(told, pictures)
    return told


def _at_their_places(told: dict[str, Told], pictures: Iterable[str]) -> dict[str, Told]:
    """Annotations know the names of pictures, but not always the folders: a name that is there once is enough."""
    places: dict[str, list[str]] = {}
    for picture in pictures:
        places.setdefault(PurePosixPath(picture).name, []).append(picture)
    found = {}
    for name, entry in told.items():
        there = places.get(PurePosixPath(name).name, [])
        found[there[0] if len(there) == 1 else name] = entry
    return found


def _beside(folder: Path, pictures: Iterable[str], language: str) -> Iterator[tuple[str, Told]]:
    """From PICTURE.json where it has a caption (img2dataset's), else from PICTURE.txt, a caption a line."""
    for name in pictures:
        text, facts, told = (folder / name).with_suffix(".txt"), (folder / name).with_suffix(".json"), Told()
        if facts.is_file():
            try:
                row = read_json(facts.read_bytes())
            except ValueError:  # something else that lies beside a picture
                row = {}
            if captions_of(row, None, language):
                told.add_row({n: v for n, v in row.items() if v is not None}, str(facts), language)
        if text.is_file() and not told.captions:
            told.add(language, lines_of(read_text(text)))
        if text.is_file() or told.captions:
            yield name, told


def label_of(value: Any, where: str) -> int:
    label = class_number(value)
    if label is None:
        raise UserError("A label is the number of a class", where=where, given=value)
    return label


def split_named(name: str) -> str | None:
    """The split that the name of a file says, or else that of a folder above it: train-00000-of-00002, val/x."""
    for part in reversed(PurePosixPath(name).parts):
        for word in re.split("[^a-z]+", part.lower()):
            if word in SPLITS:
                return SPLITS[word]
    return None


def add_splits(told: Mapping[str, Told], splits: Mapping[str, str | None]) -> None:
    """Gives pictures the splits that names say; names that all say the same divide nothing."""
    if len(set(splits.values()) - {None}) > 1:
        for name, split in splits.items():
            told[name].split = told[name].split or split


def add_classes(told: dict[str, Told], pictures: Iterable[str], names: Path | None, language: str) -> list[str]:
    """Reads FOLDER/CLASS/... or FOLDER/SPLIT/CLASS/...: labels, and the classes' names for pictures without a caption.

    Args:
        told: what is told of pictures by now; it is added to.
        pictures: their paths.
        names: lines "FOLDER name, another name", whose order is that of the labels (ImageNet's LOC_synset_mapping.txt);
            None takes the sorted names of the folders, with spaces for underscores.
        language: of the names.

    Returns:
        The name of each class in the order of labels.

    Raises:
        UserError: a picture in no folder of a class, or a folder that is not among the names.
    """
    parts = {picture: PurePosixPath(picture).parts for picture in pictures}
    depth = 1 if all(len(p) > 2 and p[0].lower() in SPLITS for p in parts.values()) else 0
    loose = [picture for picture, p in parts.items() if len(p) < depth + 2]
    if loose:
        raise UserError(
            "Pictures that lie in no folder of a class",
            where="--class-folders",
            given=listed(loose),
            allowed="CLASS/... or SPLIT/CLASS/...",
            fix="move them into folders of classes, or away",
        )
    folders = sorted({p[depth] for p in parts.values()})
    titles = _class_names(names) if names is not None else {name: [name.replace("_", " ")] for name in folders}
    if unknown := [name for name in folders if name not in titles]:
        fix = "add a line to the file for each"
        raise UserError("Folders that are no class", where="--class-names", given=listed(unknown), fix=fix)
    labels = {name: number for number, name in enumerate(titles)}
    for picture, p in parts.items():
        entry = told.setdefault(picture, Told())
        entry.more["label"] = labels[p[depth]]
        if not entry.captions:
            entry.add(language, titles[p[depth]])
    add_splits(told, {picture: SPLITS[p[0].lower()] if depth else None for picture, p in parts.items()})
    return [", ".join(of) for of in titles.values()]


def _class_names(path: Path) -> dict[str, Sequence[str]]:
    if not path.is_file():
        raise UserError("No such file of names", where="--class-names", given=path)
    lines = [line.split(maxsplit=1) for line in lines_of(read_text(path)) if line.strip()]
    return {line[0]: line[-1].strip().split(", ") for line in lines}
