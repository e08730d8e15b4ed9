"""The numbers that decide whether captions are cached: bytes, operations and epochs are those of the real thing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from data_sets import write_data_set

from datamodules.image_text import ImageText
from datamodules.records import Shards
from datamodules.text_cache import TextCache, encode_texts, text_cache
from lightning_modules.diffusion import Diffusion
from lightning_t2i.networks.text_encoder import TextEncoder
from lightning_t2i.preflight.captions import captions_of, text_caches
from lightning_t2i.preflight.rehearsal import rehearse
from lightning_t2i.preflight.sources import source_of
from lightning_t2i.preflight.world import World

PIXART = "assets/tiny/pixart"
ROWS, STEPS, BATCH = 60, 90, 8


def words(i: int) -> dict[str, list[str]]:
    return {"en": [f"a red circle left of {'a blue ' * (i % 5)} square number {i}", f"number {i}"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_data_set(tmp_path_factory.mktemp("data") / "toy", ROWS, captions=words)


def planned(folder, steps: int = STEPS, **options):
    method = Diffusion(PIXART)
    stream = ImageText(str(folder), batch_size=BATCH, size=32, **options)
    bill = rehearse(method, SimpleNamespace(training={"main": stream}), World(1, 1, None), steps)
    (found,) = captions_of(method, {"main": stream}, [source_of("main", stream)], bill, 1, steps)
    return found, bill, stream


def test_bytes_operations_and_epochs(folder):
    found, bill, _ = planned(folder)
    assert (found.text, found.captions, found.length) == ("online", 2 * ROWS, 32)
    assert found.epochs == STEPS * BATCH / ROWS == 12
    texts = [text for i in range(ROWS) for text in words(i)["en"]]
    real = int(TextEncoder.from_pretrained(PIXART).tokenize(texts)["t5_mask"].sum())
    assert found.tokens == pytest.approx(real / len(texts)) and found.tokens < 20
    for storage in ("bf16", "fp8"):
        encode_texts(folder, "train", TextCache(PIXART, storage=storage), ["en"])
        file_sizes = text_cache(Shards(folder, "train"), TextCache(PIXART, storage=storage), ["en"])
        headers = 3 * 1500  # of three files, which are larger than a real one's is to its megabytes
        assert file_sizes.about()["bytes"] == pytest.approx(found.captions * found.sizes[storage], abs=headers)
    assert found.sizes["padded"] > 1.7 * found.sizes["bf16"]
    assert found.spent == pytest.approx(STEPS * bill.flops_of["text"], rel=1e-6), "what the rehearsal itself counted"
    assert found.share == pytest.approx(bill.flops_of["text"] / bill.flops_of.total())
    assert found.made == pytest.approx(found.spent / (STEPS * BATCH) * 2 * ROWS * found.tokens / 32)


def test_a_cached_stream_costs_no_encoder_and_the_numbers_stay(folder):
    online, _, _ = planned(folder)
    cache = TextCache(PIXART, storage="fp32")
    cached, bill, stream = planned(folder, text="cached", text_cache=cache)
    assert bill.flops_of["text"] == 0 < cached.share == pytest.approx(online.share)
    assert (cached.spent, cached.made, cached.better) == (online.spent, online.made, online.better)
    assert bill.batch["main"] > BATCH * 4 * (3 * 32 * 32 + 32 * 64), "pictures and conditions"
    (store,) = text_caches([cached], {"main": stream})
    assert store.place.name.startswith("text-") and store.key == "data.main.text" and store.bytes is None
    encode_texts(folder, "train", cache, ["en"])
    assert list(text_caches([cached], {"main": stream})) == []


def test_what_the_numbers_speak_for(folder, monkeypatch):
    """Half an epoch does not pay for a cache; a small share of the operations does not, nor does a full disk."""
    monkeypatch.setattr("lightning_t2i.preflight.captions.SHARE", 0.0)
    assert planned(folder)[0].better == "cached"
    assert planned(folder, steps=4)[0].better == "online", "32 captions would be encoded, 120 are cached"
    monkeypatch.setattr("lightning_t2i.preflight.captions.SHARE", 1.1)
    assert planned(folder)[0].better == "online"
    monkeypatch.setattr("lightning_t2i.preflight.captions.SHARE", 0.0)
    monkeypatch.setattr("lightning_t2i.preflight.captions.free_bytes", lambda place: 1000)
    assert planned(folder)[0].better == "online"
    unknown = planned("data/none")[0]
    assert (unknown.captions, unknown.made, unknown.better, unknown.tokens) == (None, None, "unknown", 32)
