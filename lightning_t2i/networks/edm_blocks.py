"""The parts of EDM's two U-Nets: residual block, self-attention and noise embeddings.

    h = conv1(act(norm1(x)))                            halved or doubled in size before the convolution
    h = act(norm2(h) (1 + scale) + shift)               adaptive   (ADM, arXiv 2105.05233)
        act(norm2(h + shift))                           otherwise  (DDPM++, arXiv 2011.13456)
    y = s (skip(x) + conv2(dropout(h)))                 s = 1 (ADM), sqrt(1/2) (DDPM++)
    y = s (y + attention(norm(y)))                      where there is attention

scale and shift are linear in the embedding of noise level and class. Written from the tables and appendix F.2 of EDM
(arXiv 2206.00364).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, scaled_dot_product_attention, silu


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """Up to 32 groups of at least 4 channels."""
    return nn.GroupNorm(min(32, channels // 4), channels, eps)


def resample(x: Tensor, direction: str | None) -> Tensor:
    """[B, C, h, w] at half ("down", means of 2x2) or twice ("up", nearest) the size: the filter [1, 1]."""
    if direction == "down":
        return avg_pool2d(x, 2)
    return interpolate(x, scale_factor=2, mode="nearest") if direction == "up" else x


class SelfAttention(nn.Module):
    """Attention over all places. Output channels of `qkv` are ordered (head, channel, one of q k v) as published."""

    def __init__(self, channels: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels, eps)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, self.heads, channels // self.heads, 3, height * width)
        q, k, v = qkv.transpose(2, 4).unbind(3)  # [B, heads, places, channels] each
        out = scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(batch, channels, height, width)
        return self.out(out)


class EDMBlock(nn.Module):
    """A residual block.

    Args:
        inputs, outputs: channels.
        embedding: channels of the embedding.
        heads: heads of its attention; 0 for none.
        direction: "down", "up" or None, see `resample`.
        adaptive: the embedding gives scale and shift after the normalisation, else a shift before it.
        project: a resampled skip connection of equal channels is projected too.
        scale: s of the file's equations.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        *,
        heads: int = 0,
        direction: str | None = None,
        dropout: float = 0.0,
        adaptive: bool = True,
        project: bool = False,
        scale: float = 1.0,
        eps: float = 1e-5,
    ):
        super().__init__()
        self.direction, self.adaptive, self.scale, self.outputs = direction, adaptive, scale, outputs
        self.norm1 = group_norm(inputs, eps)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.embedding = nn.Linear(embedding, outputs * (2 if adaptive else 1))
        self.norm2 = group_norm(outputs, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        projected = inputs != outputs or (direction is not None and project)
        self.skip = nn.Conv2d(inputs, outputs, 1) if projected else nn.Identity()
        self.attention = SelfAttention(outputs, heads, eps) if heads else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x [B, inputs, h, w], emb [B, embedding] -> [B, outputs, h', w']."""
        h = self.conv1(resample(silu(self.norm1(x)), self.direction))
        shift = self.embedding(emb)[:, :, None, None]
        if self.adaptive:
            scale, shift = shift.chunk(2, dim=1)
            h = silu(self.norm2(h) * (1 + scale) + shift)
        else:
            h = silu(self.norm2(h + shift))
        y = self.scale * (self.skip(resample(x, self.direction)) + self.conv2(self.dropout(h)))
        return y if self.attention is None else self.scale * (y + self.attention(y))


class Sinusoids(nn.Module):
    """Sines and cosines of t times frequencies from 1 down to 1 / 10000.

    Args:
        channels: of the embedding, even.
        endpoint: the lowest frequency is 1 / 10000 exactly (DDPM++), else one step above it (ADM).
        sine_first: sines before cosines (DDPM++), else after them (ADM).
    """

    def __init__(self, channels: int, endpoint: bool, sine_first: bool):
        super().__init__()
        self.channels, self.endpoint, self.sine_first = channels, endpoint, sine_first

    def forward(self, t: Tensor) -> Tensor:
        """t [B] -> [B, channels], of the dtype of t."""
        half = self.channels // 2
        powers = torch.arange(half, device=t.device, dtype=t.dtype) / (half - int(self.endpoint))
        angles = t[:, None] * (1 / 10000) ** powers
        waves = [angles.cos(), angles.sin()]
        return torch.cat(waves[::-1] if self.sine_first else waves, dim=1)


class FourierFeatures(nn.Module):
    """Sines and cosines of t at fixed Gaussian frequencies of standard deviation 16 (NCSN++, arXiv 2011.13456)."""

    frequencies: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("frequencies", nn.init.normal_(torch.empty(channels // 2), std=16))

    def forward(self, t: Tensor) -> Tensor:
        """t [B] -> [B, channels], of the dtype of t."""
        angles = 2 * math.pi * t[:, None] * self.frequencies.to(t.dtype)
        return torch.cat([angles.sin(), angles.cos()], dim=1)
