"""`python -m datamodules.pack`: three ways to give captions, splits, every mistake named, all or nothing."""

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules import pack as packing
from datamodules.pack import key_of, main, pack, place_of
from datamodules.records import Shards
from lightning_t2i.errors import UserError


def save(path: Path, value: int, kind: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (value, 0, 0)).save(path, kind)
    return path


@pytest.fixture
def pictures(tmp_path) -> Callable[..., Path]:
    """pictures(n) -> folder with a/000.png, b/001.png, ... whose red value is their number."""

    def make(n: int = 6, beside: bool = False) -> Path:
        folder = tmp_path / "photos"
        for i in range(n):
            path = save(folder / "ab"[i % 2] / f"{i:03d}.png", i)
            if beside:
                path.with_suffix(".txt").write_text(f"picture {i}\n\nnumber {i}\n", encoding="utf-8")
        return folder

    return make


def names(n: int) -> list[str]:
    return [f"{'ab'[i % 2]}/{i:03d}.png" for i in range(n)]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def contents(folder: Path) -> dict[str, tuple[str, dict, int]]:
    """key -> (split, metadata, red value)."""
    found = {}
    for split in json.loads((folder / "dataset.json").read_text())["splits"]:
        shards = Shards(folder, split)
        for i in range(len(shards)):
            found[shards.index["key"][i]] = (split, shards.meta(i), int(np.asarray(shards.picture(i))[0, 0, 0]))
    return found


def test_text_files_beside_the_pictures(pictures, tmp_path):
    found = contents(pack(pictures(6, beside=True), tmp_path / "out", val=0.3, test=0.3))
    assert set(found) == {f"{'ab'[i % 2]}_{i:03d}" for i in range(6)}
    for key, (_, meta, value) in found.items():
        assert value == int(key[2:])
        assert meta["caption"] == {"en": [f"picture {value}", f"number {value}"]}
        assert meta["file"] == f"{key[0]}/{key[2:]}.png"


@pytest.mark.parametrize("write", [write_jsonl, write_csv])
def test_tables_with_languages_labels_splits_and_further_fields(pictures, tmp_path, write):
    folder = pictures(4)
    rows = [
        {"file_name": name, "caption": f"no. {i}, “{i}”", "caption_zh": f"第{i}个", "label": i,
         "split": "val" if i == 3 else "train", "author": "me"} for i, name in enumerate(names(4))
    ]  # fmt: skip
    rows.append({**rows[0], "caption": "another"})
    write(folder / f"metadata.{'jsonl' if write is write_jsonl else 'csv'}", rows)
    found = contents(pack(folder, tmp_path / "out"))
    for _, meta, i in found.values():
        assert meta["caption"] == {"en": [f"no. {i}, “{i}”"] + ["another"] * (i == 0), "zh": [f"第{i}个"]}
        assert meta["label"] == i and meta["author"] == "me"
    assert {i: split for split, _, i in found.values()} == {0: "train", 1: "train", 2: "train", 3: "val"}


UNUSUAL = "first\u2028sec\u0085ond\x0bthird\x0cfourth\x1cend"  # str.splitlines cuts it, files of lines do not


@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_captions_are_cut_at_ends_of_lines_alone(tmp_path, kind, end):
    save(tmp_path / "set" / "0.png", 0)
    row = json.dumps({"file": "0.png", "captions": [UNUSUAL, "b"]}, ensure_ascii=False)
    text = {
        "jsonl": f"{row}{end}{end}",
        "csv": f"file,caption{end}0.png,{UNUSUAL}{end}0.png,b{end}",
        "txt": f"{UNUSUAL}{end}b{end}",
    }[kind]
    (tmp_path / "set" / f"0.{kind}").write_bytes(text.encode())
    ((_, meta, _),) = contents(pack(tmp_path / "set", tmp_path / "out", val=0, test=0)).values()
    assert meta["caption"] == {"en": [UNUSUAL, "b"]}


