"""Cached latents: equal to the autoencoder's, found by hash, built once, refused when stale."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from datamodules import encode as module
from datamodules.encode import Latents, Views, encode, latent_folder
from datamodules.image_text import ImageText
from datamodules.pictures import square, to_images
from datamodules.records import Shards
from datamodules.text_cache import TextCache
from lightning_t2i.errors import UserError
from lightning_t2i.networks.codec import LatentCodec


def save_vae(folder, seed: int) -> str:
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=2,
        scaling_factor=0.7,
    )
    vae.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def vae(tmp_path) -> str:
    return save_vae(tmp_path / "vae", 0)


def begun(stream: ImageText) -> ImageText:
    stream.prepare()
    stream.setup()
    stream.begin(0, "main")
    return stream


def test_a_stream_with_latents_yields_what_the_autoencoder_makes_of_its_pictures(make_data_set, vae):
    folder = str(make_data_set())
    latents = begun(ImageText(folder, size=8, latents=vae)).load(np.arange(40), 0)
    pictures = begun(ImageText(folder, size=8)).load(np.arange(40), 0)
    assert latents.image is None
    assert latents.id.tolist() == pictures.id.tolist()
    assert latents.caption == pictures.caption
    with torch.no_grad():
        expected = LatentCodec.from_pretrained(vae).eval().encode(pictures.image)
    assert latents.latent.dtype == torch.float16
    found = LatentCodec().latents(latents)
    torch.testing.assert_close(found, expected.to(torch.float16).float(), atol=1e-3, rtol=2e-3)
    assert expected.flatten(1).std(0).min() > 1e-3  # pictures differ, so a wrong row would be seen


def test_latents_follow_filters_and_limits(make_data_set, vae):
    folder = str(make_data_set(captions=lambda i: {"en": ["x"]} if i % 3 else {"en": ["x"], "zh": ["y"]}))
    whole = begun(ImageText(folder, size=8, latents=vae)).load(np.arange(50), 0)
    some = begun(ImageText(folder, size=8, latents=vae, languages=["zh"], limit=9)).load(np.arange(9), 0)
    by_label = dict(zip(whole.label.tolist(), whole.latent, strict=True))
    assert sorted(some.label.tolist()) == list(range(0, 27, 3))
    for label, latent in zip(some.label.tolist(), some.latent, strict=True):
        assert torch.equal(latent, by_label[label])


def test_files_are_one_array_a_shard_with_their_facts(make_data_set, vae):
    folder = make_data_set()
    target = encode(folder, "train", vae, 8)
    arrays = [np.load(target / f"train-{i:06d}.npy", mmap_mode="r") for i in range(3)]
    assert [a.shape for a in arrays] == [(20, 2, 4, 4), (20, 2, 4, 4), (10, 2, 4, 4)]
    assert {a.dtype for a in arrays} == {np.dtype(np.float16)}
    about = json.loads((target / "train.json").read_text())
    assert about["complete"] is True
    assert about["shape"] == [2, 4, 4]
    assert about["scaling"] == 0.7
    values = np.concatenate(arrays).astype(np.float64)
    assert about["mean"] == pytest.approx(values.mean())
    assert about["std"] == pytest.approx(values.std())


def test_encoding_is_done_once_and_goes_on_after_an_interruption(make_data_set, vae, monkeypatch):
    folder = make_data_set()
    calls = []
    real = module._encode_rows

    def counted(codec, shards, rows, *rest):
        calls.append(int(shards.index["shard"][rows[0]]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(codec, shards, rows, *rest)

    monkeypatch.setattr(module, "_encode_rows", counted)
    with pytest.raises(KeyboardInterrupt):
        encode(folder, "train", vae, 8)
    with pytest.raises(UserError, match="incomplete"):
        Latents(Shards(folder, "train"), vae, 8)
    encode(folder, "train", vae, 8)
    encode(folder, "train", vae, 8)
    assert calls == [0, 1, 1, 2]
    assert not [file for file in latent_folder(folder, vae, 8).iterdir() if "npy." in file.name]


def test_a_bad_picture_is_replaced_with_its_latent(make_data_set, vae):
    folder = make_data_set(bad=(5,))
    stream = begun(ImageText(str(folder), size=8, latents=vae, block=10, max_bad_fraction=0.1))
    records = stream.load(np.arange(50), 0)
    rows = stream.order.rows(np.arange(50)).tolist()
    assert records.label.tolist() == [6 if row == 5 else row for row in rows]
    assert torch.equal(records.latent[rows.index(5)], records.latent[rows.index(6)])
    assert stream.take_fresh().bad == {"train-000000.tar:k0005": "picture: unknown format"}


def test_stale_and_missing_latents_are_refused(make_data_set, vae, tmp_path):
    folder = make_data_set()
    shards = Shards(folder, "train")
    with pytest.raises(UserError, match=r"no cached latents[\s\S]*datamodules\.encode --vae"):
        Latents(shards, vae, 8)
    encode(folder, "train", vae, 8)
    Latents(shards, vae, 8)
    with pytest.raises(UserError, match="no cached latents"):
        Latents(shards, vae, 16)
    other = save_vae(tmp_path / "other", 1)
    with pytest.raises(UserError, match="no cached latents"):
        Latents(shards, other, 8)
    # The data set was packed again under the same name, with the latents left in place.
    again = make_data_set(name="again", n=30)
    shutil.copytree(latent_folder(folder, vae, 8), latent_folder(again, vae, 8))
    with pytest.raises(UserError, match="'index' has changed"):
        Latents(Shards(again, "train"), vae, 8)
    with pytest.raises(UserError, match="'index' has changed"):
        encode(again, "train", vae, 8)


def test_crops_and_mirrored_pictures_on_request(make_data_set, vae):
    """Every view of a picture is drawn, by position alone, and is what the autoencoder makes of it."""
    folder = make_data_set(width=20)
    options = {"size": 8, "latents": vae, "crop": "random", "crops": 3, "flip": True}
    stream = begun(ImageText(str(folder), **options))
    records = stream.load(np.arange(1000), 0)
    views, codec = Views(3, True), LatentCodec.from_pretrained(vae).eval()
    picked = begun(ImageText(str(folder), size=8, latents=vae, flip=True))
    assert torch.equal(records.latent[40:50], stream.load(np.arange(40, 50), 4).latent)
    seen = set()
    for row in range(2):
        picture = stream.shards.picture(row)
        places = views.places(stream.shards.id(row))
        assert len({round(place[0], 3) for place in places}) == 3
        cuts = to_images(np.stack([square(picture, 8, tuple(place)) for place in places]))
        with torch.no_grad():
            known = codec.encode(torch.stack([cuts, cuts.flip(-1)], 1).flatten(0, 1)).to(torch.float16).float()
        for latent in records.latent[records.label == row]:
            gaps = (known - latent.float()).flatten(1).abs().amax(1)
            assert gaps.min() < 2e-3
            seen.add((row, int(gaps.argmin())))
    assert len(seen) > 8, "nearly all of 2 x 6 views, in some twenty draws each"
    assert picked.load(np.arange(1000), 0).latent.flatten(1).unique(dim=0).shape[0] == 100, "both sides of 50"
    about = json.loads((latent_folder(folder, vae, 8, views) / "train.json").read_text())
    assert about["cut"] == "3 random, mirrored"


def test_tasks_share_the_shards(make_data_set, vae):
    """Two tasks of an array, in any order; what they leave is what one process makes."""
    folder, whole = make_data_set(), make_data_set(name="whole")
    encode(whole, "train", vae, 8)
    target = encode(folder, "train", vae, 8, task=1, tasks=2)
    assert [file.name for file in sorted(target.glob("*.npy"))] == ["train-000001.npy"]
    encode(folder, "train", vae, 8, task=0, tasks=2)
    ours, theirs = (json.loads((latent_folder(f, vae, 8) / "train.json").read_text()) for f in (folder, whole))
    assert ours == {**theirs, "index": ours["index"]} and ours["complete"]
    for i in range(3):
        name = f"train-{i:06d}.npy"
        assert (target / name).read_bytes() == (latent_folder(whole, vae, 8) / name).read_bytes()


def test_command_line(make_data_set, vae, monkeypatch, capsys):
    folder = make_data_set()
    arguments = ["encode", "--vae", vae, "--source", str(folder), "--size", "8", "--batch_size", "7"]
    monkeypatch.setattr(sys, "argv", arguments)
    module.main()
    assert capsys.readouterr().out.strip() == str(latent_folder(folder, vae, 8))
    assert Latents(Shards(folder, "train"), vae, 8).shape == (2, 4, 4)


def test_the_command_takes_views_of_pictures_and_what_reads_captions(make_data_set, vae, monkeypatch):
    folder = make_data_set()
    source = ["--source", str(folder), "--device", "meta"]
    said = []
    monkeypatch.setattr(module, "encode_texts", lambda *given, **more: said.append((given[2], more["device"])))
    assert module.main([*source, "--text", "a/b", "--revision", "abc", "--length", "20"]) == 0
    assert said == [(TextCache("a/b", "abc", 20, "bf16"), "meta")]
    source[-1] = "cpu"
    monkeypatch.setattr(module, "default_device", None)
    assert module.main([*source, "--vae", vae, "--size", "8", "--crops", "2", "--flip"]) == 0
    assert len(Latents(Shards(folder, "train"), vae, 8, Views(2, True)).views) == 4
