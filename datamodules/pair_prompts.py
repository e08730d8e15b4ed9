"""Prompts that pairs are made for: each with its noise seed, dealt out to processes and jobs by whole shards."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from datamodules.prompts import Prompts
from datamodules.records import BadSample
from datamodules.shards import shard_name
from lightning_t2i.batch import Records
from lightning_t2i.errors import UserError
from lightning_t2i.pairs import noise_seeds


def array_part() -> tuple[int, int]:
    """(which, of how many) this task of a SLURM job array is; (0, 1) outside of one."""
    if "SLURM_ARRAY_TASK_ID" not in os.environ:
        return 0, 1
    number, first, step = (
        int(os.environ.get(f"SLURM_ARRAY_TASK_{name}", default))
        for name, default in (("ID", "0"), ("MIN", "0"), ("STEP", "1"))
    )
    return (number - first) // step, int(os.environ.get("SLURM_ARRAY_TASK_COUNT", "1"))


class PairPrompts(Prompts):
    """The prompts of a pair folder that is being made: pair p belongs to prompt p and to shard p div samples_per_shard.

    Shard k is made by process k mod n of n, counted over all jobs; shards that are there already are left out. Every
    shard is cut into the same batches whoever makes it, so that its bytes depend on neither processes nor jobs.

    Args:
        source, split, languages, limit: see `datamodules.prompts.Prompts`. A prompt that is empty is an error.
        folder: where the pairs go; jobs that share the work share it.
        batch_size: pairs of one call of the teacher.
        samples_per_shard: pairs of a shard; the last one may have fewer.
        part: which job this is, of how many, as [0, 4]; null takes it from a SLURM job array.
        licence: licence of the pairs, stored with them.
    """

    def __init__(
        self,
        source: str,
        folder: str,
        split: str = "train",
        batch_size: int = 50,
        samples_per_shard: int = 1000,
        languages: Sequence[str] = ("en",),
        limit: int | None = None,
        part: tuple[int, int] | None = None,
        licence: str = "see the licences of the teacher and of the prompts",
    ):
        super().__init__(source, split, batch_size, languages, limit)
        if batch_size < 1 or samples_per_shard < 1:
            given = f"batch_size={batch_size}, samples_per_shard={samples_per_shard}"
            raise UserError("Batches and shards hold at least one pair", where="data.predict", given=given)
        self.part = array_part() if part is None else (part[0], part[1])
        if not 0 <= self.part[0] < self.part[1]:
            raise UserError(
                "No such part of the work", where="data.predict.part", given=self.part, allowed="[i, n], i < n"
            )
        self.folder, self.samples_per_shard, self.licence = Path(folder), samples_per_shard, licence

    def setup(self) -> None:
        super().setup()
        # Looked up before any process starts to write, so that all processes of a job see the same shards missing.
        there = {path.name for path in self.folder.glob(f"{self.split}-*.tar")}
        self.missing = [k for k in range(self.shards) if shard_name(self.split, k) not in there]

    @property
    def shards(self) -> int:
        """Shards of the whole folder."""
        return -(-len(self) // self.samples_per_shard)

    @property
    def facts(self) -> dict[str, Any]:
        """What pairs depend on besides the teacher."""
        sizes = {"batch_size": self.batch_size, "samples_per_shard": self.samples_per_shard, "n": len(self)}
        return {"prompts": {**self.prompts.identity, "languages": list(self.languages)}, "seed": self.seed, **sizes}

    def begin(self, seed: int, name: str, shuffle: bool = True) -> None:
        super().begin(seed, name, shuffle)
        self.seed = seed

    def positions(self, shard: int) -> range:
        """The positions of a shard's pairs."""
        start = shard * self.samples_per_shard
        return range(start, min(start + self.samples_per_shard, len(self)))

    def mine(self, rank: int, world: int) -> list[int]:
        """The missing shards that a process makes."""
        return [k for k in self.missing if k % (world * self.part[1]) == self.part[0] * world + rank]

    def passes(self, rank: int, world: int) -> list[range]:
        """The batches of a process. One that has fewer shards than others repeats batches, which nobody writes: a
        teacher that is cut over the processes needs all of them at every call."""
        shares = [self.batches(self.mine(r, world)) for r in range(world)]
        longest = max(shares, key=len)
        return [*shares[rank], *islice(cycle(longest), len(longest) - len(shares[rank]))]

    def batches(self, shards: Iterable[int] | None = None) -> list[range]:
        """The batches of these shards, by default of all."""
        wholes = map(self.positions, range(self.shards) if shards is None else shards)
        return [pairs[i : i + self.batch_size] for pairs in wholes for i in range(0, len(pairs), self.batch_size)]

    def _read(self, row: int) -> dict[str, Any]:
        try:
            return super()._read(row)
        except BadSample as reason:  # the next prompt cannot stand in: it has a pair of its own
            where, fix = self.prompts.title(row), "repair the prompt, or leave it out of the data set"
            raise UserError("A pair needs its prompt", where=where, given=reason, fix=fix) from reason

    def fetch(self, rows: np.ndarray, positions: Tensor) -> Records:
        return replace(super().fetch(rows, positions), noise_seed=noise_seeds(self.seed, positions))

    def metas(self, records: Records) -> list[dict[str, Any]]:
        """What a pair's JSON says: caption by language, label, noise seed and the id of its prompt."""
        metas = []
        for i, (row, text) in enumerate(zip(records.position.tolist(), records.caption or [], strict=True)):
            captions = self.prompts.meta(row)["caption"]
            language = next(name for name in self.languages if text in captions.get(name, []))
            label = {} if records.label is None else {"label": int(records.label[i])}
            seed = {} if records.noise_seed is None else {"noise_seed": int(records.noise_seed[i])}
            metas.append({"caption": {language: [text]}, **label, **seed, "source": int(records.id[i])})
        return metas
