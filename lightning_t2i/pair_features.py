"""Features of a retrieval set by two frozen encoders, computed once and kept in a file.

    pictures [N, d]    one vector each;   texts [C, d']  of all captions;   owner [C]  the picture of each caption

A pair is a caption with its picture, so there are C of them. The file, which holds the captions as well, lies with the
embedded worlds, under a hash of the data, the encoders and the pictures' size. One process makes it for all of them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from datamodules.worlds import cache
from lightning_t2i import rank0
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
        """Those of a stream that gives all captions of a picture, read from the file where there is one; collective.

        Raises:
            UserError: the stream gives no pictures, or none of their captions.
        """
        facts = {**stream.identity, "size": getattr(stream, "size", None), "encoders": list(identities)}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
        file = cache() / f"features-{digest}.safetensors"
        _check(stream)
        cut = any(isinstance(p, DTensor) for network in encoders for p in network.parameters())
        with rank0.alone(True):  # the others wait
            there = rank0.agreed(lambda: _complete(file) or (not cut and _write(file, stream, encoders, device)))
        if not there or not _complete(file):  # encoders that are cut answer together; a machine may have its own folder
            _write(file, stream, encoders, device)
        found = load_file(file)
        captions = json.loads(found["captions"].numpy().tobytes())
        return cls(found["images"].to(device), found["texts"].to(device), found["owner"].to(device), captions)


def records_of(stream: Any, rows: Sequence[int]) -> Any:
    """Records of rows of a stream, in any order; their draws are those of the rows' own positions."""
    return stream.fetch(np.asarray(rows, dtype=np.int64), torch.as_tensor(rows, dtype=torch.int64))


def _check(stream: Any) -> None:
    """Refuses a stream without pictures and all of their captions, in each process, by its first row."""
    records = records_of(stream, [0])
    if records.image is None or records.captions is None:
        what, fix = "Pictures with all of their captions are needed", "datamodules.retrieval.RetrievalPairs"
        raise UserError(what, where="data.main", given=type(stream).__name__, fix=fix)


def _complete(file: Path) -> bool:
    """Whether the file is there and tells the captions, which those of older versions do not."""
    if not file.is_file():
        return False
    with safe_open(file, "pt") as content:
        return "captions" in content.keys()  # noqa: SIM118 - it is no mapping


def _write(file: Path, stream: Any, encoders: tuple[Any, Any], device: Any) -> bool:
    """Encodes all pictures and captions into the file; true once that is done."""
    found = _encoded(stream, *encoders, device)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    save_file(found, part)
    os.replace(part, file)
    return True


@torch.no_grad()
def _encoded(stream: Any, images: Any, texts: Any, device: Any) -> dict[str, Tensor]:
    pictures: list[Tensor] = []
    captions: list[str] = []
    owner: list[int] = []
    for start in range(0, len(stream), BATCH):
        rows = range(start, min(start + BATCH, len(stream)))
        records = records_of(stream, rows)
        pictures.append(images(records.image.to(device)).cpu())
        for row, own in zip(rows, records.captions, strict=True):
            captions += own
            owner += [row] * len(own)
    unique = sorted(set(captions))
    vectors = torch.cat([texts(unique[i : i + BATCH]).cpu() for i in range(0, len(unique), BATCH)])
    place = {text: i for i, text in enumerate(unique)}
    return {
        "images": torch.cat(pictures).contiguous(),
        "texts": vectors[[place[text] for text in captions]].contiguous(),
        "owner": torch.tensor(owner),
        "captions": torch.frombuffer(bytearray(json.dumps(captions).encode()), dtype=torch.uint8),
    }
