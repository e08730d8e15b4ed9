"""Perceptual losses: a distance in its range, differentiable everywhere; files read, refused and named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import interpolate

from lightning_t2i.errors import UserError
from lightning_t2i.networks.classifier import ShapesClassifier
from lightning_t2i.networks.perceptual import (
    LPIPS,
    PerceptualConfig,
    PerceptualNetwork,
    join_weights,
    unit_distance,
)

# torchvision's own numbering of the convolutions, and the channels of the stages that LPIPS looks at.
CONVOLUTIONS = {"vgg16": [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28], "alex": [0, 3, 6, 8, 10]}
CHANNELS = {"vgg16": [64, 128, 256, 512, 512], "alex": [64, 192, 384, 256, 256]}


def randomised(network: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for name, p in network.named_parameters():
        if name.startswith("lin"):
            nn.init.uniform_(p, 0, 1)
        elif p.dim() > 1:
            nn.init.kaiming_normal_(p)
    return network.eval()


@pytest.fixture(scope="module", params=["vgg16", "alex", "perceptual"])
def network(request) -> nn.Module:
    if request.param == "perceptual":
        torch.manual_seed(0)
        return PerceptualNetwork().eval()
    return randomised(LPIPS(request.param, resize=64 if request.param == "alex" else None))


def pictures(seed: int, size: int = 32) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_zero_at_equality_symmetric_and_in_range(network: nn.Module) -> None:
    x, y = pictures(0), pictures(1)
    with torch.no_grad():
        d = network(x, y)
        assert d.shape == (2,) and float(network(x, x).abs().max()) == 0
        torch.testing.assert_close(d, network(y, x))
    # Features after a ReLU are at right angles at most: each stage gives at most 2 max w.
    weights = [float(p.detach().max()) for name, p in network.named_parameters() if name.startswith("lin")]
    assert float(d.min()) > 0 and float(d.max()) <= 2 * sum(weights or [1.0] * 3)


def test_gradient_flows_and_moves_closer(network: nn.Module) -> None:
    x, y = pictures(0).requires_grad_(True), pictures(1)
    before = network(x, y)
    (gradient,) = torch.autograd.grad(before.sum(), x)
    assert torch.isfinite(gradient).all() and gradient.flatten(1).norm(dim=1).min() > 0
    with torch.no_grad():
        step = 0.1 * gradient / gradient.abs().amax((1, 2, 3), keepdim=True)
        assert (network(x - step, y) < before).all()


def test_gradient_is_finite_where_all_features_are_zero() -> None:
    x = torch.zeros(1, 4, 2, 2, requires_grad=True)
    unit_distance(x, torch.ones(1, 4, 2, 2)).sum().backward()
    assert torch.isfinite(x.grad).all()
    distance = unit_distance(torch.tensor([3.0, 4.0]).view(1, 2, 1, 1), torch.tensor([0.0, 7.0]).view(1, 2, 1, 1))
    torch.testing.assert_close(distance.flatten(), torch.tensor([0.36, 0.04]))


@pytest.mark.parametrize("layout", ["vgg16", "alex"])
def test_layout_is_the_published_one(layout: str) -> None:
    with torch.device("meta"):
        network = LPIPS(layout)
    names = {n for n in network.state_dict() if n.startswith("features")}
    assert names == {f"features.{i}.{kind}" for i in CONVOLUTIONS[layout] for kind in ("weight", "bias")}
    heads = {n: list(p.shape) for n, p in network.state_dict().items() if n.startswith("lin")}
    assert heads == {f"lin{k}.model.1.weight": [1, c, 1, 1] for k, c in enumerate(CHANNELS[layout])}
    sizes = {"vgg16": 14_714_688, "alex": 2_469_696}  # of torchvision's `features`
    assert sum(p.numel() for n, p in network.named_parameters() if n.startswith("features")) == sizes[layout]


def test_written_out_for_one_picture() -> None:
    """Input scaling, the first stage's normalisation, and the sum over stages."""
    network, x, y = randomised(LPIPS("alex")), pictures(0, 64), pictures(1, 64)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)  # ImageNet's for pictures in [0, 1]
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    with torch.no_grad():
        total = torch.zeros(2)
        a, b = ((z / 2 + 0.5 - mean) / std for z in (x, y))
        for i, layer in enumerate(network.features):
            a, b = layer(a), layer(b)
            if isinstance(layer, nn.ReLU):
                w = network.get_submodule(f"lin{network.taps.index(i)}").model[1].weight
                units = [f / f.norm(dim=1, keepdim=True).clamp_min(1e-10) for f in (a, b)]
                total += (w * (units[0] - units[1]) ** 2).sum(1).mean((1, 2))
        torch.testing.assert_close(network(x, y), total, rtol=1e-4, atol=1e-5)


