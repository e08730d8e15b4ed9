"""Projection heads as flat vectors: the students of retrieval, whose weights are what trajectories are made of.

    h = W1 v + b1,   u = dropout(W2 gelu(h) + b2),   P(v) = LayerNorm(u + h)

    v [B, d], h, u, P [B, D]; the flat vector has W1 [D, d], b1, W2 [D, D], b2, the norm's weight and bias, in order

A head is a function of its weights, so that a training loop can be differentiated through. Weights of several heads may
be stacked, [N, n]; inputs then are [N, B, d]. Initial weights are those of torch's layers: uniform within
1 / sqrt(inputs), ones and zeros for the norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, normalize

from lightning_t2i.keys import Keys

DROPOUT = 0.1
Branches = tuple[Tensor, Tensor]  # something of the picture and of the text branch


def each(function: Callable[..., Tensor], *pairs: Branches) -> Branches:
    """A function of each branch."""
    first, second = (function(*parts) for parts in zip(*pairs, strict=True))
    return first, second


@dataclass(frozen=True)
class Head:
    """A projection from `inputs` to `width` dimensions."""

    inputs: int
    width: int

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        d, w = self.inputs, self.width
        return (w, d), (w,), (w, w), (w,), (w,), (w,)

    @property
    def numel(self) -> int:
        """Parameters of the head."""
        return sum(math.prod(shape) for shape in self.shapes)

    def parts(self, weights: Tensor) -> list[Tensor]:
        """The six tensors of a flat vector [..., n], as views."""
        found, lead = [], weights.shape[:-1]
        for part, shape in zip(weights.split([math.prod(s) for s in self.shapes], dim=-1), self.shapes, strict=True):
            found.append(part.reshape(*lead, *shape))
        return found

    def initial(self, keys: Keys, name: str, numbers: Tensor) -> Tensor:
        """Weights [N, n] of new heads; each is a function of its number, int64 [N]."""
        found = []
        for place, (shape, fan) in enumerate(zip(self.shapes[:4], (self.inputs,) * 2 + (self.width,) * 2, strict=True)):
            u = keys.uniform(f"{name}/{place}", numbers, (math.prod(shape),))
            found.append((2 * u - 1) / math.sqrt(fan))
        ones = torch.ones(len(numbers), self.width, device=numbers.device)
        return torch.cat([*found, ones, torch.zeros_like(ones)], 1)

    def __call__(self, weights: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
        """P(v) of unit length, [..., B, D].

        Args:
            weights: [n], or [N, n] for v [N, B, d].
            keep: bool [..., B, D], what dropout leaves; None leaves all.
        """
        w1, b1, w2, b2, weight, bias = self.parts(weights)
        h = v @ w1.mT + b1.unsqueeze(-2)
        u = gelu(h) @ w2.mT + b2.unsqueeze(-2)
        if keep is not None:
            u = u * keep / (1 - DROPOUT)
        out = layer_norm(u + h, (self.width,)) * weight.unsqueeze(-2) + bias.unsqueeze(-2)
        return normalize(out, dim=-1, eps=0.0)


def dropout(keys: Keys, name: str, positions: Tensor, width: int) -> Tensor:
    """What dropout leaves: bool [B, width], a function of the key and the position, int64 [B]."""
    return keys.uniform(name, positions, (width,)) >= DROPOUT


@dataclass(frozen=True)
class Student:
    """Two heads into one space, on features of frozen encoders; logits are cosines over a fixed temperature.

    image, text: the heads, of equal width; temperature: tau.
    """

    image: Head
    text: Head
    temperature: float = 0.07

    @classmethod
    def of(cls, image: int, text: int, width: int | None = None, temperature: float = 0.07) -> Student:
        """A student of features of these widths; its own is that of the pictures' unless told."""
        return cls(Head(image, width or image), Head(text, width or image), temperature)

    def initial(self, keys: Keys, numbers: Tensor) -> Branches:
        """Weights of new students: [N, n] for each branch."""
        return self.image.initial(keys, "image", numbers), self.text.initial(keys, "text", numbers)

    def keep(self, keys: Keys, name: str, positions: Tensor) -> Branches:
        """Dropout of both branches: bool [B, D] each."""
        width = self.image.width
        return dropout(keys, f"{name}/image", positions, width), dropout(keys, f"{name}/text", positions, width)

    def embed(
        self,
        weights: Branches,
        images: Tensor,
        texts: Tensor,
        keep: Branches | tuple[None, None] = (None, None),
    ) -> Branches:
        """Unit vectors of features of pictures [..., B, d] and texts [..., C, d']."""
        return self.image(weights[0], images, keep[0]), self.text(weights[1], texts, keep[1])

    def logits(
        self,
        weights: Branches,
        images: Tensor,
        texts: Tensor,
        keep: Branches | tuple[None, None] = (None, None),
    ) -> Tensor:
        """[..., B, C]."""
        x, y = self.embed(weights, images, texts, keep)
        return x @ y.mT / self.temperature
