"""Teacher pairs: (z, x0, prompt) with z drawn again from its seed (`lightning_t2i.pairs.noise`)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.pair_shards import FORMAT, refuse_stale
from datamodules.records import Shards, Stream, check_shards
from lightning_t2i.batch import Records
from lightning_t2i.errors import UserError
from lightning_t2i.pairs import LAW, noise_checksum, teacher_identity
from lightning_t2i.paths import resolve


class Pairs(Stream):
    """The pairs of a folder that `predict` made, for training against a teacher's own samples.

    Batches hold `noise_seed`, `latent` (or `image`, of a pixel-space teacher), `caption`, and `label` where the prompts
    have one.

    Args:
        source: folder of pairs.
        teacher: pipeline folder or hub id that the pairs must come from.
        guidance, steps, solver: what they must have been sampled with; null takes any.
        revision: commit of the teacher's hub id.
        split: split of the folder.
        batch_size: pairs of one micro-batch over all ranks.
        limit: use only the first so many pairs.
        verify: compare the sha256 of every shard before the first use, once on each node (reads all shards).
        lanes, block: see `datamodules.order.GlobalOrder`.
        max_bad_fraction: see `datamodules.records.Stream`.
    """

    shards: Shards  # after `setup`

    def __init__(
        self,
        source: str,
        teacher: str,
        guidance: float | None = None,
        steps: int | None = None,
        solver: str | None = None,
        revision: str | None = None,
        split: str = "train",
        batch_size: int = 64,
        limit: int | None = None,
        verify: bool = True,
        lanes: int = 1024,
        block: int = 256,
        max_bad_fraction: float = 0.01,
    ):
        self.source, self.teacher, self.revision, self.split = source, teacher, revision, split
        self.expected = {"guidance": guidance, "steps": steps, "solver": solver}
        self.batch_size, self.limit, self.verify = batch_size, limit, verify
        self.lanes, self.block, self.max_bad_fraction = lanes, block, max_bad_fraction

    def _open(self) -> dict[str, Any]:
        """`dataset.json` of the folder, which is complete and what is expected.

        Raises:
            UserError: no pairs, incomplete ones, or pairs of another teacher, sampler or noise.
        """
        folder = resolve(self.source)
        again = "python train.py predict --config CONFIG, with the config that makes the folder"
        if (folder / "job.json").is_file() and not (folder / "dataset.json").is_file():
            there = f"{len(list(folder.glob('*.tar')))} shards so far"
            raise UserError("These pairs are incomplete", where=str(folder), given=there, fix=f"run again: {again}")
        if not (folder / "dataset.json").is_file():
            raise UserError("No pairs are there", where="source", given=self.source, fix=again)
        about = json.loads((folder / "dataset.json").read_text())
        if "noise" not in about:
            raise UserError("A data set, but not one of pairs", where="source", given=self.source, fix=again)
        wanted = {name: value for name, value in self.expected.items() if value is not None}
        wanted |= {"format": FORMAT, "z": LAW, "teacher": teacher_identity(self.teacher, self.revision)}
        refuse_stale(
            about["parameters"], wanted, folder / "dataset.json", f"make them again in another folder: {again}"
        )
        return about

    def prepare(self) -> None:
        self._open()
        check_shards(resolve(self.source), self.split)
        if self.verify:
            shards = Shards(resolve(self.source), self.split)
            for path in shards.index.shards:
                with path.open("rb") as stream:
                    found = hashlib.file_digest(stream, "sha256").hexdigest()
                self._compare("The bytes of a shard have changed", path, found, shards.index.facts["sha256"][path.name])

    def setup(self) -> None:
        if hasattr(self, "shards"):
            return
        about = self._open()
        shards = Shards(resolve(self.source), self.split, limit=self.limit, lanes=self.lanes)
        self.shape, self.kind = tuple(about["shape"]), about["parameters"]["x0"]
        seeds, numbers = shards.index["noise_seed"], shards.index["shard"]
        for number, path in enumerate(shards.index.shards):
            first, last = np.searchsorted(numbers, [number, number + 1]) - [0, 1]
            found = noise_checksum(torch.tensor([seeds[first], seeds[last]]), self.shape)
            self._compare("The noise of a shard is not drawn again as it was", path, found, about["noise"][path.name])
        self.shards = shards

    @staticmethod
    def _compare(what: str, shard: Path, found: str, expected: str) -> None:
        if found != expected:
            fix = "delete the folder and make the pairs again, or copy them again"
            raise UserError(what, where=str(shard), given=found, allowed=expected, fix=fix)

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def identity(self) -> dict[str, Any]:
        return {**self.shards.identity, "lanes": self.lanes, "block": self.block}

    def _read(self, row: int) -> tuple[dict[str, Any], bytes]:
        return self.shards.meta(row), self.shards.data(row)

    def fetch(self, rows: np.ndarray, positions: Tensor) -> Records:
        found = [self.read_good(int(row), self._read, self.shards.title) for row in rows]
        metas = [meta for _, (meta, _) in found]
        x0 = np.stack([np.frombuffer(data, "<f2").reshape(self.shape) for _, (_, data) in found])
        texts = [[text for texts in meta["caption"].values() for text in texts] for meta in metas]
        records = Records(
            id=torch.tensor([self.shards.id(row) for row, _ in found]),
            position=positions,
            caption=[text for (text,) in texts],
            label=torch.tensor([meta["label"] for meta in metas]) if all("label" in meta for meta in metas) else None,
            noise_seed=torch.tensor([meta["noise_seed"] for meta in metas]),
        )
        setattr(records, self.kind, torch.from_numpy(x0).to(torch.float32))
        return records
