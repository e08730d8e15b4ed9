"""Frozen networks in 4 or 8 bits by bitsandbytes: their Linear layers keep quantised weights and compute as before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, get_args

import torch
from torch import nn

from lightning_t2i.errors import UserError

Bits = Literal["nf4", "int8"]
TIME = "time_emb"  # how diffusers' U-Nets call the layers of the time's embedding
QUANTIZED = (torch.uint8, torch.int8)  # data types of quantised weights


def quantize_frozen(network: nn.Module, kind: Bits) -> nn.Module:
    """Quantises the Linear layers of a frozen network in place; all other weights stay as they are.

    nf4 (arXiv 2305.14314, section 3) is a weight-only format: 4-bit values, a scale for each 64 of them. int8 (arXiv
    2208.07339) also rounds the inputs of a layer, row by row. Layers that the network's class wants in float32
    (`_keep_in_fp32_modules`, T5's `wo`) stay so, and in U-Nets the embedding of the time, which every block adds: with
    it in nf4 the error of x0 near t = T is 1.6 times as large (tiny teacher), for 3 % of the weights of SD 1.5.

    Raises:
        UserError: the network is trained, has no Linear layer, or there is no bitsandbytes.
    """
    if kind not in get_args(Bits):
        raise UserError("Unknown format of quantised weights", where="quantize", given=kind, allowed=get_args(Bits))
    if any(parameter.requires_grad for parameter in network.parameters()):
        raise UserError("A network that is trained cannot be quantised", where="quantize", given=type(network).__name__)
    found = list(_linear(network))
    if not found:
        raise UserError("The network has no Linear layer to quantise", where="quantize", given=type(network).__name__)
    for parent, name, linear in found:
        setattr(parent, name, _quantized(linear, kind))
    return network


def _linear(network: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """(parent, name, layer) of each layer to quantise."""
    whole = {part for module in network.modules() for part in getattr(module, "_keep_in_fp32_modules", None) or ()}
    for path, parent in network.named_modules():
        for name, child in parent.named_children():
            parts = {*path.split("."), name}
            if type(child) is nn.Linear and not whole & parts and not any(part.startswith(TIME) for part in parts):
                yield parent, name, child


def _quantized(linear: nn.Linear, kind: Bits) -> nn.Module:
    try:
        from bitsandbytes import nn as quantized

        from lightning_t2i.int8 import Linear8bit
    except Exception as error:  # a library that does not load fails in many ways
        fix = "pip install bitsandbytes, or leave the network whole"
        raise UserError("There is no bitsandbytes to quantise with", given=repr(error), fix=fix) from error
    sizes = linear.in_features, linear.out_features, linear.bias is not None
    weight, layer = linear.weight.detach(), None
    if kind == "nf4":
        layer = quantized.Linear4bit(*sizes, quant_type="nf4", device="meta")
        layer.weight = quantized.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer)
        # Its kernel for inference on CPUs repacks the weights at the first forward; no gradient then goes through.
        layer.support_avx512bf16_for_cpu = False
    else:
        layer = Linear8bit(*sizes, has_fp16_weights=False, device="meta")
        layer.weight = quantized.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    layer.bias = linear.bias
    return layer.to(weight.device).eval()  # the move quantises


def refuse_quantized(name: str, network: nn.Module) -> None:
    """Raises a UserError when a network that will be trained, or holds adapters that are, has quantised weights.

    Roles of adapters say by `on_quantized` that theirs are meant for it.
    """
    if not getattr(network, "on_quantized", False) and any(
        parameter.dtype in QUANTIZED for parameter in network.parameters()
    ):
        raise UserError(
            f"'{name}' is trained in the backbone of a network that is quantised",
            where="model.common.quantize",
            fix="quantize only networks that share no weights with trained ones",
        )


def refuse_unknown(quantize: Mapping[str, Bits], frozen: Iterable[str]) -> None:
    """Raises a UserError when a format is given for something that is no frozen network."""
    for name in quantize:
        if name not in frozen:
            raise UserError(
                "Only frozen networks can be quantised", where="model.common.quantize", given=name, allowed=frozen
            )


def quantized_share(network: nn.Module) -> float:
    """Share of a network's weights that `quantize_frozen` would quantise."""
    inside = sum(linear.weight.numel() for _, _, linear in _linear(network))
    return inside / sum(parameter.numel() for parameter in network.parameters())
