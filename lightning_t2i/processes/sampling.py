"""Samplers made of `Process.step` alone.

    ddim / euler   x_s = step(x, t, s, x0)                                              DDPM; EDM and flow (Euler)
    heun           x_s = x + (s - t) (d(x, t) + d(x', s)) / 2, x' the Euler step        arXiv 2206.00364, algorithm 1
    dpmpp_2m       x_s = step(x, t, s, (1 + 1/2r) x0 - 1/2r x0_before)                  arXiv 2211.01095, algorithm 2

They give what diffusers' DDIM (trailing spacing, set_alpha_to_one, use_clipped_model_output), FlowMatchEuler, EDMEuler
and DPMSolverMultistep schedulers give.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_t2i.batch import Cond
from lightning_t2i.errors import UserError
from lightning_t2i.processes.base import ContinuousProcess, Process
from lightning_t2i.processes.guidance import guided

if TYPE_CHECKING:
    from lightning_t2i.networks.denoiser import Denoiser

SOLVERS = ("ddim", "euler", "heun", "dpmpp_2m")


def solve(
    x0: Callable[[Tensor, Tensor], Tensor],
    process: Process,
    x: Tensor,
    times: Tensor,
    solver: str = "ddim",
    eta: float = 0.0,
    noise: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Integrates from times[0] to times[-1].

    Args:
        x0: (x [B, ...], t [B]) -> the denoiser's estimate of clean data.
        x: the state at times[0], see `Process.initial`.
        times: [n + 1] native times, for instance `process.timesteps(n)`.
        solver: one of SOLVERS; "ddim" and "euler" are the same step.
        eta: noise of a ddim step, 1 is ancestral sampling.
        noise: index of the step -> unit Gaussian noise of the shape of x, needed when eta > 0.

    Returns:
        The state at times[-1], at least float32.

    Raises:
        UserError: an unknown solver, heun on a discrete process, or eta with another solver than ddim.
    """
    if solver not in SOLVERS:
        raise UserError("Unknown solver", where="solver", given=solver, allowed=SOLVERS)
    continuous = process if isinstance(process, ContinuousProcess) else None
    if solver == "heun" and continuous is None:
        raise UserError("Heun's method needs continuous time", where="solver", given=process.name, allowed="edm, flow")
    if eta and solver != "ddim":
        raise UserError("Only ddim takes eta", where="solver", given=solver, allowed=["ddim"])
    times = times.to(x.device)
    half_log_snr = process.log_snr(times, torch.float64) / 2
    # A step to sigma = 0 is of first order: Heun's second slope and 2M's 1/2r are infinite there.
    first_order = len(times) - 2 if bool(half_log_snr[-1].isposinf()) else len(times)
    before: Tensor | None = None
    for i, (t, s) in enumerate(pairwise(times)):
        estimate = x0(x, t.expand(len(x)))
        if solver == "heun" and continuous is not None and i < first_order:
            euler = process.step(x, t, s, estimate)
            slope = continuous.slope(euler, s, x0(euler, s.expand(len(x))))
            x = (euler + x + (s - t).to(x.dtype) * slope) / 2
            continue
        target = estimate
        if solver == "dpmpp_2m" and before is not None and i < first_order:
            step, previous_step = half_log_snr[i + 1] - half_log_snr[i], half_log_snr[i] - half_log_snr[i - 1]
            target = estimate + (step / (2 * previous_step)).to(estimate.dtype) * (estimate - before)
        before = estimate
        x = process.step(x, t, s, target, eta, noise(i) if noise is not None and eta else None)
    return x


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    z: Tensor,
    cond: Cond | None = None,
    steps: int = 25,
    scale: float = 1.0,
    solver: str = "ddim",
    eta: float = 0.0,
    noise: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Latents [B, C, h, w] from unit Gaussian noise z of that shape, with classifier-free guidance at `scale`."""
    process = denoiser.process

    def x0(x: Tensor, t: Tensor) -> Tensor:
        estimate = guided(denoiser.x0, x, t, cond, scale)
        return estimate if process.clip is None else estimate.clamp(-process.clip, process.clip)

    return solve(x0, process, process.initial(z), process.timesteps(steps, z.device), solver, eta, noise)
