"""The index: tars in the layouts of open_clip and img2dataset, local and remote, with every fault named."""

import io
import json
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import programs
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_sets import gradient, png
from range_server import serving

from datamodules import unique_keys
from datamodules.image_text import ImageText
from datamodules.index import main
from datamodules.index_file import Index
from datamodules.index_rows import part_path
from datamodules.records import Shards
from datamodules.unique_keys import shared_key


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def img2dataset(folder: Path, shards: int = 2, n: int = 4) -> Path:
    """A picture, a text and a JSON each, and what img2dataset writes beside."""
    folder.mkdir(exist_ok=True)
    for s in range(shards):
        members, rows = {}, []
        for i in range(n):
            key = f"{s:05d}{i:04d}"
            meta = {"caption": f"picture {s} {i}", "key": key, "status": "success", "width": 8, "height": 6}
            members |= {f"{key}.png": png(gradient(i, 6, 8)), f"{key}.txt": meta["caption"].encode()}
            members[f"{key}.json"] = json.dumps(meta).encode()
            rows.append({"key": key, "status": "success", "width": 8, "height": 6, "aesthetic": i / 2, "url": "x"})
        tar(folder / f"{s:05d}.tar", members)
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{s:05d}.parquet")
        (folder / f"{s:05d}_stats.json").write_text(json.dumps({"count": n + 1, "successes": n}))
    return folder


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


@pytest.mark.parametrize("remote", [False, True])
def test_img2dataset_is_read_as_it_lies(tmp_path, remote):
    source = img2dataset(tmp_path / "bucket")
    with serving(source) as server:
        given = f"{server.url}/{{00000..00001}}.tar" if remote else source
        assert run(given, "--out", tmp_path / "out") == 0
        index = Index.load(tmp_path / "out", "train")
        assert index["key"].tolist() == [f"{s:05d}{i:04d}" for s in range(2) for i in range(4)]
        assert set(index["width"]) == {8} and set(index["height"]) == {6}
        assert index["aesthetic"].tolist() == [0, 0.5, 1, 1.5] * 2
        assert index["caption_length"].tolist() == [11] * 8 and index["caption_en"].all()
        shards = Shards(tmp_path / "out", "train", ["en"])
        assert [shards.meta(row)["caption"] for row in (0, 7)] == [{"en": ["picture 0 0"]}, {"en": ["picture 1 3"]}]
        assert shards.data(5) == png(gradient(1, 6, 8))
        assert not list((tmp_path / "out").rglob("*.tar"))
    again = tmp_path / "again"
    assert run(source, "--out", again) == 0
    assert Index.load(again, "train").sha == index.sha  # wherever the shards lie


def test_open_clip_and_our_own_layout(tmp_path, make_data_set):
    (tmp_path / "clip").mkdir()
    members = {"a/1.jpeg": png(gradient(1)), "a/1.txt": "一只猫".encode(), "a/2.PNG": png(gradient(2)), "b/3.txt": b"x"}
    tar(tmp_path / "clip" / "x.tar", members)
    assert run(tmp_path / "clip", "--out", tmp_path / "out", "--language", "zh") == 0
    shards = Shards(tmp_path / "out", "train")
    assert shards.index["key"].tolist() == ["a/1", "a/2"]
    assert shards.index["caption_zh"].tolist() == [True, False]
    assert shards.meta(0)["caption"] == {"zh": ["一只猫"]} and shards.meta(1)["caption"] == {}
    (report,) = json.loads((tmp_path / "out" / "report-train.json").read_text()).values()
    assert report["reasons"] == {"b/3": "no picture among its members txt"}
    own = make_data_set(12)
    assert run(own, "--out", tmp_path / "ours") == 0
    indexed, written = Shards(tmp_path / "ours", "train"), Shards(own, "train")
    assert [indexed.meta(r) for r in range(12)] == [written.meta(r) for r in range(12)]
    assert indexed.index["offset"].tolist() == written.index["offset"].tolist()
    assert indexed.index["label"].tolist() == list(range(12))


