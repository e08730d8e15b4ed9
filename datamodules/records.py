"""What every stream of samples shares: its place in the global order, stand-ins for bad samples, reads by offset."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.bad_samples import Reads
from datamodules.buckets import BucketOrder, Buckets
from datamodules.extents import EVERYTHING, Extents
from datamodules.filters import Where, chosen_rows
from datamodules.index_file import Index
from datamodules.layouts import captions_of, read_json
from datamodules.open_files import Latest, Readable, check_shard, files_for
from datamodules.order import GlobalOrder, finite_batches
from datamodules.pictures import BadSample, decode
from datamodules.remote import RemoteOptions, Url
from lightning_t2i.batch import Records
from lightning_t2i.errors import UserError
from lightning_t2i.keys import Keys
from lightning_t2i.paths import resolve

T = TypeVar("T")


class Stream(ABC):
    """One named source of samples. A subclass says how to prepare, count, identify and fetch rows; order is shared.

    Attributes:
        batch_size: samples of one micro-batch over all ranks.
        lanes, block: see `datamodules.order.GlobalOrder`.
        max_bad_fraction: bad samples that are replaced before it is an error, as a share of the data set.
        reads: what was read so far and what of it was bad, as far as `report` was told.
    """

    batch_size: int
    lanes: int = 1024
    block: int = 256
    max_bad_fraction: float = 0.01

    def prepare(self) -> None:  # noqa: B027 (not every stream has something to build)
        """Downloads or builds what is missing on disk; called on one process of each node."""

    @abstractmethod
    def setup(self) -> None:
        """Opens the index; called on every process, possibly more than once."""

    @abstractmethod
    def __len__(self) -> int:
        """Samples of one epoch; known after `setup`."""

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What the sequence of samples depends on besides the seed: data set name, hash, options. Plain values."""

    @abstractmethod
    def fetch(self, rows: np.ndarray, positions: Tensor) -> Records:
        """The samples of `rows`; random choices are drawn from `self.keys` at `positions`, int64 [B]."""

    def begin(self, seed: int, name: str, shuffle: bool = True) -> None:
        """Fixes the order and the draws; two streams of one data set differ by their names."""
        self.order = self.make_order(json.dumps(self.identity, sort_keys=True), f"{seed}/{name}", shuffle)
        self.keys = Keys(seed).fork(f"data/{name}")
        self.reads, self._fresh = Reads(), Reads()

    def make_order(self, sha: str, seed: str, shuffle: bool) -> GlobalOrder | BucketOrder:
        """The order of the rows."""
        return GlobalOrder(len(self), sha, seed, self.lanes, self.block, shuffle)

    def load(self, positions: Sequence[int] | np.ndarray, batch_index: int) -> Records:
        """The samples at global positions; `batch_index` is the number of the batch they form."""
        places = torch.as_tensor(np.asarray(positions, dtype=np.int64))
        return replace(self.fetch(self.order.rows(places.numpy()), places), position=places, cursor=batch_index + 1)

    def passes(self, rank: int, world: int) -> list[range]:
        """The positions of a rank's batches of one pass over the data, in order; as many batches on every rank."""
        return finite_batches(len(self), self.batch_size, rank, world)

    def read_good(self, row: int, read: Callable[[int], T], name: Callable[[int], str]) -> tuple[int, T]:
        """(row, `read(row)`), or the same of the next row of its block that is not bad, so that positions never shift.

        Raises:
            UserError: every row of the block is bad.
        """
        met: dict[str, str] = {}
        for candidate in self.order.block_rows(row):
            try:
                found = candidate, read(candidate)
            except BadSample as reason:
                met[name(candidate)] = str(reason)
                continue
            self._fresh.read, self._fresh.replaced = self._fresh.read + 1, self._fresh.replaced + bool(met)
            self._fresh.name(met)
            return found
        raise UserError("Every sample of a block is bad", where=name(row), given=met[name(row)])

    @property
    def bad(self) -> dict[str, str]:
        """The bad samples met so far, name -> reason; the first `datamodules.bad_samples.NAMED`."""
        return self.reads.bad

    def take_fresh(self) -> Reads:
        """What was read since the last call; how a worker reports to the main process."""
        fresh, self._fresh = self._fresh, Reads()
        return fresh

    def report(self, fresh: Reads) -> None:
        """Adds to `reads`, names new bad samples in the log and holds the limit.

        Raises:
            UserError: more than `max_bad_fraction` of the data set is bad.
        """
        self.reads.add(fresh)
        self.reads.refuse_more(len(self), self.max_bad_fraction, self.block)


