"""Putting pipelines together: text encoders from random weights, adapters, stock folders out."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from lightning_t2i.networks.codec import LatentCodec
from lightning_t2i.networks.denoiser import Denoiser
from lightning_t2i.networks.load import build_network, locate
from lightning_t2i.networks.text_encoder import TextEncoder
from lightning_t2i.processes.schedulers import to_scheduler

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def text_encoder_of(
    source: str | None, tokenizer: str | None = None, revision: str | None = None
) -> TextEncoder | None:
    """A pipeline's text encoder, or CLIP's from random weights when `source` is a JSON architecture file.

    Args:
        tokenizer: CLIP tokenizer folder of an encoder from random weights.
    """
    if source is None:
        return None
    if not source.endswith(".json"):
        return TextEncoder.from_pretrained(source, revision=revision)
    from transformers import CLIPTokenizer

    return TextEncoder(clip=build_network(source), clip_tokenizer=CLIPTokenizer.from_pretrained(locate(str(tokenizer))))


def add_adapters(backbone: nn.Module, rank: int, targets: tuple[str, ...] = ATTENTION, name: str = "default") -> None:
    """Freezes a diffusers backbone and adds trainable low-rank adapters (LoRA, arXiv 2106.09685).

    Args:
        rank: rank r of B A; the update is scaled by alpha / r with alpha = r.
        targets: layer names, by default the projections of every attention.
    """
    from peft import LoraConfig

    backbone.requires_grad_(False)
    backbone.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)), adapter_name=name)


def save_pipeline(folder: Path, denoiser: Denoiser, codec: LatentCodec, text: TextEncoder | None) -> None:
    """Writes a stock Stable Diffusion folder in fp16 safetensors from copies; adapters are merged into the weights.

    The scheduler is DDIM with trailing spacing, so that few steps start from pure noise.
    """
    from diffusers import StableDiffusionPipeline

    unet, vae = copy.deepcopy(denoiser.backbone), copy.deepcopy(codec.vae)
    for network in (unet, vae):
        network.register_to_config(_name_or_path="")  # where it was read from is nobody else's business
    if getattr(unet, "peft_config", None):
        unet.fuse_lora()
        unet.unload_lora()
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=copy.deepcopy(text.clip) if text is not None else None,
        tokenizer=text._clip_tokenizer if text is not None else None,
        unet=unet,
        scheduler=to_scheduler(denoiser.process, denoiser.prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder, safe_serialization=True)
