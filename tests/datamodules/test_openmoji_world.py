"""The openmoji world: real pictures, real names in two languages, splits without leaks, attribution."""

import io
import json
import re
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

from datamodules import worlds
from datamodules.records import Shards
from datamodules.shards import Index
from datamodules.worlds import openmoji

SPLITS = ("train", "val", "test")
TONE = re.compile(r"-1F3F[B-F]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_T2I_DATA", str(tmp_path_factory.mktemp("data")))
        yield worlds.ensure("openmoji")


@pytest.fixture(scope="module")
def samples(folder):
    """split -> key -> (metadata, pixels)."""
    found: dict = {}
    for split in SPLITS:
        shards = Shards(folder, split)
        keys = shards.index["key"]
        found[split] = {keys[i]: (shards.meta(i), np.asarray(shards.picture(i))) for i in range(len(shards))}
    return found


def test_sizes_and_attribution(folder, samples):
    about = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    counts = about["splits"]
    assert counts == {split: len(samples[split]) for split in SPLITS}
    total = sum(counts.values())
    assert total > 1900
    assert counts["train"] / total == pytest.approx(0.90, abs=0.03)
    assert counts["val"] / total == pytest.approx(0.05, abs=0.02)
    assert about["licence"] == "CC-BY-SA-4.0" and "OpenMoji" in about["attribution"] and "4.0" in about["licence_url"]


def test_every_picture_has_names_in_both_languages(folder, samples):
    for split in SPLITS:
        index = Index.load(folder, split)
        assert index["caption_en"].all() and index["caption_zh"].all()
        for meta, _ in samples[split].values():
            texts = meta["caption"]["en"] + meta["caption"]["zh"]
            assert all(text == text.strip() and text and ":" not in text and "_" not in text for text in texts)
            assert len(set(meta["caption"]["en"])) == len(meta["caption"]["en"])
    everything = [key for split in SPLITS for key in samples[split]]
    assert len(everything) == len(set(everything))


def test_names_are_the_real_ones(samples):
    named = {key: meta["caption"] for split in SPLITS for key, (meta, _) in samples[split].items()}
    assert named["1F34C"] == {"en": ["banana"], "zh": ["香蕉"]}
    assert named["1F607"] == {"en": ["smiling face with halo", "innocent"], "zh": ["微笑天使"]}
    assert named["1F1F7-1F1F4"]["en"] == ["Romania", "flag for Romania"]  # but not the alias "ro"


@pytest.mark.parametrize(
    ("alias", "kept"),
    [
        (":no_good_man:", True),
        (":ng_man:", False),
        (":de:", False),
        (":man_gesturing_no:", False),
        (":face_palm:", True),
    ],
)
def test_aliases_that_are_words_and_new(alias, kept):
    texts = openmoji.captions({"en": ":man_gesturing_NO:", "zh": ":禁止手势男:", "alias": [alias]})
    assert texts["en"][0] == "man gesturing NO" and texts["zh"] == ["禁止手势男"]
    assert (len(texts["en"]) == 2) == kept


def test_pictures_show_something_on_white(samples):
    for split in SPLITS:
        for key, (_, pixels) in samples[split].items():
            assert pixels.shape == (32, 32, 3), key
            assert pixels.std() > 5, key
    whites = [(pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all() for _, pixels in samples["train"].values()]
    assert np.mean(whites) > 0.9


def test_banana_is_yellow(samples):
    pixels = next(samples[split]["1F34C"][1] for split in SPLITS if "1F34C" in samples[split])
    shown = pixels[(pixels.max(-1) > 150) & (pixels.min(-1) < 150)].mean(0)
    assert shown[0] > 180 and shown[1] > 150 and shown[2] < 120


def test_same_bytes_again_and_other_sizes(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_T2I_DATA", str(tmp_path))
    again = worlds.ensure("openmoji")
    assert again.name == folder.name
    assert json.loads((again / "dataset.json").read_text()) == json.loads((folder / "dataset.json").read_text())
    monkeypatch.setattr(openmoji, "pictures", lambda tones, some=openmoji.pictures: list(some(tones))[::100])
    large = worlds.ensure("openmoji", size=48)
    assert large != again
    index = Index.load(large, "train")
    assert set(index["width"]) == set(index["height"]) == {48}
    with index.shards[0].open("rb") as file:
        file.seek(index["offset"][0])
        assert Image.open(io.BytesIO(file.read(index["size"][0]))).size == (48, 48)


def test_skin_tones_stay_in_the_split_of_their_picture():
    keys = [key for key, _, _ in openmoji.pictures(skin_tones=True)]
    plain = [key for key, _, _ in openmoji.pictures(skin_tones=False)]
    assert set(plain) == {key for key in keys if not TONE.search(key)}
    assert len(keys) - len(plain) > 2000
    splits = defaultdict(set)
    for key in keys:
        splits[TONE.sub("", key)].add(openmoji.split_of(key))
    assert all(len(found) == 1 for found in splits.values())
    assert {split for found in splits.values() for split in found} == set(SPLITS)


def test_files_and_emoji_agree():
    for key, path, text in openmoji.pictures(skin_tones=False):
        assert path.stem == key
        assert key.replace("-FE0F", "") == "-".join(f"{ord(c):04X}" for c in text if c != "\ufe0f")
