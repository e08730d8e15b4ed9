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

from datamodules.remote import Url, is_remote
from lightning_t2i.errors import UserError

FORMAT = 1


class Index:
    """The samples of a split in the order of its shards: `index[column]` is a NumPy array.

    Attributes:
        shards: paths of the shards, or `Url`s of remote ones; column `shard` counts in them.
        columns: names of the columns.
        sha: identity of the content, 16 hex digits, the same wherever the folder lies.
        facts: what the writer stored: format, split, shards, sha256, world, n.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], columns: dict[str, np.ndarray]):
        self.facts, self._columns = facts, columns
        self.columns = tuple(columns)
        self.shards: list[Any] = [Url(name) if is_remote(name) else folder / name for name in facts["shards"]]
        content = json.dumps([facts["format"], facts["split"], facts["sha256"]], sort_keys=True)
        self.sha = hashlib.sha256(content.encode()).hexdigest()[:16]

    @classmethod
    def load(cls, folder: str | Path, split: str) -> Index:
        """Reads `index-<split>.parquet`.

        Raises:
            UserError: there is none, or it is of another kind or format.
        """
        path = index_path(Path(folder), split)
        if not path.is_file():
            found = [name.stem.removeprefix("index-") for name in sorted(Path(folder).glob("index-*.parquet"))]
            raise UserError("No index of this split", where=str(folder), given=split, allowed=found or "(no index)")
        table = pq.read_table(path, use_threads=False)
        facts = json.loads((table.schema.metadata or {}).get(b"t2i", b"{}"))
        if facts.get("format") != FORMAT:
            given = f"format {facts.get('format')}"
            raise UserError("Not an index that can be read", where=str(path), given=given, allowed=f"format {FORMAT}")
        columns = {name: table[name].to_numpy() for name in table.column_names}
        return cls(Path(folder), facts, columns)

    @property
    def stems(self) -> list[str]:
        """A name of each shard for files made from it: its own, with a hash of its address where two share one."""
        own = [path.stem for path in self.shards]
        shared = {stem for stem, count in Counter(own).items() if count > 1}
        ends = (hashlib.sha256(str(name).encode()).hexdigest()[:8] for name in self.facts["shards"])
        return [f"{stem}-{end}" if stem in shared else stem for stem, end in zip(own, ends, strict=True)]

    def __getitem__(self, column: str) -> np.ndarray:
        return self._columns[column]

    def __len__(self) -> int:
        return len(self._columns["shard"])


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
