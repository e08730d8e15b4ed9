"""A sharded denoiser: same predictions and features through its own methods, and times that bfloat16 does not round."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from lightning_t2i.networks.denoiser import Denoiser
from lightning_t2i.processes import RectifiedFlow


def predictions(rank: int) -> dict[str, dict[str, torch.Tensor]]:
    from torch.distributed.device_mesh import init_device_mesh

    from lightning_t2i.strategies.sharding import shard_network

    # The processes of a group do not get pytest's own path entries.
    sys.path.append(str(Path(__file__).resolve().parents[2] / "helpers"))
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    results = {}
    for precision in ("fp32", "bf16"):
        denoiser = build()
        shard_network(denoiser, mesh, precision)
        results[precision] = evaluate(denoiser)
    return results


def build() -> Denoiser:
    from tiny_networks import backbone

    return Denoiser(backbone("sd3"), RectifiedFlow(), "velocity")


@torch.no_grad()
def evaluate(denoiser: Denoiser) -> dict[str, torch.Tensor]:
    from tiny_networks import condition

    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([0.9987, 0.3141])
    seen = {}
    handle = denoiser.backbone.time_text_embed.time_proj.register_forward_hook(
        lambda _module, args, _out: seen.update(time=args[0].float())
    )
    _, features = denoiser.features(x, t, condition(), ["transformer_blocks.0"])
    handle.remove()
    return {"x0": denoiser.x0(x, t, condition()), "features": features["transformer_blocks.0"].float(), **seen}


def test_sharded_equals_plain(ranks):
    plain = evaluate(build())
    for result in ranks(predictions):
        for precision, close in {"fp32": {"rtol": 1e-4, "atol": 1e-5}, "bf16": {"rtol": 0.1, "atol": 0.1}}.items():
            found = result[precision]
            torch.testing.assert_close(found["x0"], plain["x0"], **close)
            torch.testing.assert_close(found["features"], plain["features"], **close)
            torch.testing.assert_close(found["time"], plain["time"], rtol=1e-6, atol=0)