def test_jsonl_captions_as_text_list_or_by_language(pictures, tmp_path):
    folder = pictures(3)
    table = tmp_path / "elsewhere.jsonl"
    captions = ["一只猫", ["a", " b ", "", "a"], {"en": "cat", "zh": ["猫", None]}]
    write_jsonl(table, [{"image": name, "text": text} for name, text in zip(names(3), captions, strict=True)])
    found = contents(pack(folder, tmp_path / "out", captions=table, language="zh", val=0, test=0))
    texts = {i: meta["caption"] for _, meta, i in found.values()}
    assert texts == {0: {"zh": ["一只猫"]}, 1: {"zh": ["a", "b"]}, 2: {"en": ["cat"], "zh": ["猫"]}}


def test_picture_bytes_are_kept_and_other_kinds_become_png(tmp_path):
    folder = tmp_path / "photos"
    kinds = {"a.JPG": "jpeg", "b.webp": "webp", "c.bmp": "bmp", "d.gif": "gif", "e.tiff": "tiff", "f.jpg": "png"}
    for name, kind in kinds.items():
        save(folder / name, 200, kind)
        (folder / name).with_suffix(".txt").write_text("x")
    shards = Shards(pack(folder, tmp_path / "out", val=0, test=0), "train")
    ext = dict(zip(shards.index["key"], shards.index["ext"], strict=True))
    assert ext == {"a": "jpg", "b": "webp", "c": "png", "d": "png", "e": "png", "f": "png"}
    for i, key in enumerate(shards.index["key"]):
        assert shards.picture(i).size == (6, 4) and abs(np.asarray(shards.picture(i))[0, 0, 0].astype(int) - 200) < 4
        original = next(path for path in folder.iterdir() if path.stem == key and path.suffix != ".txt").read_bytes()
        assert (shards._read(i, "offset", "size") == original) == (key in "abf")


def test_same_folder_same_bytes(pictures, tmp_path):
    folder = pictures(30, beside=True)
    one, two = pack(folder, tmp_path / "one", samples_per_shard=7), pack(folder, tmp_path / "two", samples_per_shard=7)
    hashes = [json.loads((out / "dataset.json").read_text())["sha256"] for out in (one, two)]
    assert hashes[0] == hashes[1]
    assert len(list(one.glob("train-*.tar"))) >= 3


def test_samples_are_in_the_order_of_hashed_keys_and_splits_stay(pictures, tmp_path):
    folder = pictures(60, beside=True)
    before = contents(pack(folder, tmp_path / "one", val=0.2, test=0.2))
    keys = Shards(tmp_path / "one", "train").index["key"].tolist()
    assert keys == sorted(keys, key=place_of) != sorted(keys)
    assert min(map(place_of, keys)) < 0.2 and max(map(place_of, keys)) > 0.8  # no split is one end of that order
    counts = [sum(split == name for split, _, _ in before.values()) for name in ("train", "val", "test")]
    assert min(counts) >= 4 and counts[0] >= 25
    save(folder / "zz.png", 99).with_suffix(".txt").write_text("late")
    after = contents(pack(folder, tmp_path / "two", val=0.2, test=0.2))
    assert {key: after[key][0] for key in before} == {key: split for key, (split, _, _) in before.items()}


def fails(match: str, *arguments, **options) -> str:
    with pytest.raises(UserError, match=match) as error:
        pack(*arguments, **options)
    return str(error.value)


def test_no_folder_no_pictures_no_captions(pictures, tmp_path):
    out = tmp_path / "out"
    fails("No such folder", tmp_path / "nowhere", out)
    (tmp_path / "empty" / ".hidden").mkdir(parents=True)
    save(tmp_path / "empty" / ".hidden" / "x.png", 1)
    fails("No pictures", tmp_path / "empty", out)
    assert "6 pictures" in fails("No picture has a caption", pictures(6), out)
    assert not out.exists()


