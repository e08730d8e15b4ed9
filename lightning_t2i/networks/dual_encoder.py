"""Everything of Wukong's dual encoder (arXiv 2202.06767) but its image tower: what is trained while that is locked."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lightning_t2i.errors import UserError
from lightning_t2i.networks.token_reduction import TokenReduction

LARGEST = math.log(100.0)  # of the logarithm of the scale
Features = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class LogitScale(nn.Module):
    """Scale and bias of the logits, in float32 whatever the towers compute in: near 4.6 bfloat16 has steps of .03, and
    a scale of 100 would move by 3.

    Args:
        scale, bias: initial values; without a bias it is 0.
    """

    def __init__(self, scale: float, bias: float | None):
        super().__init__()
        # One element and not a scalar: FSDP2 cuts no tensors without dimensions.
        self.log_scale = nn.Parameter(torch.tensor([math.log(scale)]))
        self.bias = None if bias is None else nn.Parameter(torch.tensor([bias]))

    def forward(self) -> tuple[Tensor, Tensor]:
        """One element each."""
        return self.log_scale.exp(), torch.zeros_like(self.log_scale) if self.bias is None else self.bias


class DualEncoder(nn.Module):
    """Projections, token reduction, the causal text tower, and the scale of the logits.

    Args:
        text: CLIPTextModel of transformers: causal, ending in [SEP] = `eos_token_id`, pad tokens 0.
        image_width: of the image tower's vectors.
        width: D of the common space.
        tokens: token-wise (styles f and r) or one vector for each picture and text (g).
        reduced: K tokens that a picture is reduced to; None keeps them all.
        scale: initial scale of the logits.
        bias: initial bias of the logits; None has none (it belongs to the sigmoid loss).
        projection: weight of the image projection to begin with, [D, image_width]; one of another shape is left.
        lock_projection: never train it.

    Raises:
        UserError: there is no projection of this shape to lock.
    """

    shard_forward_methods = ("encode_image", "encode_text")
    _keep_in_fp32_blocks = ("LogitScale",)

    def __init__(
        self,
        text: Any,
        image_width: int,
        width: int,
        tokens: bool,
        reduced: int | None = None,
        scale: float = 1 / 0.07,
        bias: float | None = None,
        projection: Tensor | None = None,
        lock_projection: bool = False,
    ):
        super().__init__()
        self.text, self.tokens = text, tokens
        self._no_split_modules = text._no_split_modules
        self.image_projection = nn.Linear(image_width, width, bias=False)
        self.text_projection = nn.Linear(text.config.hidden_size, width, bias=False)
        for layer in (self.image_projection, self.text_projection):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        own = self.image_projection.weight
        fits = projection is not None and projection.shape == own.shape
        if lock_projection and not fits:
            given = "no projection" if projection is None else f"one of {projection.shape[0]} numbers"
            what, fix = "There is no projection to lock", "lock_projection: false, or the width of the tower's own"
            raise UserError(what, where="model.lock_projection", given=f"{given}, width {width}", fix=fix)
        if projection is not None and fits and not projection.is_meta:  # rank 0 reads for all
            with torch.no_grad():
                own.copy_(projection)
        self.image_projection.requires_grad_(not lock_projection)
        self.reduction = TokenReduction(width, reduced) if reduced is not None else None
        self.logits = LogitScale(scale, bias)

    @property
    def count(self) -> int | None:
        """K of the reduction, None where there is none."""
        return None if self.reduction is None else self.reduction.select.out_features

    def forward(self, vectors: Tensor, ids: Tensor) -> Features:
        """Unit tokens of pictures [B, n1, D] and texts [B, n2, D], the texts' mask, scale and bias, one element each.

        Args:
            vectors: of the image tower [B, n, image_width].
            ids: token ids [B, L], 0 for pads.
        """
        texts, mask = self._text(ids)
        return self._image(vectors), texts, mask, *self.logits()

    # A sharded root gathers its weights for each method that is called from outside, and gives them back after it:
    # `forward` calls what these two are made of.
    def encode_image(self, vectors: Tensor) -> Tensor:
        """Vectors of the image tower [B, n, image_width] -> unit tokens [B, n1, D]."""
        return self._image(vectors)

    def encode_text(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Unit tokens [B, n2, D] and which of them count, bool [B, n2]; [CLS] and [SEP] do. Style g has that of [SEP].

        What stands behind a token does not change it, so pads need no mask in the tower.
        """
        return self._text(ids)

    def _image(self, vectors: Tensor) -> Tensor:
        x = self.image_projection(vectors.to(self.image_projection.weight.dtype))
        return normalize(x if self.reduction is None else self.reduction(x), dim=-1)

    def _text(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        states, mask = self.text(input_ids=ids).last_hidden_state, ids > 0
        if not self.tokens:
            last = mask.sum(1) - 1
            states, mask = states[torch.arange(len(ids), device=ids.device), last][:, None], mask[:, :1]
        return normalize(self.text_projection(states), dim=-1), mask

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Keeps the scale between 1 and 100 (arXiv 2103.00020, section 2.5)."""
        self.logits.log_scale.clamp_(0.0, LARGEST)


def initialise_text(text: Any) -> None:
    """CLIP's initial weights of a CLIPTextModel; transformers' own have attention's two deviations swapped."""
    nn.init.normal_(text.embeddings.token_embedding.weight, std=0.02)
    nn.init.normal_(text.embeddings.position_embedding.weight, std=0.01)
    _initialise_layers(text)


def initialise_image(image: Any) -> None:
    """CLIP's initial weights of a CLIPVisionModel."""
    std = image.config.hidden_size**-0.5
    nn.init.normal_(image.embeddings.class_embedding, std=std)
    nn.init.normal_(image.embeddings.position_embedding.weight, std=std)
    nn.init.kaiming_normal_(image.embeddings.patch_embedding.weight, mode="fan_out")
    _initialise_layers(image)


def _initialise_layers(tower: Any) -> None:
    width, depth = tower.config.hidden_size, tower.config.num_hidden_layers
    deep, std = width**-0.5 * (2 * depth) ** -0.5, width**-0.5
    for layer in tower.encoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            nn.init.normal_(projection.weight, std=std)
        nn.init.normal_(attention.out_proj.weight, std=deep)
        nn.init.normal_(mlp.fc1.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(mlp.fc2.weight, std=deep)
