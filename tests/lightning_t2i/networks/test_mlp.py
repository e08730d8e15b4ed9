"""The perceptron: its formula, its inputs, and its folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from lightning_t2i.batch import Cond
from lightning_t2i.networks.build import save_pipeline
from lightning_t2i.networks.codec import LatentCodec
from lightning_t2i.networks.denoiser import Denoiser
from lightning_t2i.networks.load import build_network
from lightning_t2i.networks.mlp import MLP
from lightning_t2i.processes import EDM, RectifiedFlow


def network(**sizes: int) -> MLP:
    torch.manual_seed(0)
    return MLP(**sizes).eval()


def inputs(channels: int = 3, side: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(5, channels, side, side, generator=torch.Generator().manual_seed(1)), torch.linspace(-1.5, 1, 5)


def test_the_formula_written_out() -> None:
    net, (x, t) = network(width=8, depth=2), inputs()
    first, second, last = (layer for layer in net.layers if isinstance(layer, nn.Linear))
    h = nn.functional.silu(first(torch.cat([x[:, :, 0, 0], t[:, None]], dim=1)))
    torch.testing.assert_close(net(x, t), last(nn.functional.silu(second(h)))[:, :, None, None])
    assert torch.equal(net(x, t, Cond(label=torch.arange(5))), net(x, t))


def test_time_and_every_value_count_and_samples_do_not_mix() -> None:
    net, (x, t) = network(sample_size=2, in_channels=2, width=8), inputs(2, 2)
    x.requires_grad_(), t.requires_grad_()
    out = net(x, t)
    assert out.shape == x.shape
    gradient, of_time = torch.autograd.grad(out[0].square().sum(), (x, t))
    assert bool(gradient[0].all()) and float(of_time[0]) != 0
    assert not gradient[1:].any() and not of_time[1:].any()


def test_a_folder_gives_the_same_denoiser(tmp_path: Path) -> None:
    denoiser = Denoiser(network(width=8).half().float(), EDM(0.01, 40.0), "edm")  # it is written in float16
    save_pipeline(tmp_path, denoiser, LatentCodec(), None)
    again = Denoiser.from_pretrained(str(tmp_path))
    assert isinstance(again.backbone, MLP) and (again.process, again.prediction) == (EDM(0.01, 40.0), "edm")
    x, _ = inputs()
    sigma = torch.tensor([0.02, 0.1, 1.0, 5.0, 30.0])
    torch.testing.assert_close(again.x0(x, sigma), denoiser.x0(x, sigma), rtol=1e-6, atol=1e-6)


def test_the_architecture_file_is_that_of_the_shipped_teacher() -> None:
    built, shipped = (
        build_network("configs/networks/toy_mlp.json"),
        Denoiser.from_pretrained("assets/tiny/points/teacher"),
    )
    assert sum(p.numel() for p in built.parameters()) == 8835
    assert {n: p.shape for n, p in built.named_parameters()} == {
        n: p.shape for n, p in shipped.backbone.named_parameters()
    }
    assert shipped.process != RectifiedFlow() and shipped.prediction == "edm"
