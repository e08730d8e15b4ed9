"""Pictures with captions, from local indexed shards."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.records import Shards, Stream, captioned, choose_caption, data_folder
from datamodules.remote import RemoteOptions
from lightning_t2i.batch import Records
from lightning_t2i.errors import UserError


def square(image: Image.Image, size: int, where: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """Cuts the largest square out of an RGB picture and resizes it (bicubic, antialiased): uint8 [size, size, 3].

    Args:
        image: RGB picture.
        size: pixels of a side.
        where: horizontal and vertical place of the cut in [0, 1]; (0.5, 0.5) is the centre.
    """
    width, height = image.size
    side = min(width, height)
    left, top = int(where[0] * (width - side) + 0.5), int(where[1] * (height - side) + 0.5)
    pixels = np.array(image)[top : top + side, left : left + side]
    if side == size:
        return pixels
    # torch's uint8 kernel is the same filter as Pillow's resize (they differ by at most 2 of 255) in half the time.
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(planes, (size, size), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


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
        size: side of the square pictures in pixels.
        languages: languages to draw captions from, each caption equally likely; samples without any are left out.
        crop: cut of pictures that are not square: the centre, or a random place.
        flip: mirror half of the pictures. Captions that name left and right then become wrong.
        latents: folder (or hub id) of an autoencoder: batches carry its cached latents instead of pictures; the cache
            is built on first use.
        in_memory: decode the split once and keep it, for small data sets (size^2 * 3 bytes a picture).
        where: filters on the index, column -> [least, most], such as `{width: [256, null], aspect: [0.5, 2]}`; see
            `datamodules.filters.passing`.
        remote: how shards behind URLs are read and kept, see `datamodules.remote.RemoteOptions`.
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
    ):
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
        self.where, self.remote = where, remote
        self._kept: list[tuple[int, tuple[dict[str, Any], np.ndarray | None]]] | None = None

    def prepare(self) -> None:
        folder = data_folder(self.source)
        if self.latents is not None:
            from datamodules.encode import encode

            encode(folder, self.split, self.latents, self.size)

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
        )
        if self.latents is not None:
            from datamodules.encode import Latents

            self._latents = Latents(self.shards, self.latents, self.size)

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def identity(self) -> dict[str, Any]:
        return {**self.shards.identity, "lanes": self.lanes, "block": self.block}

    def begin(self, seed: int, name: str, shuffle: bool = True) -> None:
        super().begin(seed, name, shuffle)
        if self.in_memory and self._kept is None:
            self._kept = [self.read_good(row, self._read, self.shards.title) for row in range(len(self))]

    def _read(self, row: int, where: tuple[float, float] = (0.5, 0.5)) -> tuple[dict[str, Any], np.ndarray | None]:
        """Metadata and square picture of a row; latents are fetched for a whole batch instead."""
        meta = self.shards.meta(row)
        choose_caption(meta, self.languages, 0.0)
        if self.latents is not None:
            self._latents.check(row)
            return meta, None
        return meta, square(self.shards.picture(row, self.size), self.size, where)

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
