"""What callbacks and commands ask of a method; a method implements those that make sense for it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from lightning_t2i.batch import Batch, Cond, Records
from lightning_t2i.keys import Keys

if TYPE_CHECKING:
    from lightning_t2i.networks.codec import LatentCodec
    from lightning_t2i.networks.denoiser import Denoiser


@runtime_checkable
class Generates(Protocol):
    """A method that makes pictures."""

    def condition(self, records: Records) -> Cond | None:
        """What the pictures for these records are conditioned on: captions, labels, or nothing."""

    def sample(self, cond: Cond | None, keys: Keys, positions: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1]; the noise of a picture depends on keys and position alone."""


class Distils(Generates, Protocol):
    """A method that distils a diffusion teacher; its `sample` starts from keys.normal("z", positions, shape).

    teacher: the frozen denoiser, guided at scale `guidance`; codec: from x0 to pictures; shape: (C, h, w) of one x0;
    val_steps: steps of the teacher's sampler. A method whose `sample` takes more than one step has them as `steps`.

    Not checkable at run time: from Python 3.12 on, isinstance does not see the networks of a module.
    """

    teacher: Denoiser
    codec: LatentCodec
    shape: tuple[int, int, int]
    guidance: float
    val_steps: int


@runtime_checkable
class Couples(Protocol):
    """A method that maps noise to data without further chance: teachers and flows, of which pairs can be made."""

    def recipe(self) -> dict[str, Any]:
        """What x0 depends on besides noise and condition, as plain values: "teacher" (its identity), solver, steps,
        guidance and so on, and "x0": "latent" or "image". Known before any network is built."""

    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one z and one x0; known once the networks are built."""

    def condition(self, records: Records) -> Cond | None: ...

    def couple(self, z: Tensor, cond: Cond | None) -> Tensor:
        """x0 [B, ...] (latents of unit scale, or pictures) of unit Gaussian noise z [B, ...]."""


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
class Searches(Protocol):
    """A method that trains nothing: a training step makes pictures for all samples of its data."""

    def check_batch(self, samples: int, batch: int, world: int) -> None:
        """Refuses the size of a batch of the data.

        Raises:
            UserError: so many processes cannot share so many samples so.
        """

    def kept_bytes(self) -> int:
        """Bytes that a process keeps at most between two calls of the network; known once the networks are built."""


@runtime_checkable
class Exports(Protocol):
    """A method whose result is a stock diffusers or transformers folder."""

    def export(self, folder: Path, batches: Iterable[Batch]) -> None:
        """Writes `folder`; `batches` are the validation pictures, for statistics that belong to the result."""
