"""The network of heads that remove noise from one token (MAR, arXiv 2406.11838, section 3.2; DiT, arXiv 2212.09748):

    y = time(t) + condition(z)
    h <- h + gate MLP(norm(h) (1 + scale) + shift),   (shift, scale, gate) of all blocks from one product with silu(y)
    out = final(norm(h) (1 + scale) + shift)                                                       zero at the start

z goes through its layer once for all m noises of a token, and once for all steps of sampling. Time features, the last
layer and the arithmetic of the schedules are float32, whatever the precision of the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu


def in_float32(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """A function of tensors in float32, under autocast too."""
    with torch.autocast(inputs[0].device.type, enabled=False):
        return function(*(x.float() for x in inputs))


def time_features(t: Tensor, count: int = 256) -> Tensor:
    """Cosines, then sines of t [...] at `count` / 2 frequencies from 1 down to 1e-4: float32 [..., count]."""
    half = count // 2
    frequencies = torch.exp(-math.log(1e4) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[..., None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)


class FinalLayer(nn.Linear):
    """A linear layer in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return in_float32(linear, x, self.weight, self.bias)


class HeadNetwork(nn.Module):
    """The residual network of the file's second set of equations.

    Args:
        channels, outputs: values of a token, and those that come out.
        width, depth: of the residual blocks.
    """

    def __init__(self, channels: int, outputs: int, width: int, depth: int):
        super().__init__()
        self.inside = nn.Linear(channels, width)
        self.modulation = nn.Linear(width, (3 * depth + 2) * width)
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(depth))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.final = FinalLayer(width, outputs)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [..., channels], y [..., width] -> float32 [..., outputs]."""
        h = self.inside(x.to(self.inside.weight.dtype))
        parts = self.modulation(silu(y)).chunk(3 * len(self.mlps) + 2, -1)
        for i, (norm, mlp) in enumerate(zip(self.norms, self.mlps, strict=True)):
            shift, scale, gate = parts[3 * i : 3 * i + 3]
            h = torch.addcmul(h, gate, mlp(torch.addcmul(shift, norm(h), 1 + scale)))
        return self.final(torch.addcmul(parts[-2], self.norm(h), 1 + parts[-1]))


class NoiseHead(nn.Module):
    """What diffusion and flow share: layers for z and for time, and the network.

    Args:
        width: of z.
        channels: c, values of a token.
        depth, hidden: of the network.
        outputs: values that come out of it.
    """

    def __init__(self, width: int, channels: int, depth: int, hidden: int, outputs: int):
        super().__init__()
        self.channels = channels
        self.condition = nn.Linear(width, hidden)
        self.time = nn.Sequential(nn.Linear(256, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.network = HeadNetwork(channels, outputs, hidden, depth)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.time[0], self.time[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (self.network.modulation, self.network.final):
            nn.init.zeros_(layer.weight)

    def draws(self, steps: int) -> tuple[int, int]:
        """Normal vectors of a sampled token, and their width."""
        return steps, self.channels

    def embed(self, t: Tensor) -> Tensor:
        """Times [...] in units of a thousandth to [..., hidden]."""
        return self.time(time_features(t).to(self.time[0].weight.dtype))

    def predict(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """x [M, m, c], t [M, m], z [M, width] -> float32 [M, m, outputs]."""
        return self.network(x, self.embed(t) + self.condition(z)[:, None])

    def stepwise(self, z: Tensor, times: Tensor, guidance: float) -> Callable[[Tensor, int], Tensor]:
        """(x [M, c], index of a time) -> what the network says, [M, outputs].

        With guidance z holds M rows with the text and M without. Both meet the same x, which is moved once; the
        first c values are u + w (c - u), the others those with the text.
        """
        conditions, steps = self.condition(z), self.embed(times)

        def predict(x: Tensor, j: int) -> Tensor:
            y = conditions + steps[j]
            if guidance == 1:
                return self.network(x, y)
            told, null = self.network(torch.cat([x, x]), y).chunk(2)
            null = null[:, : self.channels]
            guided = null + guidance * (told[:, : self.channels] - null)
            return torch.cat([guided, told[:, self.channels :]], 1)

        return predict
