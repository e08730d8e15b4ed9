"""Samples of a tar in the layouts of webdataset: members of one name and several endings, one of them a picture."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from datamodules.pack_tables import CAPTION
from datamodules.remote import RemoteOptions, fetch, is_remote
from lightning_t2i.errors import UserError

PICTURES = ("jpg", "jpeg", "png", "webp")
CHUNK = 8 << 20  # bytes of a remote tar that are read at once; what a larger member has beyond it is skipped


class RemoteFile(io.RawIOBase):
    """A remote file that is read forwards in chunks and sought without reading what lies between."""

    def __init__(self, url: str, options: RemoteOptions):
        self.url, self.options = url, options
        self._at = 0
        self._chunks: list[tuple[int, bytes]] = []  # the last two: a sample is read when the next one's header was

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence in (io.SEEK_SET, io.SEEK_CUR)  # the end is not known
        self._at = offset + (self._at if whence == io.SEEK_CUR else 0)
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        assert size is not None and size >= 0
        found = b""
        while len(found) < size:
            start, data = self._chunk()
            part = data[self._at - start : self._at - start + size - len(found)]
            if not part:
                break
            found += part
            self._at += len(part)
        return found

    def _chunk(self) -> tuple[int, bytes]:
        """Start and bytes of a chunk that holds the place; it is empty at the end of the file."""
        for start, data in self._chunks:
            if start <= self._at < start + len(data):
                return start, data
        (data,) = fetch([(self.url, self._at, self._at + CHUNK)], self.options)
        self._chunks = [*self._chunks[-1:], (self._at, data)]
        return self._at, data


def open_shard(name: str, options: RemoteOptions) -> BinaryIO:
    """A local or remote tar.

    Raises:
        UserError: it is not there.
    """
    if is_remote(name):
        return cast(BinaryIO, RemoteFile(name, options))
    try:
        return Path(name).open("rb")
    except OSError as error:
        raise UserError("A shard cannot be opened", where=name, given=error.strerror) from error


@dataclass
class Sample:
    """Members of one key: ending -> (offset, size)."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def ext(self) -> str | None:
        return next((ext for ext in PICTURES if ext in self.members), None)


class Truncated(Exception):
    """The tar ends within a member."""


def samples(file: BinaryIO) -> Iterator[Sample]:
    """Samples of a tar in order; a key ends at the first dot of the name, as in webdataset.

    Raises:
        Truncated: after the last sample that is whole.
    """
    sample: Sample | None = None
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # of millions of samples they would fill the memory
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, ext = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if sample is None or key != sample.key:
                    if sample is not None:
                        yield sample
                    sample = Sample(key)
                sample.members[ext.lower()] = (member.offset_data, member.size)
            file.seek(tar.offset)  # a tar that is cut between two members looks whole but for its end
            if not file.read(1):
                raise Truncated("there is no end of the archive")
    except tarfile.ReadError as error:
        raise Truncated(str(error)) from error
    if sample is not None:
        yield sample


def read_told(
    file: BinaryIO, sample: Sample, language: str, known: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """What a sample's members say beside its picture: fields and captions by language.

    Args:
        file: the tar.
        sample: its members; .json are fields, .txt is a caption, .cls a label.
        language: of captions that do not say theirs.
        known: fields from elsewhere, which those of the sample replace.

    Raises:
        ValueError: the .json or .cls cannot be understood.
    """
    parts = {}
    for ext in sorted({"json", "txt", "cls"} & set(sample.members), key=lambda ext: sample.members[ext]):
        file.seek(sample.members[ext][0])
        parts[ext] = file.read(sample.members[ext][1])
    facts = {**known, **(read_json(parts["json"]) if "json" in parts else {})}
    if "cls" in parts:
        if not parts["cls"].strip().isdigit():
            raise ValueError("its .cls is no number of a class")
        facts["label"] = int(parts["cls"])
    return facts, captions_of(facts, parts.get("txt", b"").decode("utf-8", "replace"), language)


def captions_of(meta: dict[str, Any], text: str | None, language: str) -> dict[str, list[str]]:
    """Captions by language, from a JSON of ours or of img2dataset, else from the text beside it."""
    given = next((meta[name] for name in CAPTION if meta.get(name)), text or "")
    by_language = given if isinstance(given, dict) else {language: given}
    found = {}
    for spoken, texts in by_language.items():
        clean = [str(t).strip() for t in (texts if isinstance(texts, list) else [texts]) if t and str(t).strip()]
        if clean:
            found[str(spoken)] = clean
    return found


def read_json(data: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: it is none.
    """
    meta = json.loads(data)
    if not isinstance(meta, dict):
        raise ValueError("not an object")
    return meta
