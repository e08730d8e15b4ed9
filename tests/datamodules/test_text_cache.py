"""Cached captions: the same conditions and losses as online, within the storage error; shared, killed, stale."""

import json
import multiprocessing
import os
import pickle
import signal
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_sets import as_rank, write_data_set
from range_server import serving
from safetensors import safe_open
from torch import nn

from datamodules import text_cache as module
from datamodules.captioned import refuse_other_encoders
from datamodules.encode import main
from datamodules.image_text import ImageText
from datamodules.index import main as index
from datamodules.prompts import Prompts
from datamodules.records import Shards
from datamodules.remote import fetch
from datamodules.retrieval import RetrievalPairs
from datamodules.streams import Streams
from datamodules.text_cache import (
    STORAGES,
    CachedTexts,
    TextCache,
    bytes_of_token,
    encode_texts,
    restored,
    stored,
    text_cache,
)
from lightning_modules.diffusion import Diffusion
from lightning_t2i.batch import Cond
from lightning_t2i.errors import UserError
from lightning_t2i.frozen import freeze
from lightning_t2i.networks.text_encoder import TextEncoder

SCENES = ["a red circle", "two blue squares", "a green cross left of a yellow triangle on a grey background"]
PIXART, SD, FLUX = ("assets/tiny/" + name for name in ("pixart", "sd", "flux"))


