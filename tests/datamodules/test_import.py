"""Import of what others wrote: parquet files, tars, class folders, annotations; by several processes, after a kill."""

import io
import itertools
import json
import os
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
from PIL import Image

from datamodules import pack_shards
from datamodules.image_text import ImageText
from datamodules.index import main as index
from datamodules.pack import main, pack
from datamodules.parallel import each
from datamodules.records import Shards
from datamodules.retrieval import RetrievalPairs
from lightning_t2i.errors import UserError


def encoded(i: int, kind: str = "webp", size: tuple[int, int] = (10, 6)) -> bytes:
    """A picture whose red value is about its number."""
    stream = io.BytesIO()
    Image.new("RGB", size, (i, 0, 0)).save(stream, kind, **({"lossless": True} if kind == "webp" else {}))
    return stream.getvalue()


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def contents(folder: Path) -> dict[int, tuple[str, dict]]:
    """red value -> (split, metadata), of all splits."""
    found = {}
    for split in json.loads((folder / "dataset.json").read_text())["splits"]:
        shards = Shards(folder, split)
        for row in range(len(shards)):
            found[int(np.asarray(shards.picture(row))[0, 0, 0])] = (split, shards.meta(row))
    return found


def skipped(folder: Path) -> dict[str, list[str]]:
    report = json.loads((folder / "report.json").read_text())["skipped"]
    assert {reason: len(of["names"]) for reason, of in report.items()} == {r: of["count"] for r, of in report.items()}
    assert json.loads((folder / "dataset.json").read_text())["skipped"] == sum(of["count"] for of in report.values())
    return {reason: of["names"] for reason, of in report.items()}


def fails(match: str, *arguments, **options) -> str:
    with pytest.raises(UserError, match=match) as error:
        pack(*arguments, **options)
    return str(error.value)


# ---- parquet -------------------------------------------------------------------------------------------------------


def hugging_face(path: Path, numbers: range, **columns: list) -> Path:
    """A file as the library datasets writes it: image as a struct, class names in the schema, small row groups."""
    table = pa.table({"image": [{"bytes": encoded(i), "path": f"{i}.webp"} for i in numbers], **columns})
    label = {"names": ["great_tit", "rook"], "_type": "ClassLabel"}
    features = {"image": {"_type": "Image"}, **({"label": label} if "label" in columns else {})}
    table = table.replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": features}}).encode()})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=4)
    return path


