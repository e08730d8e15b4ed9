"""Between noise processes and diffusers' scheduler configs, so that stock pipeline folders go in and out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_t2i.errors import UserError
from lightning_t2i.processes.base import Process
from lightning_t2i.processes.ddpm import DDPM
from lightning_t2i.processes.edm import EDM
from lightning_t2i.processes.flow import RectifiedFlow

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

_FROM_DIFFUSERS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
_TO_DIFFUSERS = {ours: theirs for theirs, ours in _FROM_DIFFUSERS.items()}


def scheduler_config(source: Any) -> dict[str, Any]:
    """The config of a scheduler object, a dict, a JSON file, a scheduler folder or a pipeline folder.

    Raises:
        UserError: no scheduler_config.json there.
    """
    if isinstance(source, Mapping):
        return dict(source)
    if hasattr(source, "config"):
        return {"_class_name": type(source).__name__, **source.config}
    path = Path(source)
    candidates = [path, path / "scheduler_config.json", path / "scheduler" / "scheduler_config.json"]
    for candidate in candidates:
        if candidate.is_file():
            return json.loads(candidate.read_text(encoding="utf-8"))
    raise UserError("No scheduler config found", where=str(path), fix="give a diffusers pipeline or scheduler folder")


def from_scheduler(source: Any) -> tuple[Process, str]:
    """The noise process and the prediction type ("eps", "v", "x0", "velocity" or "edm") of a diffusers scheduler.

    Raises:
        UserError: a scheduler config that no process here describes.
    """
    config = scheduler_config(source)
    kind = config.get("_class_name", "")
    if kind.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction":
        return RectifiedFlow(shift=config.get("shift", config.get("flow_shift", 1.0)) or 1.0), "velocity"
    if kind.startswith("EDM"):
        return EDM(config["sigma_min"], config["sigma_max"], config.get("rho", 7.0)), "edm"
    if "beta_schedule" not in config and config.get("trained_betas") is None:
        raise UserError(
            "Unknown scheduler", given=kind, allowed="DDPM-type, FlowMatch* and EDM* schedulers of diffusers"
        )
    process = DDPM(
        schedule=config.get("beta_schedule", "linear"),
        beta_start=config.get("beta_start", 0.0001),
        beta_end=config.get("beta_end", 0.02),
        steps=config.get("num_train_timesteps", 1000),
        zero_terminal_snr=config.get("rescale_betas_zero_snr", False),
        trained_betas=config.get("trained_betas"),
        clip=config.get("clip_sample_range", 1.0) if config.get("clip_sample") else None,
    )
    given = config.get("prediction_type", "epsilon")
    if given not in _FROM_DIFFUSERS:
        raise UserError("Unknown prediction type", where="prediction_type", given=given, allowed=_FROM_DIFFUSERS)
    return process, _FROM_DIFFUSERS[given]


def to_scheduler(
    process: Process,
    prediction: str,
    sigma_data: float = 0.5,
    times: Sequence[float] | None = None,
    solver: str = "ddim",
) -> SchedulerMixin:
    """A diffusers scheduler whose default settings sample the way this repository does.

    DDPM gives DDIMScheduler with trailing spacing and set_alpha_to_one: with Stable Diffusion's default (leading
    spacing) a one-step student would be called at t = 1. One that clips is stepped with `use_clipped_model_output`.

    Args:
        times: falling times of a student of a DDPM that estimates x0 at each and adds new noise between two of them.
            The scheduler ends at the first of them, and for several steps it is LCMScheduler: its default for so many
            are the times where they are evenly spaced, others are to be named (`timesteps=` of the pipeline).
            Schedulers of other processes hold no such times.
        solver: "dpmpp_2m" of a DDPM gives DPMSolverMultistepScheduler, unless it clips or has zero terminal SNR, where
            that one differs. Any other one gives the scheduler of "ddim" and "euler".

    Raises:
        UserError: a prediction that no diffusers scheduler of this process takes; convert the network first.
    """
    if isinstance(process, DDPM) and prediction in _TO_DIFFUSERS:
        from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler

        if times and int(times[0]) < process.t_max:
            process = process.until(int(times[0]))
        facts = {
            "num_train_timesteps": process.steps,
            "beta_start": process.beta_start,
            "beta_end": process.beta_end,
            "beta_schedule": process.schedule,
            "trained_betas": process.trained_betas,
            "rescale_betas_zero_snr": process.zero_terminal_snr,
            "prediction_type": _TO_DIFFUSERS[prediction],
            "timestep_spacing": "trailing",
        }
        if solver == "dpmpp_2m" and process.clip is None and not process.zero_terminal_snr:
            return DPMSolverMultistepScheduler(**facts)
        facts |= {
            "set_alpha_to_one": True,
            "clip_sample": process.clip is not None,
            "clip_sample_range": process.clip or 1.0,
            "steps_offset": 1,  # unused by trailing spacing; StableDiffusionPipeline warns about any other value
        }
        if not times or len(times) == 1:
            return DDIMScheduler(**facts)
        n = len(times)
        even = list(times) == [process.steps // n * i - 1 for i in range(n, 0, -1)]
        return LCMScheduler(**facts, original_inference_steps=n if even else process.steps)
    if isinstance(process, RectifiedFlow) and prediction == "velocity":
        from diffusers import FlowMatchEulerDiscreteScheduler

        return FlowMatchEulerDiscreteScheduler(shift=process.shift)
    if isinstance(process, EDM) and prediction == "edm":
        from diffusers import EDMEulerScheduler

        return EDMEulerScheduler(
            sigma_min=process.sigma_min, sigma_max=process.sigma_max, sigma_data=sigma_data, rho=process.rho
        )
    raise UserError(
        "No diffusers scheduler samples such a network",
        where="prediction",
        given=f"{prediction} on {process.name}",
        allowed="eps, v, x0 on ddpm; velocity on flow; edm on edm",
    )
