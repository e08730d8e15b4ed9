"""CLIP score: how well pictures fit their texts, 100 max(cos(e_image, e_text), 0), averaged (arXiv 2104.08718)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, interpolate
from torchmetrics import Metric

from lightning_t2i.errors import UserError
from lightning_t2i.networks.image_tower import CLIP_PIXELS, Pixels, read_pixels
from lightning_t2i.protocols import Embeds


class ClipScore(Metric):
    """Mean of 100 max(cos, 0) over (picture, text) pairs.

    Args:
        encoder: maps pictures and texts to one space.
        model: name of the encoder, part of the metric's name.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, encoder: Embeds, model: str, **kwargs: Any):
        super().__init__(**kwargs)
        self.encoder, self.model = encoder, model  # a module moves with the metric
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self._n: int | None = None

    @property
    def name(self) -> str:
        """With the number of pairs on all ranks (known once computed) and the encoder."""
        return f"clip_score@n={int(self.count) if self._n is None else self._n},model={self.model}"

    @torch.no_grad()
    def update(self, images: Tensor, texts: list[str]) -> None:
        """Adds pictures [B, 3, H, W] in [-1, 1] and their B texts."""
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} images, {len(texts)} texts")
        image, text = self.encoder.encode_image(images).double(), self.encoder.encode_text(texts).double()
        self.total += 100 * cosine_similarity(image, text).clamp(min=0).sum()
        self.count += len(texts)

    def compute(self) -> Tensor:
        self._n = int(self.count)
        return (self.total / self.count).float()

    def reset(self) -> None:
        super().reset()
        self._n = None


class TransformersClip(nn.Module):
    """A CLIP of transformers as an encoder; pictures are prepared with torch, as its image processor would.

    Args:
        network: CLIPModel, ChineseCLIPModel or another with get_image_features and get_text_features.
        tokenize: texts -> keyword arguments of get_text_features.
        size: height and width of its pictures, pixels.
        pixels: mean and deviation of pictures in [0, 1], by channel.
    """

    def __init__(
        self,
        network: nn.Module,
        tokenize: Callable[[list[str]], Any],
        size: int,
        pixels: Pixels = CLIP_PIXELS,
    ):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.tokenize, self.size = tokenize, size
        for name, values in zip(("mean", "std"), pixels, strict=True):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1))

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None) -> TransformersClip:
        """Reads a transformers folder or a hub id; the pictures' size, mean and std come from its configs.

        Raises:
            UserError: it does not say how its pictures are normalised.
        """
        from transformers import AutoConfig, AutoModel, AutoTokenizer

        pixels = read_pixels(source, revision)  # first: it says what is wrong where the hub cannot be reached
        config = AutoConfig.from_pretrained(source, revision=revision)
        network = AutoModel.from_pretrained(source, revision=revision, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
        if pixels is None:
            what, fix = "No mean of the pictures is given", "add the preprocessor_config.json that the CLIP came with"
            raise UserError(what, where=str(source), fix=fix)
        length = config.text_config.max_position_embeddings

        def tokenize(texts: list[str]) -> Any:
            return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")

        return cls(network, tokenize, config.vision_config.image_size, pixels)

    def prepare(self, images: Tensor, clamp: bool = True) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> resized (bicubic, short side), centre-cropped and normalised.

        Args:
            clamp: cut what resizing takes beyond the range, as an image processor does; what is cut has no gradient.
        """
        h, w = images.shape[-2:]
        scale = self.size / min(h, w)
        if scale != 1:
            shape = (max(self.size, round(h * scale)), max(self.size, round(w * scale)))
            images = interpolate(images, shape, mode="bicubic", antialias=True)
        top, left = (images.shape[-2] - self.size) // 2, (images.shape[-1] - self.size) // 2
        images = images[..., top : top + self.size, left : left + self.size]
        return (((images.clamp(-1, 1) if clamp else images) + 1) / 2 - self.mean) / self.std

    def encode_image(self, images: Tensor, clamp: bool = True) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> unit vectors [B, D]; see `prepare`."""
        return _unit(self.network.get_image_features(pixel_values=self.prepare(images.to(self.mean), clamp)))

    def encode_text(self, texts: list[str]) -> Tensor:
        """B texts -> unit vectors [B, D]."""
        inputs = {name: tensor.to(self.mean.device) for name, tensor in dict(self.tokenize(texts)).items()}
        return _unit(self.network.get_text_features(**inputs))


def _unit(features: Any) -> Tensor:
    """transformers 5 returns an output object where 4 returned the tensor."""
    tensor = features.pooler_output if hasattr(features, "pooler_output") else features
    return nn.functional.normalize(tensor, dim=-1)
