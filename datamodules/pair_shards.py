"""Writes folders of teacher pairs: shards that webdataset reads, each whole or absent, made in any order by anyone.

A shard's samples are batches: `KEY.npy`, float16 [n, *shape], and `KEY.json`, a list of n objects. The index has a row
per pair, with the place of its own bytes in both, so that a pair is read like a sample of any other data set.

While it is made a folder holds `job.json` (what the pairs are made from) and, per finished shard, the shard and its
index in `.SPLIT-NUMBER/`. Who finds all shards there joins the indexes and writes `dataset.json`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from datamodules.index_file import joined
from datamodules.shards import Index, ShardWriter, finish, index_path, shard_name, write_index
from lightning_t2i.errors import UserError
from lightning_t2i.pairs import LAW
from lightning_t2i.state_io import flush, write_atomically

FORMAT = 1


def refuse_stale(found: Mapping[str, Any], wanted: Mapping[str, Any], where: Path, fix: str) -> None:
    """Raises a UserError that names the first fact in which stored pairs are not what is wanted."""
    for name, value in wanted.items():
        if found.get(name) != value:
            what = f"These pairs are stale or foreign: '{name}' is another"
            raise UserError(what, where=str(where), given=str(found.get(name)), allowed=str(value), fix=fix)


class BatchWriter(ShardWriter):
    """Writes one shard whose samples are batches of arrays."""

    def write_batch(
        self, keys: Sequence[str], arrays: np.ndarray, metas: Sequence[Mapping[str, Any]], noise_seeds: Sequence[int]
    ) -> None:
        """Adds a batch as the two members FIRST_KEY.npy and FIRST_KEY.json.

        Args:
            keys: names of the rows, unique in the split.
            arrays: [n, *shape], stored as they are.
            metas: what the JSON says of each row.
            noise_seeds: a column of the index.
        """
        self._take(keys[0])
        stream = io.BytesIO()
        np.save(stream, np.ascontiguousarray(arrays))  # in any other order a row would not be one piece
        data, row_bytes = stream.getvalue(), arrays[0].nbytes
        texts = [json.dumps(meta, ensure_ascii=False, separators=(",", ":")).encode() for meta in metas]
        start = self._member(f"{keys[0]}.npy", data) + len(data) - arrays.nbytes
        json_start = self._member(f"{keys[0]}.json", b"[" + b",\n".join(texts) + b"]") + 1
        height, width = arrays.shape[-2:]
        for i, (key, text) in enumerate(zip(keys, texts, strict=True)):
            row = {"offset": start + i * row_bytes, "size": row_bytes, "ext": "npy", "width": width, "height": height}
            row |= {"json_offset": json_start, "json_size": len(text)}
            if i:
                self._take(key)
            self._add(key, row, metas[i], {"noise_seed": noise_seeds[i]})
            json_start += len(text) + 2


class PairFolder:
    """A folder of pairs that several processes and jobs fill.

    Args:
        folder: the folder.
        split: name of the split.
        shards: number of shards that make it complete.
        facts: what the pairs depend on, plain values; their hash is the key of the cache.
        licence: licence of the pairs.

    Raises:
        UserError: pairs made from something else, or other shards, are there.
    """

    def __init__(self, folder: Path, split: str, shards: int, facts: Mapping[str, Any], licence: str):
        self.folder, self.split, self.shards, self.licence = folder, split, shards, licence
        self.facts = json.loads(json.dumps({"format": FORMAT, "z": LAW, **facts}))
        self.key = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        self._about, self._job = folder / "dataset.json", folder / "job.json"
        fix = f"write to another folder, or delete {folder}"
        if not self.complete:
            with self._lock():
                if self._job.is_file():
                    refuse_stale(json.loads(self._job.read_text()), self.facts, self._job, fix)
                elif not self.complete:
                    if any(folder.glob("*.tar")):
                        raise UserError("There are shards of something else here", where=str(folder), fix=fix)
                    write_atomically(self._job, (json.dumps(self.facts, indent=1) + "\n").encode())
        if self.complete:
            refuse_stale(json.loads(self._about.read_text())["parameters"], self.facts, self._about, fix)

    def _lock(self, name: str = "folder", timeout: float = -1) -> FileLock:
        return FileLock(self.folder / f".{name}.lock", timeout=timeout)

    @property
    def complete(self) -> bool:
        return self._about.is_file()

    @property
    def done(self) -> list[int]:
        """The shards that are there."""
        return [k for k in range(self.shards) if (self.folder / shard_name(self.split, k)).is_file()]

    def _piece(self, number: int) -> Path:
        return self.folder / f".{shard_name(self.split, number).removesuffix('.tar')}"

    def begin(self, number: int, world: Mapping[str, Any]) -> ShardInProgress | None:
        """A writer of a shard; None where the shard is there by now.

        Raises:
            UserError: another process is at it.
        """
        lock = self._lock(f"{self.split}-{number:06d}", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            fix = "give every job another part: data.predict.part [i, n], or a SLURM job array"
            raise UserError(
                "Another process makes this shard", where=str(self.folder), given=number, fix=fix
            ) from error
        if number in self.done:
            lock.release()
            return None
        piece = self._piece(number)
        shutil.rmtree(piece, ignore_errors=True)  # what a killed process left
        piece.mkdir()
        return ShardInProgress(self, number, BatchWriter(piece, self.split, 2**62, world, first=number), lock)

    def join(self) -> bool:
        """Completes the folder if all shards are there, whoever made them; returns whether it is complete.

        Safe to call at any time, by several processes at once.
        """
        if self.complete:
            return True
        with self._lock():
            if not self.complete and len(self.done) == self.shards:
                self._write_index()
        if self.complete:
            for lock in self.folder.glob(".*.lock"):  # who holds one finds the work done, and comes here after
                lock.unlink(missing_ok=True)
        return self.complete

    def _write_index(self) -> None:
        pieces = [Index.load(self._piece(k), self.split) for k in range(self.shards)]
        tables = [pq.read_table(index_path(self._piece(k), self.split), use_threads=False) for k in range(self.shards)]
        table = joined(tables)
        facts = {**pieces[0].facts, "world": self.facts, "n": len(table), "sha256": {}}
        for piece in pieces:
            facts["sha256"] |= piece.facts["sha256"]
        facts["shards"] = list(facts["sha256"])
        index = write_index(self.folder, table, facts)
        flush(index_path(self.folder, self.split))
        noise = {piece.shards[0].name: piece.facts["world"]["noise"] for piece in pieces}
        more = {"key": self.key, "shape": pieces[0].facts["world"]["shape"], "noise": noise}
        finish(self.folder, self.folder.name, {self.split: index}, self.licence, self.facts, **more)
        self._job.unlink()
        for number in range(self.shards):
            shutil.rmtree(self._piece(number))


class ShardInProgress:
    """A shard that is being written; it appears in the folder when `close` returns."""

    def __init__(self, target: PairFolder, number: int, writer: BatchWriter, lock: FileLock):
        self.target, self.number, self._writer, self._lock = target, number, writer, lock

    def write(self, positions: Sequence[int], x0: Tensor, metas: Sequence[Mapping[str, Any]]) -> None:
        """Adds a batch of pairs; x0 [B, *shape] is stored as float16.

        Raises:
            UserError: a value is not finite in float16.
        """
        values = x0.detach().to("cpu", torch.float16)
        finite = values.isfinite().flatten(1).all(1).tolist()
        if not all(finite):
            given, fix = (
                positions[finite.index(False)],
                "model.common.precision: fp32, or a teacher that does not diverge",
            )
            raise UserError("The teacher's x0 is not finite in float16", where="pair", given=given, fix=fix)
        keys = [f"{position:08d}" for position in positions]
        self._writer.write_batch(keys, values.numpy(), metas, [meta["noise_seed"] for meta in metas])

    def close(self) -> None:
        """Flushes the shard and its index to the disk and moves the shard to its place."""
        index = self._writer.close()
        for path in (*index.shards, index_path(self._writer.folder, self._writer.split), self._writer.folder):
            flush(path)
        os.replace(index.shards[0], self.target.folder / index.shards[0].name)
        flush(self.target.folder)
        self._lock.release()

    def abandon(self) -> None:
        """Leaves the shard unwritten, for whoever makes it next."""
        self._writer.__exit__(Exception)
        self._lock.release()
