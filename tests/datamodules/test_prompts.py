"""Prompts come from an index or a file, and no picture is opened."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.image_text import ImageText
from datamodules.prompts import Prompts
from lightning_t2i.errors import UserError


def begun(stream, shuffle: bool = False):
    stream.prepare()
    stream.setup()
    stream.begin(0, "main", shuffle)
    return stream


def test_prompts_of_a_data_set_never_open_a_picture(make_data_set):
    stream = begun(Prompts(str(make_data_set(bad=range(50)))), shuffle=True)  # no picture of it can be opened
    records = stream.load(np.arange(50), 0)
    assert sorted(records.label.tolist()) == list(range(50))
    assert all(c in {f"{i} a", f"{i} b"} for c, i in zip(records.caption, records.label.tolist(), strict=True))
    assert records.scene[3]["row"] == records.label[3]
    assert records.image is None
    assert records.latent is None
    assert stream.bad == {}


def test_prompts_and_pictures_of_a_stream_name_the_same_samples(make_data_set):
    folder = str(make_data_set())
    prompts = begun(Prompts(folder), shuffle=True).load(np.arange(30), 0)
    pictures = begun(ImageText(folder, size=8), shuffle=True).load(np.arange(30), 0)
    assert prompts.id.tolist() == pictures.id.tolist()
    assert prompts.caption == pictures.caption


def test_text_file(tmp_path):
    file = tmp_path / "birds.txt"
    file.write_text("a red bird\n  a blue bird \n一只鸟\n", encoding="utf-8")
    stream = begun(Prompts(str(file), batch_size=3))
    records = stream.load(np.arange(4), 0)
    assert records.caption == ["a red bird", "a blue bird", "一只鸟", "a red bird"]
    assert len(set(records.id.tolist())) == 3
    assert records.label is None
    file.write_text("a red bird\na green bird\n一只鸟\n", encoding="utf-8")
    assert begun(Prompts(str(file))).identity["sha"] != stream.identity["sha"]


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_prompts_keep_their_places_whatever_is_in_them(tmp_path, suffix):
    """A prompt's line is its key: only an end of line begins another."""
    texts = ["one\u2028two", "three\u0085four", "five"]
    file = tmp_path / f"prompts.{suffix}"
    lines = texts if suffix == "txt" else [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    file.write_bytes("\r\n".join(lines).encode())
    stream = begun(Prompts(str(file)))
    assert len(stream) == 3 and stream.load(np.arange(3), 0).caption == texts


def test_jsonl_file(tmp_path):
    lines = [
        {"prompt": "one", "label": 4, "scene": {"n": 1}},
        {"caption": "two", "label": 5, "scene": {"n": 2}},
        {"caption": ["three", "three"], "label": 6, "scene": {"n": 3}},
        {"caption": {"zh": ["四"], "en": ["four"]}, "label": 7, "scene": {"n": 4}},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    records = begun(Prompts(str(file))).load(np.arange(4), 0)
    assert records.caption == ["one", "two", "three", "four"]
    assert records.label.tolist() == [4, 5, 6, 7]
    assert [scene["n"] for scene in records.scene] == [1, 2, 3, 4]
    assert begun(Prompts(str(file), languages=["zh"])).load([3], 0).caption == ["四"]


def test_parquet_file(tmp_path):
    file = tmp_path / "prompts.parquet"
    rows = [
        {"prompt": "one", "label": 4, "scene": {"n": 1}, "other": 1.0},
        {"prompt": "two", "label": 5, "scene": {"n": 2}, "other": 2.0},
    ]
    pq.write_table(pa.Table.from_pylist(rows), file)
    stream = begun(Prompts(str(file)))
    records = stream.load(np.arange(3), 0)
    assert records.caption == ["one", "two", "one"] and records.label.tolist() == [4, 5, 4]
    assert records.scene[1] == {"n": 2} and len(set(records.id.tolist())) == 2
    assert begun(Prompts(str(file), limit=1)).identity["sha"] != stream.identity["sha"]
    captions = [{"caption": {"en": ["four"], "zh": ["四"]}}, {"caption": {"en": ["five"], "zh": None}}]
    pq.write_table(pa.Table.from_pylist(captions), file)
    assert begun(Prompts(str(file), languages=["zh", "en"])).load(np.arange(2), 0).caption[1] == "five"
    with pytest.raises(UserError, match=r"Empty prompt[\s\S]*prompts.parquet:2\n"):
        begun(Prompts(str(file), languages=["zh"]))
    pq.write_table(pa.table({"caption": [["six", "six"], ["seven"]]}), file)
    assert begun(Prompts(str(file))).load(np.arange(2), 0).caption == ["six", "seven"]
    file.write_bytes(b"no table")
    with pytest.raises(UserError, match="Not a Parquet file"):
        begun(Prompts(str(file)))
    with pytest.raises(UserError, match="no columns to filter on"):
        Prompts(str(file), where={"width": [1, None]})


def test_limit(tmp_path):
    file = tmp_path / "many.txt"
    file.write_text("\n".join(f"prompt {i}" for i in range(10)))
    assert len(begun(Prompts(str(file), limit=4))) == 4


@pytest.mark.parametrize(
    ("suffix", "text", "line", "what"),
    [
        ("txt", "a\n\nb\n", 2, "Empty prompt"),
        ("txt", "a\nb\n   \n", 3, "Empty prompt"),
        ("jsonl", '{"prompt": "a"}\n{"prompt": " "}\n', 2, "Empty prompt"),
        ("jsonl", '{"prompt": "a"}\n{"text": "b"}\n', 2, "Empty prompt"),
        ("jsonl", '{"prompt": "a"}\n{"caption": {"fr": ["b"]}}\n', 2, "Empty prompt"),
        ("jsonl", '["a"]\n', 1, "Empty prompt"),
        ("jsonl", '{"prompt": "a"}\n{"prompt": \n', 2, "Not valid JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, suffix, text, line, what):
    file = tmp_path / f"prompts.{suffix}"
    file.write_text(text)
    with pytest.raises(UserError, match=f"{what}[\\s\\S]*prompts.{suffix}:{line}\n"):
        begun(Prompts(str(file)))


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(UserError, match="No such prompt file"):
        begun(Prompts(str(tmp_path / "none.txt")))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="empty"):
        begun(Prompts(str(tmp_path / "empty.txt")))
    with pytest.raises(UserError, match="No language"):
        Prompts(str(tmp_path / "empty.txt"), languages=[])


def test_a_sample_without_a_usable_caption_is_replaced(make_data_set):
    stream = begun(Prompts(str(make_data_set(captions=lambda i: {"en": [" " if i == 7 else f"{i}"]})), block=10))
    stream.max_bad_fraction = 0.1
    assert stream.load([6, 7, 8], 0).caption == ["6", "8", "8"]
    assert "no caption in en" in stream.take_fresh().bad["train-000000.tar:k0007"]