def test_missing_and_cut_shards_are_named_and_left_out_when_told(tmp_path, capsys):
    source = img2dataset(tmp_path / "bucket", 3)
    whole = (source / "00001.tar").read_bytes()
    (source / "00001.tar").write_bytes(whole[: len(whole) // 4])
    with serving(source) as server:
        given = (f"{server.url}/{{00000..00003}}.tar", "--out", tmp_path / "out")
        assert run(*given) == 2
        said = capsys.readouterr().err
        assert "00001.tar: it is cut after 1 samples" in said and "00003.tar: There is no such remote file" in said
        assert run(*given, "--skip-bad") == 0
    assert len(Index.load(tmp_path / "out", "train")) == 4 + 1 + 4


def test_statistics_that_say_more_samples_are_noticed(tmp_path, capsys):
    source = img2dataset(tmp_path / "bucket", 1)
    (source / "00000_stats.json").write_text(json.dumps({"successes": 5}))
    assert run(source, "--out", tmp_path / "out") == 2
    assert "its statistics say 5 samples, it holds 4" in capsys.readouterr().err


def test_tasks_of_an_array_share_and_finished_shards_are_kept(tmp_path):
    source, out = img2dataset(tmp_path / "bucket", 4), tmp_path / "out"
    done = []
    for task in range(2):
        assert run(source, "--out", out, "--task", task, "--tasks", 2) == 0
        done.append(sorted(path.name for path in (out / ".parts-train").glob("*.parquet")))
        assert not (out / "dataset.json").exists()
    assert [len(names) for names in done] == [2, 4]
    times = {path: path.stat().st_mtime_ns for path in (out / ".parts-train").glob("*.parquet")}
    lost = part_path(out, "train", str((source / "00002.tar").resolve()))
    lost.unlink()
    assert run(source, "--out", out) == 0
    assert [path for path, time in times.items() if path.stat().st_mtime_ns != time] == [lost]
    assert run(source, "--out", tmp_path / "alone", "--workers", 2) == 0
    assert (tmp_path / "alone" / "index-train.parquet").read_bytes() == (out / "index-train.parquet").read_bytes()


def test_the_same_command_sees_what_has_changed(tmp_path, capsys):
    """New shards join, those that are gone leave, changed ones are read again with what lies beside; others are not."""
    source, out = img2dataset(tmp_path / "bucket", 4), tmp_path / "out"
    (source / "00003.tar").rename(tmp_path / "later.tar")
    assert run(source, "--out", out) == 0 and len(Index.load(out, "train")) == 12
    times = {path: path.stat().st_mtime_ns for path in (out / ".parts-train").glob("*.parquet")}
    (tmp_path / "later.tar").rename(source / "00003.tar")
    (source / "00000.tar").unlink()
    with tarfile.open(source / "00001.tar") as archive:
        members = {info.name: archive.extractfile(info).read() for info in archive}
    larger = png(gradient(9, 6, 8)) + bytes(1000)
    tar(source / "00001.tar", {**members, "000010000.png": larger})
    rows = pq.read_table(source / "00002.parquet").to_pylist()
    pq.write_table(pa.Table.from_pylist([{**row, "aesthetic": 7.0} for row in rows]), source / "00002.parquet")
    assert run(source, "--out", out) == 0
    shards = Shards(out, "train", ["en"])
    assert [path.name for path in shards.index.shards] == ["00001.tar", "00002.tar", "00003.tar"]
    assert shards.data(0) == larger and shards.meta(3)["caption"] == {"en": ["picture 1 3"]}
    assert shards.index["aesthetic"].tolist()[4:8] == [7.0] * 4
    assert "12 samples of 3 shards" in capsys.readouterr().out
    changed = {part_path(out, "train", str((source / f"0000{n}.tar").resolve())) for n in (1, 2)}
    assert {path for path, time in times.items() if path.stat().st_mtime_ns != time} == changed
    times = {path: path.stat().st_mtime_ns for path in (out / ".parts-train").glob("*.parquet")}
    assert run(source, "--out", out) == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_keys_are_used_once_over_all_shards(tmp_path, capsys):
    source = img2dataset(tmp_path / "bucket", 1)
    (source / "copy.tar").write_bytes((source / "00000.tar").read_bytes())
    assert run(source, "--out", tmp_path / "out") == 2
    assert "--prefix-keys" in capsys.readouterr().err
    assert run(source, "--out", tmp_path / "out", "--prefix-keys") == 0
    assert Index.load(tmp_path / "out", "train")["key"].tolist()[::4] == ["000000/000000000", "000001/000000000"]


def test_keys_that_share_a_hash_are_not_the_same(tmp_path, monkeypatch):
    parts = {}
    for name, keys in {"a": ["1", "2"], "b": ["3"], "c": ["4", "2"]}.items():
        parts[name] = tmp_path / name
        pq.write_table(pa.table({"key": keys}), parts[name])
    assert shared_key(parts) == ("2", "a", "c")
    monkeypatch.setattr(unique_keys, "_hashes", lambda keys: np.zeros(len(keys), np.uint64))
    assert shared_key(parts) == ("2", "a", "c")
    assert shared_key({name: parts[name] for name in "ab"}) is None


def test_other_arguments_and_no_tars_are_refused(tmp_path, capsys):
    source = img2dataset(tmp_path / "bucket", 1)
    assert run(source, "--out", tmp_path / "out") == 0
    assert run(source, "--out", tmp_path / "out", "--language", "zh") == 2
    assert run(tmp_path, "--out", tmp_path / "none") == 2
    said = capsys.readouterr().err
    assert "begun with other arguments" in said and "No tars to index" in said


def test_filters_choose_rows_and_are_part_of_the_identity(tmp_path):
    assert run(img2dataset(tmp_path / "bucket"), "--out", tmp_path / "out") == 0

    def kept(**where):
        stream = ImageText(str(tmp_path / "out"), where=where)
        stream.setup()
        return stream.shards.rows.tolist(), stream.identity["rows"]

    everything, identity = kept()
    assert everything == list(range(8)) and kept(width=[8, None], aspect=[1.3, 1.4])[1] == identity
    rows, other = kept(aesthetic=[0.5, 1.0])
    assert rows == [1, 2, 5, 6] and other != identity
    for where, said in (
        ({"beauty": [0, 1]}, "beauty"),
        ({"width": [9, 8]}, "Not a range"),
        ({"width": [9, None]}, "left"),
    ):
        with pytest.raises(ValueError, match=said):
            kept(**where)


def test_a_killed_indexing_goes_on_with_the_shards_that_are_missing(tmp_path, repo):
    source, out, alone = img2dataset(tmp_path / "bucket", 6), tmp_path / "out", tmp_path / "alone"
    with serving(source) as server:
        url = f"{server.url}/{{00000..00005}}.tar"
        server.fault = lambda path, *_: "stall" if path == "/00003.tar" else None
        command = [sys.executable, "-m", "datamodules.index", url, "--out", str(out)]
        process = programs.Popen(command, cwd=repo, stdout=programs.DEVNULL, stderr=programs.DEVNULL)
        while not any(path == "/00003.tar" for path, *_ in server.asked):
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()  # kill -9, within the fourth shard
        process.wait()
        finished = {path: path.stat().st_mtime_ns for path in (out / ".parts-train").glob("*.parquet")}
        assert len(finished) == 3 and not (out / "dataset.json").exists()
        server.fault = lambda *_: None
        server.asked.clear()
        assert run(url, "--out", out) == 0
        assert {path for path, *_ in server.asked if path.endswith(".tar")} == {f"/0000{i}.tar" for i in (3, 4, 5)}
        assert {path: path.stat().st_mtime_ns for path in finished} == finished
        assert run(url, "--out", alone) == 0
    assert Index.load(alone, "train").facts == Index.load(out, "train").facts
