"""Counted forward units against counts by hand."""

from __future__ import annotations

import pytest
import tiny_networks
import torch
from pictures import Pictures, fit
from torch import nn
from toy import Toy, ToyData

from lightning_modules.diffusion import Diffusion
from lightning_modules.tokenizer import Tokenizer
from lightning_t2i.forward_units import PredictsUnits, Units, counted_modules, counting_units, differences, table
from lightning_t2i.method import MethodModule
from lightning_t2i.networks.codec import LatentCodec
from lightning_t2i.options import GroupOptions, MethodOptions

FORWARD = 2 * (6 * 16 + 2 * 16 * 16 + 16 * 6)  # operations of the toy's generator for one row


class Counted(Toy):
    """generator: 1 forward, its gradient every 5th step; its EMA twin as often; critic: fake and twice real."""

    def forward_units(self) -> dict[str, float]:
        return {"generator": 1 + 2 / 5, "generator_ema": 1 / 5, "critic": 9 + 3 / 5, "scale": 1}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_groups_of_different_rhythm(tmp_path, accumulate: int) -> None:
    method = Counted(MethodOptions(accumulate=accumulate))
    method.configure_model()
    with counting_units(method) as units:
        fit(tmp_path, method, 10, ToyData())
    assert isinstance(method, PredictsUnits)
    assert units.rows == 10 * accumulate * 8
    assert units.per_step() == pytest.approx(method.forward_units())
    assert differences(method.forward_units(), units.per_step()) == {}


class Once(MethodModule):
    """One network, called as the test says."""

    def configure_model(self) -> None:
        self.add_frozen("judge", nn.Linear(6, 6), "judge:1")
        self.add_group("net", nn.Linear(6, 6), GroupOptions())

    def training_step(self, batch, batch_idx) -> None:
        x = batch["main"].latent
        with torch.no_grad():
            self.net(x[:4])  # half of the rows, without a gradient
        self.net(x)  # a gradient that is never asked for
        y = self.judge(self.net(x))  # the gradient passes through the judge
        (y.mean()).backward(retain_graph=True)
        self.backward("net", y.square().mean())  # and once more


def test_what_a_pass_and_its_gradient_cost(tmp_path) -> None:
    method = Once()
    method.configure_model()
    with counting_units(method) as units:
        fit(tmp_path, method, 3, ToyData())
    assert units.per_step() == pytest.approx({"net": 0.5 + 1 + (1 + 2 + 2), "judge": 1 + 1 + 1})
    assert "_begin" not in vars(method)
    assert not method.net._forward_hooks and not method.net._forward_pre_hooks


def test_operations_of_each_network(tmp_path) -> None:
    method = Counted()
    method.configure_model()
    with counting_units(method, flops=True) as units:
        fit(tmp_path, method, 5, ToyData())
    assert units.flops["generator"] == units.flops["generator_ema"] == FORWARD
    assert units.flops_per_sample()["generator"] == pytest.approx(1.4 * FORWARD)
    lines = table(units, method.forward_units()).splitlines()
    row = next(line.split() for line in lines if line.startswith("generator "))
    assert row[:4] == ["generator", "1.40", "1.40", f"{1.4 * FORWARD / 1e6:.1f}"]


def test_diffusion_trains_one_pass_of_its_denoiser(tmp_path) -> None:
    folder = tiny_networks.pipeline_folder(tmp_path / "pipeline")
    method = Diffusion(str(folder))
    method.configure_model()
    with counting_units(method, flops=True) as units:
        fit(tmp_path, method, 6, Pictures(batch_size=8))
    measured = units.per_step()
    assert measured["denoiser"] == 3.0 and measured["codec.encoder"] == 1.0
    assert differences(method.forward_units(), measured) == {}  # the empty caption is encoded once
    assert differences({"denoiser": 2.0}, measured) == {
        "codec.encoder": "predicted 0, measured 1",
        "denoiser": "predicted 2, measured 3",
        "text": f"predicted 0, measured {measured['text']:g}",
    }
    assert min(units.flops.values()) > 0


def test_autoencoder_is_counted_in_its_halves(tmp_path) -> None:
    folder = tmp_path / "vae"
    tiny_networks.autoencoder().save_pretrained(folder)
    method = Tokenizer(str(folder))
    method.configure_model()
    with counting_units(method) as units:
        fit(tmp_path, method, 2)
    assert units.per_step() == {"autoencoder.encoder": 3.0, "autoencoder.decoder": 3.0}


def test_names_of_what_is_counted() -> None:
    assert list(counted_modules(nn.Linear(1, 1))) == [""]
    assert list(counted_modules(LatentCodec(tiny_networks.autoencoder()))) == [".encoder", ".decoder"]
    assert list(counted_modules(LatentCodec())) == []

    class Two(nn.Module):
        def shard_roots(self) -> list[nn.Module]:
            return [nn.Linear(1, 1), nn.Linear(1, 1)]

    assert list(counted_modules(Two())) == [".0", ".1"]


def test_nothing_counted_is_an_empty_table() -> None:
    assert Units().per_step() == {} and len(table(Units()).splitlines()) == 1
