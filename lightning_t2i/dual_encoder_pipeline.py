"""A trained dual encoder: features, similarities and probabilities of pictures and Chinese texts; its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_t2i.errors import UserError
from lightning_t2i.networks.build import forget_origin
from lightning_t2i.networks.chinese_tokenizer import ChineseTokenizer
from lightning_t2i.networks.dual_encoder import DualEncoder
from lightning_t2i.networks.image_tower import ImageTower
from lightning_t2i.networks.load import build_network
from lightning_t2i.processes.similarity import Pad, token_similarity

FACTS, HEADS = "wukong.json", "heads.safetensors"


class DualEncoderPipeline:
    """Image tower, dual encoder and tokenizer.

    Args:
        image: the image tower.
        towers: the rest of the weights.
        tokenizer: of the texts.
        pad: what pad tokens do in a maximum; as in training.
    """

    def __init__(self, image: ImageTower, towers: DualEncoder, tokenizer: ChineseTokenizer, pad: Pad = "exact"):
        self.image, self.towers, self.tokenizer, self.pad = image, towers, tokenizer, pad

    @torch.no_grad()
    def encode_image(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> unit vectors [B, D] of style g, unit tokens [B, n1, D] of the others."""
        return self._features(self.towers.encode_image(self.image(images)))

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Texts -> unit vectors [B, D] of style g, else unit tokens [B, length, D] with zeros behind the text."""
        device = self.towers.logits.log_scale.device
        tokens, mask = self.towers.encode_text(self.tokenizer(texts, full=True).to(device))
        return self._features(tokens * mask[..., None])

    def _features(self, tokens: Tensor) -> Tensor:
        return tokens if self.towers.tokens else tokens[:, 0]

    @torch.no_grad()
    def similarity(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        """sI [N, M] and sT [M, N] of what `encode_image` and `encode_text` returned; see processes/similarity.py."""
        images, texts = (features.to(self.towers.logits.log_scale.device) for features in (images, texts))
        if images.ndim == 2:
            images, texts = images[:, None], texts[:, None]
        mask = texts.abs().amax(-1) > 0
        there, back = token_similarity(images, texts, None, mask, self.pad, back=True)
        assert back is not None
        return there, back

    def probabilities(self, images: Tensor, texts: Tensor) -> Tensor:
        """Of each of M texts for each of N pictures, rows sum to 1: softmax(scale sI), as the training weighed them."""
        return (self.towers.logits.log_scale.exp() * self.similarity(images, texts)[0]).softmax(1)

    # ---- the folder ----------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Writes the folder in float32: a CLIPModel of transformers where the image tower is a ViT.

        `heads.safetensors` has what no stock model has: the reduction and the bias; with a Swin tower, whose folder
        `image` and text tower `text` are stock models, the projections and the scale too.
        """
        towers = self.towers
        heads = {k: v for k, v in towers.state_dict().items() if not k.startswith("text.")}
        if self.image.is_vit:
            self._clip().save_pretrained(folder)
            heads = {k: v for k, v in heads.items() if k.startswith(("reduction.", "logits.bias"))}
        else:
            self.image.backbone.save_pretrained(folder / "image")
            towers.text.save_pretrained(folder / "text")
        if heads:
            save_file({k: v.contiguous() for k, v in heads.items()}, folder / HEADS)
        self.tokenizer.save(folder)
        self._pixels().save_pretrained(folder)
        facts = {
            "tokens": towers.tokens,
            "width": towers.image_projection.out_features,
            "reduced": towers.count,
            "bias": None if towers.logits.bias is None else 0.0,
            "pad": self.pad,
            "normalise": self.image.normalise,
            "length": self.tokenizer.length,
        }
        (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        forget_origin(folder)

    def _clip(self) -> Any:
        from transformers import CLIPConfig, CLIPModel

        towers, image = self.towers, self.image.backbone
        config = CLIPConfig(
            text_config=towers.text.config.to_dict(),
            vision_config=image.config.to_dict(),
            projection_dim=towers.image_projection.out_features,
        )
        model = CLIPModel(config)
        model.text_model.load_state_dict(towers.text.state_dict())
        model.vision_model.load_state_dict(image.state_dict())
        with torch.no_grad():
            model.visual_projection.weight.copy_(towers.image_projection.weight)
            model.text_projection.weight.copy_(towers.text_projection.weight)
            model.logit_scale.copy_(towers.logits.log_scale[0])
        return model

    def _pixels(self) -> Any:
        from transformers import CLIPImageProcessorPil

        mean, deviation = (list(values) for values in self.image.normalise)
        size = self.image.size
        return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size, image_mean=mean, image_std=deviation)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> DualEncoderPipeline:
        """Reads what `save` wrote.

        Raises:
            UserError: another kind of folder.
        """
        folder = Path(folder)
        if not (folder / FACTS).is_file():
            raise UserError(
                "Not a folder of a dual encoder", where=str(folder), fix="train.py export FOLDER writes one"
            )
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        heads = load_file(folder / HEADS) if (folder / HEADS).is_file() else {}
        if (folder / "image").is_dir():
            network, text = build_network(str(folder / "image")), build_network(str(folder / "text"))
        else:
            clip: Any = build_network(str(folder))
            network, text = clip, clip.text_model
            heads["image_projection.weight"] = clip.visual_projection.weight.detach()
            heads["text_projection.weight"] = clip.text_projection.weight.detach()
            heads["logits.log_scale"] = clip.logit_scale.detach().view(1)
        mean, deviation = (tuple(values) for values in facts["normalise"])
        image = ImageTower(network, facts["tokens"], (mean, deviation))
        weights = {**heads, **{f"text.{k}": v for k, v in text.state_dict().items()}}
        towers = DualEncoder(text, image.width, facts["width"], facts["tokens"], facts["reduced"], bias=facts["bias"])
        towers.load_state_dict(weights, assign=True)  # on meta where rank 0 reads for all
        return cls(image.eval(), towers.eval(), ChineseTokenizer(str(folder), facts["length"]), facts["pad"])