def test_parquet_of_hugging_face_gives_pictures_captions_labels_and_splits(tmp_path):
    source = tmp_path / "set"
    hugging_face(source / "data/train-00000-of-00001.parquet", range(10), label=[0, 1] * 5)
    hugging_face(source / "data/validation-00000-of-00001.parquet", range(10, 13), label=[1, 0, -1])
    out = pack(source, tmp_path / "out", samples_per_shard=3, skip_bad=True)
    found = contents(out)
    assert {i: split for i, (split, _) in found.items()} == {i: "train" if i < 10 else "val" for i in range(12)}
    assert all(meta["label"] == (i + (i >= 10)) % 2 for i, (_, meta) in found.items())
    assert {meta["caption"]["en"][0] for _, meta in found.values() if meta["label"] == 0} == {"great tit"}
    assert skipped(out) == {"no caption": ["data/validation-00000-of-00001/00000002.parquet"]}
    assert json.loads((out / "dataset.json").read_text())["classes"] == ["great_tit", "rook"]
    untold = contents(pack(source, tmp_path / "untold", default_caption="a bird"))[12][1]
    assert untold["caption"] == {"en": ["a bird"]} and "label" not in untold
    shards = Shards(out, "train")
    assert sorted(shards.index["label"].tolist()) == [0] * 5 + [1] * 5 and set(shards.index["ext"]) == {"webp"}
    assert shards.data(0) == encoded(int(np.asarray(shards.picture(0))[0, 0, 0]))
    groups = [int(key[-8:]) // 4 for key in shards.index["key"]]  # every row group is read once for a split
    assert sum(a != b for a, b in itertools.pairwise(groups)) == 2


def test_parquet_of_img2dataset_keeps_its_fields_and_names_failed_rows(tmp_path, capsys):
    rows = [
        {"jpg": encoded(i, "png") if i != 2 else None, "caption": f"no. {i}", "width": 10, "aesthetic": i / 2,
         "status": "success" if i != 2 else "failed_to_download", "exif": None} for i in range(5)
    ]  # fmt: skip
    rows.append({**rows[0], "jpg": None})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "00000.parquet")
    assert "no picture in the row" in fails("Not to be packed", tmp_path / "00000.parquet", tmp_path / "out")
    arguments = [str(tmp_path / "00000.parquet"), str(tmp_path / "out"), "--val", "0", "--test", "0", "--skip-bad"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "train 4" in said and "left out: 2" in said and "report.json" in said
    assert "no picture in the row  2: 00000/00000002.parquet, 00000/00000005.parquet" in said
    found = contents(tmp_path / "out")
    assert set(found) == {0, 1, 3, 4} and found[3][1]["aesthetic"] == 1.5 and "exif" not in found[3][1]
    stream = ImageText(str(tmp_path / "out"), where={"aesthetic": [0.5, 1.5], "caption_length": [1, 9]})
    stream.setup()
    assert len(stream) == 2


def test_parquet_table_names_the_pictures_beside_it(tmp_path):
    for i in range(3):
        put(tmp_path / "set" / f"{i}.png", encoded(i, "png"))
    table = pa.table({"file_name": [f"{i}.png" for i in range(3)], "caption": [["a", "b"], ["c"], ["d"]]})
    pq.write_table(table, tmp_path / "set" / "captions.parquet")
    pq.write_table(pa.table({"url": ["x"]}), tmp_path / "set" / "00000.parquet")  # img2dataset's, names no picture
    found = contents(pack(tmp_path / "set", tmp_path / "out"))
    assert [found[i][1]["caption"]["en"] for i in range(3)] == [["a", "b"], ["c"], ["d"]]
    tar(tmp_path / "set" / "backup.tar", {"0.png": encoded(0, "png")})
    assert skipped(pack(tmp_path / "set", tmp_path / "again")) == {"archive beside loose pictures": ["backup.tar"]}
    put(tmp_path / "bad" / "x.parquet", b"no parquet")
    assert "x.parquet" in fails("Not a parquet file", tmp_path / "bad", tmp_path / "out2")


# ---- tars and files of img2dataset ---------------------------------------------------------------------------------


def tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_layouts_of_webdataset_are_read_in_place_and_packed(tmp_path, capsys):
    """jpg, png and webp, with txt, json, both or cls; the same captions and labels either way."""
    source = tmp_path / "tars"
    tar(
        source / "00000.tar",
        {"a.jpg": encoded(10, "jpeg"), "a.txt": b"text\nof two lines", "b.png": encoded(20, "png")}
        | {"b.json": json.dumps({"caption": "from json", "aesthetic": 4}).encode(), "c.webp": encoded(30)}
        | {"c.json": json.dumps({"caption": "json first"}).encode(), "c.txt": b"text after", "c.cls": b"7"},
    )
    tar(source / "00001.tar", {"a.webp": encoded(40), "a.json": b"{", "d.txt": b"no picture", "e.webp": encoded(50)})
    assert index([str(source), "--out", str(tmp_path / "indexed"), "--prefix-keys"]) == 0
    said = capsys.readouterr().out
    assert "4 samples of 2 shards" in said and "left out: 2" in said and "00001.tar:d" in said
    packed = pack(source, tmp_path / "packed", skip_bad=True, default_caption="none", val=0, test=0)
    placed = contents(tmp_path / "indexed")
    wanted = {10: ["text\nof two lines"], 20: ["from json"], 30: ["json first"]}
    for found in (placed, contents(packed)):
        assert {
            min(wanted, key=lambda i: abs(i - n)): m["caption"]["en"] for n, (_, m) in found.items() if n < 35
        } == wanted
        assert found[30][1]["label"] == 7 and "label" not in found[20][1]
    assert contents(packed)[50][1]["caption"] == {"en": ["none"]} and placed[50][1]["caption"] == {}
    assert set(Shards(packed, "train").index["ext"]) == {"jpg", "png", "webp"}
    assert skipped(packed) == {
        "its .json or .cls cannot be read": ["00001/a.tar"],
        "no picture among the members": ["00001/d.tar"],
    }


def test_tars_that_are_cut_or_mixed_with_parquet_are_refused(tmp_path):
    tar(tmp_path / "set" / "x.tar", {"a.png": png(gradient(1)), "a.txt": b"x"})
    whole = (tmp_path / "set" / "x.tar").read_bytes()
    hugging_face(tmp_path / "set" / "y.parquet", range(2), caption=["a", "b"])
    assert "y.parquet, x.tar" in fails("parquet files and in tars", tmp_path / "set", tmp_path / "out")
    (tmp_path / "set" / "y.parquet").unlink()
    (tmp_path / "set" / "x.tar").write_bytes(whole[:600])
    assert "x.tar" in fails("is cut", tmp_path / "set", tmp_path / "out")


def test_files_of_img2dataset_have_their_captions_beside(tmp_path):
    for i, (ext, text) in enumerate(
        [("json", {"caption": "one", "width": 3}), ("txt", "two"), ("json", {"shapes": []})]
    ):
        put(tmp_path / "set/00000" / f"{i}.webp", encoded(i))
        put(tmp_path / "set/00000" / f"{i}.{ext}", text.encode() if ext == "txt" else json.dumps(text).encode())
    out = pack(tmp_path / "set", tmp_path / "out", skip_bad=True)
    found = contents(out)
    assert {i: meta["caption"]["en"] for i, (_, meta) in found.items()} == {0: ["one"], 1: ["two"]}
    assert found[0][1]["width"] == 3 and skipped(out) == {"no caption": ["00000/2.webp"]}


# ---- class folders -------------------------------------------------------------------------------------------------


def imagenet(folder: Path, splits: tuple[str, ...] = ("",)) -> Path:
    for s, split in enumerate(splits):
        for c, name in enumerate(("n02", "n01", "black_cat")):
            for i in range(3):
                number = 100 * s + 10 * c + i
                put(folder / split / name / f"{number}.JPEG", encoded(number, "png"))
    return folder


def test_class_folders_give_labels_and_names_as_captions(tmp_path):
    source = imagenet(tmp_path / "set")
    out = pack(source, tmp_path / "out", class_folders=True)
    found = contents(out)
    assert {i: meta["label"] for i, (_, meta) in found.items()} == {
        10 * c + i: (2, 1, 0)[c] for c in range(3) for i in range(3)
    }
    assert found[20][1]["caption"] == {"en": ["black cat"]}
    assert json.loads((out / "dataset.json").read_text())["classes"] == ["black cat", "n01", "n02"]
    stream = ImageText(str(out), size=4)
    stream.setup()
    stream.begin(0, "main", shuffle=False)
    assert stream.load(range(4), 0).label.tolist() == [int(v) for v in stream.shards.index["label"][:4]]
    put(source / "stray.png", encoded(1, "png"))
    assert "1: stray.png" in fails("no folder of a class", source, tmp_path / "out2", class_folders=True)


def test_class_names_say_order_and_captions_and_folders_above_are_splits(tmp_path):
    source = imagenet(tmp_path / "set", ("train", "val"))
    names = put(tmp_path / "names.txt", b"n02 tench, Tinca tinca\nn07 shark\nn01 goldfish\nblack_cat cat\n")
    found = contents(pack(source, tmp_path / "out", class_names=names))
    assert {i: split for i, (split, _) in found.items()} == {i: "train" if i < 100 else "val" for i in found}
    assert found[0][1]["label"] == 0 and found[0][1]["caption"] == {"en": ["tench", "Tinca tinca"]}
    assert found[110][1]["label"] == 2 and len(found) == 18
    names.write_text("n01 goldfish\n")
    assert "black_cat, n02" in fails("Folders that are no class", source, tmp_path / "out2", class_names=names)


def test_pictures_without_captions_get_the_one_that_is_given(tmp_path):
    put(tmp_path / "set" / "1.png", encoded(1, "png"))
    assert "--default-caption" in fails("No picture has a caption", tmp_path / "set", tmp_path / "out")
    found = contents(pack(tmp_path / "set", tmp_path / "out", default_caption="a church", val=0, test=0))
    assert found[1][1]["caption"] == {"en": ["a church"]}


# ---- annotations ---------------------------------------------------------------------------------------------------


def test_karpathys_annotations_become_a_retrieval_set(tmp_path):
    splits = ["train", "restval", "val", "test"]
    images = [
        {"filename": f"{i}.webp", "filepath": "val2014", "imgid": i, "cocoid": 7 * i, "split": split,
         "sentences": [{"raw": f"{i}, {j}", "tokens": []} for j in range(5)]} for i, split in enumerate(splits)
    ]  # fmt: skip
    for i in range(5):  # the fifth belongs to no split
        put(tmp_path / "set/val2014" / f"{i}.webp", encoded(i))
    table = put(tmp_path / "dataset_coco.json", json.dumps({"images": images, "dataset": "coco"}).encode())
    out = pack(tmp_path / "set", tmp_path / "out", captions=table)
    found = contents(out)
    assert {i: split for i, (split, _) in found.items()} == {0: "train", 1: "train", 2: "val", 3: "test"}
    assert found[3][1]["caption"] == {"en": [f"3, {j}" for j in range(5)]} and found[3][1]["cocoid"] == 21
    assert skipped(out) == {"not in the annotations": ["val2014/4.webp"]}
    data = RetrievalPairs(str(out), "test", size=4, batch_size=1)
    data.setup()
    data.begin(0, "test", shuffle=False)
    assert data.load(range(1), 0).captions == [[f"3, {j}" for j in range(5)]]
    for image in images:  # Flickr30k's have no folder, and the pictures may lie in one
        del image["filepath"], image["cocoid"]
    table.write_text(json.dumps({"images": images}))
    assert set(contents(pack(tmp_path / "set", tmp_path / "flickr", captions=table))) == {0, 1, 2, 3}
    del images[2]["sentences"]
    table.write_text(json.dumps({"images": images}))
    assert "sentences" in fails("field of the annotations", tmp_path / "set", tmp_path / "x", captions=table)
    table.write_text("[]")
    assert "Karpathy" in fails("Not annotations", tmp_path / "set", tmp_path / "x", captions=table)


def test_cocos_own_annotations(tmp_path):
    for i in range(2):
        put(tmp_path / "set" / f"{i}.webp", encoded(i))
    told = {"images": [{"id": 5 + i, "file_name": f"{i}.webp"} for i in range(2)]}
    told["annotations"] = [{"image_id": 5 + i % 2, "caption": f"text {i}"} for i in range(4)]
    table = put(tmp_path / "captions_val2017.json", json.dumps(told).encode())
    found = contents(pack(tmp_path / "set", tmp_path / "out", captions=table))
    assert {i: meta["caption"]["en"] for i, (_, meta) in found.items()} == {
        0: ["text 0", "text 2"],
        1: ["text 1", "text 3"],
    }


# ---- several processes, kills --------------------------------------------------------------------------------------


def many(folder: Path, n: int = 30) -> Path:
    for i in range(n):
        put(folder / f"{i:03d}.webp", encoded(i))
        put(folder / f"{i:03d}.txt", f"number {i}".encode())
    return folder


def hashes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".tar", ".json", ".parquet")}


