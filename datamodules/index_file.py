"""The index of a split: a Parquet file with a row per sample, in the order of the shards."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datamodules.columns import MappedColumns, as_numbers, is_number
from datamodules.remote import Url, is_remote
from lightning_t2i.errors import UserError

FORMAT = 1
IN_MEMORY = 1 << 20  # rows of an index that is read whole; of a larger one columns are mapped


class Index:
    """The samples of a split in the order of its shards: `index[column]` is a NumPy array.

    Of an index of more than `IN_MEMORY` rows it is a mapped one (`MappedTexts` for texts), see `datamodules.columns`.

    Attributes:
        shards: paths of the shards, or `Url`s of remote ones; column `shard` counts in them.
        columns: names of the columns.
        numbers: names of those that hold numbers or truth values.
        sha: identity of the content, 16 hex digits, the same wherever the folder lies.
        facts: what the writer stored: format, split, shards, sha256, world, n.
    """

    def __init__(self, path: Path, facts: dict[str, Any], schema: pa.Schema, rows: int):
        self.facts, self._rows, folder = facts, rows, path.parent
        self.columns = tuple(schema.names)
        self.numbers = tuple(field.name for field in schema if is_number(field.type))
        self.shards: list[Any] = [Url(name) if is_remote(name) else folder / name for name in facts["shards"]]
        content = json.dumps([facts["format"], facts["split"], facts["sha256"]], sort_keys=True)
        self.sha = hashlib.sha256(content.encode()).hexdigest()[:16]
        self._mapped = MappedColumns(path, schema, rows, f"columns-{facts['split']}") if rows > IN_MEMORY else None
        self._columns: dict[str, Any] = {}

    @classmethod
    def load(cls, folder: str | Path, split: str) -> Index:
        """Opens `index-<split>.parquet`.

        Raises:
            UserError: there is none, or it is of another kind or format.
        """
        path = index_path(Path(folder), split)
        if not path.is_file():
            found = [name.stem.removeprefix("index-") for name in sorted(Path(folder).glob("index-*.parquet"))]
            raise UserError("No index of this split", where=str(folder), given=split, allowed=found or "(no index)")
        with pq.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
        facts = json.loads((schema.metadata or {}).get(b"t2i", b"{}"))
        if facts.get("format") != FORMAT:
            given = f"format {facts.get('format')}"
            raise UserError("Not an index that can be read", where=str(path), given=given, allowed=f"format {FORMAT}")
        index = cls(path, facts, schema, rows)
        if index._mapped is None:
            table = pq.read_table(path, use_threads=False)
            names = table.column_names
            index._columns = {n: as_numbers(table[n]) if n in index.numbers else table[n].to_numpy() for n in names}
        return index

    def __getstate__(self) -> dict[str, Any]:
        # A mapped array would be pickled whole; the other process maps it again.
        return {**self.__dict__, **({} if self._mapped is None else {"_columns": {}})}

    @property
    def stems(self) -> list[str]:
        """A name of each shard for files made from it: its own, with a hash of its address where two share one."""
        own = [path.stem for path in self.shards]
        shared = {stem for stem, count in Counter(own).items() if count > 1}
        ends = (hashlib.sha256(str(name).encode()).hexdigest()[:8] for name in self.facts["shards"])
        return [f"{stem}-{end}" if stem in shared else stem for stem, end in zip(own, ends, strict=True)]

    def __getitem__(self, column: str) -> Any:
        if self._mapped is not None and column in self.columns and column not in self._columns:
            self._columns[column] = self._mapped.open(column)
        return self._columns[column]

    def __len__(self) -> int:
        return self._rows

    def rows_of(self, shard: int) -> range:
        """The rows of a shard."""
        numbers = self["shard"]
        first, last = np.searchsorted(numbers, np.array([shard, shard + 1], numbers.dtype))
        return range(first, last)


def joined(pieces: Sequence[pa.Table]) -> pa.Table:
    """One table of pieces that have a shard each; languages that a piece does not have are false in its rows."""
    tables = [t.set_column(0, "shard", pa.array([k] * len(t), pa.int32())) for k, t in enumerate(pieces)]
    table = pa.concat_tables([t.replace_schema_metadata(None) for t in tables], promote_options="default")
    for i, name in enumerate(table.column_names):
        if table[name].null_count:
            table = table.set_column(i, name, table[name].fill_null(False))
    return table


def index_path(folder: Path, split: str) -> Path:
    return folder / f"index-{split}.parquet"
