"""LatentCodec: unit-scale latents, statistics from the stock config, draws from the posterior, tokens."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from tiny_networks import autoencoder, pipeline_folder

from lightning_t2i.batch import Records
from lightning_t2i.errors import UserError
from lightning_t2i.networks.codec import LatentCodec


def pictures(size: int = 16) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def test_scale_and_shift_follow_the_config():
    images = pictures()
    z = autoencoder().encode(images).latent_dist.mean
    torch.testing.assert_close(LatentCodec(autoencoder(scaling_factor=0.5)).encode(images), z * 0.5)
    codec = LatentCodec(autoencoder(scaling_factor=0.5, shift_factor=0.25))
    torch.testing.assert_close(codec.encode(images), (z - 0.25) * 0.5)
    torch.testing.assert_close(codec.raw(codec.encode(images)), z)
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    codec = LatentCodec(autoencoder(scaling_factor=0.5, latents_mean=mean, latents_std=std))
    channel = torch.tensor(mean).view(1, 4, 1, 1), torch.tensor(std).view(1, 4, 1, 1)
    torch.testing.assert_close(codec.encode(images), (z - channel[0]) * 0.5 / channel[1])
    torch.testing.assert_close(codec.raw(codec.encode(images)), z)


@torch.no_grad()
def test_decode_equals_the_stock_decoder_on_raw_latents():
    codec = LatentCodec(autoencoder(scaling_factor=0.5))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(codec.decode(latents), codec.vae.decode(latents / 0.5).sample)


@torch.no_grad()
def test_a_draw_has_the_posterior_mean_and_spread():
    codec = LatentCodec(autoencoder(scaling_factor=0.5))
    posterior = codec.vae.encode(pictures()).latent_dist
    eps = torch.ones(2, 4, 8, 8)
    torch.testing.assert_close(codec.encode(pictures(), eps), (posterior.mean + posterior.std) * 0.5)


def test_gradients_pass_through_the_decoder():
    codec = LatentCodec(autoencoder()).requires_grad_(False)
    latents = torch.randn(1, 4, 8, 8, requires_grad=True)
    codec.decode(latents).square().sum().backward()
    assert latents.grad.abs().sum() > 0


@torch.no_grad()
def test_half_precision_autoencoders_return_float32():
    codec = LatentCodec(autoencoder().to(torch.bfloat16))
    assert codec.encode(pictures()).dtype == codec.decode(torch.zeros(1, 4, 8, 8)).dtype == torch.float32


def test_shapes():
    codec = LatentCodec(autoencoder())
    assert codec.latent_shape(16) == (4, 8, 8) and codec.latent_shape((16, 32)) == (4, 8, 16)
    with pytest.raises(UserError, match="multiples of 2"):
        codec.latent_shape(15)


def test_identity_for_pixels():
    codec = LatentCodec.from_pretrained(None)
    assert codec.encode(pictures()) is not None and torch.equal(codec.decode(codec.encode(pictures())), pictures())
    assert codec.latent_shape(32) == (3, 32, 32) and codec.factor == 1


@torch.no_grad()
def test_from_pretrained_reads_a_pipeline_or_an_autoencoder_folder(tmp_path):
    folder = pipeline_folder(tmp_path)
    expected = LatentCodec(autoencoder()).encode(pictures())
    torch.testing.assert_close(LatentCodec.from_pretrained(str(folder)).encode(pictures()), expected)
    torch.testing.assert_close(LatentCodec.from_pretrained(str(folder / "vae")).encode(pictures()), expected)


@torch.no_grad()
def test_tokens_of_a_vq_model_decode_like_its_quantized_latents(tmp_path):
    torch.manual_seed(0)
    vq = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        num_vq_embeddings=16,
        norm_num_groups=4,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    ).eval()
    vq.save_pretrained(tmp_path)
    codec = LatentCodec.from_pretrained(str(tmp_path))
    tokens = codec.encode_tokens(pictures())
    assert tokens.shape == (2, 8, 8) and tokens.dtype == torch.int64 and len(tokens.unique()) > 1
    torch.testing.assert_close(codec.decode_tokens(tokens), codec.decode(codec.encode(pictures())))
    # Each token is the nearest entry of the codebook.
    z = vq.encode(pictures()).latents.permute(0, 2, 3, 1)
    nearest = torch.cdist(z.reshape(-1, 4), vq.quantize.embedding.weight).argmin(1).view(2, 8, 8)
    assert torch.equal(tokens, nearest)


@torch.no_grad()
def test_tiny_autoencoders_have_no_posterior():
    torch.manual_seed(0)
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()
    codec = LatentCodec(vae)
    assert codec.encode(pictures()).shape == (2, *codec.latent_shape(16))


def vq_model(**changes: Any) -> diffusers.VQModel:
    torch.manual_seed(0)
    facts = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    facts |= {"block_out_channels": (8, 8), "latent_channels": 4, "num_vq_embeddings": 16, "norm_num_groups": 4}
    return diffusers.VQModel(**facts, mid_block_add_attention=False, scaling_factor=0.3, **changes).eval()


@torch.no_grad()
def test_tokens_of_records():
    """Cached latents give the tokens of their pictures."""
    codec, places = LatentCodec(vq_model()), torch.arange(2)
    tokens = codec.tokens(Records(places, places, image=pictures()))
    assert torch.equal(tokens, codec.encode_tokens(pictures())) and len(tokens.unique()) > 1
    assert torch.equal(codec.tokens(Records(places, places, latent=codec.encode(pictures()))), tokens)


@torch.no_grad()
def test_amuseds_autoencoder_gets_and_gives_what_its_stock_pipelines_do():
    """Pictures in [0, 1], and a decoder that takes indices."""
    vq, stock = vq_model(lookup_from_codebook=True), VaeImageProcessor(vae_scale_factor=2, do_normalize=False)
    codec, places = LatentCodec(vq), torch.arange(2)
    levels = (pictures() * 127.5 + 127.5).round()
    files = [Image.fromarray(picture.permute(1, 2, 0).to(torch.uint8).numpy()) for picture in levels]
    z = vq.encode(stock.preprocess(files)).latents
    codes = vq.quantize(z)[2][2].view(2, 8, 8)
    shown = vq.decode(codes, force_not_quantize=True, shape=(2, 8, 8, 4)).sample.clip(0, 1)
    images = levels / 127.5 - 1
    torch.testing.assert_close(codec.encode(images), 0.3 * z)
    assert torch.equal(codec.tokens(Records(places, places, image=images)), codes)
    assert torch.equal(codec.tokens(Records(places, places, latent=codec.encode(images))), codes)
    for found in (codec.decode_tokens(codes), codec.decode(0.3 * z)):
        torch.testing.assert_close((found.clamp(-1, 1) + 1) / 2, shown)
    assert not torch.equal(LatentCodec(vq_model()).encode_tokens(images), codes)  # ours, of pictures in [-1, 1]
