"""Samples of anything that holds pictures with captions, evenly spaced, for a look at them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.index import find_shards
from datamodules.layouts import Truncated, open_shard, read_parts, samples, told_in
from datamodules.left_out import spelled
from datamodules.pack import find
from datamodules.pack_stored import read_bytes, read_stored
from datamodules.pictures import BadSample
from datamodules.records import Shards, data_folder
from datamodules.remote import RemoteOptions, Url, is_remote
from lightning_t2i.paths import resolve

SHARDS = 16  # tars without an index that are looked into
ALONE = RemoteOptions(read_mb=1e-6)  # samples far apart are read without their neighbours
AT_ONCE = 64  # samples that are read together


@dataclass
class Seen:
    """A sample: its captions by language, its label if it has one, the bytes of its picture and their ending."""

    split: str
    key: str
    captions: dict[str, list[str]]
    label: Any
    data: bytes
    ext: str


@dataclass
class Opened:
    """How many samples there are, in words; how many of them `samples` gives at most."""

    counts: str
    chosen: int
    samples: Iterator[Seen]


def open_source(source: str, most: int, language: str) -> Opened:
    """At most so many samples of a data-set folder, an embedded world, tars without an index, or a folder to pack.

    Raises:
        UserError: it is none of these.
    """
    folder = resolve(source)
    if is_remote(source) or source.endswith((".tar", ".txt")) or "{" in source:
        return _of_tars(find_shards([source]), most, language)
    if not folder.exists() or (folder / "dataset.json").is_file():
        return _of_data_set(data_folder(source), most)
    if any(folder.glob("*.tar")):
        return _of_tars(find_shards([str(folder)]), most, language)
    return _of_pictures(folder, most, language)


def spaced(n: int, most: int) -> list[int]:
    """At most `most` of 0 ... n - 1, evenly spaced."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).astype(int)).tolist()


def _of_data_set(folder: Path, most: int) -> Opened:
    splits = {name: n for name, n in json.loads((folder / "dataset.json").read_text())["splits"].items() if n}
    total = sum(splits.values())
    chosen = {name: spaced(n, max(1, most * n // total)) for name, n in splits.items()}

    def read() -> Iterator[Seen]:
        for split, rows in chosen.items():
            shards = Shards(folder, split, remote=ALONE)
            for first in range(0, len(rows), AT_ONCE):
                shards.ahead(rows[first : first + AT_ONCE])
                for row in rows[first : first + AT_ONCE]:
                    try:
                        meta, data = shards.meta(row), shards.data(row)
                    except BadSample:
                        meta, data = {}, b""
                    key, ext = (str(shards.index[column][row]) for column in ("key", "ext"))
                    yield Seen(split, key, meta.get("caption", {}), meta.get("label"), data, ext)

    counts = ", ".join(f"{name} {n:,}" for name, n in splits.items())
    return Opened(counts, sum(map(len, chosen.values())), read())


def _of_tars(shards: Sequence[str], most: int, language: str) -> Opened:
    chosen = [shards[i] for i in spaced(len(shards), SHARDS)]
    each = -(-most // len(chosen))

    def read() -> Iterator[Seen]:
        for shard in chosen:
            with open_shard(shard, RemoteOptions()) as file:
                try:
                    for sample in itertools.islice(samples(file), each):
                        start, size = sample.members.get(sample.ext or "", (0, 0))
                        file.seek(start)
                        data = file.read(size)
                        try:
                            facts, captions = told_in(read_parts(file, sample), language, {})
                        except ValueError:
                            facts, captions = {}, {}
                        name = spelled(f"{Url(shard).stem}/{sample.key}")
                        yield Seen("", name, captions, facts.get("label"), data, sample.ext or "none")
                except Truncated as reason:
                    yield Seen("", f"{Url(shard).name}, its end: {reason}", {}, None, b"", "none")

    counts = f"{len(shards):,} tars, {len(chosen):,} of them opened; python -m datamodules.index counts their samples"
    return Opened(counts, each * len(chosen), read())


def _of_pictures(folder: Path, most: int, language: str) -> Opened:
    found = find(folder, None, language)
    names = list(found.places)
    chosen = [names[i] for i in spaced(len(names), most)]
    places = [found.places[name] for name in chosen]

    def read() -> Iterator[Seen]:
        for name, source in zip(chosen, read_stored(places), strict=True):
            data = source if isinstance(source, bytes) else read_bytes(source)
            told, ext = found.told[name], "parquet" if isinstance(source, bytes) else Path(name).suffix[1:].lower()
            yield Seen(told.split or "", name, told.captions, told.more.get("label"), data, ext)

    splits: dict[str, int] = {}
    for told in found.told.values():
        splits[told.split or "pictures"] = splits.get(told.split or "pictures", 0) + 1
    return Opened(", ".join(f"{name} {n:,}" for name, n in splits.items()), len(chosen), read())
