"""Files that frozen networks make of a data set: one for each shard, by any number of processes, each whole or absent.

While a cache is made its folder holds `SPLIT.json` with what it is made from and, per finished shard, a file with what
is known of it. Processes take the shards that nobody is at, so those of a node, of several nodes and the tasks of an
array share the work; what a killed one was at is made again, and nothing else. Who finds all shards there completes
`SPLIT.json`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from datamodules.records import Shards
from lightning_t2i.errors import UserError
from lightning_t2i.state_io import flush, write_atomically

Make = Callable[[np.ndarray, Path], dict[str, Any]]


class Cache:
    """The files of one split.

    Args:
        folder: of the cache.
        shards: the split, all of its rows.
        facts: what the files depend on, plain values.
        what: their name in messages.
        command: makes them.
        suffix: of the file of a shard.
    """

    def __init__(self, folder: Path, shards: Shards, facts: Mapping[str, Any], what: str, command: str, suffix: str):
        self.folder, self.shards, self.what, self.command = folder, shards, what, command
        self.facts = json.loads(json.dumps(facts))
        self.file = folder / f"{shards.split}.json"
        self.names = [f"{stem}{suffix}" for stem in shards.index.stems]

    def about(self) -> dict[str, Any]:
        """What `SPLIT.json` says of a complete cache.

        Raises:
            UserError: there is none, it is incomplete, or it was made from something else.
        """
        found = self._found()
        if not found.get("complete"):
            what = f"The cached {self.what} are incomplete" if found else f"There are no cached {self.what}"
            raise UserError(what, where=str(self.file), fix=self.command)
        return found

    def _found(self) -> dict[str, Any]:
        found = json.loads(self.file.read_text()) if self.file.is_file() else {}
        for key, value in self.facts.items() if found else ():
            if found.get(key) != value:
                raise UserError(
                    f"The cached {self.what} are stale: '{key}' has changed since they were made",
                    where=str(self.file),
                    given=found.get(key),
                    allowed=str(value),
                    fix=f"delete {self.folder} and encode again with: {self.command}",
                )
        return found

    def fill(
        self, start: Callable[[], Make], merge: Callable[[list[Any]], dict[str, Any]], task: int = 0, tasks: int = 1
    ) -> bool:
        """Makes the files that are missing; returns whether the cache is complete.

        Args:
            start: gets ready, once, if there is something to make; what it returns writes the file of index rows, which
                are those of a shard, and says what is known of it.
            merge: what was said of all shards -> what `SPLIT.json` says.
            task, tasks: make every `tasks`-th shard from the `task`-th on, and wait for no other.

        Raises:
            UserError: a cache of something else is in the way.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock(self.shards.split):
            found = self._found()
            if found.get("complete"):
                return True
            if not found:
                self._say({**self.facts, "complete": False})
        make: Make | None = None
        mine = range(len(self.names))[task::tasks]
        for timeout in (0, -1):  # first what nobody is at, then what others leave unmade
            for shard in tqdm(mine, desc=f"{self.what} of {self.shards.split}", unit="shard", disable=timeout != 0):
                try:
                    with self._lock(self.names[shard], timeout):
                        # Once all shards are there the others join them, and remove what is known of each.
                        if not self._report(shard).is_file() and not self._found().get("complete"):
                            make = make or start()
                            self._make(shard, make)
                except Timeout:
                    continue
        return self._join(merge)

    def _make(self, shard: int, make: Make) -> None:
        path = self.folder / self.names[shard]
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            report = make(np.array(self.shards.index.rows_of(shard)), temporary)
            flush(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        write_atomically(self._report(shard), json.dumps(report).encode())

    def _join(self, merge: Callable[[list[Any]], dict[str, Any]]) -> bool:
        with self._lock(self.shards.split):
            if self._found().get("complete"):
                return True
            files = [self._report(shard) for shard in range(len(self.names))]
            if not all(file.is_file() for file in files):
                return False
            self._say({**self.facts, **merge([json.loads(file.read_text()) for file in files]), "complete": True})
        for name, file in zip(self.names, files, strict=True):
            file.unlink()
            (self.folder / f".{name}.lock").unlink(missing_ok=True)
            for left in self.folder.glob(f".{name}.*.tmp"):  # of killed processes
                left.unlink(missing_ok=True)
        return True

    def _say(self, content: dict[str, Any]) -> None:
        write_atomically(self.file, json.dumps(content, indent=1).encode())

    def _report(self, shard: int) -> Path:
        return self.folder / f"{self.names[shard]}.json"

    def _lock(self, name: str, timeout: float = -1) -> FileLock:
        return FileLock(self.folder / f".{name}.lock", timeout=timeout)


class Places:
    """Where the rows of a stream are in the files of a cache."""

    def __init__(self, shards: Shards):
        self._rows, self._index = shards.rows, shards.index  # whose mapped columns are not pickled
        self._first = np.array([self._index.rows_of(shard).start for shard in range(len(self._index.shards))])

    def __call__(self, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Index rows, their shards, and their places within these, each [B]."""
        wanted = self._rows[np.asarray(rows)]
        shards = self._index["shard"][wanted]
        return wanted, shards, wanted - self._first[shards]


def default_device(task: int = 0) -> str:
    """A GPU where there is one, another for each task of a node."""
    return f"cuda:{task % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
