"""Token reduction: n tokens of a picture to K, each a mean over all of them by learned weights (arXiv 2202.06767).

    A = softmax over tokens of W2 G1 LN(x),   F = G2 x,   out_s = sum_p A_sp F_p

    x [B, n, D];  G1, G2: D -> D in 8 groups of channels, no bias;  W2: D -> K, no bias

1x1 convolutions over the grid of patches are these linear maps: the order of the tokens does not matter.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm


class GroupedLinear(nn.Module):
    """Linear map within groups of channels, without bias; the weight is [groups, D / groups, D / groups]."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups, width // groups, width // groups))
        nn.init.normal_(self.weight, std=(2 / width) ** 0.5)  # He's for fan-out, which counts all groups

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        groups = x.unflatten(-1, (self.weight.shape[0], -1))
        return torch.einsum("...gi,goi->...go", groups, self.weight).flatten(-2)


class TokenReduction(nn.Module):
    """The layer above, after the projection.

    Args:
        width: D, a multiple of `groups`.
        count: K.
        groups: of channels.
    """

    def __init__(self, width: int, count: int, groups: int = 8):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix, self.values = GroupedLinear(width, groups), GroupedLinear(width, groups)
        self.select = nn.Linear(width, count, bias=False)
        nn.init.normal_(self.select.weight, std=(2 / count) ** 0.5)

    def weights(self, x: Tensor) -> Tensor:
        """A [B, K, n] of tokens [B, n, D]; the norm is computed in float32."""
        norm = layer_norm(x.float(), x.shape[-1:], self.norm.weight.float(), self.norm.bias.float(), self.norm.eps)
        return self.select(self.mix(norm.to(x))).transpose(1, 2).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, D] -> [B, K, D]."""
        return self.weights(x) @ self.values(x)
