"""`python -m datamodules.look`: what it prints is true, on every kind of source, and near copies are found."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_sets import png, write_data_set
from PIL import Image
from range_server import serving

from datamodules.duplicates import difference_hash, duplicates, thumbnail
from datamodules.index import main as index
from datamodules.look import main
from datamodules.records import Shards


def scene(seed: int, size: tuple[int, int] = (96, 64)) -> Image.Image:
    """Smooth noise, another for each seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str = "png", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def run(source: object, tmp_path: Path, *more: str) -> int:
    return main([str(source), "--sheet", str(tmp_path / "sheet.png"), *more])


def test_copies_are_found_after_compression_and_resizing_and_others_are_not() -> None:
    first = scene(0)
    copies = [Image.open(io.BytesIO(saved(first, "jpeg", quality=60))).convert("RGB"), first.resize((192, 128))]
    copies.append(Image.open(io.BytesIO(saved(first.resize((60, 40)), "webp", quality=70))).convert("RGB"))
    flat = [Image.new("RGB", (32, 32), colour) for colour in ("white", "red", "green", "white")]
    marked = Image.new("RGB", (32, 32), "white")
    marked.paste("blue", (10, 10, 16, 16))
    images = [scene(1), first, *flat[:3], *copies, marked, flat[3], *(scene(seed) for seed in range(2, 60))]
    found = duplicates([difference_hash(i) for i in images], [thumbnail(i) for i in images])
    assert found == [[1, 5, 6, 7], [2, 9]]
    assert duplicates([], []) == []


def test_numbers_of_a_data_set_folder(tmp_path, capsys) -> None:
    texts = ["a red circle", "a red circle beside a square"]

    def captions(i: int) -> dict:
        return {"en": texts[: 1 + i % 2], **({"zh": ["圆形"]} if i < 5 else {})}

    folder = write_data_set(tmp_path / "d", 20, bad=[3], captions=captions, splits=("train", "val"), width=12)
    assert run(folder, tmp_path) == 0
    said = capsys.readouterr().out
    assert "train 20, val 20; looked at 40" in said
    assert "en: 60 of 40 pictures" in said and "zh: 10 of 10 pictures" in said
    assert "12 to 28, median 12" in said
    assert "shorter side 8 pixels" in said and "width / height 1.5" in said and "png 38" in said
    assert "20, labels 0 to 19" in said
    assert "unreadable  2: k0003: picture: unknown format, k0003" in said
    assert "37 look as another picture does; 1 groups, 1 over splits" in said  # their red values are 0 to 19
    assert "train/k0000 = train/k0001 = train/k0002 = train/k0004 = ..." in said
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[1] == 6 * 200 and (sheet < 100).any()
    assert run(folder, tmp_path, "--samples", "10") == 0
    assert "looked at 10" in capsys.readouterr().out


def img2dataset(folder: Path, n: int = 6) -> Path:
    """Two tars written by the shard writer, each with the same pictures."""
    return write_data_set(folder, n, captions=lambda i: {"en": [f"number {i} 中"]}, samples_per_shard=3)


@pytest.mark.parametrize("kind", ["folder", "url", "tar", "index"])
def test_tars_where_they_lie(tmp_path, capsys, kind) -> None:
    folder = img2dataset(tmp_path / "tars")
    for beside in ("dataset.json", "index-train.parquet"):
        (folder / beside).unlink()
    with serving(folder) as server:
        url = f"{server.url}/train-{{000000..000001}}.tar"
        source = {"folder": folder, "url": url, "tar": folder / "train-000000.tar", "index": tmp_path / "indexed"}[kind]
        if kind == "index":
            assert index([url, "--out", str(source)]) == 0
        assert run(source, tmp_path) == 0
        asked = len(server.asked)
    said = capsys.readouterr().out
    assert f"looked at {3 if kind == 'tar' else 6}" in said
    assert f"{3 if kind == 'tar' else 6} with Chinese characters" in said
    assert (asked > 0) == (kind in ("url", "index"))


def test_a_folder_that_could_be_packed_and_parquet(tmp_path, capsys) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.jpg").write_bytes(saved(scene(i % 3), "jpeg"))
        if i:
            (folder / f"{i}.txt").write_text("a\nb")
    assert run(folder, tmp_path) == 0
    said = capsys.readouterr().out
    assert "pictures 4; looked at 4" in said and "1 pictures without any" in said and "en: 6 of 3" in said
    assert "1 look as another picture does; 1 groups, 0 over splits" in said and "0.jpg = 3.jpg" in said
    rows = [{"image": {"bytes": png(np.zeros((4, 4, 3), np.uint8)), "path": None}, "text": "x"}] * 3
    (tmp_path / "parquet").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "parquet" / "00000.parquet")
    assert run(tmp_path / "parquet", tmp_path) == 0
    assert "pictures 3; looked at 3" in capsys.readouterr().out


def test_a_world_and_mistakes(tmp_path, capsys, monkeypatch) -> None:
    from datamodules import look_sources, worlds

    monkeypatch.setenv("LIGHTNING_T2I_DATA", str(tmp_path))
    small = worlds.ensure("shapes", train=6, val=2, test=2, retrieval=0)
    monkeypatch.setattr(look_sources, "data_folder", lambda source: small)
    assert run("shapes", tmp_path) == 0
    assert "train 6, val 2, test 2; looked at 10" in capsys.readouterr().out
    assert Shards(small, "train").index["width"].max() == 32
    monkeypatch.undo()
    for source, more, said in (
        ("shape", (), "did you mean shapes"),
        (tmp_path / "sheet.png", (), "No pictures"),
        (small, ("--samples", "0"), "Nothing to look at"),
    ):
        assert run(source, tmp_path, *more) == 2
        assert said in capsys.readouterr().err
    assert json.loads((small / "dataset.json").read_text())["name"] == "shapes"
