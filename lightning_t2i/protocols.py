"""What callbacks and commands ask of a method; a method implements those that make sense for it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from lightning_t2i.batch import Batch, Cond
from lightning_t2i.keys import Keys


@runtime_checkable
class Generates(Protocol):
    """A method that makes pictures."""

    def encode_prompts(self, prompts: list[str]) -> Cond: ...

    def sample(self, cond: Cond, keys: Keys, positions: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1]; the noise of a picture depends on keys and position alone."""


@runtime_checkable
class Reconstructs(Protocol):
    """A method that encodes and decodes pictures."""

    def reconstruct(self, images: Tensor) -> Tensor: ...


@runtime_checkable
class Embeds(Protocol):
    """A method that maps pictures and texts to one space: [B, D] each, unit length."""

    def encode_image(self, images: Tensor) -> Tensor: ...

    def encode_text(self, texts: list[str]) -> Tensor: ...


@runtime_checkable
class Exports(Protocol):
    """A method whose result is a stock diffusers or transformers folder."""

    def export(self, folder: Path, batches: Iterable[Batch]) -> None:
        """Writes `folder`; `batches` are the validation pictures, for statistics that belong to the result."""
