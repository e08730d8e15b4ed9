"""Building and reading stock models, and equality of whole pictures with diffusers' own pipeline."""

from __future__ import annotations

import json

import diffusers
import huggingface_hub
import pytest
import torch
import transformers
from tiny_networks import autoencoder, backbone, pipeline_folder, text_model, tokenizer

from lightning_t2i.errors import UserError
from lightning_t2i.networks import load
from lightning_t2i.networks.codec import LatentCodec
from lightning_t2i.networks.denoiser import Denoiser
from lightning_t2i.networks.text_encoder import TextEncoder
from lightning_t2i.processes import DDPM, sample
from lightning_t2i.processes.schedulers import to_scheduler


def architecture(net) -> dict:
    return {"_class_name": type(net).__name__, **net.config}


@pytest.mark.parametrize("kind", ["unet_text", "pixart"])
def test_architecture_files_build_random_networks(kind, tmp_path):
    net = backbone(kind)
    net.save_config(tmp_path)
    built = load.build_network(str(tmp_path / "config.json"))
    assert type(built) is type(net)
    assert {n: p.shape for n, p in built.named_parameters()} == {n: p.shape for n, p in net.named_parameters()}


def test_architecture_files_build_text_encoders(tmp_path):
    file = tmp_path / "text.json"
    file.write_text(json.dumps({"_class_name": "CLIPTextModel", **text_model("clip").config.to_diff_dict()}))
    built = load.build_network(file)
    assert isinstance(built, transformers.CLIPTextModel) and built.config.hidden_size == 12


def test_meta_builds_count_parameters():
    config = architecture(backbone("unet_text"))
    with torch.device("meta"):
        net = load.build_network(config)
    assert all(p.is_meta for p in net.parameters())
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in backbone("unet_text").parameters())


def test_model_folders_load_their_weights(tmp_path):
    autoencoder().half().save_pretrained(tmp_path)
    built = load.build_network(str(tmp_path))
    assert built.dtype == torch.float32 and not built.training
    for name, value in autoencoder().half().float().state_dict().items():
        assert torch.equal(built.state_dict()[name], value)


def test_folders_are_found_from_the_working_directory(tmp_path, monkeypatch):
    pipeline_folder(tmp_path / "models" / "sd")
    monkeypatch.chdir(tmp_path)
    assert load.locate("models/sd") == str(tmp_path / "models" / "sd")
    assert load.locate("owner/name") == "owner/name"
    with pytest.raises(UserError, match="did you mean sd"):
        load.locate(str(tmp_path / "models" / "sd1"))


def test_pickled_weights_are_not_read(tmp_path):
    autoencoder().save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(OSError, match="safetensors"):
        load.build_network(str(tmp_path))


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("nowhere.json", "architecture file"),
        ({"_class_name": "UNet3"}, "UNet3"),
        ({"sample_size": 8}, "Not a diffusers"),
        ("/nowhere/at/all", "No such model folder"),
        ("exported/nowhere", "make it first: python train.py export"),  # ours, which no hub has
        ("data/nowhere", "check the path"),
    ],
)
def test_mistakes_are_told(spec, match):
    with pytest.raises(UserError, match=match):
        load.build_network(spec)


def test_a_pipeline_without_a_denoiser_is_told(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"vae": ["diffusers", "AutoencoderKL"]}))
    with pytest.raises(UserError, match="no denoising network"):
        Denoiser.from_pretrained(str(tmp_path))
    (tmp_path / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DModel"]}))
    with pytest.raises(UserError, match="no autoencoder"):
        LatentCodec.from_pretrained(str(tmp_path))
    with pytest.raises(UserError, match="no text encoder"):
        TextEncoder.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (huggingface_hub.errors.LocalEntryNotFoundError("offline"), "cannot be reached"),
        (OSError("gated"), "gated"),
    ],
)
def test_hub_problems_are_told(error, match, monkeypatch):
    def fail(*_args, **_options):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(UserError, match=match):
        Denoiser.from_pretrained("owner/name", revision="abc")


def test_hub_files_are_asked_at_the_revision(monkeypatch):
    asked = []

    def missing(repo, name, revision=None):
        asked.append((repo, name, revision))
        raise huggingface_hub.errors.EntryNotFoundError("no such file")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", missing)
    assert load.read_json("owner/name", "model_index.json", "abc") is None
    assert asked == [("owner/name", "model_index.json", "abc")]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("steps", [1, 5])
def test_pictures_equal_those_of_the_stock_pipeline(steps, tmp_path):
    """Text encoding, guidance, trailing DDIM and decoding against diffusers' StableDiffusionPipeline."""
    words = tokenizer(tmp_path, "clip")
    vae, clip, unet = autoencoder(scaling_factor=0.7), text_model("clip"), backbone("unet_text")
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=clip,
        tokenizer=words,
        unet=unet,
        scheduler=to_scheduler(DDPM(), "eps"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    captions = ["a red square", "two"]
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    wanted = pipeline(
        captions, num_inference_steps=steps, guidance_scale=3.0, latents=z, output_type="pt", height=16, width=16
    ).images
    codec, text = LatentCodec(vae), TextEncoder(clip=clip, clip_tokenizer=words).requires_grad_(False)
    with torch.no_grad():
        latents = sample(Denoiser(unet, DDPM(), "eps"), z, text(captions), steps=steps, scale=3.0)
        ours = (codec.decode(latents) / 2 + 0.5).clamp(0, 1)
    assert wanted.std() > 0.01
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-3)
