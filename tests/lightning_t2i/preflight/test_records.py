"""Batches by what the streams declare, and what is known of data, caches and loaders without opening them."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from datamodules.image_text import ImageText
from datamodules.pairs import Pairs
from datamodules.prompts import Prompts
from datamodules.shards import index_path
from datamodules.worlds import ensure
from lightning_t2i.preflight.records import UNKNOWN, batch_of, captions, some_captions
from lightning_t2i.preflight.sources import caches, latent_shape, ram_per_process, source_of
from lightning_t2i.preflight.stand_ins import Tokenizer

ROWS = 40


@pytest.fixture(scope="module")
def scenes():
    return str(ensure("shapes", train=ROWS, val=0, test=0, retrieval=0))


def stream(scenes: str, **options) -> ImageText:
    return ImageText(source=scenes, batch_size=8, **options)


def test_a_batch_has_the_shapes_of_the_real_one(scenes):
    """Of two processes each has half; the real batch is read and compared."""
    streams = {"main": stream(scenes), "real": stream(scenes, latents="assets/tiny/vae")}
    with FakeTensorMode(allow_non_fake_inputs=True):
        batch = batch_of(streams, 2, SimpleNamespace())
    real = stream(scenes)
    real.setup()
    real.begin(0, "main")
    loaded = real.load(range(4), 0)
    assert batch["main"].image.shape == loaded.image.shape and batch["main"].image.dtype == loaded.image.dtype
    assert len(batch["main"].caption) == len(loaded.caption) == len(batch["main"]) == 4
    assert batch["real"].latent.shape == (4, 4, 8, 8) and batch["real"].image is None


def test_prompts_and_pairs_follow_the_method():
    method = SimpleNamespace(codec=SimpleNamespace(vae=object()), shape=(4, 8, 8), classes=0)
    streams = {
        "main": Prompts(source="shapes", batch_size=6),
        "pairs": Pairs(source="assets/tiny/pairs", teacher="assets/tiny/sd", guidance=4.5, batch_size=2),
    }
    batch = batch_of(streams, 1, method)
    assert (len(batch["main"]), batch["main"].image, batch["pairs"].latent.shape) == (6, None, (2, 4, 8, 8))
    method.codec.vae, method.classes = None, 10
    pairs = batch_of(streams, 1, method)["pairs"]
    assert pairs.image.shape == (2, 4, 8, 8) and pairs.label.tolist() == [0, 0]


def test_captions_are_the_longest_of_the_data(scenes):
    """Those of a data set that is there; a tokenizer gives others their full length."""
    found = captions(stream(scenes), 3)
    assert len(found) == 3 and len(found[0]) == max(map(len, captions(stream(scenes), ROWS)))
    assert captions(stream("data/none"), 2) == [UNKNOWN] * 2
    tokenizer = Tokenizer(77, lambda: lambda texts: {"input_ids": [[0] * len(text.split()) for text in texts]})
    assert tokenizer(found, padding="longest")["input_ids"].shape == (3, max(len(text.split()) for text in found))
    assert tokenizer([UNKNOWN], padding="longest", max_length=20)["input_ids"].shape == (1, 20)
    assert tokenizer(found, padding="max_length")["attention_mask"].shape == (3, 77)


def test_captions_behind_the_network_are_not_asked_for(scenes, tmp_path, monkeypatch):
    """`check` promises to open nothing there; the index of such data is a file beside others."""
    monkeypatch.setattr("datamodules.extents.fetch", lambda *_: pytest.fail("the network was asked"))
    monkeypatch.setattr("datamodules.records.decode", lambda *_: pytest.fail("a picture was read"))
    folder = shutil.copytree(ensure("shapes", train=ROWS, val=0, test=0, retrieval=0), tmp_path / "far")
    file = index_path(folder, "train")
    table = pq.read_table(file)
    facts = json.loads(table.schema.metadata[b"t2i"])
    assert len(some_captions(stream(str(folder)))) == ROWS
    facts["shards"] = [f"https://example.org/{name}" for name in facts["shards"]]
    pq.write_table(table.replace_schema_metadata({b"t2i": json.dumps(facts)}), file)
    assert some_captions(stream(str(folder))) == []
    assert captions(stream(str(folder)), 1) == [UNKNOWN]


def test_sources_and_their_memory(scenes, tmp_path):
    kept = source_of("main", stream(scenes, in_memory=True, limit=30))
    assert (kept.there, kept.rows, kept.kept) == (True, 30, 30 * 3 * 32 * 32) and kept.shards and kept.index > 0
    assert source_of("main", stream(str(tmp_path))).there is False
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    assert source_of("main", Prompts(source=str(tmp_path / "prompts.txt"))).rows == 2
    none = ram_per_process([kept], {"main": 1000}, workers=0)
    plans = 4 * 30 * 2  # each worker comes to have one of its own
    assert ram_per_process([kept], {"main": 1000}, workers=4) == none + 7 * 1000 + plans
    assert none == 1000 + kept.kept + 30 * (kept.index + 2)


def test_caches_that_are_still_to_be_made(scenes):
    assert latent_shape("assets/tiny/vae", 32) == (4, 8, 8)
    (cache,) = caches({"main": stream(scenes, latents="assets/tiny/vae"), "real": stream(scenes)})
    assert cache.bytes == ROWS * 4 * 8 * 8 * 2 and cache.key == "data.main.latents"
    (views,) = caches({"main": stream(scenes, latents="assets/tiny/vae", crop="random", crops=3, flip=True)})
    assert views.bytes == 6 * cache.bytes and views.place != cache.place


@pytest.mark.parametrize("complete", [False, True])
def test_a_cache_that_is_half_made_is_still_to_be_made(scenes, tmp_path, complete):
    folder = shutil.copytree(scenes, tmp_path / "copy", ignore=shutil.ignore_patterns("latents-*"))
    streams = {"main": stream(str(folder), latents="assets/tiny/vae")}
    (cache,) = caches(streams)
    cache.place.mkdir()
    (cache.place / "train.json").write_text(json.dumps({"complete": complete}))
    assert len(list(caches(streams))) == (not complete)
