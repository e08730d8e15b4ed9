"""A folder of byte strings with a limit, shared by the processes of a node; what was not used for longest goes first.

fsspec's own caches on disk have no limit and forget what other processes wrote. Here an entry is a file that appears
whole by a rename; the sum of sizes is kept in one file under a lock, and counted again whenever entries are removed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import time
from pathlib import Path

from filelock import FileLock

log = logging.getLogger(__name__)
KEPT = 0.9  # share of the limit that is left after entries were removed
FRESH = 30.0  # seconds in which a use is not noted again


class DiskCache:
    """Bytes by name.

    Args:
        folder: made if missing.
        limit: bytes of all entries together at most.
    """

    def __init__(self, folder: str | Path, limit: int):
        self.folder, self.limit = Path(folder).expanduser(), limit
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock, self._total = str(self.folder / ".lock"), self.folder / ".total"
        self._full = False

    def read(self, name: str, size: int, offset: int, length: int) -> bytes | None:
        """`length` bytes at `offset` of an entry of `size` bytes; None where there is none."""
        path = self._path(name)
        try:
            with path.open("rb") as file:
                facts = os.fstat(file.fileno())
                if facts.st_size != size:
                    return None
                data = os.pread(file.fileno(), length, offset)
            if time.time() - facts.st_mtime > FRESH:
                os.utime(path)
        except OSError:  # never there, or just removed by another process
            return None
        return data

    def has(self, name: str, size: int) -> bool:
        try:
            return self._path(name).stat().st_size == size
        except OSError:
            return False

    def write(self, name: str, data: bytes) -> None:
        """Keeps `data` unless it is larger than the limit; on a full disk it is left out, with one warning."""
        path = self._path(name)
        if len(data) > self.limit or self._full:
            return
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(exist_ok=True)
            with FileLock(self.lock):
                total = self._read_total() + len(data)
                if total > self.limit:
                    total = self._make_room(len(data)) + len(data)
                self._total.write_text(str(total))
                # Under the lock too: another process that counts the entries would not find this one.
                temporary.write_bytes(data)
                os.replace(temporary, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                raise
            self._full = True
            log.warning("the cache %s takes no more (%s): data is read without it", self.folder, error.strerror)

    def _path(self, name: str) -> Path:
        digest = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
        return self.folder / digest[:2] / digest[2:]

    def _read_total(self) -> int:
        try:
            return int(self._total.read_text())
        except (OSError, ValueError):  # the first use, or a process that was killed while it wrote
            return sum(size for _, size, _ in self._entries())

    def _entries(self) -> list[tuple[float, int, Path]]:
        """(last use, bytes, file) of every entry, half-written ones included."""
        found = []
        for path in self.folder.glob("??/*"):
            with contextlib.suppress(OSError):
                facts = path.stat()
                found.append((facts.st_mtime, facts.st_size, path))
        return found

    def _make_room(self, needed: int) -> int:
        """Removes the entries that were not used for longest; returns the bytes that are left."""
        entries = sorted(self._entries())
        left = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if left + needed <= self.limit * KEPT or left == 0:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            left -= size
        return left
