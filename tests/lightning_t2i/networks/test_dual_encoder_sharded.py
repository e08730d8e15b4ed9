"""The dual encoder cut over two processes: features, loss and gradients of the whole one, and its scale."""

from __future__ import annotations

import pytest
import torch
from wukong_parts import TEXT, chinese

from lightning_t2i.networks.chinese_tokenizer import ChineseTokenizer
from lightning_t2i.networks.dual_encoder import DualEncoder, initialise_text
from lightning_t2i.networks.load import build_network
from lightning_t2i.processes.similarity import contrastive_loss, strips

PAIRS = 4


def encoder(tokens: bool) -> DualEncoder:
    torch.manual_seed(3)
    text = build_network(TEXT)
    initialise_text(text)
    return DualEncoder(text, 6, 8, tokens, 2 if tokens else None)


def inputs(first: int, count: int, tokens: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    vectors = torch.randn(PAIRS, 5 if tokens else 1, 6, generator=generator)
    ids = ChineseTokenizer()(chinese(0, PAIRS).caption, full=True)
    return vectors[first : first + count], ids[first : first + count]


def loss_of(network: DualEncoder, first: int, count: int, tokens: bool) -> torch.Tensor:
    images, texts, mask, scale, _ = network(*inputs(first, count, tokens))
    there, back = strips(images, texts, mask)
    return contrastive_loss(there, back, scale.mean(), first)


def sharded(rank: int, replicate: int, tokens: bool) -> dict[str, torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh

    from lightning_t2i.strategies.sharding import shard_network

    network, share = encoder(tokens), PAIRS // 2
    names = ("replicate", "shard")
    shard_network(network, init_device_mesh("cpu", (replicate, 2 // replicate), mesh_dim_names=names))
    features = network.encode_text(inputs(0, 2, tokens)[1])[0].detach()
    loss_of(network, rank * share, share, tokens).backward()
    found = {name: p.grad.full_tensor() for name, p in network.named_parameters()}
    with torch.no_grad():
        network.logits.log_scale.mul_(100)
    network.clamp_scale()
    return {**found, "features": features, "clamped": network.logits.log_scale.full_tensor().detach()}


@pytest.mark.parametrize(("replicate", "tokens"), [(1, True), (2, True), (1, False)])
def test_shards_have_the_gradients_of_the_whole(ranks, replicate, tokens):
    network = encoder(tokens)
    loss_of(network, 0, PAIRS, tokens).backward()
    whole = {name: p.grad for name, p in network.named_parameters()}
    features = network.encode_text(inputs(0, 2, tokens)[1])[0].detach()
    for found in ranks(sharded, replicate, tokens):
        torch.testing.assert_close(found.pop("features"), features)
        assert found.pop("clamped").item() == pytest.approx(4.60517, rel=1e-5)
        assert found.keys() == whole.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6, msg=name)


def scales_in_bf16(rank: int) -> tuple[list[float], torch.dtype]:
    from torch.distributed.device_mesh import init_device_mesh

    from lightning_t2i.strategies.sharding import shard_network

    network, found = encoder(False), []
    shard_network(network, init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard")), "bf16")
    for log_scale in (4.5, 4.505, 4.6):
        with torch.no_grad():
            network.logits.log_scale.fill_(log_scale)
        features, *_, scale, bias = network(*inputs(0, 2, False))
        assert scale.dtype == bias.dtype == torch.float32
        found.append(scale.item())
    return found, features.dtype


def test_the_scale_is_not_rounded_where_the_towers_compute_in_bf16(ranks):
    for found, dtype in ranks(scales_in_bf16):
        assert dtype == torch.bfloat16
        assert found == pytest.approx([90.01713, 90.46834, 99.48432], rel=1e-6)
