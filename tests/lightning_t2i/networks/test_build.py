"""Pipelines out of our parts: each family loads as its stock class and draws our pictures; encoders of either kind."""

from pathlib import Path

import diffusers
import pytest
import tiny_networks
import torch

from lightning_t2i.batch import Cond
from lightning_t2i.distillation import Pipeline
from lightning_t2i.errors import UserError
from lightning_t2i.networks.build import save_pipeline, text_encoder_of
from lightning_t2i.networks.codec import LatentCodec
from lightning_t2i.networks.denoiser import Denoiser
from lightning_t2i.networks.load import build_network
from lightning_t2i.networks.text_encoder import TextEncoder
from lightning_t2i.processes import DDPM, EDM, RectifiedFlow, sample

PROMPTS = ["a red square", "two blue circle"]


def encoder(kinds: str) -> TextEncoder:
    return text_encoder_of(f"configs/networks/tiny_{kinds}.json", "assets/tiny/tokenizers").eval().requires_grad_(False)


def written(folder: Path, denoiser: Denoiser, codec: LatentCodec, text: TextEncoder | None) -> None:
    """Saves with weights that fp16 holds exactly, so that only the sampling can differ."""
    for network in (denoiser.backbone, codec, text):
        if network is not None:
            network.half().float()
    save_pipeline(folder, denoiser, codec, text)


