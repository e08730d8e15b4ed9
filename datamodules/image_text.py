"""Pictures with captions, from local indexed shards."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.buckets import BucketOrder, Buckets
from datamodules.order import GlobalOrder
from datamodules.records import Shards, Stream, captioned, choose_caption, data_folder
from datamodules.remote import RemoteOptions
from lightning_t2i.batch import Records
from lightning_t2i.errors import UserError

log = logging.getLogger(__name__)


def cut(image: Image.Image, size: tuple[int, int], where: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """Cuts the largest part of a shape out of an RGB picture and resizes it (bicubic, antialiased): uint8 [H, W, 3].

    Args:
        image: RGB picture.
        size: width and height in pixels.
        where: horizontal and vertical place of the cut in [0, 1]; (0.5, 0.5) is the centre.
    """
    (width, height), (w, h) = image.size, size
    # What is larger than the shape is cut; of a square the shorter side is left.
    across, down = (width, _rounded(width * h, w)) if width * h < height * w else (_rounded(height * w, h), height)
    left, top = int(where[0] * (width - across) + 0.5), int(where[1] * (height - down) + 0.5)
    pixels = np.array(image)[top : top + down, left : left + across]
    if (across, down) == size:
        return pixels
    # torch's uint8 kernel is the same filter as Pillow's resize (they differ by at most 2 of 255) in half the time.
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(planes, (h, w), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _rounded(numerator: int, denominator: int) -> int:
    return max(1, (2 * numerator + denominator) // (2 * denominator))


def square(image: Image.Image, size: int, where: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """The largest square of a picture (see `cut`) with sides of `size` pixels: uint8 [size, size, 3]."""
    return cut(image, (size, size), where)


def to_images(pixels: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).to(torch.float32).div_(127.5).sub_(1)


class ImageText(Stream):
    """Pictures and captions of one split, drawn by (seed, position) only.

    Batches hold `image` in [-1, 1] (or `latent`), `caption`, and `label` and `scene` where the data set has them.

    Args:
        source: an embedded world ("shapes", "openmoji") or a data-set folder.
        split: split of the data set.
        batch_size: samples of one micro-batch over all ranks.
        size: side of the square pictures in pixels; with `buckets` theirs count.
        languages: languages to draw captions from, each caption equally likely; samples without any are left out.
        crop: cut of pictures that are not square: the centre, or a random place.
        flip: mirror half of the pictures. Captions that name left and right then become wrong.
        latents: folder (or hub id) of an autoencoder: batches carry its cached latents instead of pictures; the cache
            is built on first use.
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
        in_memory: bool = False,
        limit: int | None = None,
        lanes: int = 1024,
        block: int = 256,
        max_bad_fraction: float = 0.01,
        where: dict[str, list[float | None]] | None = None,
        remote: RemoteOptions = RemoteOptions(),
        buckets: Buckets | None = None,
    ):
        if latents is not None and buckets is not None:
            what = "Latents are cached at one size"
            raise UserError(what, where="buckets", given="sizes and latents", fix="latents: null")
        if (latents is not None or in_memory) and crop == "random":
            option = "in_memory" if latents is None else "latents"
            raise UserError(f"{option} keeps one crop of each picture", where="crop", given=crop, allowed="centre")
        if latents is not None and flip:
            raise UserError("Latents are cached unflipped", where="flip", given=flip, fix="flip: false")
        if not languages:
            raise UserError("No language to take captions from", where="languages", given=list(languages))
        self.source, self.split, self.batch_size, self.size = source, split, batch_size, size
        self.languages, self.crop, self.flip, self.latents = tuple(languages), crop, flip, latents
        self.in_memory, self.limit, self.lanes, self.block = in_memory, limit, lanes, block
        self.max_bad_fraction = max_bad_fraction
        self.where, self.remote, self.buckets = where, remote, buckets
        if buckets is not None:
            self.size = buckets.square_side
        self._kept: list[tuple[int, tuple[dict[str, Any], np.ndarray | None]]] | None = None

    def prepare(self) -> None:
        folder = data_folder(self.source)
        if self.latents is not None:
            from datamodules.encode import encode

            encode(folder, self.split, self.latents, self.size, remote=self.remote)

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
            from datamodules.encode import Latents

            self._latents = Latents(self.shards, self.latents, self.size)

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
            if self.crop == "random":
                where = self.keys.uniform("crop", positions, (2,))
            self.shards.ahead([int(row) for row in rows])
            found = [
                self.read_good(int(row), partial(self._read, where=tuple(place)), self.shards.title)
                for row, place in zip(rows, where.tolist(), strict=True)
            ]
        used, metas = [row for row, _ in found], [meta for _, (meta, _) in found]
        records = captioned(self.shards, self.keys, self.languages, used, metas, positions)
        if self.latents is not None:
            records.latent = self._latents[used]
            return records
        records.image = to_images(np.stack([picture for _, (_, picture) in found]))
        if self.flip:
            flipped = self.keys.bernoulli("flip", positions, 0.5).view(-1, 1, 1, 1)
            records.image = torch.where(flipped, records.image.flip(-1), records.image)
        return records
