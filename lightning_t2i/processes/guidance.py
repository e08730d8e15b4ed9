"""Classifier-free guidance (arXiv 2207.12598) in one network call: guided = u + scale (c - u)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_t2i.batch import Cond

Denoise = Callable[[Tensor, Tensor, Cond | None], Tensor]


def guided(
    denoise: Denoise,
    x_t: Tensor,
    t: Tensor | float | int,
    cond: Cond | None,
    scale: Tensor | float = 1.0,
    null: Cond | None = None,
) -> Tensor:
    """A guided prediction; any kind that is linear in x0 works (x0, eps, v, velocity, score), with equal results.

    Args:
        denoise: (x_t [N, ...], t [N], cond of N samples) -> prediction [N, ...], for instance `denoiser.x0`.
        x_t: [B, ...].
        t: [B] or scalar, native time.
        cond: B conditions.
        scale: a number or [B]. 1 is no guidance: the unconditional branch is not computed; 0 computes only that one.
        null: what replaces `cond.null()`, for negative prompts.

    Raises:
        ValueError: guidance without a condition, or a condition whose null values are unknown.
    """
    t = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
    if not isinstance(scale, Tensor) and scale == 1:
        return denoise(x_t, t, cond)
    if cond is None:
        raise ValueError("guidance needs a condition")
    null = cond.null() if null is None else null
    if not isinstance(scale, Tensor) and scale == 0:
        return denoise(x_t, t, null)
    both = denoise(torch.cat([x_t, x_t]), torch.cat([t, t]), cond.cat(null))
    conditional, unconditional = both.chunk(2)
    if isinstance(scale, Tensor) and scale.dim() == 1:
        scale = scale.to(both).view(-1, *[1] * (x_t.dim() - 1))
    return unconditional + scale * (conditional - unconditional)
