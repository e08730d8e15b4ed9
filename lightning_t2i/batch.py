"""The two records that every part of the repository exchanges: conditions (`Cond`) and samples (`Records`)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T", "Cond", "Records")


def _per_row(name: str) -> bool:
    return not name.startswith("null_") and name != "cursor"


def map_values(record: T, function, kind: type = Tensor) -> T:
    """A copy of a dataclass whose tensors, those of nested records too, went through `function(name, tensor)`.

    Args:
        kind: of the values that are changed, where they are no tensors.
    """
    changed: dict[str, Any] = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, kind):
            changed[field.name] = function(field.name, value)
        elif isinstance(value, Cond):
            changed[field.name] = map_values(value, function, kind)
    return replace(record, **changed)


def _take(record: T, rows) -> T:
    """Rows of a record; `rows` is a slice or an index tensor [N]."""
    taken = map_values(record, lambda name, x: x[rows] if _per_row(name) else x)
    positions = range(*rows.indices(len(record))) if isinstance(rows, slice) else rows.tolist()
    lists: dict[str, Any] = {
        f.name: [getattr(record, f.name)[i] for i in positions]
        for f in fields(record)
        if isinstance(getattr(record, f.name), list)
    }
    return replace(taken, **lists)


@dataclass
class Cond:
    """What a denoiser is conditioned on, for B samples; a field that a network does not use is None.

    embeds [B, L, D] token embeddings, mask [B, L] True where a token counts, pooled [B, P], label [B] int64,
    size_ids [B, 6] in pixels (original height and width, crop top and left, target height and width: SDXL, arXiv
    2307.01952; where they are None a network that is told them takes those of whole pictures of its input's size),
    guidance [B] (guidance-distilled networks). The null_* fields hold the unconditional values of one sample.
    """

    embeds: Tensor | None = None
    mask: Tensor | None = None
    pooled: Tensor | None = None
    label: Tensor | None = None
    size_ids: Tensor | None = None
    guidance: Tensor | None = None
    null_embeds: Tensor | None = None
    null_mask: Tensor | None = None
    null_pooled: Tensor | None = None
    null_label: int | None = None

    def __len__(self) -> int:
        for name in ("embeds", "pooled", "label", "size_ids", "guidance"):
            value = getattr(self, name)
            if value is not None:
                return len(value)
        return 0

    def null(self) -> Cond:
        """The unconditional condition of the same batch size (classifier-free guidance, arXiv 2207.12598)."""
        if len(self) == 0:
            return self
        return self.drop(torch.ones(len(self), dtype=torch.bool, device=self.device))

    def drop(self, rows: Tensor) -> Cond:
        """Replaces the conditions of `rows` (bool [B]) by the null condition.

        Raises:
            ValueError: a field is conditioned on but its null value is unknown.
        """
        changed: dict[str, Tensor] = {}
        for name in ("embeds", "mask", "pooled", "label"):
            value, null = getattr(self, name), getattr(self, f"null_{name}")
            if value is None:
                continue
            if null is None:
                raise ValueError(f"Cond has {name} but no null_{name}: encode the empty prompt once and store it there")
            null = torch.as_tensor(null, dtype=value.dtype, device=value.device)
            selected = rows.to(value.device).view(-1, *[1] * (value.dim() - 1))
            changed[name] = torch.where(selected, null, value)
        return replace(self, **changed)

    def cat(self, other: Cond) -> Cond:
        """Both conditions in one batch, this one first, for a guided prediction in one network call."""

        def join(name: str, x: Tensor) -> Tensor:
            return torch.cat([x, getattr(other, name)]) if _per_row(name) else x

        return map_values(self, join)

    def index(self, rows) -> Cond:
        """The conditions of `rows`, a slice or an index tensor."""
        return _take(self, rows)

    def repeat(self, times: int) -> Cond:
        """Each condition `times` times in a row: [a, a, b, b, ...]."""
        return map_values(self, lambda name, x: x.repeat_interleave(times, 0) if _per_row(name) else x)

    def to(self, device=None, dtype: torch.dtype | None = None) -> Cond:
        """Moves every tensor; `dtype` applies to floating-point ones only."""
        return map_values(self, lambda _, x: x.to(device, dtype if x.is_floating_point() else None))

    def detach(self) -> Cond:
        return map_values(self, lambda _, x: x.detach())

    def to_cache(self) -> list[dict[str, Tensor]]:
        """One dict per sample without padding: a cache of padded tokens would be five to ten times larger."""
        rows = []
        for i in range(len(self)):
            row = {n: getattr(self, n)[i] for n in ("embeds", "pooled", "label") if getattr(self, n) is not None}
            if self.mask is not None and "embeds" in row:
                row["embeds"] = row["embeds"][self.mask[i]]
            rows.append(row)
        return rows

    @property
    def device(self) -> torch.device:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                return value.device
        return torch.device("cpu")


@dataclass
class Records:
    """B samples of one stream.

    id [B] int64, hash of data set and key; position [B] int64, place in the stream's global sequence; image
    [B, 3, H, W] in [-1, 1]; latent [B, C, h, w] with unit scale, float16 where it was cached; label [B] int64;
    noise_seed [B] int64; captions: all of a picture, where a stream of a retrieval set gives them beside the drawn one;
    cursor: batches of the stream consumed once this one is.
    """

    id: Tensor
    position: Tensor
    image: Tensor | None = None
    caption: list[str] | None = None
    cond: Cond | None = None
    latent: Tensor | None = None
    label: Tensor | None = None
    noise_seed: Tensor | None = None
    scene: list[dict] | None = None
    captions: list[list[str]] | None = None
    cursor: int = 0

    @classmethod
    def of_prompts(cls, prompts: list[str]) -> Records:
        """Records of these captions alone, at positions 0, 1, ..."""
        places = torch.arange(len(prompts))
        return cls(id=places, position=places.clone(), caption=list(prompts))

    def __len__(self) -> int:
        return len(self.id)

    def slice(self, start: int, stop: int) -> Records:
        return _take(self, slice(start, stop))

    def index(self, rows) -> Records:
        """The samples of `rows`, an index tensor; a row may be named more than once."""
        return _take(self, rows)

    def to(self, device=None, non_blocking: bool = False) -> Records:
        return map_values(self, lambda _, x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Records:
        return map_values(self, lambda _, x: x.pin_memory())


Batch = dict[str, Records]
