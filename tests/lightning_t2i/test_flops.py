"""Counted operations against counts by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from lightning_t2i import flops
from lightning_t2i.flops import counting, peak_flops, use_tensor_cores, utilisation


def count_flops(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Operations of one call."""
    with counting() as counter:
        function(*args, **kwargs)
    return counter.total


def test_linear_layer() -> None:
    layer, x = nn.Linear(7, 5), torch.randn(3, 11, 7)
    assert count_flops(layer, x) == 2 * 33 * 7 * 5


def test_linear_layer_with_its_backward_pass() -> None:
    layer, x = nn.Linear(7, 5), torch.randn(33, 7, requires_grad=True)
    # Gradients of the weight and of the input cost one forward pass each.
    assert count_flops(lambda: layer(x).sum().backward()) == 3 * 2 * 33 * 7 * 5


def test_convolution() -> None:
    layer, x = nn.Conv2d(3, 8, 3, padding=1), torch.randn(2, 3, 10, 6)
    assert count_flops(layer, x) == 2 * 2 * (10 * 6) * 8 * 3 * 9


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("gradients", [True, False])
def test_attention_block(gradients: bool) -> None:
    b, n, d = 2, 16, 32
    block, x = Attention(d, heads=4), torch.randn(b, n, d)
    projections = 2 * b * n * d * 4 * d
    attention = 2 * 2 * b * n * n * d  # scores and weighted sum; heads split d, so they cancel
    with torch.set_grad_enabled(gradients):
        assert count_flops(block, x) == projections + attention


def test_attention_block_with_its_backward_pass() -> None:
    b, n, d = 2, 16, 32
    block, x = Attention(d, heads=4), torch.randn(b, n, d, requires_grad=True)
    projections, attention = 2 * b * n * d * 4 * d, 2 * 2 * b * n * n * d
    total = count_flops(lambda: block(x).sum().backward())
    assert total == 3 * projections + attention + attention * 5 // 2


def test_cross_attention_of_unequal_lengths() -> None:
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    assert count_flops(scaled_dot_product_attention, q, k, v) == 2 * 2 * 3 * 5 * 9 * (8 + 8)


def test_utilisation_is_unknown_without_a_known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops(torch.device("cpu")) is None and utilisation(1e12, torch.device("cpu")) is None
    for name in ("Some Card 1", "NVIDIA L40G", "NVIDIA RTX A1000"):  # the last two begin like an L4 and an A100
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert utilisation(1e12, torch.device("cuda")) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA B200", 2250e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
    ],
)
def test_utilisation_of_a_known_device(name: str, peak: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert utilisation(0.4 * peak, torch.device("cuda")) == pytest.approx(0.4)


def test_names_that_contain_another_come_first() -> None:
    names = list(flops.PEAKS)
    assert all(not (b != a and a in b and i < j) for i, a in enumerate(names) for j, b in enumerate(names))


def test_a_gpu_multiplies_float32_as_tf32_and_a_cpu_does_not(monkeypatch) -> None:
    set_to: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", set_to.append)
    use_tensor_cores(torch.device("cpu"))
    assert set_to == []
    use_tensor_cores(torch.device("cuda"))
    assert set_to == ["high"]
