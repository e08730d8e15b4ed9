"""Shards and index: what is written is what webdataset, tarfile and a read at the offset give back."""

import hashlib
import io
import json
import multiprocessing
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from datamodules.shards import Index, ShardWriter, build, finish
from lightning_t2i.errors import UserError


def picture(i: int, kind: str = "png", size: tuple[int, int] = (5, 3)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (i, 2 * i, 0)).save(stream, kind)
    return stream.getvalue()


def meta(i: int) -> dict:
    return {"caption": {"en": [f"number {i}"], "zh": [f"第{i}个"] if i % 2 else []}, "label": i}


def write(folder: Path, n: int = 7, per_shard: int = 3) -> Index:
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder, "train", per_shard, {"seed": 1}) as writer:
        for i in range(n):
            writer.write(f"k{i}", picture(i, "webp" if i == 2 else "png"), "webp" if i == 2 else "png", meta(i),
                         {"even": i % 2 == 0, "square": i * i})  # fmt: skip
    return Index.load(folder, "train")


def test_offsets_lead_to_the_bytes_of_each_sample(tmp_path):
    index = write(tmp_path)
    assert len(index) == 7
    assert [path.name for path in index.shards] == [f"train-00000{i}.tar" for i in range(3)]
    assert index["shard"].tolist() == [0, 0, 0, 1, 1, 1, 2]
    for i in range(7):
        data = index.shards[index["shard"][i]].read_bytes()
        start, size = index["offset"][i], index["size"][i]
        assert data[start : start + size] == picture(i, index["ext"][i])
        start, size = index["json_offset"][i], index["json_size"][i]
        assert json.loads(data[start : start + size]) == meta(i)


def test_columns_and_facts(tmp_path):
    index = write(tmp_path)
    assert index["key"].tolist() == [f"k{i}" for i in range(7)]
    assert index["ext"].tolist() == ["png", "png", "webp", "png", "png", "png", "png"]
    assert set(index["width"]) == {5} and set(index["height"]) == {3}
    assert index["caption_en"].all()
    assert index["caption_zh"].tolist() == [False, True] * 3 + [False]
    assert index["square"].tolist() == [i * i for i in range(7)]
    assert index["even"].dtype == bool
    types = {name: index[name].dtype for name in ("shard", "offset", "size", "json_offset", "json_size", "width")}
    assert types == dict.fromkeys(types, np.dtype("int64")) | {"shard": np.dtype("int32"), "width": np.dtype("int32")}
    facts = index.facts
    assert (facts["format"], facts["split"], facts["n"], facts["world"]) == (1, "train", 7, {"seed": 1})
    assert facts["sha256"] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in index.shards}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves files open
