"""Safetensors files that are read and written piece by piece, without mapping them: little memory, of which the same is
used again and again, since memory that the system hands out for each tensor costs more than reading it."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_t2i.errors import UserError
from lightning_t2i.state_io import flush

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
AHEAD = 8  # pieces that are read before they are needed
PIECE = 2**20  # numbers of a tensor that are read at once
PART = 2**20  # bytes


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: where its bytes begin, its precision and its shape."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def pieces(self) -> Iterator[Entry]:
        """The tensor, flat, PIECE numbers at a time; none of an empty one."""
        for start in range(0, count := math.prod(self.shape), PIECE):
            offset = self.offset + start * self.dtype.itemsize
            yield replace(self, offset=offset, shape=(min(PIECE, count - start),))

    def read(self) -> Tensor:
        buffer = torch.empty(self.bytes, dtype=torch.uint8)
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.offset)
            view, done = memoryview(buffer.numpy()), 0
            while done < self.bytes:
                if not (count := stream.readinto(view[done:])):
                    raise UserError("The file ends in the middle of a tensor", where=str(self.file))
                done += count
        return buffer.view(self.dtype).view(self.shape)


class Digests:
    """SHA-256 of files whose tensors come in their order; what lies before the first one is read for it.

    A file that is read with gaps or in another order has none.
    """

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[Any, int]] = {}  # hash of the first so many bytes

    def add(self, entry: Entry, tensor: Tensor) -> None:
        digest, end = self._seen.get(entry.file) or self._head(entry)
        if entry.offset == end:
            digest.update(tensor.view(-1).view(torch.uint8).numpy())
            end += entry.bytes
        self._seen[entry.file] = digest, end

    @staticmethod
    def _head(first: Entry) -> tuple[Any, int]:
        digest, left = hashlib.sha256(), first.offset
        with first.file.open("rb") as stream:
            while left:
                part = stream.read(min(left, PART))
                digest.update(part)
                left -= len(part)
        return digest, first.offset

    def whole(self) -> dict[Path, bytes]:
        """Of the files that have been read to their end."""
        return {file: digest.digest() for file, (digest, end) in self._seen.items() if end == file.stat().st_size}


def read_ahead(entries: Iterable[Entry], digests: Digests) -> Iterator[Tensor]:
    """The tensors in order; a thread reads the next ones meanwhile, and another one hashes them."""
    with ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(1) as reader:
        reads: deque[Future[tuple[Tensor, Future[None]]]] = deque()

        def read(entry: Entry) -> tuple[Tensor, Future[None]]:
            tensor = entry.read()
            return tensor, hasher.submit(digests.add, entry, tensor)

        def oldest() -> Tensor:
            tensor, hashed = reads.popleft().result()
            hashed.result()  # whoever gets the tensor may change it
            return tensor

        for entry in entries:
            reads.append(reader.submit(read, entry))
            if len(reads) > AHEAD:
                yield oldest()
        while reads:
            yield oldest()


def read_header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, without reading a tensor.

    Raises:
        UserError: it is none.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > file.stat().st_size:
                raise ValueError
            header = json.loads(stream.read(length))
        about = header.pop("__metadata__", {})
        found = {
            name: Entry(file, 8 + length + e["data_offsets"][0], DTYPES[e["dtype"]], tuple(e["shape"]))
            for name, e in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError("Not a safetensors file that can be read", where=str(file)) from error
    return found, about


def write_streamed(
    file: Path, like: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], pieces: Iterable[Tensor],
    metadata: Mapping[str, str],
) -> None:  # fmt: skip
    """Writes a safetensors file of the tensors `like`, whose bytes are those of `pieces`; whole or not at all."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (dtype, shape) in like.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb", buffering=0) as stream:
            stream.write(len(head).to_bytes(8, "little") + head)
            for piece in pieces:
                data = piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                _write(stream, data)
                offset -= len(data)
        if offset:
            raise ValueError(f"{file}: pieces have {-offset:+} bytes more than their tensors")
        flush(temporary)
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush(file.parent)


def _write(stream: Any, data: np.ndarray) -> None:
    view = memoryview(data)
    while len(view):
        view = view[stream.write(view) :]


def index(folder: Path) -> dict[str, Entry]:
    """`component/tensor` -> where it lies, of all safetensors files of a folder; names of files do not matter."""
    found: dict[str, Entry] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        place = file.parent.relative_to(folder).as_posix()
        found |= {f"{place}/{name}": entry for name, entry in read_header(file)[0].items()}
    return found
