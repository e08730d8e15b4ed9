"""The image side of a dual encoder: a ViT of CLIP or a Swin transformer, from pictures to tokens before projection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_t2i.errors import UserError
from lightning_t2i.networks import load

Pixels = tuple[tuple[float, ...], tuple[float, ...]]  # mean and deviation of pictures in [0, 1], by channel
# Of those that the families' towers were trained on.
CLIP_PIXELS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET_PIXELS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def read_pixels(source: str | Path, revision: str | None = None) -> Pixels | None:
    """What a folder or hub repository says of its pictures, in either file that transformers writes, or None."""
    facts = (load.read_json(source, "processor_config.json", revision) or {}).get("image_processor")
    facts = facts or load.read_json(source, "preprocessor_config.json", revision) or {}
    if facts.get("do_normalize") is False:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return (tuple(facts["image_mean"]), tuple(facts["image_std"])) if "image_mean" in facts else None


class ImageTower(nn.Module):
    """Pictures to the vectors that a projection maps to the common space.

        CLIPVisionModel  global: ln_post of [CLS];  tokens: ln_post of every patch, [CLS] left out
        SwinModel        global: mean of the last stage's positions;  tokens: its positions

    Args:
        backbone: CLIPVisionModel or SwinModel of transformers, or a model that holds one.
        tokens: whether all tokens come out, or one global vector.
        normalise: mean and deviation of pictures, three numbers each; those of the family by default.
        projection: the projection that was trained with the tower, [D, width], to begin with; None where there is none.

    Attributes:
        width: of the vectors; size: side of the pictures in pixels.
    """

    def __init__(
        self,
        backbone: nn.Module,
        tokens: bool,
        normalise: Pixels | None = None,
        projection: Tensor | None = None,
    ):
        super().__init__()
        held: Any = next((getattr(backbone, n) for n in ("vision_model", "swin") if hasattr(backbone, n)), backbone)
        if type(held).__name__ not in ("CLIPVisionModel", "SwinModel"):
            raise UserError(
                "Not an image tower that is served", where="model.image", given=type(backbone).__name__,
                allowed="CLIPModel, CLIPVisionModel, SwinModel",
            )  # fmt: skip
        self.backbone, self.tokens = held, tokens
        self._no_split_modules = held._no_split_modules
        self.is_vit = type(held).__name__ == "CLIPVisionModel"
        self.normalise = normalise or (CLIP_PIXELS if self.is_vit else IMAGENET_PIXELS)
        self.width, self.size = int(held.config.hidden_size), int(held.config.image_size)
        self.projection = projection

    @classmethod
    def build(cls, source: str, tokens: bool, revision: str | None = None) -> ImageTower:
        """From a folder or hub id with weights, or from a JSON architecture file. A CLIPModel's text tower is dropped.

        An exported dual encoder with a Swin tower has it in `image`; its projection comes with the text tower. Pictures
        are normalised as the folder says, else as the family's towers were trained.

        Raises:
            UserError: no such source, or it holds no image tower of a known kind.
        """
        inside = not source.endswith(".json") and load.read_json(source, "config.json", revision) is None
        network = load.load_model(source, "image", revision) if inside else load.build_network(source, revision)
        head = getattr(network, "visual_projection", None)
        pixels = None if source.endswith(".json") else read_pixels(source, revision)
        return cls(network, tokens, pixels, None if head is None else head.weight.detach().clone())

    def forward(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, size, size] in [-1, 1] -> [B, n, width], n = 1 for the global vector.

        Raises:
            UserError: pictures of another size.
        """
        if images.shape[-1] != self.size or images.shape[-2] != self.size:
            raise UserError(
                "The pictures are not of the tower's size", where="data.main.size",
                given=f"{images.shape[-2]} x {images.shape[-1]}", allowed=f"{self.size} x {self.size}",
            )  # fmt: skip
        weight = next(self.backbone.parameters())
        mean, deviation = (images.new_tensor(values).view(1, 3, 1, 1) for values in self.normalise)
        pixels = ((images + 1) / 2 - mean) / deviation
        states = self.backbone(pixels.to(weight.dtype)).last_hidden_state
        if not self.is_vit:
            return states if self.tokens else states.mean(1, keepdim=True)
        return self.backbone.post_layernorm(states[:, 1:] if self.tokens else states[:, :1])