def test_workers_write_the_same_bytes(tmp_path):
    source = many(tmp_path / "set")
    (source / "007.webp").write_bytes(b"bad")
    one, two = (pack(source, tmp_path / str(n), workers=n, samples_per_shard=5, skip_bad=True) for n in (1, 2))
    assert hashes(one) == hashes(two) and len(list(one.glob("train-*.tar"))) > 3
    assert skipped(one) == {"cannot be decoded": ["007.webp: unknown format"]}
    assert not [path for path in one.iterdir() if path.name.startswith(".")]


def test_a_killed_worker_is_a_users_error():
    with pytest.raises(UserError, match="worker process was killed"):
        list(each(os._exit, [3], workers=2))


def test_a_killed_pack_goes_on_with_the_shards_that_are_missing(tmp_path, repo):
    source, out = many(tmp_path / "set"), tmp_path / "out"
    whole = hashes(pack(source, tmp_path / "whole", samples_per_shard=5, val=0, test=0, name="x"))
    last = Shards(tmp_path / "whole", "train").meta(29)["file"]
    (source / last).unlink()
    os.mkfifo(source / last)  # reading it waits for ever
    command = [sys.executable, "-m", "datamodules.pack", str(source), str(out), "--val", "0", "--test", "0"]
    command += ["--samples-per-shard", "5", "--name", "x"]
    process = programs.Popen(command, cwd=repo, stdout=programs.DEVNULL, stderr=programs.DEVNULL)
    part = tmp_path / ".out.part"
    while len(list(part.glob(".pieces/*.parquet"))) < 5:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not out.exists()
    (source / last).unlink()
    put(source / last, encoded(int(last[:3])))
    changed = Shards(tmp_path / "whole", "train").meta(0)["file"].replace("webp", "txt")
    told = (source / changed).read_text()
    (source / changed).write_text("another caption")
    made = {path.name: path.stat().st_mtime_ns for path in part.glob("*.tar")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack_shards, "join", lambda *_: 1 / 0)
        patch.setattr("datamodules.pack.join", pack_shards.join)
        with pytest.raises(ZeroDivisionError):  # broken off once more, when all shards are made
            pack(source, out, samples_per_shard=5, val=0, test=0, name="x")
    (source / changed).write_text(told)
    pack(source, out, samples_per_shard=5, val=0, test=0, name="x")
    assert hashes(out) == whole
    kept = {path.name for path in out.glob("*.tar") if path.stat().st_mtime_ns == made.get(path.name)}
    assert kept == {f"train-00000{i}.tar" for i in (1, 2, 3, 4)}  # the first was made twice: another caption, and back


