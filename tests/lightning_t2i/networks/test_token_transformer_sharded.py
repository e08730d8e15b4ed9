"""Token transformers cut over two processes: losses, gradients and samples of whole ones, in float32 and bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_t2i.networks.token_transformer import TokenTransformer

B, L, C, V = 4, 9, 3, 11
KINDS = [("random", "diffusion"), ("raster", "categorical")]
PRECISIONS = ("fp32", "bf16")


def build(order: str, head: str) -> TokenTransformer:
    torch.manual_seed(0)
    net = TokenTransformer(order, L, C, V, 16, 2, 2, 10, aligner_depth=1, head=head, head_depth=1)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net


def inputs(net: TokenTransformer) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randint(V, (B, L), generator=draw) if net.discrete else torch.randn(B, L, C, generator=draw)
    return {
        "embeds": torch.randn(B, 5, 10, generator=draw),
        "mask": torch.arange(5) < torch.tensor([5, 2, 3, 1])[:, None],
        "tokens": tokens,
        "known": torch.rand(B, L, generator=draw) < 0.4,
        "u": torch.rand(B * L, 2, generator=draw),
        "noise": torch.randn(B * L, 2, C, generator=draw),
        "start": torch.randn(net.draws(4)[0], B, net.draws(4)[1], generator=draw),
    }


def step(net: TokenTransformer, rows: slice) -> dict[str, Any]:
    """Loss, gradients and samples of some pictures of the batch."""
    given = inputs(net)
    drop = torch.tensor([False, True, False, False])[rows]
    known = given["known"][rows] if net.config.order == "random" else None
    text = net.align(given["embeds"][rows], given["mask"][rows], drop)
    z = net(given["tokens"][rows], text, known)
    draws = (given[name].unflatten(0, (B, L))[rows].flatten(0, 1) for name in ("u", "noise"))
    loss = net.loss(z.flatten(0, 1), given["tokens"][rows].flatten(0, 1), *draws).total.mean()
    loss.backward()
    gradients = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}
    with torch.no_grad():
        told, null = net.align(given["embeds"], given["mask"], keep=True), net.null(B, keep=True)
        if net.config.order == "random":
            z, z_null = (net(given["tokens"], text, given["known"])[:, 0] for text in (told, null))
        else:
            z, z_null = (net(None, text, cache=net.cache(text))[:, 0] for text in (told, null))
        found = net.sample(z, given["start"], guidance=2.0, z_null=z_null)
    return {"loss": loss.detach(), "gradients": whole, "tokens": found.tokens, "z": z.float()}


def everything(rank: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh

    from lightning_t2i.strategies.sharding import shard_network

    mesh, results = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard")), {}
    for order, head in KINDS:
        for precision in PRECISIONS:
            net = build(order, head)
            shard_network(net, mesh, precision)
            seen: list[torch.dtype] = []
            if head != "categorical":
                layer = net.token_head.network.final
                layer.register_forward_hook(lambda m, i, o, seen=seen: seen.extend((m.weight.dtype, o.dtype)))
            found = step(net, slice(2 * rank, 2 * rank + 2))
            found["float32"] = set(seen) <= {torch.float32}
            found["matrices"] = sum(p.shape[0] == V for p in net.parameters() if p.dim() == 2)
            results[f"{order} {head} {precision}"] = found
    return results


@pytest.mark.timeout(240)
def test_P12_P16_sharded_networks_equal_whole_ones(ranks) -> None:
    results = ranks(everything)
    for order, head in KINDS:
        whole = step(build(order, head), slice(None))
        exact, rounded = ([r[f"{order} {head} {p}"] for r in results] for p in PRECISIONS)
        torch.testing.assert_close(sum(r["loss"] for r in exact) / 2, whole["loss"], rtol=1e-5, atol=1e-6)
        assert float(sum(r["loss"] for r in rounded) / 2) == pytest.approx(float(whole["loss"]), rel=0.05)
        for result in exact:
            assert result["gradients"].keys() == whole["gradients"].keys()
            torch.testing.assert_close(result["gradients"], whole["gradients"], rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(result["z"], whole["z"], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(result["tokens"], whole["tokens"], rtol=1e-3, atol=1e-3)
        for result in rounded:
            torch.testing.assert_close(result["z"], whole["z"], rtol=0.1, atol=0.1)
        assert all(r["float32"] and r["matrices"] == (head == "categorical") for r in [*exact, *rounded])
