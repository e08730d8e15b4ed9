"""Frozen networks in 4 and 8 bits: which layers, how exact, refused where trained, whole in an export."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn
from toy import DIM, Toy, ToyData, trainer_for

from lightning_modules.teacher import Teacher
from lightning_t2i.errors import UserError
from lightning_t2i.options import MethodOptions
from lightning_t2i.quantization import quantize_frozen, quantized_share
from lightning_t2i.state_io import AtomicCheckpointIO


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(64, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 64, bias=False), nn.Conv1d(1, 1, 1)
    return nn.Sequential(*layers[:4]).append(nn.Unflatten(1, (1, 64))).append(layers[4]).requires_grad_(False).eval()


@pytest.mark.parametrize(("bits", "dtype", "limit"), [("nf4", torch.uint8, 0.2), ("int8", torch.int8, 0.02)])
def test_linear_layers_are_quantised_and_compute_nearly_the_same(bits, dtype, limit):
    whole, x = network(), torch.randn(32, 64)
    quantized = quantize_frozen(copy.deepcopy(whole), bits)
    assert [p.dtype for p in quantized.parameters() if p.dim() == 2] == [dtype, dtype]
    assert quantized[2].weight.dtype == quantized[5].weight.dtype == torch.float32  # a norm, a convolution
    y = quantized(x)
    assert 0 < (y - whole(x)).norm() < limit * whole(x).norm()
    inputs = x.clone().requires_grad_()
    through = quantized(inputs)
    assert torch.equal(through, y)
    (found,) = torch.autograd.grad(through.square().sum(), inputs)  # after a forward without gradients
    inputs = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(whole(inputs).square().sum(), inputs)
    assert (found - expected).norm() < limit * expected.norm()
    sizes = [sum(p.numel() * p.element_size() for p in n.parameters()) for n in (quantized, whole)]
    assert sizes[0] / sizes[1] < {"nf4": 0.15, "int8": 0.28}[bits]
    half = quantized.to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("called", [False, True], ids=["before a forward", "after one"])
def test_what_an_int8_layer_computes_with_moves_with_its_network(called):
    """As to a GPU: the move of a network gives each weight a new place."""
    torch.manual_seed(0)
    network, x = quantize_frozen(nn.Sequential(nn.Linear(8, 4)).requires_grad_(False), "int8"), torch.randn(2, 8)
    expected = copy.deepcopy(network)(x)
    if called:
        network(x)
    (layer,), before = network, network[0].weight.data_ptr()
    network._apply(torch.clone)
    held = layer.state if called else layer.weight
    assert held.CB.data_ptr() == layer.weight.data_ptr() != before
    assert held.SCB.device == layer.weight.device
    assert torch.equal(network(x), expected)


def test_what_a_class_wants_whole_stays_whole():
    whole = network()
    whole._keep_in_fp32_modules = ["3"]
    assert quantized_share(whole) == 64 * 128 / sum(p.numel() for p in whole.parameters())
    quantized = quantize_frozen(whole, "nf4")
    assert [quantized[i].weight.dtype for i in (0, 3)] == [torch.uint8, torch.float32]


def test_what_cannot_be_quantised_is_refused(monkeypatch):
    with pytest.raises(UserError, match="trained cannot be quantised"):
        quantize_frozen(network().requires_grad_(True), "nf4")
    with pytest.raises(UserError, match="no Linear layer"):
        quantize_frozen(nn.Conv1d(1, 1, 1).requires_grad_(False), "int8")
    with pytest.raises(UserError, match="nf4, int8"):
        quantize_frozen(network(), "nf3")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        quantize_frozen(network(), "nf4")


class Boxed(Toy):
    """A toy whose frozen network has a Linear layer inside."""

    def add_frozen(self, name, network, *args):
        return super().add_frozen(name, nn.Sequential(network), *args)


def test_a_config_names_frozen_networks_and_no_others():
    module = Boxed(MethodOptions(quantize={"scale": "nf4"}))
    module.configure_model()
    assert module.scale[0].weight.dtype == torch.uint8
    assert module.frozen_identities == {"scale": "toy:1 in nf4"}
    for name in ("critic", "teacher"):
        with pytest.raises(UserError, match=rf"Only frozen[\s\S]*{name}[\s\S]*scale"):
            Boxed(MethodOptions(quantize={name: "nf4"})).configure_model()


def test_a_backbone_that_is_shared_with_trained_adapters_is_refused():
    class Shared(Toy):
        def configure_model(self):
            base = nn.Sequential(nn.Linear(DIM, DIM))
            self.add_frozen("base", base, "toy:1")
            self.add_group("critic", nn.Sequential(base, nn.Linear(DIM, 1)), self.options["critic"])

    Shared().configure_model()
    with pytest.raises(UserError, match="'critic' is trained in the backbone of a network that is quantised"):
        Shared(MethodOptions(quantize={"base": "nf4"})).configure_model()


def test_the_checkpoint_knows_the_format(tmp_path):
    quantized = MethodOptions(quantize={"scale": "int8"})
    trainer = trainer_for(tmp_path, 2)
    trainer.fit(Boxed(quantized), ToyData(), weights_only=True)
    trainer.save_checkpoint(tmp_path / "c", False)
    saved = AtomicCheckpointIO().load_checkpoint(tmp_path / "c")
    assert saved["t2i"]["frozen"] == {"scale": "toy:1 in int8"}
    for other in (MethodOptions(), MethodOptions(quantize={"scale": "nf4"})):
        with pytest.raises(UserError, match="another frozen network 'scale'"):
            trainer_for(tmp_path, 4).fit(Boxed(other), ToyData(), ckpt_path=tmp_path / "c", weights_only=True)
    whole = Boxed(quantized)
    whole.quantizes = False  # as `export` builds it: whole weights, and the checkpoint still fits
    whole.configure_model()
    whole.on_load_checkpoint(saved)
    assert whole.scale[0].weight.dtype == torch.float32


def test_pairs_of_a_quantised_teacher_are_others():
    recipes = [
        Teacher("assets/tiny/sd", common=MethodOptions(quantize=quantize)).recipe()
        for quantize in ({}, {"text": "nf4", "denoiser": "int8"})
    ]
    assert [recipe["precision"] for recipe in recipes] == ["fp32", "fp32, denoiser in int8, text in nf4"]
