"""A distilled set as a folder: a shard of synthetic pairs, the factors of their similarity, and what they belong to.

    pairs-000000.tar        KEY.image.npy float32 [3, H, W], KEY.text_embeds.npy float32 [d'], KEY.json for each pair
    similarity.safetensors  a, left, right (or dense; nothing for S = I) and rates [2]
    config.json             encoders, alpha, temperature, widths of the heads

Pictures are in the normalised units of this repository, [-1, 1] for real ones, and are not clamped. A text vector
stands for a caption in the space of its text encoder and has no tokens; KEY.json names the real captions nearest to it.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

from lightning_t2i.errors import UserError
from lightning_t2i.soft_contrast import similarity

SHARD, FACTORS, CONFIG, KIND = "pairs-000000.tar", "similarity.safetensors", "config.json", "SyntheticSet"
NAMES = {3: ("a", "left", "right"), 1: ("dense",), 0: ()}  # of the factors, by their number


@dataclass(frozen=True)
class SyntheticSet:
    """Pictures [M, 3, H, W], text vectors [M, d'], factors of S, rates [2]; facts: what config.json says besides.

    captions: the nearest real ones of each pair, best first.
    """

    images: Tensor
    texts: Tensor
    factors: tuple[Tensor, ...]
    rates: Tensor
    facts: dict[str, Any]
    captions: list[list[str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def similarity(self) -> Tensor:
        """S [M, M]."""
        return similarity(self.factors, self.facts["alpha"], torch.arange(len(self)))

    def save(self, folder: Path) -> None:
        """Writes the folder, with the same bytes for the same set."""
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(folder / SHARD, "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in range(len(self)):
                for name, tensor in (("image", self.images[row]), ("text_embeds", self.texts[row])):
                    stream = io.BytesIO()
                    np.save(stream, tensor.detach().cpu().float().numpy())
                    _add(tar, f"{row:06d}.{name}.npy", stream.getvalue())
                about = {"nearest_captions": self.captions[row] if self.captions else []}
                _add(tar, f"{row:06d}.json", json.dumps(about, ensure_ascii=False).encode())
        tensors = dict(zip(NAMES[len(self.factors)], self.factors, strict=True)) | {"rates": self.rates}
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / FACTORS)
        facts = {"_class_name": KIND, "pairs": len(self), **self.facts}
        (folder / CONFIG).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> SyntheticSet:
        """Reads what `save` wrote.

        Raises:
            UserError: another kind of folder, or pairs are missing.
        """
        file = folder / CONFIG
        facts = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if facts.pop("_class_name", None) != KIND:
            fix = "train.py export FOLDER --run NAME writes one"
            raise UserError("Not the folder of a synthetic set", where=str(folder), fix=fix)
        with tarfile.open(folder / SHARD) as tar:
            members = {member.name: _bytes(tar, member) for member in tar}
        count = facts.pop("pairs")
        keys = [f"{row:06d}" for row in range(count)]
        if missing := [key for key in keys if f"{key}.image.npy" not in members]:
            raise UserError("Pairs of the set are missing", where=str(folder / SHARD), given=missing[0])
        images, texts = (
            torch.stack(
                [torch.from_numpy(np.load(io.BytesIO(members[f"{k}.{name}.npy"]), allow_pickle=False)) for k in keys]
            )
            for name in ("image", "text_embeds")
        )
        captions = [json.loads(members[f"{key}.json"])["nearest_captions"] for key in keys]
        found = load_file(folder / FACTORS)
        factors = tuple(found[name] for name in NAMES[len(found) - 1])
        return cls(images, texts, factors, found["rates"], facts, captions)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member)
    return stream.read() if stream is not None else b""


def nearest_captions(texts: Tensor, known: Tensor, captions: Sequence[str], count: int = 3) -> list[list[str]]:
    """The captions whose vectors [C, d'] have the largest cosines with each of `texts` [M, d'], different ones."""
    places: dict[str, int] = {}
    for place, text in enumerate(captions):
        places.setdefault(text, place)  # a caption of several pictures counts once
    unique = list(places)
    cosines = normalize(texts, dim=1) @ normalize(known[list(places.values())], dim=1).T
    return [[unique[i] for i in row] for row in cosines.topk(min(count, len(unique)), dim=1).indices.tolist()]
