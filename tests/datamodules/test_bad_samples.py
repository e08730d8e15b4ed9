"""The bound of bad samples holds on a process that reads little of the data, and what is kept of them is bounded."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import Tensor

from datamodules import bad_samples
from datamodules.bad_samples import Reads
from datamodules.order import batch_positions
from datamodules.pictures import BadSample
from datamodules.records import Stream
from lightning_t2i.batch import Records
from lightning_t2i.errors import UserError

N = 2_000_000


class Numbers(Stream):
    """N samples, of which `bad` says whether a row is a bad one."""

    batch_size = 64 * 512

    def __init__(self, bad, n: int = N, share: float = 0.01):
        self.is_bad, self.n, self.max_bad_fraction = bad, n, share

    def setup(self) -> None: ...

    def __len__(self) -> int:
        return self.n

    identity = {"data": "numbers"}

    def _read(self, row: int) -> int:
        if self.is_bad(row):
            raise BadSample("odd")
        return row

    def fetch(self, rows: np.ndarray, positions: Tensor) -> Records:
        used = [self.read_good(int(row), self._read, lambda row: f"r{row}")[0] for row in rows]
        return Records(id=torch.tensor(used), position=positions)


def epochs(stream: Stream, count: float, rank: int = 5, world: int = 512) -> None:
    """Reads what a rank reads in so many epochs."""
    stream.begin(0, "main")
    for k in range(int(count * len(stream) / stream.batch_size)):
        stream.load(batch_positions(k, stream.batch_size, rank, world), k)
        stream.report(stream.take_fresh())


def test_half_of_the_samples_are_too_many_though_a_rank_of_512_sees_few() -> None:
    stream = Numbers(lambda row: row % 2)
    with pytest.raises(UserError, match=r"Too many bad samples[\s\S]*that this process read[\s\S]*at most 0.01"):
        epochs(stream, 1)
    assert stream.reads.read < N / 512  # of its epoch


@pytest.mark.parametrize("scattered", [True, False])
def test_a_data_set_within_its_share_is_read(scattered: bool) -> None:
    """One in a hundred is bad: each for itself, or all but one of a block, as where shards were cut."""
    stream = Numbers((lambda row: row % 100 == 7) if scattered else (lambda row: row // 256 % 100 == 7 and row % 256))
    epochs(stream, 6)
    assert stream.reads.read > 4 * N / 512 and stream.reads.replaced > 0


def test_of_a_small_data_set_each_bad_sample_is_counted_once() -> None:
    stream = Numbers(lambda row: row < 2, n=50, share=0.04)
    stream.batch_size = 10
    epochs(stream, 10, 0, 1)
    assert stream.reads.replaced == 2 * 10 and len(stream.bad) == 2
    stream.max_bad_fraction = 0.02
    with pytest.raises(UserError, match="2 bad of 50"):
        epochs(stream, 1, 0, 1)


def test_none_is_allowed_where_the_share_is_zero() -> None:
    with pytest.raises(UserError, match="1 bad of"):
        epochs(Numbers(lambda row: row == 5, n=640, share=0.0), 100, 0, 1)


def test_few_are_named_and_fewer_logged(monkeypatch, caplog) -> None:
    monkeypatch.setattr(bad_samples, "NAMED", 30)
    monkeypatch.setattr(bad_samples, "LOGGED", 10)
    stream = Numbers(lambda row: row % 3 == 0, n=900, share=1.0)
    stream.batch_size = 100
    with caplog.at_level(logging.WARNING):
        epochs(stream, 2, 0, 1)
    assert len(stream.bad) == 30 and stream.reads == Reads(1800, 600, stream.bad)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 11 and all("replaced: odd" in line for line in lines[:10])
    assert lines[10].startswith("further bad samples are counted")