def words(i: int) -> dict[str, list[str]]:
    """Three captions: two that several samples have, one of its own."""
    return {"en": [SCENES[i % 3], f"{SCENES[(i + 1) % 3]} and {'a star ' * (i % 4)}"], "zh": [f"红色的圆形 {i}"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_data_set(tmp_path_factory.mktemp("data") / "toy", 50, captions=words)


def begun(folder, encoder: str, kind: type = ImageText, **options):
    options = {"text": "cached", "text_cache": TextCache(encoder, **options)} if encoder else options
    stream = kind(str(folder), languages=["en", "zh"], **({"size": 8} if kind is ImageText else {}), **options)
    stream.prepare()
    stream.setup()
    stream.begin(0, "main")
    return stream


@pytest.fixture(scope="module", params=[PIXART, SD])
def method(request):
    found = Diffusion(request.param, null_probability=0.3)
    found.configure_model()
    return found


@torch.no_grad()
@pytest.mark.parametrize(("storage", "bound"), [("fp32", 1e-5), ("bf16", 5e-5), ("fp8", 3e-4)])
def test_the_loss_is_that_of_captions_encoded_online(folder, method, storage, bound):
    """A T5 pipeline and a CLIP one, null conditions among them; nothing of the method knows of the cache."""
    online = begun(folder, "").load(np.arange(40), 0)
    cached = begun(folder, method.network, storage=storage).load(np.arange(40), 0)
    assert cached.caption == online.caption and len(set(online.caption)) > 20
    latents = torch.randn(40, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    online.latent = cached.latent = latents
    losses, conds = [], []
    for records in (online, cached):
        conds.append(method.condition(records))
        losses.append(method.loss(records, method.denoiser, conds[-1], method.keys))
    torch.testing.assert_close(losses[1], losses[0], rtol=bound, atol=0)
    assert conds[1] is cached.cond and conds[1].embeds.dtype == torch.float32
    ours, theirs = (cond.embeds if cond.mask is None else cond.embeds * cond.mask[..., None] for cond in conds[::-1])
    assert (ours - theirs).norm() <= {"fp32": 1e-5, "bf16": 2.0**-8, "fp8": 2.0**-4}[storage] * theirs.norm()
    assert conds[0].mask is None or torch.equal(conds[0].mask, conds[1].mask)
    other = method.loss(cached, method.denoiser, conds[1].index(torch.arange(39, -1, -1)), method.keys)
    assert abs(other / losses[0] - 1) > 10 * bound, "the captions of other samples"


def test_trimmed_batches_are_as_long_as_their_longest_caption(folder):
    whole, trimmed = (begun(folder, PIXART, trim=trim, storage="fp32").load(np.arange(8), 0).cond for trim in (0, 1))
    length = int(whole.mask.sum(1).max())
    assert trimmed.embeds.shape[1] == len(trimmed.null_embeds) == length < whole.embeds.shape[1] == 32
    assert torch.equal(trimmed.embeds, whole.embeds[:, :length]) and torch.equal(trimmed.mask, whole.mask[:, :length])
    assert torch.equal(trimmed.drop(torch.ones(8) > 0).embeds, whole.null().embeds[:, :length])
    assert begun(folder, SD, trim=True, storage="fp32").load(np.arange(8), 0).cond.embeds.shape[1] == 32, "no mask"


@pytest.mark.parametrize("source", [SD, FLUX])
def test_without_a_mask_every_position_counts(folder, source):
    """CLIP's padding differs from caption to caption, so none of it can be left out; pooled outputs are kept."""
    encoder = freeze(TextEncoder.from_pretrained(source))
    online, cached = begun(folder, "").load(np.arange(30), 0), begun(folder, source, storage="fp32")
    cached = cached.load(np.arange(30), 0).cond
    with torch.no_grad():
        cond = encoder(online.caption)
    assert (cond.embeds[:, -1] - cond.embeds[0, -1]).abs().amax(1)[1:].max() > 0.1, "the last of 32 positions"
    for name in ("embeds", "pooled", "null_embeds", "null_pooled"):
        ours, theirs = getattr(cached, name), getattr(cond, name)
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("storage", ["bf16", "fp8"])
def test_the_error_of_a_storage_is_bounded(storage):
    """Every value, also with outliers of a thousand times the rest, as T5 has them, and tokens of zeros."""
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)).pow(3)
    x[::7, 5] *= 1000
    x[::11] = 0
    x[1] *= 1e-15
    parts = stored(x, storage)
    error = (restored(**parts) - x).abs()
    step = x.abs().amax(1, keepdim=True) / 448 / 2**10
    bound = x.abs() / 2**8 if storage == "bf16" else torch.maximum(x.abs() / 2**4, step)
    assert (error <= bound * (1 + 1e-5)).all() and error.max() > 0
    assert sum(tensor.nbytes for tensor in parts.values()) == len(x) * bytes_of_token(64, storage)


def test_files_hold_real_tokens_alone_and_each_caption_once(folder):
    encode_texts(folder, "train", TextCache(PIXART), ["en"])
    cache = text_cache(Shards(folder, "train"), TextCache(PIXART), ["en"])
    encoder = TextEncoder.from_pretrained(PIXART)
    real = captions = 0
    for shard, name in enumerate(cache.names):
        texts = {text for i in range(shard * 20, min(shard * 20 + 20, 50)) for text in words(i)["en"]}
        with safe_open(cache.folder / name, "pt") as file:
            tokens = file.get_tensor("tokens")
        assert tokens.dtype == torch.bfloat16
        assert len(tokens) == int(encoder.tokenize(sorted(texts))["t5_mask"].sum())
        real, captions = real + len(tokens), captions + len(texts)
    about = cache.about()
    assert (about["real_tokens"], about["captions"], about["width"]) == (real, captions, 64)
    assert real < 0.6 * captions * about["tokens"], "padded they would be as large as this"
    assert 0 < about["relative_error"] < 2.0**-8
    size = sum((cache.folder / name).stat().st_size for name in cache.names)
    assert size == about["bytes"] < 1.4 * real * bytes_of_token(64, "bf16")


def test_a_killed_conversion_goes_on_where_it_was_and_shares_the_work(tmp_path, monkeypatch):
    """SIGKILL in the second of three shards; then two tasks of an array; the bytes are those of one process."""
    folders = [write_data_set(tmp_path / name / "toy", 50, captions=words) for name in ("whole", "killed")
               if (tmp_path / name).mkdir() is None]  # fmt: skip
    options, real, made = TextCache(PIXART, storage="fp8"), module._encoded, list[int]()
    whole, killed = (text_cache(Shards(folder, "train"), options, ["en"]) for folder in folders)
    encode_texts(folders[0], "train", options, ["en"])

    def counted(encoder, texts, *rest):
        made.append(len(texts))
        return real(encoder, texts, *rest)

    def dies(encoder, texts, *rest):
        if len(counted(encoder, texts, *rest)[0]) and len(made) == 2:
            (killed.folder / f".{killed.names[1]}.{os.getpid()}.tmp").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return real(encoder, texts, *rest)

    def convert(task: int = 0, tasks: int = 1) -> None:
        encode_texts(folders[1], "train", options, ["en"], task=task, tasks=tasks)

    monkeypatch.setattr(module, "_encoded", dies)
    process = multiprocessing.get_context("fork").Process(target=convert)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    monkeypatch.setattr(module, "_encoded", counted)
    with pytest.raises(UserError, match="incomplete"):
        CachedTexts(Shards(folders[1], "train"), options, ["en"])
    convert(1, 2)
    assert len(made) == 1, "the second shard of three; the first is there"
    with pytest.raises(UserError, match="incomplete"):
        killed.about()
    convert(0, 2)
    convert()
    assert len(made) == 2 and killed.about() == whole.about()
    for name in whole.names:
        assert (whole.folder / name).read_bytes() == (killed.folder / name).read_bytes()
    left = {file.name for file in killed.folder.iterdir()} - {".train.lock"}
    assert left == {*killed.names, "train.json"}


@pytest.mark.parametrize("encoder", [PIXART, FLUX])
def test_few_shards_of_embeddings_are_open_and_nothing_mapped_is_pickled(tmp_path, encoder, monkeypatch):
    many, options = write_data_set(tmp_path / "many", 30, captions=words, samples_per_shard=3), TextCache(encoder)
    encode_texts(many, "train", options, ["en"])
    shards = Shards(many, "train")
    whole = CachedTexts(shards, options, ["en"])
    expected = whole(range(30), [0.5] * 30)
    assert len(whole._files) == 10
    monkeypatch.setattr(module, "MAPPED", 2)
    few = CachedTexts(shards, options, ["en"])
    for texts in (few, pickle.loads(pickle.dumps(few))):
        found = texts(range(30), [0.5] * 30)
        assert len(texts._files) == 2
        for field in fields(Cond):
            one, other = getattr(found, field.name), getattr(expected, field.name)
            assert one is other or torch.equal(one, other), field.name
    assert len(pickle.dumps(whole._null)) < 10_000 + 2 * sum(t.nbytes for t in whole._null.values())


def test_captions_of_remote_shards_are_fetched_many_at_once(tmp_path, monkeypatch):
    """Pictures of more than the gap between them: the captions of each sample are a piece of their own."""
    monkeypatch.setattr("datamodules.extents.GAP", 0)
    local, asked = write_data_set(tmp_path / "toy", 50, captions=words), []
    with serving(local) as server:
        names = [f"{server.url}/{path.name}" for path in sorted(local.glob("*.tar"))]
        assert index([*names, "--out", str(tmp_path / "out"), "--name", "toy"]) == 0
        monkeypatch.setattr(
            "datamodules.extents.fetch", lambda ranges, options: asked.append(len(ranges)) or fetch(ranges, options)
        )
        target = encode_texts(tmp_path / "out", "train", TextCache(PIXART), ["en"])
    assert asked == [16, 4, 16, 4, 10]  # of shards of 20 samples
    encode_texts(local, "train", TextCache(PIXART), ["en"])
    for file in target.glob("*.safetensors"):
        assert file.read_bytes() == (local / target.name / file.name).read_bytes()


def test_stale_embeddings_are_refused(folder, tmp_path):
    options, shards = TextCache(PIXART), Shards(folder, "train")
    encode_texts(folder, "train", options, ["en"])
    CachedTexts(shards, options, ["en"])
    with pytest.raises(UserError, match="'length' has changed"):
        CachedTexts(shards, TextCache(PIXART, length=20), ["en"])
    with pytest.raises(UserError, match=r"no cached text embeddings[\s\S]*--text assets/tiny/sd --source"):
        CachedTexts(shards, TextCache(SD, storage="fp8"), ["en"])
    again = write_data_set(tmp_path / "again", 30, captions=words)
    cache, other = text_cache(shards, options, ["en"]), text_cache(Shards(again, "train"), options, ["en"])
    other.folder.mkdir()
    other.file.write_bytes(cache.file.read_bytes())
    with pytest.raises(UserError, match="'index' has changed"):
        CachedTexts(Shards(again, "train"), options, ["en"])
    with pytest.raises(UserError, match="'index' has changed"):
        encode_texts(again, "train", options, ["en"])


def test_a_method_with_another_text_encoder_is_refused(folder, method):
    def refuse(**changes):
        stream = begun(folder, changes.pop("encoder", method.network), **changes)
        refuse_other_encoders(method, {"main": stream})

    refuse()
    other = SD if method.network == PIXART else PIXART
    with pytest.raises(UserError, match="'encoder' differs"):
        refuse(encoder=other)
    encoder = method.text
    try:
        method.text = nn.Module()
        method.text.inner = TextEncoder.from_pretrained(method.network, t5_length=20)
        method.text.inner.requires_grad_(False)
        if method.network == PIXART:  # whose length is a choice
            with pytest.raises(UserError, match="'lengths' differs"):
                refuse()
        else:
            refuse()
        method.text.inner.requires_grad_(True)
        with pytest.raises(UserError, match="that is trained"):
            refuse()
    finally:
        method.text = encoder
    method.told = nn.Module()
    method.told.config = SimpleNamespace(guidance_embeds=True)
    try:
        with pytest.raises(UserError, match="guidance-distilled"):
            refuse()
    finally:
        del method.told
    data = as_rank(Streams(begun(folder, other)))
    data.trainer.lightning_module = method
    with pytest.raises(UserError, match=r"'encoder' differs[\s\S]*data\.main\.text"):
        data.train_dataloader()


def test_prompts_have_conditions_too_and_options_that_cannot_be_meant_are_refused(folder, tmp_path):
    stream = begun(folder, SD)
    ours, whole = begun(folder, SD, kind=Prompts).load(np.arange(30), 0), stream.load(np.arange(30), 0)
    assert ours.caption == whole.caption and torch.equal(ours.cond.embeds, whole.cond.embeds)
    maps = Path("/proc/self/maps")
    assert not maps.is_file() or "/train-000000.safetensors" in maps.read_text(), "mapped, not read"
    again = pickle.loads(pickle.dumps(stream))  # as a worker gets it
    assert torch.equal(again.load(np.arange(30), 0).cond.embeds, whole.cond.embeds)
    with pytest.raises(UserError, match="which text encoder"):
        ImageText(str(folder), text="cached")
    with pytest.raises(UserError, match="file"):
        Prompts(str(tmp_path / "prompts.txt"), text="cached", text_cache=TextCache(SD))
    with pytest.raises(UserError, match="Short"):
        RetrievalPairs(str(folder), short=True, text="cached", text_cache=TextCache(SD))


def test_command_line(folder, capsys, monkeypatch):
    arguments = ["--source", str(folder), "--text", SD, "--storage", "fp32", "--languages", "zh", "--batch_size", "7"]
    assert main([*arguments, "--task", "1", "--tasks", "2"]) == 0
    with pytest.raises(UserError, match="incomplete"):
        CachedTexts(Shards(folder, "train"), TextCache(SD, storage="fp32"), ["zh"])
    assert main(arguments) == 0
    place = capsys.readouterr().out.split()[-1]
    assert json.loads((folder / place / "train.json").read_text())["captions"] == 50
    monkeypatch.setattr(sys, "argv", ["encode", "--source", str(folder)])
    with pytest.raises(SystemExit):
        main()
    assert main(["--source", str(folder), "--text", SD, "--languages", "fr"]) == 2
    assert "error: " in capsys.readouterr().err and set(STORAGES) == {"fp32", "bf16", "fp8"}
