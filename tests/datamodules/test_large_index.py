"""A large index is mapped by column and its rows are found without a list: the same samples, little of it held."""

import hashlib
import pickle
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.loader import open_and_seek, write_large_index
from datamodules import columns, filters, index_file, rows
from datamodules.buckets import Buckets
from datamodules.image_text import ImageText
from datamodules.index_file import Index, index_path
from datamodules.rows import OUT, Rows
from datamodules.shards import write_index
from lightning_t2i.errors import UserError


@pytest.fixture
def mapped(monkeypatch):
    """Every index counts as large, and is looked at in small parts."""
    monkeypatch.setattr(index_file, "IN_MEMORY", 0)
    monkeypatch.setattr(columns, "BATCH", 7)
    for module in (filters, rows):
        monkeypatch.setattr(module, "PIECE", 16)
    monkeypatch.setattr(rows, "CHUNK", 8)


def facts() -> dict:
    return {"format": 1, "split": "train", "shards": ["a.tar"], "sha256": {"a.tar": "0"}, "n": 20}


def table() -> pa.Table:
    n = 20
    return pa.table(
        {
            "shard": pa.array([0] * n, pa.int32()),
            "key": pa.array(["", "一只猫", *(f"key {i}" * (i % 4) for i in range(n - 3)), None]),
            "even": [i % 2 == 0 for i in range(n)],
            "score": pa.array([None if i == 11 else i / 7 for i in range(n)], pa.float64()),
            "late": pa.array([None if i == 17 else i for i in range(n)], pa.int64()),
            "sure": pa.array([None if i == 3 else i > 4 for i in range(n)], pa.bool_()),
            "tags": [["a"] * (i % 3) for i in range(n)],
        }
    )


def test_mapped_columns_are_the_columns(tmp_path, monkeypatch, mapped):
    write_index(tmp_path, table(), facts())
    large = Index.load(tmp_path, "train")
    monkeypatch.setattr(index_file, "IN_MEMORY", 20)
    small = Index.load(tmp_path, "train")
    assert large.numbers == small.numbers == ("shard", "even", "score", "late", "sure")
    for name in large.numbers:
        assert large[name].dtype == small[name].dtype
        np.testing.assert_array_equal(large[name], small[name])
    texts = [text or "" for text in small["key"]]
    assert large["key"].tolist() == texts and [large["key"][i] for i in range(-20, 20)] == texts * 2
    assert (
        large["key"][np.array([3, 1])].tolist() == [texts[3], texts[1]] and large["key"][2:9:3].tolist() == texts[2:9:3]
    )
    assert [list(tags) for tags in large["tags"]] == [["a"] * (i % 3) for i in range(20)]
    with pytest.raises(KeyError):
        large["none"]


def test_columns_do_not_travel_and_those_of_another_file_are_not_taken(tmp_path, mapped):
    index = write_index(tmp_path, table(), facts())
    assert index["score"][5] == 5 / 7
    copy = pickle.loads(pickle.dumps(index))
    assert copy._columns == {} and copy["score"][5] == 5 / 7
    changed = table().set_column(3, "score", pa.array([float(i) for i in range(20)]))
    assert write_index(tmp_path, changed, facts())["score"][5] == 5


