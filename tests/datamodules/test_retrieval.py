"""Retrieval sets: all captions of a picture, short Chinese ones of scenes, published forms, one data module."""

import base64
import json
from pathlib import Path

import pytest
import torch
from data_sets import as_rank, gradient, png, write_data_set

from datamodules.pack import pack
from datamodules.records import Shards
from datamodules.retrieval import RetrievalDataModule, RetrievalPairs
from datamodules.retrieval_sets import KINDS, convert, main
from datamodules.worlds import shapes
from datamodules.worlds.shapes_captions import short_chinese
from lightning_t2i.batch import Records
from lightning_t2i.errors import UserError
from lightning_t2i.networks.chinese_tokenizer import ChineseTokenizer


def several(i: int) -> dict[str, list[str]]:
    return {"zh": [f"{i} 中{j}" for j in range(1 + i % 3)], "en": [f"{i} a"]}


def stream(folder: Path, **options) -> RetrievalPairs:
    found = RetrievalPairs(str(folder), size=8, languages=["zh"], **options)
    found.setup()
    found.begin(0, "main")
    return found


@pytest.mark.parametrize("in_memory", [False, True])
def test_every_record_has_all_captions_and_one_drawn(tmp_path, in_memory):
    data = stream(write_data_set(tmp_path / "d", 12, captions=several), in_memory=in_memory)
    drawn = set()
    for k in range(20):
        records = data.load(range(k * 6, k * 6 + 6), k)
        for text, own, label in zip(records.caption, records.captions, records.label.tolist(), strict=True):
            assert own == several(label)["zh"] and text in own
            drawn.add((label, text))
    assert len(drawn) > 18  # of 24
    part = records.slice(2, 4)
    assert isinstance(part, Records) and part.captions == records.captions[2:4]


def test_a_bad_picture_brings_the_captions_of_its_stand_in(tmp_path):
    data = stream(write_data_set(tmp_path / "d", 12, bad=[3], captions=several), max_bad_fraction=0.2)
    for k in range(3):
        records = data.load(range(k * 4, k * 4 + 4), k)
        assert records.captions == [several(label)["zh"] for label in records.label.tolist()]


def test_short_captions_of_scenes_fit_twenty_tokens_and_tell_scenes_apart():
    tokenizer = ChineseTokenizer()
    scenes = list(shapes.retrieval_scenes(0, 200)) + [shapes.scene(0, "train", i) for i in range(300)]
    texts = [text for scene in scenes for text in short_chinese(scene)]
    ids = tokenizer(texts, full=True)
    assert int((ids > 0).sum(1).max()) <= 20 and 100 not in ids
    example = next(s for s in scenes if s["relation"] == "left of")
    a, b = example["objects"]
    first, second = short_chinese(example)
    assert "左边" in first and "右边" in second and first.endswith("背景")
    assert a["colour"] != b["colour"]
    sets = [frozenset(short_chinese(scene)) for scene in scenes[:200] if scene["task"] == "color_attr"]
    assert len(set(sets)) == len(sets)


