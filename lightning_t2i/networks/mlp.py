"""A multilayer perceptron for pictures of one pixel: the denoiser of toy worlds.

    h_1 = silu(W_1 [x, t]),   h_i = silu(W_i h_(i-1)),   y = W h_n

Called as `backbone(x, t, cond)` on the preconditioned input like `edm_unets`, t = ln(sigma) / 4 an input beside x: the
network of EDM2's two-dimensional toy (Karras et al., arXiv 2406.02507) with a vector in place of its energy.
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from lightning_t2i.batch import Cond


class MLP(ModelMixin, ConfigMixin):
    """The network of this file.

    Args:
        sample_size: side of the pictures; all pixels are inputs of one layer.
        in_channels: channels of the pictures, before and after.
        width, depth: units of a hidden layer, and hidden layers.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(self, sample_size: int = 1, in_channels: int = 3, width: int = 64, depth: int = 3):
        super().__init__()
        values = in_channels * sample_size**2
        widths = [values + 1, *[width] * depth]
        hidden = [layer for i in range(depth) for layer in (nn.Linear(widths[i], widths[i + 1]), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, values))

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        """x [B, C, H, W], t = ln(sigma) / 4 [B] -> [B, C, H, W]; a condition has no effect."""
        return self.layers(torch.cat([x.flatten(1), t[:, None].to(x.dtype)], dim=1)).view_as(x)
