"""Prompts without pictures: for methods that learn from a teacher alone, for sampling and for scores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from datamodules.captioned import Captioned
from datamodules.records import BadSample, Shards, choose_caption, data_folder, sample_id
from datamodules.text_cache import TextCache
from lightning_t2i.batch import Records
from lightning_t2i.errors import UserError
from lightning_t2i.paths import resolve

SUFFIXES = (".txt", ".jsonl")


class PromptFile:
    """Prompts of a text file, one a line, or of a jsonl file, one object a line.

    An object has "prompt" (text) or "caption" (text, list of texts, or lists by language), and may have "label" (int)
    and "scene" (object).

    Args:
        path: the file; its stem names the data set, the line number is the key.
        languages: languages that count where captions are given by language.
        limit: use only the first so many lines.

    Raises:
        UserError: a line is empty, is not valid or has no prompt; names the file and the line.
    """

    def __init__(self, path: Path, languages: Sequence[str], limit: int | None = None):
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()[:limit]
        if not lines:
            raise UserError("The prompt file is empty", where=str(path))
        self.name, self.languages = path.stem, tuple(languages)
        self.metas = [self._parse(line, f"{path}:{number}", path.suffix) for number, line in enumerate(lines, 1)]
        self.identity = {"data": self.name, "sha": hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]}

    def _parse(self, line: str, where: str, suffix: str) -> dict[str, Any]:
        meta: dict[str, Any] = {"prompt": line.strip()}
        if suffix == ".jsonl":
            try:
                meta = json.loads(line)
            except ValueError as error:
                raise UserError(f"Not valid JSON: {error}", where=where, given=line[:80]) from error
        captions = meta.get("prompt", meta.get("caption", {})) if isinstance(meta, dict) else {}
        if isinstance(captions, str):
            captions = [captions]
        if isinstance(captions, list):  # no language given: it counts as whatever is asked for
            captions = {self.languages[0]: captions}
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
        return len(self.metas)

    def meta(self, row: int) -> dict[str, Any]:
        return self.metas[row]

    def title(self, row: int) -> str:
        return f"{self.name}:{row + 1}"

    def id(self, row: int) -> int:
        return sample_id(self.name, "prompts", str(row))


class Prompts(Captioned):
    """Prompts of a data set or a file; no picture is ever opened.

    Batches hold `caption` (and `cond`), and `label` and `scene` where the source has them.

    Args:
        source: an embedded world, a data-set folder, or a .txt or .jsonl file (see `PromptFile`).
        split: split of the data set; without meaning for a file.
        batch_size: prompts of one micro-batch over all ranks.
        languages: languages to draw prompts from, each prompt of a sample equally likely.
        limit: use only the first so many samples.
        lanes, block: see `datamodules.order.GlobalOrder`.
        max_bad_fraction: see `datamodules.records.Stream`.
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
        text: Literal["online", "cached"] = "online",
        text_cache: TextCache | None = None,
    ):
        if not languages:
            raise UserError("No language to take prompts from", where="languages", given=list(languages))
        self.source, self.split, self.batch_size, self.languages = source, split, batch_size, tuple(languages)
        self.limit, self.lanes, self.block, self.max_bad_fraction = limit, lanes, block, max_bad_fraction
        self.choose_text(text, text_cache)
        if text == "cached" and self._is_file:
            raise UserError("Captions of a file are not cached", where="text", given=text, allowed="online")

    @property
    def _is_file(self) -> bool:
        return Path(self.source).suffix in SUFFIXES

    def prepare(self) -> None:
        if not self._is_file:
            self.make_texts(data_folder(self.source))

    def setup(self) -> None:
        if hasattr(self, "prompts"):
            return
        if not self._is_file:
            self.prompts = Shards(data_folder(self.source), self.split, self.languages, self.limit)
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
        used, metas = zip(*(self.read_good(int(row), self._read, self.prompts.title) for row in rows), strict=True)
        return self.captioned(self.prompts, used, metas, positions)
