"""Two towers that map pictures and texts to one space: a CLIPModel of transformers, called as one sharded root."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import normalize

from lightning_t2i.networks.load import build_network, locate

LARGEST_SCALE = 100.0  # of the logits, arXiv 2103.00020, section 2.5


class Towers(nn.Module):
    """A CLIPModel with its tokenizer.

    Args:
        clip: CLIPModel of transformers.
        tokenizer: its fast tokenizer.
    """

    shard_forward_methods = ("encode_image", "encode_text")

    def __init__(self, clip: nn.Module, tokenizer: Any):
        super().__init__()
        clip.logit_scale = nn.Parameter(clip.logit_scale.detach().reshape(1))  # FSDP2 cuts dimensions
        self.clip: Any = clip
        self._no_split_modules = clip._no_split_modules
        self._tokenizer = tokenizer

    @classmethod
    def build(cls, network: str, tokenizer: str | None = None) -> Towers:
        """From a JSON architecture file and a tokenizer folder, or from a CLIPModel folder or hub id that has both."""
        from transformers import AutoTokenizer

        return cls(build_network(network), AutoTokenizer.from_pretrained(locate(tokenizer or network)))

    def forward(self, images: Tensor, tokens: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Unit embeddings of pictures and of texts, [B, D] each, and the scale of their logits, a scalar."""
        scale = self.clip.logit_scale.squeeze(0).exp().clamp(max=LARGEST_SCALE)
        return self.encode_image(images), self.encode_text(tokens), scale

    def encode_image(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] to unit embeddings [B, D]."""
        return normalize(self.clip.get_image_features(pixel_values=images).pooler_output, dim=-1)

    def encode_text(self, tokens: dict[str, Tensor]) -> Tensor:
        """What `tokenize` returned to unit embeddings [B, D]."""
        return normalize(self.clip.get_text_features(**tokens).pooler_output, dim=-1)

    def tokenize(self, texts: list[str]) -> dict[str, Tensor]:
        """input_ids and attention_mask, int64 [B, L] for the longest text; what exceeds the tower is cut."""
        length = self.clip.config.text_config.max_position_embeddings
        device = next(self.parameters()).device
        found = self._tokenizer(list(texts), padding="longest", max_length=length, truncation=True, return_tensors="pt")
        return {name: found[name].to(device) for name in ("input_ids", "attention_mask")}

    def save_pretrained(self, folder: Path) -> None:
        """Writes the CLIPModel folder in fp16 with tokenizer and image processor, as CLIPProcessor reads it."""
        from transformers import CLIPImageProcessorPil

        size = self.clip.config.vision_config.image_size
        self.clip.logit_scale = nn.Parameter(self.clip.logit_scale.detach().reshape(()))
        self.clip.half().save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)
        CLIPImageProcessorPil(
            size={"shortest_edge": size}, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ).save_pretrained(folder)
