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
MOST_PADDING = 4 << 20  # bytes: more than any tape's record (tar -b); of less it cannot be told what they are
CHUNK = 8 << 20  # bytes of a remote tar that are read at once; what a larger member has beyond it is skipped


class RemoteFile(io.RawIOBase):
    """A remote file that is read forwards in chunks and sought without reading what lies between."""

    def __init__(self, url: str, options: RemoteOptions):
        self.url, self.options = url, options
        self._at = 0
        self._end: int | None = None  # a place at which there are no more bytes, once it is known
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
        if self._end is not None and self._at >= self._end:
            return self._at, b""
        (data,) = fetch([(self.url, self._at, self._at + CHUNK)], self.options)
        if len(data) < CHUNK:
            self._end = self._at + len(data)
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
    """The tar ends within a member, or something else than a member or an end stands where one is due."""


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
            _expect_end(file, tar.offset)
    except tarfile.ReadError as error:
        raise Truncated(str(error)) from error
    if sample is not None:
        yield sample


def _expect_end(file: BinaryIO, offset: int) -> None:
    """Raises where no end of a tar is at `offset`: tarfile takes damaged and cut headers and holes for one.

    An end is two blocks of zeros, and further zeros that fill a record.
    """
    end = 2 * tarfile.BLOCKSIZE
    file.seek(offset)
    tail = file.read(end + MOST_PADDING)
    if given := tail.lstrip(b"\0"):
        raise Truncated(f"what stands at byte {offset + len(tail) - len(given)} is neither a member nor an end")
    if len(tail) < end:
        raise Truncated("there is no end of the archive")
    if len(tail) == end + MOST_PADDING:
        raise Truncated(f"from byte {offset} on there are zeros, more than an end has")


def read_parts(file: BinaryIO, sample: Sample) -> dict[str, bytes]:
    """Bytes of a sample's members .json, .txt and .cls, by these endings, of those that are there."""
    parts = {}
    for ext in sorted({"json", "txt", "cls"} & set(sample.members), key=lambda ext: sample.members[ext]):
        file.seek(sample.members[ext][0])
        parts[ext] = file.read(sample.members[ext][1])
    return parts


def told_in(
    parts: Mapping[str, bytes], language: str, known: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """What a sample's members say beside its picture: fields and captions by language.

    Args:
        parts: see `read_parts`; .json are fields, .txt is a caption, .cls a label.
        language: of captions that do not say theirs.
        known: fields from elsewhere, which those of the sample replace.

    Raises:
        ValueError: the .json or .cls cannot be understood.
    """
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
        clean = [c for t in (texts if isinstance(texts, list) else [texts]) if t and (c := cleaned(t))]
        if clean:
            found[cleaned(spoken)] = clean
    return found


def cleaned(text: object) -> str:
    """A text without space around it, and ? for halves of characters, which JSON can have and no tokenizer takes."""
    return str(text).encode("utf-8", "replace").decode().strip()


def class_number(value: object) -> int | None:
    """The number of a class; None for what is not a whole number."""
    try:
        number = int(value)  # type: ignore[call-overload]  # whatever it is
    except (TypeError, ValueError, OverflowError):
        return None
    return None if isinstance(value, float) and number != value else number


def read_json(data: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: it is none.
    """
    meta = json.loads(data)
    if not isinstance(meta, dict):
        raise ValueError("not an object")
    return meta