def test_pictures_that_cannot_be_read_cost_nothing_twice(tmp_path):
    source = many(tmp_path / "set", 12)
    (source / "003.webp").write_bytes(b"bad")
    said = fails("cannot be read", source, tmp_path / "out", samples_per_shard=1, val=0, test=0)
    assert "003.webp: unknown format" in said and ".out.part" in said
    made = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".out.part").glob("*.tar")}
    out = pack(source, tmp_path / "out", samples_per_shard=1, val=0, test=0, skip_bad=True)
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")} == made and len(made) == 11
    assert len(contents(out)) == 11


def test_samples_and_shards_of_an_earlier_call_are_not_taken_for_those_of_this_one(tmp_path):
    source = many(tmp_path / "set", 12)
    (source / "003.webp").write_bytes(b"bad")
    fails("cannot be read", source, tmp_path / "out", samples_per_shard=2)
    for name in ("003.webp", "003.txt", "004.webp", "004.txt"):
        (source / name).unlink()
    out = pack(source, tmp_path / "out", samples_per_shard=3)
    assert set(contents(out)) == set(range(12)) - {3, 4}
    again = pack(source, tmp_path / "again", samples_per_shard=3, name="out")
    assert {p.name for p in out.glob("*.tar")} == {p.name for p in again.glob("*.tar")}
