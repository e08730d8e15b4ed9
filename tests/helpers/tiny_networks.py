"""Randomly initialised stock networks and pipeline folders, small enough for tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from lightning_t2i.batch import Cond

WORDS = ["red", "blue", "square", "circle", "a", "and", "the", "two"]
KINDS = ("unet", "unet_class", "unet_text", "unet_xl", "pixart", "sd3", "flux")


def backbone(kind: str) -> nn.Module:
    """A network of the kind for 4 x 8 x 8 inputs (pixart has learned variances: 8 output channels)."""
    import diffusers

    torch.manual_seed(0)
    unet = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "norm_num_groups": 4}
    if kind in ("unet", "unet_class"):
        net = diffusers.UNet2DModel(
            **unet,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=4,
            num_class_embeds=11 if kind == "unet_class" else None,
        )
    elif kind in ("unet_text", "unet_xl"):
        xl = {  # 54: pooled text of width 6, and six numbers in 8 frequencies each
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 54,
        }
        net = diffusers.UNet2DConditionModel(
            **unet,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            attention_head_dim=4,
            cross_attention_dim=12,
            **(xl if kind == "unet_xl" else {}),
        )
    elif kind == "pixart":
        net = diffusers.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=16,
            sample_size=8,
            patch_size=2,
            caption_channels=12,
        )
    elif kind == "sd3":
        net = diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=12,
            caption_projection_dim=16,
            pooled_projection_dim=6,
        )
    else:
        net = diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            pooled_projection_dim=6,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        )
    # Output layers that start at zero would make every test of a prediction blind.
    for parameter in net.parameters():
        if parameter.abs().sum() == 0:
            nn.init.normal_(parameter, std=0.05)
    return net.eval()


def condition(batch: int = 2, seed: int = 0) -> Cond:
    """A Cond with every field that some kind of `backbone` needs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return Cond(
        embeds=normal(batch, 5, 12),
        pooled=normal(batch, 6),
        label=torch.randint(0, 10, (batch,), generator=generator),
        guidance=torch.full((batch,), 3.5),
        null_embeds=normal(5, 12),
        null_pooled=normal(6),
        null_label=10,
    )


def tokenizer(folder: Path, kind: str, length: int = 8):
    """A word-level tokenizer saved and loaded as a fast one of CLIP, of SDXL's second CLIP or of T5 would be."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate(special + WORDS)}
    base = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    base.pre_tokenizer = pre_tokenizers.Whitespace()
    single = "$A <eos>" if kind == "t5" else "<bos> $A <eos>"
    base.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<bos>", 1), ("<eos>", 2)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=base,
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<eos>" if kind == "clip" else "<pad>",
        model_max_length=length,
    )
    fast.save_pretrained(folder)
    return fast


def text_model(kind: str, width: int = 12) -> nn.Module:
    import transformers

    torch.manual_seed(1)
    if kind in ("clip", "clip_2"):
        config = transformers.CLIPTextConfig(
            vocab_size=12,
            hidden_size=width,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=8,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
            projection_dim=6,
        )
        cls = transformers.CLIPTextModel if kind == "clip" else transformers.CLIPTextModelWithProjection
        return cls(config).eval()
    config = transformers.T5Config(
        vocab_size=12, d_model=width, d_kv=4, d_ff=16, num_layers=2, num_heads=2, dropout_rate=0.0, pad_token_id=0
    )
    return transformers.T5EncoderModel(config).eval()


def pipeline_folder(folder: Path, kind: str = "unet_text", scheduler=None) -> Path:
    """A stock pipeline folder: backbone, vae, text encoders and tokenizers of the kind, and a scheduler config."""
    import diffusers

    net = backbone(kind)
    component = "unet" if kind.startswith("unet") else "transformer"
    index = {
        "_class_name": "DiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        component: ["diffusers", type(net).__name__],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    net.save_pretrained(folder / component)
    autoencoder().save_pretrained(folder / "vae")
    encoders = {
        "unet_text": {"clip": 12},
        "unet_xl": {"clip": 4, "clip_2": 8},
        "pixart": {"t5": 12},
        "flux": {"clip": 6, "t5": 12},
    }
    for suffix, (name, width) in zip(("", "_2"), encoders.get(kind, {}).items(), strict=False):
        model = text_model(name, width)
        model.save_pretrained(folder / f"text_encoder{suffix}")
        tokenizer(folder / f"tokenizer{suffix}", name)
        index[f"text_encoder{suffix}"] = ["transformers", type(model).__name__]
        index[f"tokenizer{suffix}"] = ["transformers", "PreTrainedTokenizerFast"]
    scheduler = scheduler or diffusers.PNDMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True, steps_offset=1
    )
    scheduler.save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def autoencoder(**options) -> nn.Module:
    import diffusers

    torch.manual_seed(2)
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=False,
        **options,
    ).eval()
