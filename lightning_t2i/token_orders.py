"""Orders of token prediction: how many tokens are masked, which ones, and what changes from step to step.

    r = Q(u), u ~ U(0, 1)         mask ratio of a picture
        cosine      cos(pi u / 2)                                              MaskGIT, arXiv 2202.04200, section 3.2
        arccos      (2 / pi) arccos(u)                                         Muse, arXiv 2301.00704, section 2.6
        truncnorm   N(1, 0.25^2) cut to [0.7, 1]                               MAR, arXiv 2406.11838, section 4
    n = max(1, ceil(r L))         masked tokens: the n smallest ranks of a random permutation
    m_k = max(1, min(m_(k-1) - 1, floor(L cos(pi/2 (k + 1) / K)))), m_(-1) = L       tokens that step k leaves masked
    w_k = 1 + (w - 1) (L - m_k) / L                                            "linear" guidance; the last step predicts
                                                                               all that is left and has w_(K-1) of m = 1
    L tokens, K steps, k = 0, ..., K - 1

Strata: u of S consecutive positions is (j + U) / S with the j in a random order and one U for each, so that every
picture keeps the law alone while the masked tokens of a batch are nearly as many in every step. What is computed for
masked tokens only then has a fixed size, `MaskLaw.rows`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_t2i.errors import UserError
from lightning_t2i.keys import Keys

Law = Literal["cosine", "arccos", "truncnorm"]
Schedule = Literal["linear", "constant"]
DEVIATION, LOWEST = 0.25, 0.7  # of the truncated normal
CUT = 0.5 * math.erfc((1 - LOWEST) / DEVIATION / math.sqrt(2))  # share of the normal below LOWEST
DENSITY = (1 - math.exp(-0.5 * ((1 - LOWEST) / DEVIATION) ** 2)) / math.sqrt(2 * math.pi)
# Mean of r and the width of its range.
MOMENTS = {
    "cosine": (2 / math.pi, 1.0),
    "arccos": (2 / math.pi, 1.0),
    "truncnorm": (1 - DEVIATION * DENSITY / (0.5 - CUT), 1 - LOWEST),
}


def mask_ratio(law: Law, u: Tensor) -> Tensor:
    """Q(u): mask ratios in [0, 1] of float64 u in (0, 1), of any shape."""
    if law == "cosine":
        return torch.cos(0.5 * math.pi * u)
    if law == "arccos":
        return 2 / math.pi * torch.arccos(u)
    return 1 + DEVIATION * torch.special.ndtri(CUT + u * (0.5 - CUT))


@dataclass(frozen=True)
class MaskLaw:
    """The law of the masks of a training.

    Args:
        law: Q.
        strata: S; 1 draws every u on its own.
    """

    law: Law = "cosine"
    strata: int = 32

    def __post_init__(self) -> None:
        if self.law not in MOMENTS:
            raise UserError("No such mask law", where="law", given=self.law, allowed=list(MOMENTS))
        if self.strata < 1:
            raise UserError("strata must be at least 1", where="strata", given=self.strata)

    def ratios(self, keys: Keys, positions: Tensor) -> Tensor:
        """Mask ratios float64 [B] of global positions [B]."""
        size = self.strata
        group = positions.div(size, rounding_mode="floor")
        ranks = ranked(keys.words("mask_strata", group, size))
        place = ranks.gather(1, (positions % size)[:, None])[:, 0]
        return mask_ratio(self.law, (place + keys.uniform("mask_ratio", positions, dtype=torch.float64)) / size)

    def masks(self, keys: Keys, positions: Tensor, length: int) -> Tensor:
        """Masks bool [B, L], True where a token is to be predicted; at least one of each row."""
        counts = (self.ratios(keys, positions) * length).ceil().clamp(min=1)
        return ranked(keys.words("mask_order", positions, length)) < counts[:, None]

    def rows(self, batch: int, length: int) -> int:
        """The most masked tokens that `batch` positions can have that follow a multiple of `batch`, as in all batches.

        The sum of f((j + U_j) / S) over a whole stratum, f monotone, differs from S times its mean by the width of its
        range at most. Positions that are no whole stratum count in full.
        """
        whole = batch // self.strata if batch % self.strata == 0 else max(batch // self.strata - 1, 0)
        mean, width = MOMENTS[self.law]
        bound = whole * (self.strata * mean + width) + (batch - whole * self.strata)
        return min(batch * length, math.ceil(bound * length) + batch)


def ranked(words: Tensor) -> Tensor:
    """The rank of each column in its row, int64 [B, L] of that shape; of equal ones the first comes first."""
    return words.argsort(dim=1, stable=True).argsort(dim=1)


def permutations(keys: Keys, stream: str, positions: Tensor, length: int) -> Tensor:
    """Random permutations of 0 ... L - 1: int64 [B, L]."""
    return keys.words(stream, positions, length).argsort(dim=1, stable=True)


def remaining(length: int, steps: int) -> list[int]:
    """m_k, the tokens that each of K steps leaves masked: falling by at least one each, 0 at the end.

    Raises:
        UserError: fewer than one step, or more steps than tokens.
    """
    if not 1 <= steps <= length:
        raise UserError("The tokens cannot be predicted in so many steps", where="steps", given=steps,
                        allowed=f"1 to {length}")  # fmt: skip
    left, found = length, []
    for k in range(steps - 1):
        left = max(1, min(left - 1, math.floor(length * math.cos(0.5 * math.pi * (k + 1) / steps))))
        found.append(left)
    return [*found, 0]


def guidance_scales(schedule: Schedule, scale: float, left: list[int], length: int) -> list[float]:
    """w_k of steps that leave `left` tokens masked; "constant" is `scale` in each. All are 1 where `scale` is."""
    if schedule == "constant":
        return [scale] * len(left)
    return [1 + (scale - 1) * (length - max(1, m)) / length for m in left]


def most_confident(log_p: Tensor, masked: Tensor, left: int, noise: Tensor) -> Tensor:
    """MaskGIT's choice (arXiv 2202.04200, section 3.2): which masked tokens stay masked after a step.

    Args:
        log_p: log probability of the tokens that were drawn, [B, L].
        masked: bool [B, L].
        left: tokens of each row that stay masked, fewer than are masked now.
        noise: what is added to log_p, [B, L]: Gumbel noise times its annealed scale.

    Returns:
        bool [B, L].
    """
    score = torch.where(masked, log_p + noise, torch.inf)
    return ranked(score) < left