def test_resize_and_pooling_are_options() -> None:
    x, y = pictures(0), pictures(1)
    plain = randomised(LPIPS("alex", resize=80))
    bare, average = LPIPS("alex"), LPIPS("alex", resize=80, average_pool=True)
    for other in (bare, average):
        other.load_state_dict(plain.state_dict())
    large = [interpolate(z, size=(80, 80), mode="bilinear", align_corners=False) for z in (x, y)]
    with torch.no_grad():
        torch.testing.assert_close(plain(x, y), bare(*large))
        assert not torch.allclose(plain(x, y), average(x, y))
    assert sum(isinstance(m, nn.AvgPool2d) for m in average.features) == 2
    assert not any(isinstance(m, nn.MaxPool2d) for m in average.features)


def test_file_read_back_from_the_published_parts(tmp_path: Path) -> None:
    network = randomised(LPIPS("alex"))
    state = network.state_dict()
    trunk = {n: t for n, t in state.items() if n.startswith("features")} | {"classifier.1.weight": torch.ones(2)}
    torch.save(trunk, tmp_path / "alexnet.pth")
    torch.save({n: t for n, t in state.items() if n.startswith("lin")}, tmp_path / "alex.pth")
    join_weights(tmp_path / "alexnet.pth", tmp_path / "alex.pth", tmp_path / "lpips.safetensors")
    loaded = LPIPS.from_file(tmp_path / "lpips.safetensors", "alex")
    x, y = pictures(0, 64), pictures(1, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x, y), network(x, y))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert loaded.identity.startswith("sha256:") and loaded.name == "lpips"


def test_mistakes_name_what_to_download(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="PerceptualSimilarity.*BSD-2-Clause"):
        LPIPS.from_file(tmp_path / "none.safetensors", "alex")
    save_file({"features.0.weight": torch.zeros(2)}, str(tmp_path / "other.safetensors"))
    with pytest.raises(UserError, match="layout alex"):
        LPIPS.from_file(tmp_path / "other.safetensors", "alex")
    with pytest.raises(UserError, match="did you mean vgg16"):
        LPIPS("vgg")


def test_stand_in_is_read_back_and_is_no_metric_network(tmp_path: Path) -> None:
    torch.manual_seed(3)
    network = PerceptualNetwork(PerceptualConfig(widths=(8, 12, 16), grid=2)).eval()
    network.save_pretrained(tmp_path / "perceptual")
    loaded = PerceptualNetwork.from_pretrained(tmp_path / "perceptual")
    x, y = pictures(0), pictures(1)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x, y), network(x, y), rtol=1e-2, atol=1e-3)  # kept in float16
        assert [f.shape[1:] for f in loaded.stages(x)] == [(8, 32, 32), (12, 16, 16), (16, 8, 8)]
    assert loaded.config == network.config and loaded.name == "perceptual" and loaded.identity.startswith("sha256:")
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    scores = loaded.classify(x)
    assert scores.shape.shape == (2, 4, 5) and scores.colour.shape == (2, 4, 9) and scores.count.shape == (2, 4)
    ShapesClassifier().save_pretrained(tmp_path / "classifier")
    for folder in ("classifier", "none"):
        with pytest.raises(UserError, match="no perceptual network"):
            PerceptualNetwork.from_pretrained(tmp_path / folder)


def test_stand_in_differs_from_the_metric_network() -> None:
    kinds = [{type(m) for m in net.modules()} for net in (PerceptualNetwork(), ShapesClassifier())]
    assert nn.GroupNorm not in kinds[0] and nn.GroupNorm in kinds[1]
    assert 50_000 < sum(p.numel() for p in PerceptualNetwork().parameters()) < 150_000
