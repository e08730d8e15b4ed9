"""NFNet-L0, the image encoder of the vision-language distillation papers: a residual network without normalisation.

    y = shortcut + a gain f(b x),   f: silu, 1x1, silu, 3x3, silu, 3x3, silu, 1x1, channel attention (arXiv 2102.06171)
    W of every convolution is standardised over its inputs, times gain / sqrt(inputs) and a learned gain

    a = 0.2; b = 1 / (expected deviation of x), which grows by a^2 in every block of a stage

timm's nfnet_l0: depths 1, 2, 6, 3, channels 256, 512, 1536, 1536, a quarter of them inside, groups of 64, squeeze and
excitation of a quarter, silu; names of parameters are timm's, so that its weights can be read. 2,304 features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv2d, silu

ALPHA = 0.2
GAIN = 1.7881293296813965  # of silu: its output has unit deviation for unit input
DEPTHS, CHANNELS, FEATURES, GROUP = (1, 2, 6, 3), (256, 512, 1536, 1536), 2304, 64


class ScaledConv(nn.Conv2d):
    """A convolution whose weights are standardised."""

    def __init__(self, inputs: int, outputs: int, size: int = 1, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, size, stride, padding=size // 2, groups=groups)
        self.gain = nn.Parameter(torch.ones(outputs, 1, 1, 1))
        self.scale = GAIN * self.weight[0].numel() ** -0.5

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, len(self.weight), -1)
        weight = batch_norm(flat, None, None, (self.gain * self.scale).view(-1), training=True, momentum=0.0, eps=1e-6)
        return conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding, 1, self.groups)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        inner = max(8, int(channels * 0.25 + 4) // 8 * 8)
        self.fc1, self.fc2 = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(silu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class Shortcut(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.pool = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
        self.conv = ScaledConv(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pool(x))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, beta: float, first: bool):
        super().__init__()
        middle = outputs // 4
        self.beta = beta
        self.downsample = Shortcut(inputs, outputs, stride) if first else None
        self.conv1 = ScaledConv(inputs, middle)
        self.conv2 = ScaledConv(middle, middle, 3, stride, middle // GROUP)
        self.conv2b = ScaledConv(middle, middle, 3, 1, middle // GROUP)
        self.conv3 = ScaledConv(middle, outputs)
        self.attn_last = SqueezeExcite(outputs)

    def forward(self, x: Tensor) -> Tensor:
        out = silu(x) * self.beta
        shortcut = x if self.downsample is None else self.downsample(out)
        out = self.conv2b(silu(self.conv2(silu(self.conv1(out)))))
        return shortcut + 2 * ALPHA * self.attn_last(self.conv3(silu(out)))


class NFNet(nn.Module):
    """Pictures [B, 3, H, W], normalised -> features [B, 2304]."""

    width = FEATURES

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential()
        stem = zip((3, 16, 32, 64), (16, 32, 64, 128), (2, 1, 1, 2), strict=True)
        for number, (inputs, outputs, stride) in enumerate(stem, start=1):
            self.stem.add_module(f"conv{number}", ScaledConv(inputs, outputs, 3, stride))
        stages, inputs, variance = [], 128, 1.0
        for stage, (depth, channels) in enumerate(zip(DEPTHS, CHANNELS, strict=True)):
            blocks = []
            for place in range(depth):
                stride = 2 if place == 0 and stage > 0 else 1
                blocks.append(Block(inputs, channels, stride, variance**-0.5, place == 0))
                variance = (1.0 if place == 0 else variance) + ALPHA**2
                inputs = channels
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.final_conv = ScaledConv(inputs, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        for number, conv in enumerate(self.stem):
            x = conv(x) if number == 0 else conv(silu(x))
        return silu(self.final_conv(self.stages(x))).mean((2, 3))
