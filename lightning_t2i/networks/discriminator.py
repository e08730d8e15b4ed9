"""The discriminator of DMD2: a small head on the middle features of a denoiser (arXiv 2405.14867, section 4.3)."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from lightning_t2i.errors import UserError
from lightning_t2i.networks.denoiser import Denoiser
from lightning_t2i.networks.edm_unets import EDMUNet

SIDE = 4  # to which the features are halved before the last convolution takes them whole
GROUPS = 32


class Discriminator(nn.Module):
    """Features [B, C, s, s] -> logits [B], positive for real ones.

    Args:
        channels: C.
        side: s, 1, 2, or a power of two.
    """

    def __init__(self, channels: int, side: int):
        super().__init__()
        stages: list[nn.Module] = []
        while side > SIDE:
            stages += _stage(nn.Conv2d(channels, channels, 4, stride=2, padding=1))
            side //= 2
        stages += _stage(nn.Conv2d(channels, channels, side))
        self.layers = nn.Sequential(*stages, nn.Conv2d(channels, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        logits = self.layers(features.to(self.layers[-1].weight.dtype))
        return logits.sum((1, 2, 3))  # of one value each; FSDP2 wants no views


def _stage(convolution: nn.Conv2d) -> list[nn.Module]:
    return [convolution, nn.GroupNorm(math.gcd(GROUPS, convolution.out_channels), convolution.out_channels), nn.SiLU()]


def middle(denoiser: Denoiser) -> tuple[str, int, int]:
    """(name of the module, channels, side) of the features between the two halves of a U-Net.

    Without a block in the middle they are those of the last block on the way down.

    Raises:
        UserError: a backbone without a middle.
    """
    facts: Any = getattr(denoiser.backbone, "config", None)
    if isinstance(denoiser.backbone, EDMUNet):
        side = facts.sample_size >> (len(facts.channel_mult) - 1)
        return f"encoder.{side}x{side}_block{facts.blocks - 1}", facts.channels * facts.channel_mult[-1], side
    if not hasattr(denoiser.backbone, "mid_block"):
        what, given = "A discriminator needs a U-Net, whose middle features it reads", type(denoiser.backbone).__name__
        raise UserError(what, where="model.teacher", given=given, allowed="UNet2DModel, UNet2DConditionModel, EDM")
    widths = facts.block_out_channels
    name = "mid_block" if denoiser.backbone.mid_block is not None else f"down_blocks.{len(widths) - 1}"
    return name, widths[-1], facts.sample_size >> (len(widths) - 1)
