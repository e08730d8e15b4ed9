"""Features of a retrieval set by two frozen encoders, computed once and kept in a file.

    pictures [N, d]    one vector each;   texts [C, d']  of all captions;   owner [C]  the picture of each caption

A pair is a caption with its picture, so there are C of them. The file lies with the embedded worlds, under a hash of
the data, the encoders and the pictures' size.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from datamodules.worlds import cache
from lightning_t2i.errors import UserError

BATCH = 128


@dataclass(frozen=True)
class PairFeatures:
    """See above; captions: of each row of `texts`, pictures: rows of the stream."""

    images: Tensor
    texts: Tensor
    owner: Tensor
    captions: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def of(cls, stream: Any, encoders: tuple[Any, Any], identities: Sequence[str], device: Any) -> PairFeatures:
        """Those of a stream that gives all captions of a picture, read from the file where there is one.

        Raises:
            UserError: the stream gives no pictures, or none of their captions.
        """
        facts = {**stream.identity, "size": getattr(stream, "size", None), "encoders": list(identities)}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
        file = cache() / f"features-{digest}.safetensors"
        captions, owner = _captions(stream)
        if not file.is_file():
            found = _encoded(stream, captions, *encoders, device)
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_name(f".{file.name}.{os.getpid()}.tmp")
            save_file(found, part)
            os.replace(part, file)
        found = load_file(file)
        return cls(found["images"].to(device), found["texts"].to(device), owner.to(device), captions)


def records_of(stream: Any, rows: Sequence[int]) -> Any:
    """Records of rows of a stream, in any order; their draws are those of the rows' own positions."""
    return stream.fetch(np.asarray(rows, dtype=np.int64), torch.as_tensor(rows, dtype=torch.int64))


def _captions(stream: Any) -> tuple[list[str], Tensor]:
    captions: list[str] = []
    owner: list[int] = []
    for start in range(0, len(stream), BATCH):
        rows = range(start, min(start + BATCH, len(stream)))
        records = records_of(stream, rows)
        if records.image is None or records.captions is None:
            what, fix = "Pictures with all of their captions are needed", "datamodules.retrieval.RetrievalPairs"
            raise UserError(what, where="data.main", given=type(stream).__name__, fix=fix)
        for row, texts in zip(rows, records.captions, strict=True):
            captions += texts
            owner += [row] * len(texts)
    return captions, torch.tensor(owner)


@torch.no_grad()
def _encoded(
    stream: Any,
    captions: list[str],
    images: Callable[[Tensor], Tensor],
    texts: Callable[[list[str]], Tensor],
    device: Any,
) -> dict[str, Tensor]:
    pictures = [
        images(records_of(stream, range(i, min(i + BATCH, len(stream)))).image.to(device)).cpu()
        for i in range(0, len(stream), BATCH)
    ]
    unique = sorted(set(captions))
    rows = torch.cat([texts(unique[i : i + BATCH]).cpu() for i in range(0, len(unique), BATCH)])
    place = {text: i for i, text in enumerate(unique)}
    return {"images": torch.cat(pictures).contiguous(), "texts": rows[[place[text] for text in captions]].contiguous()}
