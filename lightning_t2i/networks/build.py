"""Putting pipelines together: text encoders from random weights, adapters, stock folders out."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_t2i.errors import UserError
from lightning_t2i.networks.backbones import is_told_size
from lightning_t2i.networks.codec import LatentCodec
from lightning_t2i.networks.denoiser import Denoiser
from lightning_t2i.networks.load import OURS, build_network, locate, read_architecture
from lightning_t2i.networks.text_encoder import TextEncoder
from lightning_t2i.paths import resolve
from lightning_t2i.processes.schedulers import to_scheduler

TOKENIZERS = {"clip": "CLIPTokenizer", "t5": "T5Tokenizer"}
# backbone -> its pipeline, and the pipeline's name for the backbone
PIPELINES = {
    "UNet2DConditionModel": ("StableDiffusionPipeline", "unet"),
    "PixArtTransformer2DModel": ("PixArtAlphaPipeline", "transformer"),
    "FluxTransformer2DModel": ("FluxPipeline", "transformer"),
    "UNet2DModel": ("DDIMPipeline", "unet"),
}
NO_TEXT = {"text_encoder": None, "tokenizer": None}  # components that a pipeline has to be told it lacks
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def text_encoder_of(
    source: str | None, tokenizer: str | None = None, revision: str | None = None
) -> TextEncoder | None:
    """A pipeline's text encoder, or one from random weights when `source` is a JSON architecture file.

    Args:
        source: folder, hub id, or a JSON file: the architecture of a CLIPTextModel or T5EncoderModel, or an object with
            both as "clip" and "t5".
        tokenizer: tokenizer folder of an encoder from random weights, or a folder with one as "clip" and one as "t5".
    """
    if source is None:
        return None
    if not source.endswith(".json"):
        return TextEncoder.from_pretrained(source, revision=revision)
    import transformers

    facts = read_architecture(source)
    kinds = {"CLIPTextModel": "clip", "T5EncoderModel": "t5"}
    specs = {kinds.get(str(facts["_class_name"]), ""): facts} if "_class_name" in facts else facts
    if not specs.keys() <= {"clip", "t5"}:
        raise UserError("Not a text encoder that is served", where=source, given=list(specs), allowed=list(kinds))
    parts: dict[str, Any] = {}
    for kind, spec in specs.items():
        folder = resolve(str(tokenizer)) / kind
        parts[kind] = build_network(spec)
        parts[f"{kind}_tokenizer"] = getattr(transformers, TOKENIZERS[kind]).from_pretrained(
            str(folder) if folder.is_dir() else locate(str(tokenizer))
        )
    return TextEncoder(**parts)


def add_adapters(
    backbone: nn.Module,
    rank: int,
    targets: Sequence[str] = ATTENTION,
    name: str = "default",
    alpha: float | None = None,
) -> None:
    """Freezes a diffusers backbone and adds trainable low-rank adapters (LoRA, arXiv 2106.09685).

    Args:
        rank: rank r of B A; the update is scaled by alpha / r.
        targets: layer names, by default the projections of every attention.
        alpha: None is r.

    Raises:
        UserError: the backbone has none of these layers.
    """
    from peft import LoraConfig

    backbone.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=list(targets))
    try:
        backbone.add_adapter(config, adapter_name=name)
    except ValueError as error:  # PEFT's, whose message names its own options
        raise UserError("Adapters do not fit this backbone", where="lora", given=targets, fix=str(error)) from error


def save_pipeline(
    folder: Path,
    denoiser: Denoiser,
    codec: LatentCodec,
    text: TextEncoder | None,
    times: Sequence[float] | None = None,
    solver: str = "ddim",
) -> None:
    """Writes the stock diffusers folder of the backbone's family in fp16 safetensors, from copies.

        UNet2DConditionModel      StableDiffusionPipeline; StableDiffusionXLPipeline where it is told the pictures' size
        PixArtTransformer2DModel  PixArtAlphaPipeline
        FluxTransformer2DModel    FluxPipeline
        UNet2DModel on pixels     DDIMPipeline; ConsistencyModelPipeline where the process is EDM's: it is the stock
                                  pipeline that takes class labels and any scheduler
        networks of ours          no stock pipeline knows them: the folder of the network, with its scheduler

    Adapters are merged into the weights. The scheduler is the one of `to_scheduler`; a DDPM's spaces its steps so that
    few of them start from pure noise.

    Args:
        times: of a student's steps where they are not the default, see `to_scheduler`.
        solver: of the scheduler, see `to_scheduler`.

    Raises:
        UserError: a backbone for which no pipeline is known, one on pixels with an autoencoder or a text encoder, or
            one with the text encoders of another family where SDXL is one of the two.
    """
    import diffusers

    backbone: Any = denoiser.merged().backbone
    scheduler = to_scheduler(denoiser.process, denoiser.prediction, denoiser.sigma_data, times, solver)
    vae = copy.deepcopy(codec.vae)
    if type(backbone).__name__ in OURS and vae is None and text is None:
        backbone.half().save_pretrained(folder, safe_serialization=True)
        scheduler.save_pretrained(folder / "scheduler")
        return forget_origin(folder)
    kind = next((c.__name__ for c in type(backbone).__mro__ if c.__name__ in PIPELINES), None)
    if kind is None or (kind == "UNet2DModel") != (vae is None and text is None):
        raise UserError("No stock pipeline holds these networks", given=type(backbone).__name__, allowed=PIPELINES)
    xl = kind == "UNet2DConditionModel" and is_told_size(backbone)
    if text is not None and xl != (text.clip_2 is not None):
        given = f"{kind} with {' and '.join(text.encoders())}"
        raise UserError("Two CLIPs belong to SDXL's U-Net, and to it alone", given=given)
    parts: dict[str, Any] = {"scheduler": scheduler, PIPELINES[kind][1]: backbone}
    if vae is not None:
        parts["vae"] = vae
    for component, encoder in zip(("", "_2"), _encoders(text), strict=False):
        parts[f"text_encoder{component}"], parts[f"tokenizer{component}"] = encoder
    name = PIPELINES[kind][0] if denoiser.prediction != "edm" else "ConsistencyModelPipeline"
    if xl:
        name = "StableDiffusionXLPipeline"
        parts = {**NO_TEXT, "text_encoder_2": None, "tokenizer_2": None, **parts}
        parts["force_zeros_for_empty_prompt"] = text is None or text.zero_null
    elif kind == "UNet2DConditionModel":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        parts = {**NO_TEXT, **parts}
    pipeline = getattr(diffusers, name)(**parts)
    pipeline.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    return forget_origin(folder)


def forget_origin(folder: Path) -> None:
    """Takes out of the configs of a written folder where its networks were read from.

    That is nobody else's business, and equal networks then give equal files.
    """
    for file in folder.rglob("config.json"):
        facts = json.loads(file.read_text(encoding="utf-8"))
        if facts.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _encoders(text: TextEncoder | None) -> list[tuple[Any, Any]]:
    """The text encoders with their tokenizers, in the order of a pipeline's components."""
    if text is None:
        return []
    return [(copy.deepcopy(encoder), tokenizer) for encoder, tokenizer in text.encoders().values()]
