"""Counts floating-point operations by watching what is dispatched, and relates them to a device's peak.

A multiplication and an addition are two operations; matrix products, convolutions and attention count, element-wise
operations do not (they are below 1 % in the networks here).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

# Dense peak in operations per second without sparsity, from the vendor's data sheets; longer names first.
PEAKS: dict[str, dict[torch.dtype, float]] = {
    "B200": {torch.bfloat16: 2250e12, torch.float32: 1100e12},
    "H200": {torch.bfloat16: 989e12, torch.float32: 494e12},
    "H100 PCIe": {torch.bfloat16: 756e12, torch.float32: 378e12},
    "H100 NVL": {torch.bfloat16: 835e12, torch.float32: 417e12},
    "H100": {torch.bfloat16: 989e12, torch.float32: 494e12},
    "A100": {torch.bfloat16: 312e12, torch.float32: 156e12},
    "L40S": {torch.bfloat16: 362e12, torch.float32: 183e12},
    "L40": {torch.bfloat16: 181e12, torch.float32: 90.5e12},
    "L4": {torch.bfloat16: 121e12, torch.float32: 60e12},
    "RTX 4090": {torch.bfloat16: 165e12, torch.float32: 82.6e12},
}


def _attention(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]) -> int:
    """Scores and weighted sum: 2 B H Q K (D + Dv)."""
    *batch, q, d = query
    return 2 * torch.Size(batch).numel() * q * key[-2] * (d + value[-1])


def _cpu_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return _attention(query, key, value)


def _cpu_attention_backward(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    """Scores once more and the gradients of scores, values, queries and keys: five products for the forward's two."""
    return _attention(query, key, value) * 5 // 2


# torch registers the attention kernels of GPUs only.
_MISSING = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_attention_backward,
}


class Operations(TorchDispatchMode):
    """Adds up the operations of every kernel that runs while it is entered: `total`.

    It calls exactly the kernels that would run without it. torch's FlopCounterMode decomposes some of them, and the
    counted step then rounds differently from the others: a resumed run, which counts another step, would not end with
    the bits of an uninterrupted one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.formulas = {**flop_registry, **{op: shape_wrapper(f) for op, f in _MISSING.items()}}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.add(func, args, kwargs or {}, out)
        return out

    def add(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Counts a kernel that ran."""
        formula = self.formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)


@contextmanager
def counting() -> Iterator[Operations]:
    """Counts what runs inside, backward passes too: `counter.total`. Compiled blocks run eagerly."""
    with torch.compiler.set_stance("force_eager"), Operations() as counter:
        yield counter


def peak_flops(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float | None:
    """Dense peak of a device, operations per second; None when unknown, as for every CPU.

    float32 means TF32 matrix products, see `use_tensor_cores`.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    # A name goes on to its end: the numbers of an "L4" or "A100" are not those of an "L40G" or "RTX A1000".
    return next((peaks.get(dtype) for known, peaks in PEAKS.items() if re.search(rf"{known}\b", name)), None)


def use_tensor_cores(device: torch.device) -> None:
    """Multiplies float32 matrices as TF32 on a GPU, as its convolutions do by default: 10 bits of mantissa, products
    added in float32."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def utilisation(flops_per_second: float, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float | None:
    """Model FLOPs utilisation in [0, 1] (arXiv 2204.02311, appendix B); None where the peak is unknown."""
    peak = peak_flops(device, dtype)
    return None if peak is None else flops_per_second / peak
