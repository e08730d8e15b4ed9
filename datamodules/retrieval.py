"""Retrieval sets: pictures with several captions each, for training on one of them and measuring on all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from datamodules.image_text import ImageText
from datamodules.records import captions_in
from datamodules.remote import RemoteOptions
from datamodules.streams import Streams
from datamodules.worlds.shapes_captions import short_chinese
from lightning_t2i.batch import Records
from lightning_t2i.errors import UserError


class RetrievalPairs(ImageText):
    """Pictures with all of their captions: `captions`, beside the drawn `caption`.

    Args:
        short: give scenes of the shapes world short Chinese captions in place of their own, 20 tokens at most.
        options: of `ImageText`.
    """

    def __init__(self, source: str, split: str = "train", batch_size: int = 64, short: bool = False, **options: Any):
        super().__init__(source, split, batch_size, **options)
        if short and self.text == "cached":
            raise UserError("Short captions are not those of the data set", where="text", given="cached", fix="online")
        self.short = short
        self._captions: dict[int, list[str]] = {}

    @property
    def identity(self) -> dict[str, Any]:
        return {**super().identity, **({"captions": "short"} if self.short else {})}

    def _read(self, row: int, where: tuple[float, float] = (0.5, 0.5)) -> tuple[dict[str, Any], np.ndarray | None]:
        meta, picture = super()._read(row, where)
        if self.short:
            meta = {**meta, "caption": {"zh": short_chinese(meta["scene"])}}
        self._captions[self.shards.id(row)] = captions_in(meta, self.languages)
        return meta, picture

    def fetch(self, rows: np.ndarray, positions: Tensor) -> Records:
        if self._kept is None:
            self._captions.clear()  # of an earlier batch
        records = super().fetch(rows, positions)
        records.captions = [self._captions[id] for id in records.id.tolist()]
        return records


class RetrievalDataModule(Streams):
    """One retrieval set: trained on `train`, validated on `val`, tested on `test`.

    Args:
        source: data-set folder or embedded world.
        batch_size: pictures of one micro-batch over all ranks.
        val_batch_size: pictures of a batch of validation and test.
        splits: names of the three splits.
        options: of `RetrievalPairs`, for all three; validation and test cut the centre and mirror nothing.
        seed, accumulate, workers: see `Streams`.
    """

    def __init__(
        self,
        source: str,
        batch_size: int = 64,
        val_batch_size: int = 100,
        splits: Sequence[str] = ("train", "val", "test"),
        options: dict[str, Any] | None = None,
        seed: int = 0,
        accumulate: int = 1,
        workers: int = 0,
    ):
        sizes = (batch_size, val_batch_size, val_batch_size)
        given = dict(options or {})
        if isinstance(given.get("remote"), dict):  # as a config says it
            given["remote"] = RemoteOptions(**given["remote"])
        plain = {**given, "crop": "centre", "crops": None, "flip": False}
        main, val, test = (
            RetrievalPairs(source, split, size, **own)
            for split, size, own in zip(splits, sizes, (given, plain, plain), strict=True)
        )
        super().__init__(main, val=val, test=test, seed=seed, accumulate=accumulate, workers=workers)
