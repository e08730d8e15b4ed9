"""EDM's U-Nets: published sizes, parts against written-out formulas, null label, augmentation, folders, Denoiser."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_t2i.batch import Cond
from lightning_t2i.networks import load
from lightning_t2i.networks.denoiser import Denoiser
from lightning_t2i.networks.edm_blocks import EDMBlock, FourierFeatures, SelfAttention, Sinusoids, resample
from lightning_t2i.networks.edm_unets import DhariwalUNet, EDMUNet, SongUNet
from lightning_t2i.processes.edm import EDM
from lightning_t2i.processes.schedulers import to_scheduler
from lightning_t2i.strategies.sharding import blocks

SMALL = {
    "sample_size": 8,
    "num_classes": 5,
    "augment_dim": 2,
    "channels": 8,
    "channel_mult": (1, 2),
    "blocks": 1,
    "attention_sizes": (4,),
}


def network(cls: type[EDMUNet], **changes) -> EDMUNet:
    """A small network in eval mode whose weights are all random, those that start at zero too."""
    torch.manual_seed(0)
    net = cls(**{**SMALL, **changes})
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    return net.eval()


def inputs(size: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 3, 8, 8, generator=generator), torch.linspace(-1.5, 1, size)


both = pytest.mark.parametrize("cls", [SongUNet, DhariwalUNet])


@pytest.mark.parametrize(("name", "millions"), [("edm_cifar10", 55.7), ("edm_imagenet64", 295.9)])
def test_published_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        net = load.build_network(f"configs/networks/{name}.json")
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert len(list(blocks(net))) > 20


@both
def test_embeddings_are_as_wide_as_asked_for(cls: type[EDMUNet]) -> None:
    wide = {layer.in_features for layer in network(cls, embedding_mult=3).modules() if isinstance(layer, nn.Linear)}
    usual = {layer.in_features for layer in network(cls).modules() if isinstance(layer, nn.Linear)}
    assert 24 in wide and 24 not in usual and 32 in usual


def test_resampling_is_the_filter_of_two_ones() -> None:
    x = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    kernel = torch.full((3, 1, 2, 2), 0.25)
    down = nn.functional.conv2d(x, kernel, stride=2, groups=3)
    up = nn.functional.conv_transpose2d(x, 4 * kernel, stride=2, groups=3)
    torch.testing.assert_close(resample(x, "down"), down)
    torch.testing.assert_close(resample(x, "up"), up)
    assert resample(x, None) is x


def test_attention_written_out() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(8, 2, 1e-5)
    x = torch.randn(2, 8, 3, 3)
    qkv = attention.qkv(attention.norm(x)).reshape(2 * 2, 4, 3, 9)  # the published order: head, channel, q k v
    q, k, v = qkv.unbind(2)
    weights = torch.einsum("ncq,nck->nqk", q, k / math.sqrt(4)).softmax(2)
    expected = attention.out(torch.einsum("nqk,nck->ncq", weights, v).reshape(2, 8, 3, 3))
    torch.testing.assert_close(attention(x), expected)


@pytest.mark.parametrize("direction", ["down", "up"])
def test_a_skip_of_equal_channels_is_projected_only_where_asked(direction: str) -> None:
    assert isinstance(EDMBlock(8, 8, 4, direction=direction).skip, nn.Identity)
    assert isinstance(EDMBlock(8, 8, 4, direction=direction, project=True).skip, nn.Conv2d)
    block = EDMBlock(8, 8, 4, direction=direction, scale=0.5)
    nn.init.zeros_(block.conv2.weight)
    nn.init.zeros_(block.conv2.bias)
    x = torch.ones(1, 8, 4, 4)
    side = 2 if direction == "down" else 8
    torch.testing.assert_close(block(x, torch.ones(1, 4)), torch.full((1, 8, side, side), 0.5))


def test_noise_embeddings_by_hand() -> None:
    t = torch.tensor([0.3, -1.1], dtype=torch.float64)
    adm, ddpm = Sinusoids(4, False, sine_first=False)(t), Sinusoids(4, True, sine_first=True)(t)
    slow = 0.01 * t  # half of 2 frequencies: 1 and 10000^(-1/2), or with the endpoint 1 and 1/10000
    torch.testing.assert_close(adm, torch.stack([t.cos(), slow.cos(), t.sin(), slow.sin()], dim=1))
    torch.testing.assert_close(ddpm, torch.stack([t.sin(), (1e-4 * t).sin(), t.cos(), (1e-4 * t).cos()], dim=1))
    fourier = FourierFeatures(2)
    fourier.frequencies.fill_(16.0)
    angle = 2 * math.pi * 16 * t
    torch.testing.assert_close(fourier(t), torch.stack([angle.sin(), angle.cos()], dim=1))


@both
def test_null_label_is_no_label(cls: type[EDMUNet]) -> None:
    net, (x, t) = network(cls), inputs()
    label = torch.tensor([0, 3, 4])
    cond = Cond(label=label, null_label=5)
    with torch.no_grad():
        given, null, none = net(x, t, cond), net(x, t, cond.null()), net(x, t)
        dropped = net(x, t, cond.drop(torch.tensor([False, True, False])))
    assert given.shape == x.shape
    torch.testing.assert_close(null, none)
    assert (given - none).abs().flatten(1).amax(1).min() > 1e-3
    torch.testing.assert_close(
        dropped, torch.where(torch.tensor([False, True, False])[:, None, None, None], none, given)
    )
    with pytest.raises(RuntimeError):
        net(x, t, Cond(label=label + 2))


@both
def test_time_and_dropout_matter(cls: type[EDMUNet]) -> None:
    net, (x, t) = network(cls, dropout=0.5), inputs()
    with torch.no_grad():
        out = net(x, t)
        assert torch.equal(net(x, t), out)
        assert (net(x, t + 0.5) - out).abs().max() > 1e-3
        assert not torch.equal(net.train()(x, t), out)


@both
def test_augmentation_can_be_deleted(cls: type[EDMUNet], tmp_path: Path) -> None:
    net, (x, t) = network(cls), inputs()
    with torch.no_grad():
        out = net(x, t)
        torch.testing.assert_close(net(x, t, augment=torch.zeros(3, 2)), out)
        assert (net(x, t, augment=torch.ones(3, 2)) - out).abs().max() > 1e-3
    net.drop_augmentation()
    net.save_pretrained(tmp_path)
    loaded = load.build_network(str(tmp_path))
    assert not any("augment" in name for name in (*net.state_dict(), *loaded.state_dict()))
    with torch.no_grad():
        torch.testing.assert_close(loaded(x, t), out)
        with pytest.raises(ValueError, match="no augmentation"):
            loaded(x, t, augment=torch.zeros(3, 2))


def test_initial_output() -> None:
    """ADM starts at zero exactly, DDPM++ at about 1e-5 of its input."""
    x, t = inputs()
    with torch.no_grad():
        assert DhariwalUNet(**SMALL)(x, t).abs().max() == 0
        assert 0 < SongUNet(**SMALL)(x, t).abs().max() < 1e-3


def test_fourier_embedding_and_its_mistakes() -> None:
    net, (x, t) = network(SongUNet, embedding="fourier", noise_mult=2), inputs()
    assert net.noise.frequencies.shape == (8,) and net(x, t).shape == x.shape
    with pytest.raises(ValueError, match="positional or fourier"):
        network(SongUNet, embedding="sine")


@both
def test_gradients_reach_every_parameter(cls: type[EDMUNet]) -> None:
    net, (x, t) = network(cls), inputs()
    net(x, t, Cond(label=torch.tensor([0, 1, 2])), torch.ones(3, 2)).square().mean().backward()
    # a bias before a normalisation over single channels has no effect, but it is still reached
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


@both
def test_as_an_edm_denoiser_of_a_folder(cls: type[EDMUNet], tmp_path: Path) -> None:
    net = network(cls)
    net.save_pretrained(tmp_path)
    to_scheduler(EDM(), "edm").save_pretrained(tmp_path / "scheduler")
    denoiser = Denoiser.from_pretrained(str(tmp_path))
    assert type(denoiser.backbone) is cls and denoiser.prediction == "edm" and not denoiser.backbone.training
    x, sigma = inputs()[0], torch.tensor([0.01, 0.5, 80.0])
    cond = Cond(label=torch.tensor([0, 1, 2]), null_label=5)
    with torch.no_grad():
        s = sigma[:, None, None, None]
        raw = net(x / (s**2 + 0.25).sqrt(), sigma.log() / 4, cond)
        expected = 0.25 / (s**2 + 0.25) * x + 0.5 * s / (s**2 + 0.25).sqrt() * raw
        torch.testing.assert_close(denoiser.x0(x, sigma, cond), expected.to(torch.float32), rtol=1e-4, atol=1e-5)