def test_missing_captions_are_counted_and_named(pictures, tmp_path):
    folder = pictures(14, beside=True)
    for name in names(12):
        (folder / name).with_suffix(".txt").unlink()
    message = fails("without a caption", folder, tmp_path / "out")
    assert "12: a/000.png, a/002.png" in message and "and 2 more" in message and "--skip-bad" in message
    out = pack(folder, tmp_path / "out", skip_bad=True, val=0, test=0)
    assert len(contents(out)) == 2
    assert json.loads((out / "dataset.json").read_text())["skipped"] == 12
    skipped = json.loads((out / "report.json").read_text())["skipped"]
    assert skipped == {"no caption": {"count": 12, "names": sorted(names(12))}}


def test_unreadable_pictures_are_counted_and_named(pictures, tmp_path):
    folder = pictures(6, beside=True)
    (folder / "a/000.png").write_bytes(b"no picture")
    whole = (folder / "b/001.png").read_bytes()
    (folder / "b/001.png").write_bytes(whole[: len(whole) - 25])
    message = fails("cannot be read", folder, tmp_path / "out")
    assert "given:   2: " in message and "a/000.png: unknown format" in message and "b/001.png: " in message
    assert not (tmp_path / "out").exists()
    out = pack(folder, tmp_path / "out", skip_bad=True)
    assert {i for _, _, i in contents(out).values()} == {2, 3, 4, 5}
    for name in names(6)[2:]:
        (folder / name).write_bytes(b"")
    fails("cannot be read", folder, tmp_path / "out2", skip_bad=True)


def test_captions_of_pictures_that_are_not_there(pictures, tmp_path):
    folder = pictures(2)
    write_jsonl(folder / "m.jsonl", [{"file": name, "caption": "x"} for name in [*names(2), "c/gone.png"]])
    assert "1: c/gone.png" in fails("not there", folder, tmp_path / "out")
    out = pack(folder, tmp_path / "out", skip_bad=True)
    report = json.loads((out / "report.json").read_text())
    assert report["skipped"] == {"no picture": {"count": 1, "names": ["c/gone.png"]}}


def test_duplicate_keys_name_both_pictures(tmp_path):
    for name in ("x/cat.png", "x_cat.jpg"):
        save(tmp_path / "photos" / name, 1).with_suffix(".txt").write_text("cat")
    assert "x/cat.png and x_cat.jpg" in fails("same key", tmp_path / "photos", tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "suffix", "match", "where"),
    [
        ('{"file": "a.png"', "jsonl", "Not valid JSON", "m.jsonl:1"),
        ('\n["a.png"]', "jsonl", "Not a JSON object", "m.jsonl:2"),
        ('{"caption": "x"}', "jsonl", "names no picture", "m.jsonl:1"),
        ('{"file": "../a.png", "caption": "x"}', "jsonl", "lies in it", "m.jsonl:1"),
        ('{"file": "/a.png", "caption": "x"}', "jsonl", "lies in it", "m.jsonl:1"),
        ('{"file": "a.png", "caption": "x", "label": "dog"}', "jsonl", "number of a class", "m.jsonl:1"),
        ("file,caption\na.png,one, two\n", "csv", "as many cells", "m.csv:2"),
        ("file,caption\na.png\n", "csv", "as many cells", "m.csv:2"),
        ('file,caption\na.png,"x\n', "csv", "Not valid CSV", "m.csv, after line 1"),
        ("name,caption\na.png,x\n", "csv", "names no picture", "m.csv:2"),
    ],
)
def test_mistakes_in_tables_name_file_and_line(tmp_path, text, suffix, match, where):
    save(tmp_path / "photos" / "a.png", 1)
    (tmp_path / "photos" / f"m.{suffix}").write_text(text)
    assert where in fails(match, tmp_path / "photos", tmp_path / "out")


def test_text_that_is_not_utf8_names_its_file(pictures, tmp_path):
    folder = pictures(1, beside=True)
    (folder / "a/000.txt").write_bytes("圆形".encode("gbk"))
    assert "000.txt" in fails("Not UTF-8", folder, tmp_path / "out")


