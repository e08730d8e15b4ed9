"""Prompts without pictures: for methods that learn from a teacher alone, for sampling and for scores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from datamodules.captioned import Captioned
from datamodules.pack_tables import lines_of, read_text
from datamodules.records import BadSample, Shards, check_shards, choose_caption, data_folder, sample_id
from datamodules.remote import RemoteOptions
from datamodules.text_cache import TextCache
from lightning_t2i.batch import Records
from lightning_t2i.errors import UserError
from lightning_t2i.paths import resolve

SUFFIXES = (".txt", ".jsonl", ".parquet")
FIELDS = ("prompt", "caption", "label", "scene")  # of an object or a row


class PromptFile:
    """Prompts of a text file, one a line, of a jsonl file, one object a line, or of a Parquet file, one a row.

    An object or row has "prompt" (text) or "caption" (text, list of texts, or lists by language), and may have "label"
    (int) and "scene" (object).

    Args:
        path: the file; its stem names the data set, the line number is the key.
        languages: languages that count where captions are given by language.
        limit: use only the first so many lines.

    Raises:
        UserError: a line is empty, is not valid or has no prompt; names the file and the line.
    """

    def __init__(self, path: Path, languages: Sequence[str], limit: int | None = None):
        self.name, self.languages = path.stem, tuple(languages)
        if path.suffix == ".parquet":
            self.table = self._rows(path).slice(0, limit)
            with path.open("rb") as file:
                content = f"{hashlib.file_digest(file, 'sha256').hexdigest()} {limit}"
            found = enumerate((row for part in self.table.to_batches(1000) for row in part.to_pylist()), 1)
            count = sum(1 for number, row in found if self._check(row, f"{path}:{number}", str(row)))
        else:
            lines = lines_of(read_text(path))[:limit]
            content, count = "\n".join(lines), len(lines)
            self.metas = [self._parse(line, f"{path}:{number}", path.suffix) for number, line in enumerate(lines, 1)]
        if not count:
            raise UserError("The prompt file is empty", where=str(path))
        self.count = count
        self.identity = {"data": self.name, "sha": hashlib.sha256(content.encode()).hexdigest()[:16]}

    @staticmethod
    def _rows(path: Path) -> pa.Table:
        """The table of a Parquet file, which stays as it is: objects of Python would be ten times larger."""
        try:
            names = pq.read_schema(path).names
            return pq.read_table(path, columns=[name for name in FIELDS if name in names], use_threads=False)
        except pa.ArrowInvalid as error:
            raise UserError(f"Not a Parquet file: {error}", where=str(path)) from error

    def _parse(self, line: str, where: str, suffix: str) -> dict[str, Any]:
        meta: dict[str, Any] = {"prompt": line.strip()}
        if suffix == ".jsonl":
            try:
                meta = json.loads(line)
            except ValueError as error:
                raise UserError(f"Not valid JSON: {error}", where=where, given=line[:80]) from error
        return self._check(meta, where, line)

    def _check(self, meta: Any, where: str, line: str) -> dict[str, Any]:
        """The object with its captions by language."""
        meta = {name: v for name, v in meta.items() if v is not None} if isinstance(meta, dict) else {}
        captions = meta.get("prompt", meta.get("caption", {}))
        if isinstance(captions, str):
            captions = [captions]
        if isinstance(captions, list):  # no language given: it counts as whatever is asked for
            captions = {self.languages[0]: captions}
        captions = {language: texts for language, texts in captions.items() if texts}
        try:
            choose_caption({"caption": captions}, self.languages, 0.0)
        except BadSample as error:
            raise UserError(
                "Empty prompt",
                where=where,
                given=line[:80] or "an empty line",
                fix="write a prompt in the line or delete it",
            ) from error
        return {**meta, "caption": captions}

    def __len__(self) -> int:
        return self.count

    def meta(self, row: int) -> dict[str, Any]:
        if hasattr(self, "metas"):
            return self.metas[row]
        return self._check(self.table.slice(row, 1).to_pylist()[0], f"{self.name}:{row + 1}", "")

    def title(self, row: int) -> str:
        return f"{self.name}:{row + 1}"

    def id(self, row: int) -> int:
        return sample_id(self.name, "prompts", str(row))


class Prompts(Captioned):
    """Prompts of a data set or a file; no picture is ever opened.

    Batches hold `caption` (and `cond`), and `label` and `scene` where the source has them.

    Args:
        source: an embedded world, a data-set folder, or a .txt, .jsonl or .parquet file (see `PromptFile`).
        split: split of the data set; without meaning for a file.
        batch_size: prompts of one micro-batch over all ranks.
        languages: languages to draw prompts from, each prompt of a sample equally likely.
        limit: use only the first so many samples.
        lanes, block: see `datamodules.order.GlobalOrder`.
        max_bad_fraction: see `datamodules.records.Stream`.
        where, remote: see `ImageText`; of remote samples only what tells the captions is read.
        text, text_cache: see `datamodules.image_text.ImageText`; of data sets, not of files.
    """

    prompts: Shards | PromptFile  # after `setup`

    def __init__(
        self,
        source: str,
        split: str = "train",
        batch_size: int = 64,
        languages: Sequence[str] = ("en",),
        limit: int | None = None,
        lanes: int = 1024,
        block: int = 256,
        max_bad_fraction: float = 0.01,
        where: dict[str, list[float | None]] | None = None,
        remote: RemoteOptions = RemoteOptions(),
        text: Literal["online", "cached"] = "online",
        text_cache: TextCache | None = None,
    ):
        if not languages:
            raise UserError("No language to take prompts from", where="languages", given=list(languages))
        self.source, self.split, self.batch_size, self.languages = source, split, batch_size, tuple(languages)
        self.limit, self.lanes, self.block, self.max_bad_fraction = limit, lanes, block, max_bad_fraction
        self.where, self.remote = where, remote
        if where and self._is_file:
            raise UserError("A file has no columns to filter on", where="where", given=where, fix="where: null")
        self.choose_text(text, text_cache)
        if text == "cached" and self._is_file:
            raise UserError("Captions of a file are not cached", where="text", given=text, allowed="online")

    @property
    def _is_file(self) -> bool:
        return Path(self.source).suffix in SUFFIXES

    def prepare(self) -> None:
        if not self._is_file:
            folder = data_folder(self.source)
            check_shards(folder, self.split)
            self.make_texts(folder)

    def setup(self) -> None:
        if hasattr(self, "prompts"):
            return
        if not self._is_file:
            self.prompts = Shards(
                data_folder(self.source),
                self.split,
                self.languages,
                self.limit,
                self.where,
                self.remote,
                self.lanes,
                self.block,
                parts=("json_", "txt_"),
            )
            self.open_texts(self.prompts)
        elif resolve(self.source).is_file():
            self.prompts = PromptFile(resolve(self.source), self.languages, self.limit)
        else:
            raise UserError("No such prompt file", where="source", given=self.source)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def identity(self) -> dict[str, Any]:
        return {**self.prompts.identity, "lanes": self.lanes, "block": self.block}

    def _read(self, row: int) -> dict[str, Any]:
        meta = self.prompts.meta(row)
        choose_caption(meta, self.languages, 0.0)
        return meta

    def fetch(self, rows: np.ndarray, positions: Tensor) -> Records:
        if isinstance(self.prompts, Shards):
            self.prompts.ahead(rows.tolist())
        used, metas = zip(*(self.read_good(int(row), self._read, self.prompts.title) for row in rows), strict=True)
        return self.captioned(self.prompts, used, metas, positions)