def test_columns_lie_with_the_worlds_where_a_folder_is_not_ours(tmp_path, monkeypatch, mapped):
    monkeypatch.setenv("LIGHTNING_T2I_DATA", str(tmp_path / "worlds"))
    monkeypatch.setattr(columns.os, "access", lambda *_: False)
    (tmp_path / "set").mkdir()
    assert write_index(tmp_path / "set", table(), facts())["late"][2] == 2
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["index-train.parquet"]
    assert list((tmp_path / "worlds").glob(".columns-train-*/late.npy"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"limit": 33},
        {"where": {"label": [5, 41]}},
        {"where": {"aspect": [0.5, 2], "label": [None, 44]}, "languages": ["zh"], "limit": 17},
    ],
)
def test_a_stream_of_a_mapped_index_has_the_same_samples(make_data_set, mapped, monkeypatch, options):
    folder = make_data_set(captions=lambda i: {"en": [f"{i}"]} if i % 3 else {"en": [f"{i}"], "zh": [f"{i} 中"]})
    parquet = index_path(folder, "train")
    known = pq.read_table(parquet)
    pq.write_table(known.append_column("label", pa.array(range(50))), parquet)

    def samples() -> tuple:
        stream = ImageText(str(folder), size=8, **options)
        stream.setup()
        stream.begin(0, "main")
        found = stream.load(np.arange(60), 0)
        taken = np.concatenate(list(stream.shards.rows.pieces()))
        assert stream.shards.rows[:].tolist() == taken.tolist()
        return found.id.tolist(), found.caption, stream.identity, taken

    large = samples()
    for module in (filters, rows):
        monkeypatch.setattr(module, "PIECE", 1 << 20)
    monkeypatch.setattr(index_file, "IN_MEMORY", 50)
    small = samples()
    assert large[:3] == small[:3]
    # The hash that runs of earlier versions have in their checkpoints.
    assert large[2]["rows"] == hashlib.blake2b(large[3].astype(np.int64).tobytes(), digest_size=8).hexdigest()


def test_rows_are_those_of_a_list(mapped):
    classes = np.random.default_rng(0).choice([0, 1, 2, OUT], 61, p=[0.5, 0.1, 0.1, 0.3]).astype(np.uint8)
    found = Rows(61, classes, 4)
    listed = np.concatenate([np.flatnonzero(classes == c) for c in range(4)])
    assert len(found) == len(listed) and found.tolist() == listed.tolist()
    assert [found[i] for i in range(len(found))] == listed.tolist() and found[3].dtype == np.int64
    places = np.array([[5, 0, 5], [len(listed) - 1, 20, 33]])
    assert found[places].tolist() == listed[places].tolist()
    assert found[4:30:5].tolist() == listed[4:30:5].tolist() and found[np.array([], int)].tolist() == []
    assert np.concatenate(list(found.pieces())).tolist() == listed.tolist()
    assert classes[found[:]].tolist() == found.class_of(np.arange(len(found))).tolist()
    assert Rows(9)[2:].tolist() == list(range(2, 9)) and Rows(9)[4] == 4
    with pytest.raises(IndexError):
        found[len(found)]


def test_a_large_index_holds_a_few_bytes_a_row(tmp_path, monkeypatch):
    n = 60_000
    write_large_index(tmp_path, n)
    monkeypatch.setattr(index_file, "IN_MEMORY", 0)
    for module in (filters, rows):
        monkeypatch.setattr(module, "PIECE", 1 << 13)

    def peak() -> int:
        """Bytes that NumPy and Arrow hold at most, from the opening to the first batch of the third epoch."""
        arrow = pa.total_allocated_bytes()
        tracemalloc.start()
        stream = ImageText(str(tmp_path), where={"width": [300, None]}, batch_size=64)
        stream.setup()
        stream.begin(0, "main")
        ids = [stream.shards.id(row) for row in stream.order.rows(2 * n + np.arange(64)).tolist()]
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(set(ids)) == 64
        return most + pa.total_allocated_bytes() - arrow

    figures = open_and_seek(str(tmp_path), {"buckets": Buckets(side=512)}, 2.5)  # converts the columns
    assert 0 < figures["rows"] < n and figures["held, GB"] > 0
    peak()
    assert peak() < 8 * n + 1_000_000  # the columns have 100 bytes a row


def test_a_wrong_language_and_an_empty_choice_are_named(make_data_set, mapped):
    folder = str(make_data_set())
    with pytest.raises(UserError, match="languages"):
        ImageText(folder, languages=["fr"]).setup()
    with pytest.raises(UserError, match="No sample is left"):
        ImageText(folder, where={"width": [9, None]}).setup()
