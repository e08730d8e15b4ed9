"""Two U-Nets in series: where the second one's weights come from, what passes between them, what is refused."""

from __future__ import annotations

import pytest
import torch
from tiny_networks import backbone, condition

from lightning_t2i.networks.denoiser import Denoiser
from lightning_t2i.networks.load import build_network, load_model
from lightning_t2i.networks.stacked_unet import StackedUNet, stacked
from lightning_t2i.processes import RectifiedFlow


@pytest.fixture
def unet():
    return backbone("unet_text")


@pytest.mark.parametrize("junction", ["full", "features", "drop_top"])
def test_both_begin_as_the_one(unet, junction) -> None:
    double = stacked(unet, junction)
    weights = dict(unet.named_parameters())
    for name, own in double.named_parameters():
        if not name.startswith("second."):
            assert name.startswith("narrow") or torch.equal(own, weights[name])
    second = double.second.down_blocks[0]
    assert torch.equal(
        next(second.parameters()), next(unet.down_blocks[1 if junction == "drop_top" else 0].parameters())
    )
    assert torch.equal(next(double.second.up_blocks.parameters()), next(unet.up_blocks.parameters()))
    assert double.training and all(p.requires_grad for p in double.parameters())


def test_full_is_one_after_the_other(unet) -> None:
    double, x, t, cond = stacked(unet, "full").eval(), torch.linspace(-1, 1, 512).view(2, 4, 8, 8), 700.0, condition()
    with torch.no_grad():
        once = unet(x, t, cond.embeds).sample
        twice = unet(once, t, cond.embeds).sample
        torch.testing.assert_close(double(x, t, cond.embeds).sample, twice)
        double.gate = torch.nn.Parameter(torch.full((1,), 0.25))
        torch.testing.assert_close(double(x, t, cond.embeds).sample, once + 0.25 * (twice - once))


@pytest.mark.parametrize("junction", ["full", "features", "drop_top"])
def test_text_time_and_mask_count_in_both(unet, junction, tmp_path) -> None:
    double, x, cond = stacked(unet, junction).eval(), torch.linspace(-1, 1, 512).view(2, 4, 8, 8), condition()
    denoiser = Denoiser(double, RectifiedFlow(), "velocity")
    with torch.no_grad():
        out = denoiser(x, torch.ones(2), cond)
        assert out.shape == x.shape and bool(out.isfinite().all())
        for other in (denoiser(x, torch.zeros(2), cond), denoiser(x, torch.ones(2), condition(seed=1))):
            assert not torch.allclose(out, other, atol=1e-4)
        cond.mask = torch.tensor([[True, True, False, False, False]] * 2)
        assert not torch.allclose(out, denoiser(x, torch.ones(2), cond), atol=1e-5)
        double.save_pretrained(tmp_path)
        again = load_model(tmp_path, None)
        assert isinstance(again, StackedUNet) and again.config.junction == junction
        cond.mask = None
        torch.testing.assert_close(Denoiser(again, RectifiedFlow(), "velocity")(x, torch.ones(2), cond), out)
    found = {name: p.grad for name, p in double.named_parameters()}
    double(x, 1000.0, cond.embeds).sample.square().mean().backward()
    assert all(value is None for value in found.values())
    without = [name for name, p in double.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in without if "to_q" not in name and "to_k" not in name] == []


def test_one_without_weights_gives_two_without(unet) -> None:
    with torch.device("meta"):
        bare = build_network(
            {"_class_name": "UNet2DConditionModel", **{k: v for k, v in unet.config.items() if k[0] != "_"}}
        )
    assert all(p.is_meta for p in stacked(bare, "features").parameters())


def test_what_cannot_be_stacked(unet) -> None:
    with pytest.raises(TypeError, match="UNet2DModel"):
        stacked(backbone("unet"), "full")
    for junction, residual in (("half", False), ("drop_top", True)):
        with pytest.raises(ValueError, match="no such junction"):
            stacked(unet, junction, residual)
    with pytest.raises(ValueError, match="class_labels"):
        stacked(unet, "full")(torch.zeros(1, 4, 8, 8), 1.0, torch.zeros(1, 5, 12), class_labels=torch.zeros(1))
