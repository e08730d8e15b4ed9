"""Small parts for tests of token models: a pipeline with autoencoder and T5, a VQ autoencoder, an architecture file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny_networks import pipeline_folder
from torch import nn

from lightning_modules.fluid import Fluid
from lightning_t2i.options import GroupOptions
from lightning_t2i.token_orders import MaskLaw
from lightning_t2i.token_sampling import Sampling

SIDE, LENGTH, CODES = 16, 64, 12  # pixels of a side, tokens of a picture, codes of the VQ autoencoder
FACTS = {"_class_name": "TokenTransformer", "width": 16, "depth": 1, "heads": 2, "aligner_depth": 1, "head_depth": 1}


def parts(folder: Path) -> Path:
    """A folder with `pipeline` (autoencoder, T5), `vq` and `network.json`; pictures of 16 pixels have 8 x 8 tokens."""
    import diffusers

    pipeline_folder(folder / "pipeline", "pixart")
    torch.manual_seed(3)
    vq = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        vq_embed_dim=4,
        num_vq_embeddings=CODES,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )
    nn.init.normal_(vq.quantize.embedding.weight)
    vq.save_pretrained(folder / "vq")
    (folder / "network.json").write_text(json.dumps(FACTS))
    return folder


def fluid(folder: Path, **options: Any) -> Fluid:
    """A method on these parts, not built."""
    discrete = options.get("head") == "categorical"
    given: dict[str, Any] = {
        "network": str(folder / "network.json"),
        "codec": str(folder / ("vq" if discrete else "pipeline")),
        "text": str(folder / "pipeline"),
        "size": SIDE,
        "text_length": None,
        "mask": MaskLaw(strata=4),
        "copies": 2,
        "sampling": Sampling(steps=4, head_steps=3),
        "transformer": GroupOptions(lambda p: torch.optim.AdamW(p, lr=1e-2)),
    }
    return Fluid(**{**given, **options})


def built(folder: Path, **options: Any) -> Fluid:
    """A method with networks; no weight is zero or one, so that no output is blind."""
    torch.manual_seed(0)
    method = fluid(folder, **options)
    method.configure_model()
    for network in (method.transformer, method.groups["transformer"].ema):
        for parameter in network.parameters() if network is not None else ():
            nn.init.normal_(parameter, std=0.2)
    return method.eval()