def sample_id(data_set: str, split: str, key: str) -> int:
    """Signed 64-bit id of a sample, the same in every run: the first 8 bytes of blake2b over name, split and key."""
    digest = hashlib.blake2b(f"{data_set}/{split}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def captions_in(meta: dict[str, Any], languages: Sequence[str]) -> list[str]:
    """A sample's captions in `languages`, in their order, without empty ones."""
    return [text for language in languages for text in meta.get("caption", {}).get(language, []) if text.strip()]


def choose_caption(meta: dict[str, Any], languages: Sequence[str], u: float) -> str:
    """One of a sample's captions in `languages`, each equally likely for u uniform in (0, 1).

    Raises:
        BadSample: there is none.
    """
    captions = captions_in(meta, languages)
    if not captions:
        raise BadSample(f"no caption in {', '.join(languages)}")
    return captions[int(u * len(captions))]


def captioned(
    source: Any, keys: Keys, languages: Sequence[str], rows: Sequence[int], metas: Sequence[dict], positions: Tensor
) -> Records:
    """Records of `rows` with drawn captions; labels and scenes where every sample has them."""
    draws = keys.uniform("caption", positions, dtype=torch.float64).tolist()
    return Records(
        id=torch.tensor([source.id(row) for row in rows]),
        position=positions,
        caption=[choose_caption(meta, languages, u) for meta, u in zip(metas, draws, strict=True)],
        label=torch.tensor([meta["label"] for meta in metas]) if all("label" in meta for meta in metas) else None,
        scene=[meta["scene"] for meta in metas] if all("scene" in meta for meta in metas) else None,
    )


def data_folder(source: str | Path) -> Path:
    """The folder of a data set: `source` itself, or that of an embedded world, built on first use."""
    if resolve(source).is_dir():
        return resolve(source)
    from datamodules import worlds

    return worlds.ensure(str(source))


def _about(folder: Path, split: str) -> dict[str, Any]:
    """`dataset.json` of a folder that has the split."""
    facts = folder / "dataset.json"
    if not facts.is_file():
        raise UserError(
            "Not a data-set folder: it has no dataset.json",
            where="source",
            given=folder,
            fix=f"pack a folder of pictures with: python -m datamodules.pack {folder}",
        )
    about = json.loads(facts.read_text())
    if split not in about["splits"]:
        raise UserError("The data set has no such split", where="split", given=split, allowed=about["splits"])
    return about


def check_shards(folder: Path, split: str) -> None:
    """Looks at each local shard of a split, once a node and before the training, to spare a shared disk.

    Raises:
        UserError: no such folder or split, or a shard is missing or empty.
    """
    _about(folder, split)
    for path in Index.load(folder, split).shards:
        if not isinstance(path, Url):  # whether that is there is found when it is read
            check_shard(path)


class Shards:
    """A split of a data-set folder, read sample by sample without unpacking: one `pread` at the indexed offset.

    Args:
        folder: data-set folder with `dataset.json`, shards and index.
        split: name of the split.
        languages: keep only samples with a caption in one of these languages; None keeps all.
        limit: keep only the first so many of them.
        where: filters on the index, see `datamodules.filters.passing`.
        remote: how shards behind URLs are read.
        lanes, block: of the order in which samples are read: so many files stay open, and remote reads follow it.
        buckets: sizes of pictures; the rows of a bucket then lie side by side.
        parts: members that are read, see `datamodules.extents.Extents`.

    Raises:
        UserError: no such folder or split, or no sample is left; as it is read, that a shard is missing or empty.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        languages: Sequence[str] | None = None,
        limit: int | None = None,
        where: Where | None = None,
        remote: RemoteOptions = RemoteOptions(),
        lanes: int = 1,
        block: int = 256,
        buckets: Buckets | None = None,
        parts: Sequence[str] = EVERYTHING,
    ):
        self.folder, self.split, self.name = folder, split, _about(folder, split)["name"]
        self.index = Index.load(folder, split)
        self.rows = chosen_rows(self.index, languages, where, limit, buckets)
        if len(self.rows) == 0:
            given = f"split={split}, languages={languages}, where={dict(where or {})}"
            raise UserError("No sample is left", where=str(folder), given=given)
        self._files = Latest(Readable, files_for(lanes))
        remotely = any(isinstance(path, Url) for path in self.index.shards)
        self.extents = Extents(self.index, self.rows, remote, lanes, block, parts) if remotely else None

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Name, index hash and a hash of the rows that the filters left, in their order."""
        return {"data": f"{self.name}/{self.split}", "sha": self.index.sha, "rows": self.rows.digest()}

    def title(self, row: int) -> str:
        """Shard and key of a sample, for messages."""
        i = self.rows[row]
        return f"{self.index.shards[self.index['shard'][i]].name}:{self.index['key'][i]}"

    def id(self, row: int) -> int:
        return sample_id(self.name, self.split, self.index["key"][self.rows[row]])

    def meta(self, row: int) -> dict[str, Any]:
        """The JSON beside the picture: captions by language and what the data set adds.

        Other layouts than ours have a caption without a language, or as a text beside the picture.
        """
        data = self._read(row, "json_offset", "json_size")
        try:
            meta = read_json(data) if data else {}
        except ValueError as error:
            raise BadSample(f"json: {error}") from error
        language = self.index.facts.get("language")
        if language is None:
            return meta
        text = self._read(row, "txt_offset", "txt_size").decode("utf-8", "replace")
        meta = {name: value for name, value in meta.items() if name != "label"}  # the index has those that are numbers
        if "label" in self.index.columns and not np.isnan(label := self.index["label"][self.rows[row]]):
            meta = {**meta, "label": int(label)}  # of the JSON, a .cls, or metadata beside the shard
        return {**meta, "caption": captions_of(meta, text, language)}

    def ahead(self, rows: Sequence[int]) -> None:
        """Fetches what these rows and their neighbours need, many at once, where the shards are remote."""
        if self.extents is not None:
            self.extents.prepare(rows)

    def data(self, row: int) -> bytes:
        """The sample's own bytes: an encoded picture, or what the data set has in its place."""
        return self._read(row, "offset", "size")

    def picture(self, row: int, size: int | None = None) -> Image.Image:
        """The decoded picture in RGB; transparent pixels become white.

        Args:
            row: the sample.
            size: the shorter side that is needed. A JPEG of four times that and more is decoded at half, a quarter or
                an eighth of its size, never below twice the need, which is several times faster.
        """
        return decode(self.data(row), size)  # an error of the network is not one of the picture

    def _read(self, row: int, offset: str, size: str) -> bytes:
        i = self.rows[row]
        shard, start, length = int(self.index["shard"][i]), int(self.index[offset][i]), int(self.index[size][i])
        if self.extents is not None and isinstance(self.index.shards[shard], Url):
            data = self.extents.read(row, start, length) if length else b""
        else:
            data = self._files(self.index.shards[shard]).read(start, length)
        if len(data) != length:
            raise BadSample(f"the shard ends {length - len(data)} bytes early")
        return data