def loaded(folder: Path, cls: type):
    pipeline = cls.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def shaken(network: torch.nn.Module) -> torch.nn.Module:
    """With output layers that do not start at zero, as they would in new networks."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.abs().sum() == 0:
            torch.nn.init.normal_(parameter, std=0.05)
    return network


def shown(images: torch.Tensor) -> torch.Tensor:
    return (images / 2 + 0.5).clamp(0, 1)


def test_pixart(tmp_path):
    net = shaken(build_network("configs/networks/tiny_pixart.json"))
    denoiser = Denoiser(net.eval(), DDPM("linear", 0.0001, 0.02), "eps")
    codec = LatentCodec(tiny_networks.autoencoder())
    text = encoder("t5")
    written(tmp_path / "out", denoiser, codec, text)
    pipeline = loaded(tmp_path / "out", diffusers.PixArtAlphaPipeline)
    z = torch.randn(2, 4, 8, 8)
    theirs = pipeline(
        PROMPTS, latents=z, guidance_scale=3.0, num_inference_steps=5, output_type="pt", height=16, width=16,
        use_resolution_binning=False, clean_caption=False, max_sequence_length=32,
    ).images  # fmt: skip
    with torch.no_grad():
        ours = codec.decode(sample(denoiser, z, text(PROMPTS), 5, 3.0))
    torch.testing.assert_close(shown(ours), theirs, atol=2e-3, rtol=0)


def test_flux(tmp_path):
    net = shaken(build_network("configs/networks/tiny_flux.json"))
    denoiser = Denoiser(net.eval(), RectifiedFlow(), "velocity")
    codec = LatentCodec(tiny_networks.autoencoder(scaling_factor=0.5, shift_factor=0.1))
    text = encoder("clip_t5")
    written(tmp_path / "out", denoiser, codec, text)
    pipeline = loaded(tmp_path / "out", diffusers.FluxPipeline)
    z = torch.randn(2, 4, 8, 8)
    packed = pipeline._pack_latents(z, 2, 4, 8, 8)
    theirs = pipeline(
        PROMPTS, negative_prompt=["", ""], true_cfg_scale=2.0, latents=packed, num_inference_steps=5, height=16,
        width=16, max_sequence_length=32, output_type="pt",
    ).images  # fmt: skip
    with torch.no_grad():
        ours = codec.decode(sample(denoiser, z, text(PROMPTS), 5, 2.0, "euler"))
    torch.testing.assert_close(shown(ours), theirs, atol=2e-3, rtol=0)


def xl_text(folder: Path, zero_null: bool) -> TextEncoder:
    models = {name: tiny_networks.text_model(name, width) for name, width in (("clip", 4), ("clip_2", 8))}
    words = {f"{name}_tokenizer": tiny_networks.tokenizer(folder / name, name) for name in models}
    return TextEncoder(**models, **words, zero_null=zero_null).eval().requires_grad_(False)


@pytest.mark.parametrize("zero_null", [True, False])
def test_sdxl(zero_null, tmp_path):
    net = tiny_networks.backbone("unet_xl")
    net.picture_factor = 2  # that of the autoencoder, as Diffusion sets it
    denoiser, codec = Denoiser(net, DDPM(), "eps"), LatentCodec(tiny_networks.autoencoder(scaling_factor=0.7))
    text = xl_text(tmp_path, zero_null)
    written(tmp_path / "out", denoiser, codec, text)
    pipeline = loaded(tmp_path / "out", diffusers.StableDiffusionXLPipeline)
    assert pipeline.config.force_zeros_for_empty_prompt is zero_null
    z = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    size = {"height": 16, "width": 24}  # of two lengths, so that their order shows
    theirs = pipeline(
        PROMPTS, latents=z, guidance_scale=3.0, num_inference_steps=5, output_type="pt", **size
    ).images  # fmt: skip
    read = Pipeline.load(str(tmp_path / "out"), guidance=3.0)  # where the factor is that of the folder's autoencoder
    for parts in ((denoiser, codec, text), (read.denoiser, read.codec, read.text)):
        with torch.no_grad():
            ours = parts[1].decode(sample(parts[0], z, parts[2](PROMPTS), 5, 3.0))
        torch.testing.assert_close(shown(ours), theirs, atol=1e-4, rtol=0)
    wrong = read.text.requires_grad_(False)(PROMPTS)
    wrong.size_ids = torch.tensor([[64, 96, 0, 0, 64, 96]] * 2)  # of an autoencoder of factor 8
    with torch.no_grad():
        other = read.codec.decode(sample(read.denoiser, z, wrong, 5, 3.0))
    assert float((shown(other) - theirs).abs().max()) > 1e-3


def test_sdxl_without_text_encoders_and_with_those_of_others(tmp_path):
    denoiser = Denoiser(tiny_networks.backbone("unet_xl"), DDPM(), "eps")
    codec = LatentCodec(tiny_networks.autoencoder())
    save_pipeline(tmp_path / "out", denoiser, codec, None)
    pipeline = loaded(tmp_path / "out", diffusers.StableDiffusionXLPipeline)
    assert pipeline.text_encoder is None and pipeline.text_encoder_2 is None
    text = {"clip": tiny_networks.text_model("clip"), "clip_tokenizer": None}
    with pytest.raises(UserError, match="UNet2DConditionModel with clip$"):
        save_pipeline(tmp_path / "a", denoiser, codec, TextEncoder(**text))
    plain = Denoiser(tiny_networks.backbone("unet_text"), DDPM(), "eps")
    with pytest.raises(UserError, match="UNet2DConditionModel with clip and clip_2$"):
        save_pipeline(tmp_path / "b", plain, codec, TextEncoder(**text, clip_2=tiny_networks.text_model("clip_2")))


def pixels(name: str) -> torch.nn.Module:
    return shaken(build_network(f"configs/networks/tiny_{name}_unet.json")).eval()


@pytest.mark.parametrize("clip", [None, 1.0])
def test_unconditional_ddpm(tmp_path, clip):
    process = DDPM("linear", 0.0001, 0.02, clip=clip)
    denoiser, codec = Denoiser(pixels("ddpm"), process, "eps"), LatentCodec()
    written(tmp_path / "out", denoiser, codec, None)
    pipeline = loaded(tmp_path / "out", diffusers.DDIMPipeline)
    draw = {"num_inference_steps": 5, "use_clipped_model_output": True, "output_type": "np"}
    theirs = pipeline(2, torch.Generator().manual_seed(3), **draw).images
    z = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    ours = sample(denoiser, z, None, 5)
    torch.testing.assert_close(shown(ours), torch.from_numpy(theirs).permute(0, 3, 1, 2), atol=2e-3, rtol=0)
    assert Denoiser.from_pretrained(str(tmp_path / "out")).process == process
    unclipped = sample(Denoiser(denoiser.backbone, DDPM("linear", 0.0001, 0.02), "eps"), z, None, 5)
    assert torch.equal(ours, unclipped) == (clip is None)


def test_class_conditional_edm(tmp_path):
    denoiser, codec = Denoiser(pixels("edm"), EDM(), "edm"), LatentCodec()
    written(tmp_path / "out", denoiser, codec, None)
    pipeline = loaded(tmp_path / "out", diffusers.ConsistencyModelPipeline)
    z, labels = torch.randn(2, 3, 32, 32), torch.tensor([3, 7])
    theirs = pipeline(2, labels, num_inference_steps=5, latents=z, output_type="pt").images
    ours = sample(denoiser, z, Cond(label=labels, null_label=32), 5, 1.0, "euler")
    # diffusers starts from z sqrt(sigma_max^2 + 1), this repository from z sigma_max: 8e-5 apart.
    torch.testing.assert_close(shown(ours), theirs, atol=5e-3, rtol=0)
    again = Denoiser.from_pretrained(str(tmp_path / "out"))
    assert again.prediction == "edm" and again.process == EDM()


def test_networks_that_no_pipeline_holds_are_refused(tmp_path):
    sd3 = Denoiser(tiny_networks.backbone("sd3"), RectifiedFlow(), "velocity")
    with pytest.raises(UserError, match="No stock pipeline"):
        save_pipeline(tmp_path / "a", sd3, LatentCodec(tiny_networks.autoencoder()), None)
    unconditional = Denoiser(tiny_networks.backbone("unet"), DDPM(), "eps")
    with pytest.raises(UserError, match="No stock pipeline"):
        save_pipeline(tmp_path / "b", unconditional, LatentCodec(tiny_networks.autoencoder()), None)
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_the_folder_of_one_tokenizer_does_as_well():
    text = text_encoder_of("configs/networks/tiny_t5.json", "assets/tiny/tokenizers/t5")
    assert text.clip is None and text(PROMPTS).embeds.shape == (2, 32, 64)


def test_an_unknown_text_encoder_is_refused(tmp_path):
    (tmp_path / "bert.json").write_text('{"_class_name": "BertModel"}')
    with pytest.raises(UserError, match="Not a text encoder"):
        text_encoder_of(str(tmp_path / "bert.json"), str(tmp_path))
