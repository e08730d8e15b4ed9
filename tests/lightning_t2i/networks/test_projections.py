"""Channel projections in every kind of network: where they go, what they do, copies, gradients, folders."""

import copy

import pytest
import tiny_networks
import torch
from tiny_networks import condition

from lightning_t2i.errors import UserError
from lightning_t2i.networks.denoiser import Denoiser
from lightning_t2i.networks.load import build_network
from lightning_t2i.networks.projections import ChannelProjection, add_projections, inject, projected, sites
from lightning_t2i.processes import DDPM, RectifiedFlow

KINDS = ["unet", "unet_text", "unet_xl", "pixart", "sd3", "flux"]


def denoiser(kind: str) -> Denoiser:
    flow = kind in ("sd3", "flux")
    process = RectifiedFlow() if flow else DDPM("linear", 0.0001, 0.02)
    return Denoiser(tiny_networks.backbone(kind), process, "velocity" if flow else "eps")


def call(network: Denoiser) -> torch.Tensor:
    t = torch.tensor([0.1, 0.8]) if isinstance(network.process, RectifiedFlow) else torch.tensor([3, 700])
    return network(torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), t, condition())


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_is_projected_and_the_identity_changes_no_bit(kind):
    network = denoiser(kind)
    with torch.no_grad():
        before = call(network)
        names = add_projections(network.backbone, "all")
        assert torch.equal(call(network), before)
        for name in names:  # each of them counts
            delta = network.backbone.get_submodule(name).projection.delta
            delta.data.normal_(std=0.1)
            assert not torch.allclose(call(network), before, atol=1e-6), name
            delta.data.zero_()


@pytest.mark.parametrize("kind", KINDS)
def test_each_projection_gets_a_gradient(kind):
    network = denoiser(kind)
    names = add_projections(network.backbone, "all")
    call(network).square().mean().backward()
    for name in names:
        assert float(network.backbone.get_submodule(name).projection.delta.grad.abs().max()) > 0, name


def test_skip_connections_are_not_projected():
    """What the last up block reads of the first down block is as it was: only what flows on is projected."""
    network, seen = tiny_networks.backbone("unet"), []
    network.up_blocks[-1].register_forward_pre_hook(lambda m, args: seen.append([x.clone() for x in args[1]]))
    add_projections(network, "all")
    for fill in (0.0, 0.5):
        network.down_blocks[0].projection.delta.data.fill_(fill)
        with torch.no_grad():
            network(torch.ones(1, 4, 8, 8), torch.tensor([5]))
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_a_projection_is_a_matrix_over_channels():
    x = torch.randn(2, 3, 4, 5)
    projection = ChannelProjection(3, 1)
    projection.delta.data.normal_()
    expected = x + torch.einsum("oc,bchw->bohw", projection.delta, x)
    torch.testing.assert_close(projection(x), expected)
    tokens = ChannelProjection(5, -1)
    tokens.delta.data.normal_()
    torch.testing.assert_close(tokens(x), x + x @ tokens.delta.T)


def test_decay_draws_the_matrix_to_the_identity():
    projection = ChannelProjection(3, 1)
    projection.delta.data.fill_(0.5)
    optimizer = torch.optim.AdamW(projection.parameters(), lr=0.1, weight_decay=1.0)
    for _ in range(100):
        projection.delta.grad = torch.zeros(3, 3)
        optimizer.step()
    x = torch.randn(1, 3, 2, 2)
    torch.testing.assert_close(projection(x), x, atol=1e-3, rtol=1e-3)


def test_copies_have_projections_of_their_own():
    network = denoiser("unet_text")
    add_projections(network.backbone, "all")
    twin = copy.deepcopy(network)
    with torch.no_grad():
        before = call(network)
        twin.backbone.up_blocks[0].projection.delta.data.fill_(0.3)
        assert torch.equal(call(network), before)
        assert not torch.equal(call(twin), before)


def test_sizes_of_the_papers_networks():
    """13 matrices with 1,638,400 numbers in the Church network, as the released code has."""
    with torch.device("meta"):
        network = build_network("configs/networks/ddpm_church.json")
    found = sites(network)
    assert len(found) == 13
    assert sum(site.channels**2 for site in found) == 1_638_400


def test_names_of_projected_blocks_and_a_network_without_a_rule():
    network = tiny_networks.backbone("unet")
    inject(network, ["up_blocks.0"])
    assert projected(network) == ["up_blocks.0"]
    assert add_projections(tiny_networks.backbone("unet"), "none") == []
    with pytest.raises(UserError, match="No rule"):
        add_projections(torch.nn.Linear(2, 2), "all")
