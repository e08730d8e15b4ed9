"""The discriminator's layers are those of the paper's description; the middle of each kind of U-Net is found."""

from __future__ import annotations

import pytest
import torch
from tiny_networks import backbone
from torch import nn

from lightning_t2i.batch import Cond
from lightning_t2i.networks.denoiser import Denoiser
from lightning_t2i.networks.discriminator import Discriminator, middle
from lightning_t2i.networks.load import build_network
from lightning_t2i.processes import DDPM, EDM


def convolutions(channels: int, side: int) -> list[tuple]:
    with torch.device("meta"):
        head = Discriminator(channels, side)
    assert head(torch.zeros(3, channels, side, side, device="meta")).shape == (3,)
    return [(m.kernel_size[0], m.stride[0], m.padding[0]) for m in head.modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize(("side", "halvings"), [(32, 3), (8, 1), (4, 0), (2, 0), (1, 0)])
def test_features_are_halved_to_four_and_taken_whole(side, halvings) -> None:
    whole = min(side, 4)
    assert convolutions(64, side) == [(4, 2, 1)] * halvings + [(whole, 1, 0), (1, 1, 0)]


def test_gradients_reach_the_features_and_groups_divide_the_channels() -> None:
    torch.manual_seed(0)
    head, features = Discriminator(40, 8), torch.randn(2, 40, 8, 8, requires_grad=True)
    assert {m.num_groups for m in head.modules() if isinstance(m, nn.GroupNorm)} == {8}  # 32 does not divide 40
    head(features).sum().backward()
    assert float(features.grad.abs().min(0).values.sum()) > 0


@pytest.mark.parametrize(
    ("network", "process", "found"),
    [
        ("sd15_unet", DDPM(), ("mid_block", 1280, 8)),
        ("sdxl_unet", DDPM(), ("mid_block", 1280, 32)),
        ("edm_imagenet64", EDM(), ("encoder.8x8_block2", 768, 8)),
        ("edm_cifar10", EDM(), ("encoder.8x8_block3", 256, 8)),
    ],
)
def test_the_middle_of_the_papers_networks(network, process, found) -> None:
    with torch.device("meta"):
        denoiser = Denoiser(build_network(f"configs/networks/{network}.json"), process, "eps")
    assert middle(denoiser) == found and found[0] in dict(denoiser.backbone.named_modules())


@pytest.mark.parametrize("kind", ["unet", "unet_text", "without"])
def test_the_middle_has_the_named_shape(kind) -> None:
    if kind == "without":  # a block in the middle
        network = build_network("configs/networks/tiny_sd_unet.json")
        assert network.mid_block is None
    else:
        network = backbone(kind)
    denoiser = Denoiser(network, DDPM(), "eps")
    name, channels, side = middle(denoiser)

    width = network.config.get("cross_attention_dim")
    cond = Cond(embeds=torch.zeros(2, 5, width)) if width else None
    with torch.no_grad():
        _, features = denoiser.features(torch.zeros(2, 4, 8, 8), 5, cond, [name])
    assert features[name].shape == (2, channels, side, side)
