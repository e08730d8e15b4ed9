"""A tiny Wukong on noise pictures with Chinese captions, and its losses by plain loops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from pictures import records
from torch import Tensor
from torch.nn.functional import normalize

from lightning_modules.wukong import Wukong
from lightning_t2i.batch import Records
from lightning_t2i.networks.load import build_network

TEXT = {
    "_class_name": "CLIPTextModel", "vocab_size": 21128, "hidden_size": 16, "intermediate_size": 16,
    "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32, "hidden_act": "quick_gelu",
    "pad_token_id": 0, "bos_token_id": 101, "eos_token_id": 102,
}  # fmt: skip
IMAGE = {
    "_class_name": "CLIPVisionModel", "image_size": 16, "patch_size": 8, "hidden_size": 12, "intermediate_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "quick_gelu",
}  # fmt: skip
SWIN = {
    "_class_name": "SwinModel", "image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1],
    "num_heads": [1, 2], "window_size": 4, "drop_path_rate": 0.5,
}  # fmt: skip
CAPTIONS = ["红色的圆形", "两个蓝色的正方形", "红色和蓝色", "一个圆形和一个正方形"]


def chinese(first: int, size: int) -> Records:
    """Noise pictures at positions first ... with captions of several lengths."""
    found = records(first, size)
    found.caption = [CAPTIONS[p % 4] + "大" * (p % 7) for p in found.position.tolist()]
    return found


def text_file(folder: Path, **options: Any) -> str:
    file = folder / "text.json"
    file.write_text(json.dumps({**TEXT, **options}))
    return str(file)


def image_folder(folder: Path, facts: dict[str, Any] | None = None, name: str = "image") -> str:
    """A tower of random weights as a stock folder."""
    if not (folder / name).is_dir():
        torch.manual_seed(5)
        build_network(facts or IMAGE).save_pretrained(folder / name)
    return str(folder / name)


def wukong(
    folder: Path, facts: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **options: Any
) -> Any:
    """The built method, on a locked random tower; style f unless told."""
    name = "swin" if facts is SWIN else "image"
    given = {"style": "f", "width": 8, "reduced": 3, **options}
    if "image" not in given:
        given["image"] = image_folder(folder, facts, name)
    module = Wukong(text=text_file(folder, **(text or {})), **given)
    module.configure_model()
    return module


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, generator=generator, dtype=dtype), dim=-1)


def ragged(lengths: list[int], longest: int) -> Tensor:
    """Masks of texts of these lengths."""
    return torch.arange(longest) < torch.tensor(lengths)[:, None]


def plain_similarity(images: Tensor, texts: Tensor, mask: Tensor, floor: bool = False) -> tuple[Tensor, Tensor]:
    """sI and sT by loops over pictures, texts and tokens, with torch's own gradients."""
    there = []
    back = []
    for i in range(len(images)):
        row, other = [], []
        for j in range(len(texts)):
            valid = texts[j][mask[j]]
            total = images.new_zeros(())
            for k in range(images.shape[1]):
                best = (valid @ images[i, k]).max(0).values
                total = total + (best.clamp(min=0) if floor and len(valid) < texts.shape[1] else best)
            row.append(total / images.shape[1])
            other.append(torch.stack([(images[i] @ token).max(0).values for token in valid]).sum() / len(valid))
        there.append(torch.stack(row))
        back.append(torch.stack(other))
    return torch.stack(there), torch.stack(back).T


def plain_loss(there: Tensor, back: Tensor, scale: Tensor) -> Tensor:
    """The mean of -log softmax of the diagonals, by hand."""
    rows = range(len(there))
    terms = [scale * s[i, i] - (scale * s[i]).logsumexp(0) for s in (there, back) for i in rows]
    return -sum(terms) / len(terms)
