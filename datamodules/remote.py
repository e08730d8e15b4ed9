"""Byte ranges of remote files, by fsspec: read in pieces at once, retried, resumed where they broke."""

from __future__ import annotations

import asyncio
import logging
import os
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_t2i.errors import UserError

log = logging.getLogger(__name__)
PIECE = 1 << 20  # bytes of a request: what a lost connection costs
AT_ONCE = 16  # requests of a process in flight
LIBRARIES = {"aiohttp", "aiobotocore", "botocore", "urllib3"}  # whose own errors mean the connection
LONGEST_WAIT = 30.0  # seconds between two attempts


class Url(str):
    """A shard's address; `name` and `stem` are those of a path."""

    @property
    def name(self) -> str:
        return self.split("?")[0].rstrip("/").rsplit("/", 1)[-1]

    @property
    def stem(self) -> str:
        return self.name.rsplit(".", 1)[0]


def is_remote(name: str) -> bool:
    return "://" in name and not name.startswith("file://")


@dataclass(frozen=True)
class RemoteOptions:
    """How shards behind URLs are read; local ones are read as they are.

    Args:
        cache: local folder that keeps what was read, shared by all processes of a node; None keeps it in memory.
        cache_gb: size of that folder at most, in 10^9 bytes; what was not used for longest goes first.
        memory_mb: without a folder, memory of each process (worker) for what was read, in 10^6 bytes.
        read_mb: neighbouring samples of a block are read together, up to so many 10^6 bytes.
        retries: attempts after the first one for a piece that does not come, each after twice the wait.
        wait_s: first wait, at most 30 seconds later on.
        timeout_s: seconds after which a request that says nothing more counts as lost.
    """

    cache: str | None = None
    cache_gb: float = 100.0
    memory_mb: float = 256.0
    read_mb: float = 4.0
    retries: int = 8
    wait_s: float = 0.5
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("cache_gb", "memory_mb", "read_mb", "wait_s", "timeout_s"):
            if not getattr(self, name) > 0:
                raise UserError(
                    "Not a size or a time", where=f"remote.{name}", given=getattr(self, name), allowed="> 0"
                )
        if self.retries < 0:
            raise UserError("Not a number of retries", where="remote.retries", given=self.retries, allowed=">= 0")


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a url and the path in it.

    Raises:
        UserError: the protocol is unknown or its package is not installed.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        fix = 'pip install "lightning-t2i[s3]"' if url.startswith("s3") else "install the package that fsspec names"
        raise UserError(f"The protocol cannot be read: {error}", where=url, fix=fix) from error


def fetch(ranges: Sequence[tuple[str, int, int]], options: RemoteOptions) -> list[bytes]:
    """The bytes of several (url, start, end) at once; less where a file ends before `end`.

    Raises:
        UserError: a file is not there or not for us, its server does not read ranges, or a piece did not come in
            `retries` + 1 attempts in a row.
    """
    from fsspec.asyn import get_loop, sync

    return sync(get_loop(), _fetch, ranges, options, [filesystem(url) for url, _, _ in ranges])


async def _fetch(
    ranges: Sequence[tuple[str, int, int]], options: RemoteOptions, systems: Sequence[tuple[Any, str]]
) -> list[bytes]:
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(number: int, start: int, end: int) -> bytes:
        async with gate:
            return await _piece(ranges[number][0], *systems[number], start, end, options)

    cuts = [
        (i, at, min(at + PIECE, end)) for i, (_, start, end) in enumerate(ranges) for at in range(start, end, PIECE)
    ]
    tasks = [asyncio.ensure_future(one(*cut)) for cut in cuts]
    try:
        pieces = await asyncio.gather(*tasks)
    finally:
        for task in tasks:  # after a failure the others are not waited for
            task.cancel()
    return [
        b"".join(piece for (n, _, _), piece in zip(cuts, pieces, strict=True) if n == i) for i in range(len(ranges))
    ]


async def _piece(url: str, system: Any, path: str, start: int, end: int, options: RemoteOptions) -> bytes:
    """One piece; each attempt asks for what is still missing, and progress gives new attempts."""
    got, attempts, began = bytearray(), 0, time.monotonic()
    while start + len(got) < end:
        at = start + len(got)
        try:
            if system.async_impl:
                call = system._cat_file(path, start=at, end=end)
            else:
                call = asyncio.to_thread(system.cat_file, path, start=at, end=end)
            data = await asyncio.wait_for(call, options.timeout_s)
        except Exception as error:
            if _is_past_the_end(error):
                break
            attempts += 1
            _give_up_on(error, url, attempts, options, time.monotonic() - began)
            wait = min(options.wait_s * 2 ** (attempts - 1), LONGEST_WAIT)
            # Processes that lost a server together should not all come back together.
            wait *= 0.5 + zlib.crc32(f"{os.getpid()}/{url}/{at}/{attempts}".encode()) / 2**33
            log.info("%s: bytes %d to %d did not come (%s), again in %.1f s", url, at, end, _says(error), wait)
            await asyncio.sleep(wait)
            continue
        if len(data) > end - at:
            fix = "serve it by a server that answers range requests, or copy it"
            raise UserError("The server sends the whole file where a range was asked for", where=url, fix=fix)
        if not data:
            break
        got += data
        attempts = 0
    return bytes(got)


def _is_past_the_end(error: Exception) -> bool:
    said = f"{error} {error.__cause__}"  # s3fs keeps the code of S3 in the cause
    return getattr(error, "status", None) == 416 or "InvalidRange" in said or "not satisfiable" in said


def _give_up_on(error: Exception, url: str, attempts: int, options: RemoteOptions, seconds: float) -> None:
    """Raises unless another attempt may help."""
    status = getattr(error, "status", None)
    refused = status is not None and 400 <= status < 500 and status not in (408, 429)
    if isinstance(error, FileNotFoundError):
        fix = "make the index again, or bring the shard back"
        raise UserError("There is no such remote file", where=url, given="attempt 1", fix=fix) from error
    if isinstance(error, PermissionError) or refused:
        fix = "check the credentials of fsspec's file system and the rights on the bucket"
        raise UserError(
            "The remote file may not be read", where=url, given=f"attempt 1: {_says(error)}", fix=fix
        ) from error
    known = isinstance(error, OSError | TimeoutError) or type(error).__module__.split(".")[0] in LIBRARIES
    if not known:
        raise error
    if attempts > options.retries:
        raise UserError(
            "A remote file could not be read",
            where=url,
            given=f"{attempts} attempts in {seconds:.0f} s, the last: {_says(error)}",
            fix="run the same command again when the server answers; remote.retries and remote.timeout_s say how long",
        ) from error


def _says(error: Exception) -> str:
    return f"{type(error).__name__} {error}".strip()[:200]
