"""Columns of a large Parquet file as files that are mapped into memory: only what is read of them is in it.

A Parquet file is read by groups of rows, and the rows that a batch needs lie in as many groups as the batch has rows.
So a column is converted once, when it is first asked for, and a row is then a look-up.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

BATCH = 1 << 18  # rows that are converted at once


class MappedTexts:
    """A column of texts: `texts[row]` is one, `texts[rows]` an array of them; a missing one is empty.

    Args:
        ends: int64 [rows], where each text ends in `data`.
        data: all texts in UTF-8, one after the other.
    """

    def __init__(self, ends: np.ndarray, data: np.ndarray):
        self.ends, self.data = ends, data

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, rows: Any) -> Any:
        if np.ndim(rows) == 0 and not isinstance(rows, slice):
            row = int(rows) + (len(self) if rows < 0 else 0)
            start = int(self.ends[row - 1]) if row else 0
            return self.data[start : int(self.ends[row])].tobytes().decode()
        numbers = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else np.asarray(rows)
        return np.array([self[row] for row in numbers.tolist()], object)

    def tolist(self) -> list[str]:
        return self[:].tolist()


def as_numbers(values: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Numbers or truth values; with missing ones they are float64, and those are NaN."""
    if values.null_count and pa.types.is_boolean(values.type):
        values = values.cast(pa.float64())
    options = {} if isinstance(values, pa.ChunkedArray) else {"zero_copy_only": False}
    return values.to_numpy(**options)


def is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


class MappedColumns:
    """The columns of one Parquet file.

    Args:
        path: the file.
        schema, rows: of it.
        name: of the folder of the converted columns, which also has a hash of the file's footer, so that those of a
            file that has changed are not taken. It lies beside the file, or with the embedded worlds where nothing may
            be written there.
    """

    def __init__(self, path: Path, schema: pa.Schema, rows: int, name: str):
        self.path, self.rows, self.schema = path, rows, schema
        folder = f".{name}-{_footer_hash(path)}"
        self.folder = path.parent / folder
        if not self.folder.is_dir() and not os.access(path.parent, os.W_OK):
            from datamodules.worlds import cache

            self.folder = cache() / folder

    def open(self, column: str) -> Any:
        """A column of numbers as a mapped array, of texts as `MappedTexts`, any other as an array in memory."""
        kind = self.schema.field(column).type
        if not is_number(kind) and not _is_text(kind):
            return pq.read_table(self.path, columns=[column], use_threads=False)[column].to_numpy()
        place = self.folder / f"{column}.npy"
        if not place.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".lock"):  # other processes may be at it
                if not place.is_file():
                    (self._convert_texts if _is_text(kind) else self._convert_numbers)(column, place)
        array = np.asarray(np.load(place, mmap_mode="r"))
        if not _is_text(kind):
            return array
        return MappedTexts(array, np.asarray(np.memmap(place.with_suffix(".utf8"), np.uint8, "r")))

    def _batches(self, column: str) -> Iterator[pa.Array]:
        with pq.ParquetFile(self.path, pre_buffer=False) as file:
            for group in range(file.num_row_groups):  # all at once, Arrow would read a column before its first row
                for batch in file.iter_batches(BATCH, [group], [column], use_threads=False):
                    yield batch.column(0)

    def _convert_numbers(self, column: str, place: Path, kind: Any = None) -> None:
        part, start, out = place.with_suffix(".part"), 0, None
        for values in self._batches(column):
            found = as_numbers(values)
            if out is None:
                out = np.lib.format.open_memmap(part, "w+", kind or found.dtype, (self.rows,))
            if not np.can_cast(found.dtype, out.dtype):  # the first missing value of a column of integers
                return self._convert_numbers(column, place, np.float64)
            out[start : start + len(found)] = found
            start += len(found)
        assert out is not None  # an index has rows
        out.flush()
        os.replace(part, place)
        return None

    def _convert_texts(self, column: str, place: Path) -> None:
        part, data = place.with_suffix(".part"), place.with_suffix(".utf8")
        ends, start, length = np.lib.format.open_memmap(part, "w+", np.int64, (self.rows,)), 0, 0
        with data.open("wb") as file:
            for values in self._batches(column):
                texts = values.fill_null("").cast(pa.large_string())
                offsets = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset :][: len(texts) + 1]
                file.write(memoryview(texts.buffers()[2])[offsets[0] : offsets[-1]])
                ends[start : start + len(texts)] = length + offsets[1:] - offsets[0]
                start, length = start + len(texts), length + int(offsets[-1] - offsets[0])
            file.write(b"\0")  # a file without a byte cannot be mapped
        ends.flush()
        os.replace(part, place)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _footer_hash(path: Path) -> str:
    """Of the footer, which has the place, the size and the extremes of every piece of the file."""
    with path.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        length = int.from_bytes(file.read(4), "little")
        file.seek(-8 - length, os.SEEK_END)
        return hashlib.blake2b(file.read(length), digest_size=8).hexdigest()