def test_the_shapes_world_gets_short_captions(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_T2I_DATA", str(tmp_path))
    from datamodules import worlds

    folder = worlds.ensure("shapes", train=6, val=0, test=0, retrieval=0)
    short, own = (RetrievalPairs(str(folder), languages=["zh"], short=s, batch_size=6) for s in (True, False))
    for data in (short, own):
        data.setup()
        data.begin(0, "main", shuffle=False)
    a, b = (data.load(range(6), 0) for data in (short, own))
    assert a.captions == [short_chinese(scene) for scene in a.scene]
    assert a.captions != b.captions and short.identity != own.identity


def test_one_module_for_a_retrieval_set(tmp_path):
    folder = write_data_set(tmp_path / "d", 12, captions=several, splits=("train", "val", "test"))
    options = {"size": 8, "languages": ["zh"]}
    data = as_rank(RetrievalDataModule(str(folder), 4, 3, options=options))
    batch = next(iter(data.train_dataloader()))
    assert len(batch["main"]) == 4 and len(batch["main"].captions) == 4
    assert sum(len(b["main"]) for b in data.val_dataloader()) == 12
    assert data.finite["test"].batch_size == 3
    assert [len(b["main"]) for b in data.val_dataloader()] == [3] * 4  # val_batch_size


def test_only_training_mirrors_and_crops_at_random(tmp_path):
    facts = {"splits": ("train", "val", "test"), "size": lambda _: (24, 16)}
    folder = write_data_set(tmp_path / "d", 12, captions=several, **facts)
    found = {}
    for name, changes in (("plain", {}), ("changed", {"flip": True, "crop": "random"})):
        options = {"size": 8, "languages": ["zh"], **changes}
        data = as_rank(RetrievalDataModule(str(folder), 12, 12, options=options))
        data.setup("test")
        loaders = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
        found[name] = [next(iter(loader))["main"].image for loader in loaders]
    same = [torch.equal(a, b) for a, b in zip(*found.values(), strict=True)]
    assert same == [False, True, True]
    main, val, test = (data.training["main"], *data.finite.values())
    assert (main.flip, main.crop) == (True, "random")
    for stream in (val, test):
        assert (stream.flip, stream.crop, stream.crops) == (False, "centre", None)


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("10", "20"):
        (folder / f"{name}.png").write_bytes(png(gradient(int(name))))
    return folder


ROWS = "".join(
    json.dumps(r) + "\n" for r in ({"query_text": "甲", "item_ids": [10, 20]}, {"query_text": "乙", "item_ids": [20]})
)
FORMS = {
    "flickr30k-cn": ("10.jpg#0\t甲\n20.jpg#0\t甲\n20.jpg#1\t乙 \n", {"10": ["甲"], "20": ["甲", "乙"]}),
    "coco-cn": ("10#zhm#0\t甲\n20#zhm#0\t甲\n20#zhm#1\t乙\n", {"10": ["甲"], "20": ["甲", "乙"]}),
    "aic-icc": (
        json.dumps([{"image_id": "10.jpg", "caption": ["甲"]}, {"image_id": "20.jpg", "caption": ["甲", "乙"]}]),
        {"10": ["甲"], "20": ["甲", "乙"]},
    ),
    "muge": (ROWS, {"10": ["甲"], "20": ["甲", "乙"]}),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMS)
def test_published_forms_become_a_data_set(tmp_path, pictures, kind):
    text, wanted = FORMS[kind]
    (tmp_path / "annotations").write_text(text, encoding="utf-8")
    source = pictures
    if kind == "muge":
        source = tmp_path / "pictures.tsv"
        lines = [f"{p.stem}\t{base64.b64encode(p.read_bytes()).decode()}" for p in pictures.iterdir()]
        source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for split in ("train", "val"):
        assert convert(kind, tmp_path / "annotations", source, tmp_path / "out", split) == 2
    with pytest.raises(UserError, match="there already"):
        convert(kind, tmp_path / "annotations", source, tmp_path / "out", "val")
    if kind == "muge":
        return  # the pictures are one for both splits; pack reads a picture once
    table = [json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").read_text().splitlines()]
    assert {Path(r["file_name"]).stem: r["captions"] for r in table} == wanted


@pytest.mark.parametrize("kind", ["flickr30k-cn", "muge"])
def test_captions_are_cut_at_ends_of_lines_alone(kind):
    text = "甲\u2028乙\u0085丙"
    told = json.dumps({"query_text": text, "item_ids": [10]}, ensure_ascii=False) if kind == "muge" else f"10#0\t{text}"
    assert KINDS[kind](f"{told}\r\n{told}\n") == {"10": [text] * 2}


def test_a_broken_off_conversion_leaves_the_table_as_it_was(tmp_path, pictures, monkeypatch):
    (tmp_path / "annotations").write_text("10.jpg#0\t甲\n", encoding="utf-8")
    convert("flickr30k-cn", tmp_path / "annotations", pictures, tmp_path / "out", "train")
    table = tmp_path / "out" / "captions.jsonl"
    before = table.read_bytes()

    def broken_off(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", broken_off)
    with pytest.raises(KeyboardInterrupt):
        convert("flickr30k-cn", tmp_path / "annotations", pictures, tmp_path / "out", "val")
    assert table.read_bytes() == before


def test_a_converted_set_is_packed(tmp_path, pictures):
    for split, name in (("train", "10"), ("val", "20")):
        (tmp_path / "annotations").write_text(f"{name}.jpg#0\t甲\n{name}.jpg#1\t乙\n", encoding="utf-8")
        convert("flickr30k-cn", tmp_path / "annotations", pictures, tmp_path / "out", split)
    folder = pack(tmp_path / "out", tmp_path / "set", language="zh")
    for split in ("train", "val"):
        assert Shards(folder, split).meta(0)["caption"] == {"zh": ["甲", "乙"]}


def test_mistakes_are_named(tmp_path, pictures, capsys):
    (tmp_path / "annotations").write_text("30.jpg#0\t甲\n", encoding="utf-8")
    arguments = [str(tmp_path / name) for name in ("annotations", "pictures", "out")]
    assert main(["flickr30k-cn", *arguments]) == 2
    assert "the first is 30" in capsys.readouterr().err
    assert main(["nothing", *arguments]) == 2
    assert "No such retrieval set" in capsys.readouterr().err
    (tmp_path / "annotations").write_text("10.jpg#0\t甲\n", encoding="utf-8")
    assert main(["flickr30k-cn", *arguments]) == 0
    assert "1 pictures of train" in capsys.readouterr().out
