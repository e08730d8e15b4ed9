"""However many shards are read, few files are open, in this process and in one that gets the readers."""

import gc
import os
import pickle
import resource

import numpy as np
import pytest
import torch

from datamodules import open_files
from datamodules.caches import Cache
from datamodules.encode import Latents
from datamodules.image_text import ImageText
from datamodules.records import Shards
from lightning_t2i.errors import UserError


def open_now() -> int:
    return len(os.listdir("/dev/fd"))


@pytest.fixture
def shards(make_data_set, monkeypatch) -> Shards:
    monkeypatch.setattr("datamodules.records.files_for", lambda lanes: 3)
    monkeypatch.setattr("datamodules.encode.MAPPED", 3)
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
    gc.collect()  # what earlier tests left is not to be closed meanwhile
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
    assert open_now() == before and len(latents._files) == 3  # a mapping needs no descriptor
    assert torch.equal(pickle.loads(pickle.dumps(latents)).take(rows), latents.take(rows))


def test_a_file_in_use_stays_open(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    latest = open_files.Latest(open_files.Readable, 1)
    held = latest(tmp_path / "a")
    assert latest(tmp_path / "b").read(0, 1) == b"b"
    assert held.read(0, 1) == b"a"
    with pytest.raises(UserError, match="missing"):
        latest(tmp_path / "absent")


@pytest.mark.parametrize(
    ("allowed", "lanes", "files"),
    [(65536, 1024, 1088), (resource.RLIM_INFINITY, 1024, 1088), (1024, 1024, 256), (65536, 1, 65), (2, 1, 1)],
)
def test_files_are_those_of_the_lanes_within_what_a_process_may_open(allowed, lanes, files, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (allowed, allowed))
    assert open_files.files_for(lanes) == files


def test_no_shard_is_opened_again_while_its_lane_is_in_it(make_data_set, monkeypatch):
    """As many shards as lanes, read in turn."""
    opened = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (65536, 65536))
    monkeypatch.setattr("datamodules.records.Readable", lambda path: opened.append(path) or open_files.Readable(path))
    shards = Shards(make_data_set(600, bad=range(600), samples_per_shard=2), "train", lanes=300)
    turns = [*range(0, 600, 2), *range(1, 600, 2)]
    assert [shards.meta(row)["label"] for row in turns] == turns
    assert len(opened) == len(set(opened)) == 300


@pytest.mark.parametrize(("kind", "dtype"), [("C", np.float16), ("F", np.int64)])
def test_a_mapped_array_is_the_one_that_was_saved(tmp_path, kind, dtype):
    array = np.arange(24, dtype=dtype).reshape(4, 3, 2)
    np.save(tmp_path / "a.npy", np.asarray(array, order=kind))
    assert np.array_equal(open_files.mapped(tmp_path / "a.npy"), array)
    assert open_files.mapped(tmp_path / "a.npy").dtype == dtype


def test_shards_are_looked_at_once_a_node_and_told_as_they_are_read(make_data_set, monkeypatch):
    looked = []
    monkeypatch.setattr("datamodules.records.check_shard", lambda path: looked.append(path.name))
    folder = make_data_set()
    stream = ImageText(str(folder), size=8)
    stream.prepare()
    assert looked == [f"train-00000{k}.tar" for k in range(3)]
    stream.setup()
    stream.begin(0, "main", shuffle=False)
    assert len(looked) == 3
    (folder / looked[0]).unlink()
    os.truncate(folder / looked[1], 0)
    for first, says in ((0, "missing"), (20, "empty")):
        with pytest.raises(UserError, match=rf"A shard named by the index is {says}[\s\S]*copy the shard again"):
            stream.load(range(first, first + 2), 0)
    assert stream.load(range(40, 50), 0).label.tolist() == list(range(40, 50))
