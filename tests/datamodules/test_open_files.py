"""However many shards are read, few files are open, in this process and in one that gets the readers."""

import os
import pickle

import numpy as np
import pytest
import torch

from datamodules import open_files
from datamodules.caches import Cache
from datamodules.encode import Latents
from datamodules.records import Shards


def open_now() -> int:
    return len(os.listdir("/dev/fd"))


@pytest.fixture
def shards(make_data_set, monkeypatch) -> Shards:
    monkeypatch.setattr(open_files, "OPEN", 3)
    return Shards(make_data_set(30, samples_per_shard=2), "train")


@pytest.fixture
def latents(shards, monkeypatch) -> Latents:
    """Two latents of one number in each shard."""
    cache = Cache(shards.folder, shards, {}, "latents", "", ".npy")
    cache._say({"complete": True, "shape": [1, 1, 1], "bad": {}})
    for i, name in enumerate(cache.names):
        np.save(shards.folder / name, np.array([2 * i, 2 * i + 1], np.float16).reshape(2, 1, 1, 1))
    monkeypatch.setattr("datamodules.encode._cache", lambda *_: cache)
    return Latents(shards, "", 8)


def test_shards_are_closed_again(shards):
    before = open_now()
    assert [shards.meta(row)["label"] for row in range(30)] == list(range(30))
    assert open_now() == before + 3
    copy = pickle.loads(pickle.dumps(shards))
    assert copy.data(0) == shards.data(0)  # read anew where it was closed
    del copy, shards._files
    assert open_now() == before


def test_latents_are_closed_again(latents):
    before, rows = open_now(), np.arange(30)
    assert torch.equal(latents.take(rows).flatten(), torch.arange(30, dtype=torch.float16))
    assert open_now() <= before + 3
    assert torch.equal(pickle.loads(pickle.dumps(latents)).take(rows), latents.take(rows))


def test_a_file_in_use_stays_open(tmp_path, monkeypatch):
    monkeypatch.setattr(open_files, "OPEN", 1)
    for name in "ab":
        (tmp_path / name).write_text(name)
    latest = open_files.Latest(open_files.Readable)
    held = latest(tmp_path / "a")
    assert latest(tmp_path / "b").read(0, 1) == b"b"
    assert held.read(0, 1) == b"a"
    with pytest.raises(FileNotFoundError):
        latest(tmp_path / "absent")
