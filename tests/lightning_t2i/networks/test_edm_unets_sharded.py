"""EDM's U-Nets cut over two processes give the predictions of whole ones, in float32 and in bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_t2i.batch import Cond
from lightning_t2i.networks.denoiser import Denoiser
from lightning_t2i.networks.edm_unets import DhariwalUNet, EDMUNet, SongUNet
from lightning_t2i.processes.edm import EDM

NETWORKS: dict[str, tuple[type[EDMUNet], dict]] = {
    "song": (SongUNet, {"num_classes": 5}),
    "fourier": (SongUNet, {"embedding": "fourier"}),
    "adm": (DhariwalUNet, {"num_classes": 5}),
}


def build(name: str) -> Denoiser:
    torch.manual_seed(0)
    cls, options = NETWORKS[name]
    net = cls(sample_size=8, channels=8, channel_mult=(1, 2), blocks=1, attention_sizes=(4,), **options)
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    return Denoiser(net.eval(), EDM(), "edm")


@torch.no_grad()
def evaluate(denoiser: Denoiser) -> torch.Tensor:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return denoiser.x0(x, torch.tensor([0.5, 2.0]), Cond(label=torch.tensor([1, 4])))


def predictions(rank: int) -> dict[tuple[str, str], torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh

    from lightning_t2i.strategies.sharding import shard_network

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    results = {}
    for name in NETWORKS:
        for precision in ("fp32", "bf16"):
            denoiser = build(name)
            shard_network(denoiser, mesh, precision)
            results[name, precision] = evaluate(denoiser)
    return results


@pytest.mark.timeout(240)
def test_sharded_edm_networks_equal_whole_ones(ranks) -> None:
    close = {"fp32": {"rtol": 1e-4, "atol": 1e-5}, "bf16": {"rtol": 0.1, "atol": 0.05}}
    for result in ranks(predictions):
        for (name, precision), found in result.items():
            torch.testing.assert_close(found, evaluate(build(name)), **close[precision])