def test_webdataset_reads_the_shards(tmp_path):
    index = write(tmp_path)
    urls = [str(path) for path in index.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == [f"k{i}" for i in range(7)]
    assert [sample["json"] for sample in samples] == [meta(i) for i in range(7)]
    for i, sample in enumerate(samples):
        if i != 2:  # webp is lossy
            assert sample["png"].shape == (3, 5, 3)
            assert (sample["png"] == (i, 2 * i, 0)).all()


def test_members_say_nothing_of_who_wrote_them(tmp_path):
    write(tmp_path)
    with tarfile.open(tmp_path / "train-000000.tar") as tar:
        members = tar.getmembers()
    assert [m.name for m in members] == [
        f"k{i}.{ext}" for i, e in enumerate(["png", "png", "webp"]) for ext in (e, "json")
    ]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    assert (tmp_path / "train-000000.tar").stat().st_size % 10240 == 0


def test_same_samples_same_bytes_and_golden_hash(tmp_path):
    def plain(folder: Path, text: str) -> Index:
        folder.mkdir()
        with ShardWriter(folder, "train", 2) as writer:
            for i in range(3):
                writer.write(f"k{i}", b"bytes" * i, "png", {"caption": {"en": [f"{text} {i}"]}})
        return Index.load(folder, "train")

    one, two, other = (plain(tmp_path / name, text) for name, text in (("a", "x"), ("b", "x"), ("c", "y")))
    assert one.facts == two.facts
    assert one.sha == two.sha == "48b3e8034b85b991"
    assert other.sha != one.sha


def test_order_of_the_identity_is_that_of_the_samples(tmp_path):
    for name, keys in (("a", "xy"), ("b", "yx")):
        (tmp_path / name).mkdir()
        with ShardWriter(tmp_path / name, "train") as writer:
            for key in keys:
                writer.write(key, b"", "png", {})
    assert Index.load(tmp_path / "a", "train").sha != Index.load(tmp_path / "b", "train").sha


@pytest.mark.parametrize("key", ["", "a.b", "a/b", "a" * 91, "名" * 31])
def test_keys_that_webdataset_would_split_are_refused(tmp_path, key):
    with pytest.raises(UserError, match="Not a key"):
        ShardWriter(tmp_path, "train").write(key, b"", "png", {})


def test_longest_keys_survive_the_tar(tmp_path):
    keys = ["a" * 90, "名" * 30]
    with ShardWriter(tmp_path, "train") as writer:
        for key in keys:
            writer.write(key, b"x", "webp", {})
    with tarfile.open(tmp_path / "train-000000.tar") as tar:
        assert tar.getnames() == [f"{key}.{ext}" for key in keys for ext in ("webp", "json")]


def test_a_key_is_used_once(tmp_path):
    with ShardWriter(tmp_path, "train", 1) as writer:
        writer.write("a", b"", "png", {})
        with pytest.raises(UserError, match="same key"):
            writer.write("a", b"", "png", {})
    assert Index.load(tmp_path, "train")["key"].tolist() == ["a"]


def test_unknown_picture_has_no_size(tmp_path):
    with ShardWriter(tmp_path, "train") as writer:
        writer.write("a", b"no picture", "png", {"caption": {"en": [""]}})
    index = Index.load(tmp_path, "train")
    assert (index["width"][0], index["height"][0]) == (0, 0)
    assert "caption_en" not in index.columns  # an empty text is no caption


def test_a_writer_that_fails_leaves_no_index(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "train") as writer:
        writer.write("a", b"", "png", {})
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["train-000000.tar"]


def test_empty_split(tmp_path):
    index = ShardWriter(tmp_path, "train").close()
    assert len(index) == 0 and index.shards == []


def test_index_errors_name_what_there_is(tmp_path):
    with pytest.raises(UserError, match="no index"):
        Index.load(tmp_path, "train")
    write(tmp_path)
    with pytest.raises(UserError, match="allowed: train"):
        Index.load(tmp_path, "val")
    pq.write_table(pa.table({"shard": [0]}), tmp_path / "index-val.parquet")
    with pytest.raises(UserError, match="format None"):
        Index.load(tmp_path, "val")


def test_finish_describes_the_folder(tmp_path):
    index = write(tmp_path)
    finish(tmp_path, "toy", {"train": index}, "CC0-1.0", {"seed": 1}, attribution="nobody")
    about = json.loads((tmp_path / "dataset.json").read_text())
    assert about["splits"] == {"train": 7}
    assert (about["name"], about["licence"], about["parameters"]) == ("toy", "CC0-1.0", {"seed": 1})
    assert about["attribution"] == "nobody"
    assert len(about["sha256"]) == 64


def test_build_is_all_or_nothing(tmp_path):
    def fails(part: Path) -> None:
        (part / "half").write_text("x")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        build(tmp_path / "world", fails)
    assert not (tmp_path / "world").exists()
    folder = build(tmp_path / "world", lambda part: (part / "dataset.json").write_text("{}"))
    assert [path.name for path in folder.iterdir()] == ["dataset.json"]  # the failed half is gone
    assert build(folder, fails) == folder  # complete: not built again


def test_build_never_touches_what_is_not_its_own(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not empty"):
        build(tmp_path / "mine", lambda part: (part / "dataset.json").write_text("{}"))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def _build_held(folder: str, queue, other, waits: bool) -> None:
    """Builds until the process that does not wait has come to its own build."""

    def held(part: Path) -> None:
        queue.put("built")
        assert other.wait(60)
        time.sleep(0.3)  # from the event to the lock it is no way
        (part / "dataset.json").write_text("{}")

    if not waits:
        other.set()
    build(Path(folder), held)


def test_of_two_processes_one_builds(tmp_path):
    context = multiprocessing.get_context("fork")
    queue, other = context.Queue(), context.Event()
    first, second = (
        context.Process(target=_build_held, args=(str(tmp_path / "w"), queue, other, waits)) for waits in (True, False)
    )
    first.start()
    assert queue.get(timeout=60) == "built"
    second.start()
    for process in (first, second):
        process.join(60)
    assert [first.exitcode, second.exitcode] == [0, 0]
    assert queue.empty()
