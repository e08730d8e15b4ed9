"""Tars that are not what they seem: damage that looks like an end, new captions at old places, odd names and labels."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from data_sets import gradient, png
from PIL import ExifTags, Image
from range_server import serving

from datamodules.image_text import ImageText
from datamodules.index import main
from datamodules.index_file import Index
from datamodules.layouts import CHUNK, MOST_PADDING
from datamodules.look import main as look
from datamodules.pack import pack
from datamodules.records import Shards
from datamodules.remote import PIECE
from lightning_t2i.errors import UserError

N = 10
END = 2 * tarfile.BLOCKSIZE


def tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", encoding="utf-8", errors="surrogateescape") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def members(text: str = "picture {}", **more: object) -> dict[str, bytes]:
    """Ten samples of a picture, a text and a JSON."""
    found = {}
    for i in range(N):
        found |= {f"{i}.png": png(gradient(i, 6, 8)), f"{i}.txt": text.format(i).encode()}
        found[f"{i}.json"] = json.dumps({"key": str(i), **more}).encode()
    return found


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def report(out: Path) -> dict:
    (found,) = json.loads((out / "report-train.json").read_text(encoding="utf-8")).values()
    return found


# ---- other captions ------------------------------------------------------------------------------------------------


def test_other_captions_at_the_same_places_are_other_data(tmp_path):
    """A tar pads members to blocks, so that the places of other captions are the old ones."""
    source, out = tmp_path / "tars" / "x.tar", tmp_path / "out"

    def identity(parts: dict[str, bytes]) -> dict:
        sizes.append(tar(source, parts).stat().st_size)
        changed.append(source.stat().st_mtime_ns + 10**9 * len(changed))  # clocks of file systems are coarse
        os.utime(source, ns=(changed[-1], changed[-1]))
        assert run(source.parent, "--out", out) == 0
        stream = ImageText(str(out))
        stream.setup()
        return stream.identity

    changed, sizes = list[int](), list[int]()
    first = identity(members())
    others = [members("another caption {}"), members("PICTURE {}"), members(label=1), members(label=2)]
    others += [{"0.cls": b"3", **members()}, {"0.cls": b"4", **members()}]
    found = [json.dumps(identity(parts)) for parts in [*others, members()]]
    assert len(set(sizes[:5])) == 1
    assert found[-1] == json.dumps(first)  # the same bytes are the same data, whenever they were written
    assert len(set(found)) == len(found)


# ---- damage --------------------------------------------------------------------------------------------------------


def whole(tmp_path: Path) -> tuple[bytes, int]:
    """A tar of ten samples and where the header of the sixth begins."""
    path = tar(tmp_path / "whole.tar", members())
    with tarfile.open(path) as archive:
        return path.read_bytes(), archive.getmember("5.png").offset


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("damage", ["cut within a header", "garbage", "hole", "two in one", "cut end"])
def test_damage_that_looks_like_an_end_is_found(tmp_path, capsys, damage, remote):
    data, at = whole(tmp_path)
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512
    broken = {
        "cut within a header": data[: at + 300],
        "garbage": data[:at] + b"\xaa" * 512 + data[at + 512 :],
        "hole": data[:at] + bytes(END + MOST_PADDING),
        "two in one": data + data.replace(b"picture", b"another"),
        "cut end": data[: end + 512],
    }[damage]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "x.tar").write_bytes(broken)
    with serving(tmp_path / "set") as server:
        given = f"{server.url}/x.tar" if remote else tmp_path / "set"
        assert run(given, "--out", tmp_path / "out") == 2
        assert "cannot be read to their end" in capsys.readouterr().err
        assert run(given, "--out", tmp_path / "out", "--skip-bad") == 0
    assert len(Index.load(tmp_path / "out", "train")) in (4, 9)  # the last may lack members
    with pytest.raises(UserError, match="A shard is cut"):
        pack(tmp_path / "set", tmp_path / "packed", skip_bad=True)


@pytest.mark.parametrize("remote", [False, True])
def test_every_way_to_end_a_tar_is_an_end(tmp_path, remote):
    """Two blocks alone (Go, Rust), records of 10 KiB (GNU, Python) and larger ones (tar -b)."""
    data, _ = whole(tmp_path)
    content = data[: len(data.rstrip(b"\0")) // 512 * 512 + 512]
    with serving(tmp_path / "set") as server:
        for i, padding in enumerate((0, -len(content + bytes(END)) % 10240, 5 * 512, 1 << 20, MOST_PADDING - 512)):
            (tmp_path / "set").mkdir(exist_ok=True)
            (tmp_path / "set" / f"{i}.tar").write_bytes(content + bytes(END + padding))
            server.asked.clear()
            given = f"{server.url}/{i}.tar" if remote else tmp_path / "set" / f"{i}.tar"
            assert run(given, "--out", tmp_path / f"out{i}") == 0
            assert len(Index.load(tmp_path / f"out{i}", "train")) == N
            size = len(content) + END + padding
            late = [start for path, start, _ in server.asked if path == f"/{i}.tar" and start >= size]
            assert len(late) <= CHUNK // PIECE  # of one chunk: that the file ends there is not asked again


# ---- odd names, captions and labels --------------------------------------------------------------------------------


def test_names_that_are_not_utf8_are_named_and_left_out(tmp_path, capsys):
    odd = os.fsdecode(b"caf\xe9")
    tar(tmp_path / "set" / "x.tar", {f"{odd}.png": png(gradient(3)), f"{odd}.txt": b"x", **members()})
    assert run(tmp_path / "set", "--out", tmp_path / "out") == 0
    assert report(tmp_path / "out")["reasons"] == {"caf\\udce9": "its name is not UTF-8"}
    assert "x.tar:caf\\udce9" in capsys.readouterr().out and len(Index.load(tmp_path / "out", "train")) == N
    with pytest.raises(UserError, match=r"its name is not UTF-8(.|\n)*x/caf.udce9.tar"):
        pack(tmp_path / "set", tmp_path / "packed")
    packed = pack(tmp_path / "set", tmp_path / "packed", skip_bad=True)
    assert sum(json.loads((packed / "dataset.json").read_text())["splits"].values()) == N
    assert look([str(tmp_path / "set" / "x.tar"), "--sheet", str(tmp_path / "look.png")]) == 0
    capsys.readouterr().out.encode()
    (tmp_path / "set" / "x.tar").rename(tmp_path / "set" / f"{odd}.tar")
    assert run(tmp_path / "set", "--out", tmp_path / "none") == 2
    assert "caf\\udce9.tar" in capsys.readouterr().err


def test_a_file_whose_name_is_not_utf8_is_named_and_left_out(tmp_path):
    source = tmp_path / "set"
    for name in ("a", os.fsdecode(b"caf\xe9")):
        source.mkdir(exist_ok=True)
        (source / f"{name}.png").write_bytes(png(gradient(1)))
        (source / f"{name}.txt").write_text("x")
    with pytest.raises(UserError, match=r"its name is not UTF-8(.|\n)*1: caf.udce9.png"):
        pack(source, tmp_path / "out")
    out = pack(source, tmp_path / "out", skip_bad=True, val=0, test=0)
    assert Shards(out, "train").index["key"].tolist() == ["a"]
    assert "caf\\\\udce9.png" in (out / "report.json").read_text()


def test_halves_of_characters_become_question_marks(tmp_path):
    """JSON can hold one of two surrogates, which no tokenizer takes and no file of UTF-8."""
    told = {"caption": {"en": ["a \ud83d cat"]}, "author": "\ud83d"}
    tar(tmp_path / "set" / "x.tar", {"a.png": png(gradient(1)), "a.json": json.dumps(told).encode()})
    assert run(tmp_path / "set", "--out", tmp_path / "out") == 0
    packed = pack(tmp_path / "set", tmp_path / "packed", val=0, test=0)
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "a.png").write_bytes(png(gradient(1)))
    (tmp_path / "loose" / "m.jsonl").write_text(json.dumps({"file": "a.png", **told}))
    loose = pack(tmp_path / "loose", tmp_path / "of-loose", val=0, test=0)
    for folder in (tmp_path / "out", packed, loose):
        assert Shards(folder, "train").meta(0)["caption"] == {"en": ["a ? cat"]}


def test_labels_that_are_no_numbers_of_classes_are_not_taken(tmp_path):
    labels = [3, "4", 5.0, "dog", 6.5, None, [1], True]
    parts = {}
    for i, label in enumerate(labels):
        parts |= {f"{i}.png": png(gradient(i)), f"{i}.json": json.dumps({"label": label, "caption": "x"}).encode()}
    tar(tmp_path / "set" / "x.tar", parts)
    assert run(tmp_path / "set", "--out", tmp_path / "out") == 0
    shards = Shards(tmp_path / "out", "train")
    assert [shards.meta(row).get("label") for row in range(len(labels))] == [3, 4, 5, None, None, None, None, 1]
    stream = ImageText(str(tmp_path / "out"), size=4)
    stream.setup()
    stream.begin(0, "main", shuffle=False)
    assert stream.load(range(3), 0).label.tolist() == [3, 4, 5]
    assert stream.load(range(8), 0).label is None  # not all have one
    with pytest.raises(UserError, match="number of a class"):
        pack(tmp_path / "set", tmp_path / "packed")


# ---- sizes ---------------------------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_pictures_whatever_the_json_says(tmp_path):
    """Metadata often tell the size of the picture before it was made smaller, or say nothing of how it is turned."""
    turned = io.BytesIO()
    facts = Image.Exif()
    facts[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (8, 6)).save(turned, "jpeg", exif=facts)
    tar(tmp_path / "set" / "x.tar", {**members(width=800, height=600, original_width=900), "t.jpg": turned.getvalue()})
    assert run(tmp_path / "set", "--out", tmp_path / "out") == 0
    index = Index.load(tmp_path / "out", "train")
    assert index["width"].tolist() == [8] * N + [6] and index["height"].tolist() == [6] * N + [8]
    assert index["original_width"].tolist()[:N] == [900] * N
