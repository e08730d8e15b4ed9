"""Pictures with captions, from local indexed shards."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from datamodules.buckets import BucketOrder, Buckets
from datamodules.captioned import Captioned
from datamodules.encode import Latents, Views, encode
from datamodules.order import GlobalOrder
from datamodules.pictures import cut, to_images
from datamodules.records import Shards, check_shards, choose_caption, data_folder
from datamodules.remote import RemoteOptions
from datamodules.text_cache import TextCache
from lightning_t2i.batch import Records
from lightning_t2i.errors import UserError

log = logging.getLogger(__name__)


class ImageText(Captioned):
    """Pictures and captions of one split, drawn by (seed, position) only.

    Batches hold `image` in [-1, 1] or `latent`, `caption` (and `cond`), and `label` and `scene` where they are there.

    Args:
        source: an embedded world ("shapes", "openmoji") or a data-set folder.
        split: split of the data set.
        batch_size: samples of one micro-batch over all ranks.
        size: side of the square pictures in pixels; with `buckets` theirs count.
        languages: languages to draw captions from, each caption equally likely; samples without any are left out.
        crop: cut of pictures that are not square: the centre, or a random place.
        flip: mirror half of the pictures. Captions that name left and right then become wrong.
        latents: folder (or hub id) of an autoencoder: batches carry its cached latents instead of pictures; the cache
            is built on first use. With `flip` it has mirrored pictures too.
        crops: random places of each picture in the cache of latents; only and always with `crop: random`.
        text: "cached": batches carry the embeddings of their captions in `cond`; the cache is built on first use.
        text_cache: which embeddings these are.
        in_memory: decode the split once and keep it, for small data sets (size^2 * 3 bytes a picture).
        where: filters on the index, column -> [least, most], such as `{width: [256, null], aspect: [0.5, 2]}`; see
            `datamodules.filters.passing`.
        remote: how shards behind URLs are read and kept, see `datamodules.remote.RemoteOptions`.
        buckets: read pictures at the size of a list that is nearest to their shape, each batch at one of them; see
            `datamodules.buckets`. Pictures are cut as with `size`, and what would be enlarged is left out.
        limit: use only the first so many samples.
        lanes, block: see `datamodules.order.GlobalOrder`.
        max_bad_fraction: see `datamodules.records.Stream`.
    """

    shards: Shards  # after `setup`

    def __init__(
        self,
        source: str,
        split: str = "train",
        batch_size: int = 64,
        size: int = 32,
        languages: Sequence[str] = ("en",),
        crop: Literal["centre", "random"] = "centre",
        flip: bool = False,
        latents: str | None = None,
        crops: int | None = None,
        in_memory: bool = False,
        limit: int | None = None,
        lanes: int = 1024,
        block: int = 256,
        max_bad_fraction: float = 0.01,
        where: dict[str, list[float | None]] | None = None,
        remote: RemoteOptions = RemoteOptions(),
        text: Literal["online", "cached"] = "online",
        text_cache: TextCache | None = None,
        buckets: Buckets | None = None,
    ):
        if latents is not None and buckets is not None:
            what = "Latents are cached at one size"
            raise UserError(what, where="buckets", given="sizes and latents", fix="latents: null")
        if latents is None and in_memory and crop == "random":
            raise UserError("in_memory keeps one crop of each picture", where="crop", given=crop, allowed="centre")
        if (crops is not None) != (latents is not None and crop == "random") or (crops or 1) < 1:
            what, fix = "Cached latents have so many random crops of each picture", "crop: random, crops: 4"
            raise UserError(what, where="crops", given=f"crop {crop}, crops {crops}, latents {latents}", fix=fix)
        if not languages:
            raise UserError("No language to take captions from", where="languages", given=list(languages))
        self.source, self.split, self.batch_size, self.size = source, split, batch_size, size
        self.languages, self.crop, self.flip, self.latents = tuple(languages), crop, flip, latents
        self.in_memory, self.limit, self.lanes, self.block = in_memory, limit, lanes, block
        self.max_bad_fraction = max_bad_fraction
        self.where, self.remote, self.crops = where, remote, crops
        self.choose_text(text, text_cache)
        self.buckets = buckets
        if buckets is not None:
            self.size = buckets.square_side
        self._kept: list[tuple[int, tuple[dict[str, Any], np.ndarray | None]]] | None = None

    def prepare(self) -> None:
        folder = data_folder(self.source)
        check_shards(folder, self.split)
        if self.latents is not None:
            encode(folder, self.split, self.latents, self.size, views=self.views, remote=self.remote)
        self.make_texts(folder)

    def setup(self) -> None:
        if hasattr(self, "shards"):
            return
        self.shards = Shards(
            data_folder(self.source),
            self.split,
            self.languages,
            self.limit,
            self.where,
            self.remote,
            self.lanes,
            self.block,
            self.buckets,
        )
        if self.latents is not None:
            self._latents = Latents(self.shards, self.latents, self.size, self.views)
        self.open_texts(self.shards)

    @property
    def views(self) -> Views:
        """What of each picture the cache of latents has."""
        return Views(self.crops, self.flip)

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def identity(self) -> dict[str, Any]:
        sizes = "" if self.buckets is None else " ".join(f"{w}x{h}" for w, h in self.buckets.all)
        buckets = {"buckets": sizes} if sizes else {}
        return {**self.shards.identity, "lanes": self.lanes, "block": self.block, **buckets}

    def make_order(self, sha: str, seed: str, shuffle: bool) -> GlobalOrder | BucketOrder:
        if self.buckets is None:
            return super().make_order(sha, seed, shuffle)
        order = BucketOrder(self.shards.rows.firsts, self.batch_size, sha, seed, self.lanes, self.block, shuffle)
        held = [f"{w}x{h}: {n}" for (w, h), n in zip(self.buckets.all, order.counts.tolist(), strict=True) if n]
        log.info("pictures by bucket: %s", ", ".join(held))
        return order

    def passes(self, rank: int, world: int) -> list[range]:
        return self.order.passes(rank, world) if isinstance(self.order, BucketOrder) else super().passes(rank, world)

    def _size_of(self, row: int) -> tuple[int, int]:
        """Width and height at which a row is read."""
        return (self.size, self.size) if self.buckets is None else self.buckets.all[self.shards.rows.class_of(row)]

    def begin(self, seed: int, name: str, shuffle: bool = True) -> None:
        super().begin(seed, name, shuffle)
        if self.in_memory and self._kept is None:
            self._kept = [self.read_good(row, self._read, self.shards.title) for row in range(len(self))]

    def _read(self, row: int, where: tuple[float, float] = (0.5, 0.5)) -> tuple[dict[str, Any], np.ndarray | None]:
        """Metadata and cut picture of a row; latents are fetched for a whole batch instead."""
        meta = self.shards.meta(row)
        choose_caption(meta, self.languages, 0.0)
        if self.latents is not None:
            self._latents.check(row)
            return meta, None
        size = self._size_of(row)
        return meta, cut(self.shards.picture(row, max(size)), size, where)

    def fetch(self, rows: np.ndarray, positions: Tensor) -> Records:
        if self._kept is not None:
            found = [self._kept[row] for row in rows]
        else:
            where = torch.full((len(rows), 2), 0.5)
            if self.crop == "random" and self.latents is None:
                where = self.keys.uniform("crop", positions, (2,))
            self.shards.ahead([int(row) for row in rows])
            found = [
                self.read_good(int(row), partial(self._read, where=tuple(place)), self.shards.title)
                for row, place in zip(rows, where.tolist(), strict=True)
            ]
        used, metas = [row for row, _ in found], [meta for _, (meta, _) in found]
        records = self.captioned(self.shards, used, metas, positions)
        if self.latents is not None:
            records.latent = self._latents.take(used, self.views.draw(self.keys, positions))
            return records
        records.image = to_images(np.stack([picture for _, (_, picture) in found]))
        if self.flip:
            flipped = self.keys.bernoulli("flip", positions, 0.5).view(-1, 1, 1, 1)
            records.image = torch.where(flipped, records.image.flip(-1), records.image)
        return records
