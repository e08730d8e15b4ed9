"""The blocks of the token transformer: attention within a sequence, attention to the text, multilayer perceptron.

    x = x + out(attention(q, k, v)),  (q, k, v) of norm(x)        within the tokens, causal in the raster order
    x = x + out(attention(q, k, v)),  q of norm(x), (k, v) of text
    x = x + MLP(norm(x))

A block that is shown the text alone returns its keys and values: they are the same in every step of sampling, so they
are computed once for each prompt (Fluid, arXiv 2410.13863; MAR, arXiv 2406.11838).
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

KeysValues: TypeAlias = tuple[Tensor, Tensor]
"""Keys and values [B, heads, N, width / heads] each."""


class Attention(nn.Module):
    """Multi-head attention with queries of `x` and keys and values of `x` or of another sequence.

    Args:
        width, heads: channels, and heads they are cut into.
        cross: keys and values are those of another sequence, see `keys_values`.
        dropout: of the attention weights and of the output.
    """

    def __init__(self, width: int, heads: int, cross: bool = False, dropout: float = 0.0):
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.inputs = nn.Linear(width, width if cross else 3 * width)
        self.text = nn.Linear(width, 2 * width) if cross else None
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def keys_values(self, text: Tensor) -> KeysValues:
        """Keys and values of another sequence [B, N, width]."""
        assert self.text is not None
        k, v = self._split(self.text(text), 2)
        return k, v

    def forward(
        self,
        x: Tensor,
        other: KeysValues | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        rotary: Tensor | None = None,
        past: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Tensor:
        """x [B, n, width] -> [B, n, width].

        Args:
            other: keys and values of the other sequence; None where it attends to itself.
            mask: True where a key is seen, to be broadcast to [B, heads, n, N].
            causal: a place sees itself and those before it.
            rotary: cosines and sines [2, n, width / heads / 2] that turn queries and keys.
            past: keys, values [B, heads, L, width / heads], and the place [1] where those of x are written into them.
        """
        q, *own = self._split(self.inputs(x), 1 if other is not None else 3)
        k, v = other if other is not None else own
        if rotary is not None:
            q, k = turn(q, rotary), turn(k, rotary)
        if past is not None:
            keys, values, place = past
            k, v = keys.index_copy_(2, place, k), values.index_copy_(2, place, v)
        rate = self.rate if self.training else 0.0
        found = scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=rate, is_causal=causal)
        return self.dropout(self.out(found.transpose(1, 2).flatten(2)))

    def _split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """[B, n, parts * width] -> parts of [B, heads, n, width / heads]."""
        return x.unflatten(2, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def mlp(width: int, ratio: float, dropout: float) -> nn.Sequential:
    """Linear, GELU, Linear with `ratio` times the width between them."""
    hidden = int(width * ratio)
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width), nn.Dropout(dropout))


class AlignerBlock(nn.Module):
    """A block over the text alone: attention between real words, then the perceptron."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, dropout: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attention = Attention(width, heads, dropout=dropout)
        self.mlp = mlp(width, mlp_ratio, dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, N, width], mask bool [B, N] True for real words -> [B, N, width]."""
        x = x + self.attention(self.norm1(x), mask=mask[:, None, None])
        return x + self.mlp(self.norm2(x))


class TokenBlock(nn.Module):
    """A block over the tokens; the text enters by its second attention and is never changed."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, dropout: float):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.attention = Attention(width, heads, dropout=dropout)
        self.cross = Attention(width, heads, cross=True, dropout=dropout)
        self.mlp = mlp(width, mlp_ratio, dropout)

    def forward(
        self,
        x: Tensor | None,
        text: Tensor | KeysValues,
        text_mask: Tensor | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        rotary: Tensor | None = None,
        past: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Tensor | KeysValues:
        """x [B, n, width] -> [B, n, width]; without x the keys and values of the text.

        Args:
            text: states [B, N, width], or what this block returned for them.
            text_mask: bool [B, N], True for real words.
            mask, causal, rotary, past: of the attention within the tokens, see `Attention`.
        """
        found = self.cross.keys_values(text) if isinstance(text, Tensor) else text
        if x is None:
            return found
        x = x + self.attention(self.norm1(x), mask=mask, causal=causal, rotary=rotary, past=past)
        seen = None if text_mask is None else text_mask[:, None, None]
        x = x + self.cross(self.norm2(x), other=found, mask=seen)
        return x + self.mlp(self.norm3(x))


def turn(x: Tensor, rotary: Tensor) -> Tensor:
    """Turns the halves of x [B, heads, n, D], as pairs, by the angles of a `rotary_table` [2, n, D / 2]."""
    cosine, sine = rotary.to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], -1)


def _angles(length: int, count: int, device: torch.device) -> Tensor:
    """float32 [length, count]: half of the angles tell the row, half the column of a square of places."""
    side = math.isqrt(length)
    place = torch.arange(length, device=device)
    rows, columns = place.div(side, rounding_mode="floor"), place % side
    frequencies = 1e4 ** (-torch.arange(count // 2, dtype=torch.float32, device=device) / (count // 2))
    return torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], 1)


def rotary_table(length: int, width: int, device: torch.device) -> Tensor:
    """Cosines and sines [2, length, width / 2] for heads of this width, a multiple of 4 (RoPE, arXiv 2104.09864)."""
    angles = _angles(length, width // 2, device)
    return torch.stack([angles.cos(), angles.sin()])


def sine_table(length: int, width: int, device: torch.device) -> Tensor:
    """Fixed features [length, width] of the places of a square, without parameters; width a multiple of 4."""
    angles = _angles(length, width // 2, device)
    return torch.cat([angles.sin(), angles.cos()], 1)
