"""Several denoisers that share one backbone: each with low-rank adapters of its own (LoRA, arXiv 2106.09685), or none.

    teacher, student, fake = roles(denoiser, ("student", "fake"), rank=64)

Memory is that of one backbone and the adapters. Which adapter answers is decided anew in each forward pass, and again
when a checkpointed block is recomputed; `requires_grad` is never toggled.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_t2i.batch import Cond
from lightning_t2i.networks.build import ATTENTION, add_adapters
from lightning_t2i.networks.denoiser import Denoiser
from lightning_t2i.processes.base import Time
from lightning_t2i.quantization import Bits, quantize_frozen


class Role(Denoiser):
    """A denoiser that answers with one adapter of a shared backbone, or with the bare backbone, always in eval mode.

    Args:
        denoiser: whose backbone, process and prediction it has.
        adapter: name of the adapter; None is the bare backbone, which then owns no parameters: `parameters()` of such a
            role is empty, so that freezing or casting it leaves the adapters alone.
    """

    on_quantized = True  # adapters may be trained on a quantised backbone (arXiv 2305.14314)

    def __init__(self, denoiser: Denoiser, adapter: str | None):
        super().__init__(denoiser.backbone, denoiser.process, denoiser.prediction, denoiser.sigma_data)
        self.adapter = adapter
        if adapter is None:
            del self._modules["backbone"]
            self.__dict__["backbone"] = denoiser.backbone

    def owns(self, name: str) -> bool:
        return f".{self.adapter}." in name

    def answers(self) -> bool:
        """Whether a pass through the backbone that runs now is this role's."""
        layers = _layers(self.backbone)
        return bool(layers) and _adapter_of(layers[0]) == self.adapter

    def train(self, mode: bool = True) -> Role:
        """Stays in eval mode: the backbone is also that of the other roles."""
        return super().train(False)

    def predict(self, x_t: Tensor, t: Time, cond: Cond | None = None) -> Tensor:
        with active(self.backbone, self.adapter):
            return super().predict(x_t, t, cond)

    def merged(self) -> Denoiser:
        with active(self.backbone, self.adapter):
            return super().merged()


def roles(
    denoiser: Denoiser,
    adapters: tuple[str, ...],
    rank: int,
    dtype: torch.dtype | None = None,
    gradient_checkpointing: bool = False,
    alpha: float | None = None,
    targets: Sequence[str] = ATTENTION,
    bits: Bits | None = None,
) -> list[Role]:
    """The bare denoiser and one role for each of the adapters, which begin as zero, in float32.

    Args:
        denoiser: of a diffusers backbone, which is frozen and gets the adapters.
        dtype: precision of the frozen backbone.
        rank, alpha, targets: of the adapters, see `add_adapters`.
        bits: format of the backbone's quantised weights; None leaves them whole.
    """
    backbone: Any = denoiser.backbone
    backbone.to(dtype).eval()
    if bits is not None:
        quantize_frozen(backbone.requires_grad_(False), bits)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # PEFT's: several adapters are the point
        for name in adapters:
            add_adapters(backbone, rank, targets, name, alpha)
    for name, parameter in backbone.named_parameters():
        if any(f".{adapter}." in name for adapter in adapters):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    if gradient_checkpointing:
        backbone.enable_gradient_checkpointing(_checkpointed)
    return [Role(denoiser, name) for name in (None, *adapters)]


@contextmanager
def active(network: nn.Module, adapter: str | None) -> Iterator[None]:
    """Lets one adapter of a network answer, or none; PEFT's own switches would toggle `requires_grad` as well."""
    layers = _layers(network)
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._active_adapter, layer._disable_adapters = [adapter] if adapter else [], adapter is None
    try:
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = state


def _adapter_of(layer: BaseTunerLayer) -> str | None:
    return None if layer._disable_adapters else layer.active_adapters[0]


def _layers(network: nn.Module) -> list[BaseTunerLayer]:
    return [m for m in network.modules() if isinstance(m, BaseTunerLayer)]


def _checkpointed(block: nn.Module, *args: Any) -> Any:
    """A checkpoint whose second pass, in the backward pass, uses the adapter of the first."""
    layers = _layers(block)
    adapter = _adapter_of(layers[0]) if layers else None

    def run(*inputs: Any) -> Any:
        with active(block, adapter):
            return block(*inputs)

    return checkpoint(run, *args, use_reentrant=False)
