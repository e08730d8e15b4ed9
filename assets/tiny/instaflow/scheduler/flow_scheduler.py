"""Euler's method for rectified flows on the grid 1, 1 - 1/N, ..., 1/N: the scheduler inside exported folders.

diffusers' FlowMatchEulerDiscreteScheduler has no `init_noise_sigma`, which StableDiffusionPipeline asks for, and its N
times end at 1/1000 and not at 1/N. The network is told 1000 t and answers eps - x0. The file imports diffusers alone.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor


class FlowMatchUniformScheduler(SchedulerMixin, ConfigMixin):
    """N equal Euler steps from noise (t = 1) to data (t = 0).

    Args:
        num_train_timesteps: what the network is told at t = 1.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000):
        self.set_timesteps(1)

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Chooses N."""
        self.num_inference_steps = num_inference_steps
        left = 1 - torch.arange(num_inference_steps, dtype=torch.float64) / num_inference_steps
        self.timesteps = (self.config.num_train_timesteps * left).to(torch.float32).to(device)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The input of the network: x itself."""
        return sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        """x of the next time, 1/N nearer to the data."""
        x = (sample.float() - model_output.float() / self.num_inference_steps).to(sample.dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)