def test_choices_of_tables(pictures, tmp_path):
    folder = pictures(2)
    for name in ("one.jsonl", "two.csv"):
        (folder / name).write_text("")
    assert "one.jsonl, two.csv" in fails("Several files", folder, tmp_path / "out")
    fails("No such file", folder, tmp_path / "out", captions=folder / "three.csv")
    fails("Not a kind", folder, tmp_path / "out", captions=save(tmp_path / "x.png", 1))


def test_options_out_of_range(pictures, tmp_path):
    folder = pictures(2, beside=True)
    fails("nothing to train on", folder, tmp_path / "out", val=0.5, test=0.5)
    fails("nothing to train on", folder, tmp_path / "out", val=-0.1)
    fails("needs a sample", folder, tmp_path / "out", samples_per_shard=0)
    write_jsonl(folder / "m.jsonl", [{"file": names(1)[0], "caption": "x", "split": "../up"}])
    fails("name of a split", folder, tmp_path / "out", skip_bad=True)


def test_out_is_never_overwritten(pictures, tmp_path):
    folder = pictures(2, beside=True)
    out = pack(folder, tmp_path / "out")
    fails("already", folder, out)
    fails("not empty", folder, folder)
    assert len(list(folder.rglob("*.png"))) == 2


def test_nothing_is_left_of_a_run_that_was_broken_off(pictures, tmp_path, monkeypatch):
    folder = pictures(4, beside=True)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(packing, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pack(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(contents(pack(folder, tmp_path / "out"))) == 4


@pytest.mark.parametrize(
    ("name", "key"),
    [("a/b.c/d.png", "a_b_c_d"), ("my cat.jpg", "my_cat"), ("猫.png", "猫"), ("x.png", "x")],
)
def test_keys(name, key):
    assert key_of(name) == key


def test_long_keys_are_cut_and_stay_apart():
    one, two = (key_of("名" * 40 + f"{i}.png") for i in range(2))
    assert one != two and all(len(key.encode()) <= 90 for key in (one, two))


def test_command_line(pictures, tmp_path, repo, capsys):
    folder = pictures(3, beside=True)
    command = [sys.executable, "-m", "datamodules.pack", str(folder), str(tmp_path / "out"), "--name", "mine"]
    command += ["--val", "0", "--test", "0", "--licence", "CC0-1.0", "--language", "de"]
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    done = subprocess.run(command, cwd=repo, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3/3" in done.stderr  # the progress bar
    assert f"source: {tmp_path / 'out'}" in done.stdout
    about = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert (about["name"], about["licence"], about["splits"]) == ("mine", "CC0-1.0", {"train": 3})
    assert {language for _, meta, _ in contents(tmp_path / "out").values() for language in meta["caption"]} == {"de"}
    assert main([str(tmp_path / "gone"), str(tmp_path / "x")]) == 2
    assert "No such folder" in capsys.readouterr().err


def test_transparent_gif_keeps_its_transparency(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    frame = Image.new("RGBA", (4, 4), (255, 0, 0, 255))
    frame.putpixel((0, 0), (0, 0, 0, 0))
    frame.save(folder / "a.gif")
    (folder / "a.txt").write_text("x")
    shards = Shards(pack(folder, tmp_path / "out", val=0, test=0), "train")
    stored = Image.open(io.BytesIO(shards._read(0, "offset", "size")))
    assert stored.mode == "RGBA" and stored.getpixel((0, 0))[3] == 0
    assert shards.picture(0).getpixel((0, 0)) == (255, 255, 255)


def test_a_language_that_no_caption_is_in_is_refused_and_those_that_are_there_are_named(pictures, tmp_path):
    out = pack(pictures(beside=True), tmp_path / "out", val=0.0, test=0.0)
    with pytest.raises(UserError, match="No captions in this language") as error:
        Shards(out, "train", ["en", "zh"])
    assert "allowed: en\n" in f"{error.value}\n"
