"""The interface of a noise process; methods use a process through it and nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from lightning_t2i.errors import UserError
from lightning_t2i.processes.conversions import expand, work_dtype

Time: TypeAlias = Tensor | float | int


class Process(ABC):
    """x_t = alpha(t) x0 + sigma(t) eps, with t in the process's own (native) time, which rises with noise.

    A time is a tensor [B], a 0-d tensor or a number. `data_time` is the time of clean data (sigma = 0); `t_min` and
    `t_max` bound the times that a network is trained on.
    """

    name: ClassVar[str]
    registry: ClassVar[dict[str, type[Process]]] = {}
    t_min: float
    t_max: float
    data_time: float
    discrete: ClassVar[bool] = False
    initial_scale: float = 1.0
    clip: float | None = None  # bound of x0 estimates while sampling

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            Process.registry[cls.name] = cls

    @abstractmethod
    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """float64 alpha and sigma of the shape of t."""

    @abstractmethod
    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """The native time, possibly fractional, whose log_snr is the given one; clamped to [t_min, t_max] or data."""

    @abstractmethod
    def timesteps(self, steps: int, device: torch.device | str | None = None) -> Tensor:
        """A sampling grid [steps + 1] of native times from t_max down to `data_time`."""

    @abstractmethod
    def to_config(self) -> dict[str, Any]:
        """Constructor arguments and the process's name, as plain values for JSON or YAML."""

    @staticmethod
    def from_config(config: dict[str, Any]) -> Process:
        """The process that `to_config` described.

        Raises:
            UserError: an unknown name.
        """
        options = dict(config)
        name = options.pop("name", None)
        if name not in Process.registry:
            raise UserError("Unknown noise process", where="name", given=name, allowed=Process.registry)
        return Process.registry[name](**options)

    def alpha_sigma(self, t: Time, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """alpha(t) and sigma(t), of the shape of t; computed in float64 and rounded once to `dtype`."""
        alpha, sigma = self._alpha_sigma(torch.as_tensor(t))
        return alpha.to(dtype), sigma.to(dtype)

    def log_snr(self, t: Time, dtype: torch.dtype = torch.float32) -> Tensor:
        """log(alpha^2 / sigma^2), natural logarithm; +inf for data."""
        alpha, sigma = self._alpha_sigma(torch.as_tensor(t))
        return (2 * (alpha.log() - sigma.log())).to(dtype)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Time) -> Tensor:
        """x_t of x0 and eps [B, ...] at t; at least float32."""
        alpha, sigma = self.alpha_sigma(t, torch.float64)
        dtype = work_dtype(x0)
        return expand(alpha, x0) * x0.to(dtype) + expand(sigma, x0) * eps.to(dtype)

    def initial(self, z: Tensor, t: Time | None = None) -> Tensor:
        """The state from which sampling starts, of unit Gaussian noise z: at t_max, or as if nothing but noise were
        there at an earlier t."""
        return z * self.initial_scale

    def step(self, x: Tensor, t: Time, s: Time, x0: Tensor, eta: float = 0.0, noise: Tensor | None = None) -> Tensor:
        """Moves x from time t to time s, exact for the given x0 (the mean of x0 given x, or a solver's estimate).

            x_s = alpha_s x0 + sqrt(sigma_s^2 - d^2) eps + d noise,   eps = (x - alpha_t x0) / sigma_t
            d = eta (sigma_s / sigma_t) sqrt(sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2)

        For DDPM this is DDIM (arXiv 2010.02502, eq. 12 and 16; eta = 1 is ancestral sampling), for EDM and rectified
        flow with eta = 0 it is Euler's step of the probability flow ODE.

        Args:
            x, x0: [B, ...].
            t, s: scalars or [B]; sigma(t) > 0. s > t is allowed with eta = 0 (inversion).
            eta: 0 is deterministic.
            noise: unit Gaussian noise of the shape of x, needed when eta > 0.

        Returns:
            x at time s, at least float32.
        """
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.alpha_sigma(t, torch.float64), self.alpha_sigma(s, torch.float64)
        dtype = torch.promote_types(work_dtype(x), x0.dtype)
        x, x0 = x.to(dtype), x0.to(dtype)
        if eta == 0:
            kept = sigma_s / sigma_t
            return expand(kept, x) * x + expand(alpha_s - alpha_t * kept, x) * x0
        if noise is None:
            raise ValueError("a step with eta > 0 needs noise")
        variance = (sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2).clamp(min=0)
        std = eta * sigma_s / sigma_t * variance.sqrt()
        kept = (sigma_s**2 - std**2).clamp(min=0).sqrt() / sigma_t
        moved = expand(kept, x) * x + expand(alpha_s - alpha_t * kept, x) * x0
        return moved + expand(std, x) * noise.to(dtype)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Process) and self.to_config() == other.to_config()

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in self.to_config().items() if k != "name")
        return f"{type(self).__name__}({options})"


class ContinuousProcess(Process):
    """A process in continuous time whose probability flow ODE is dx/dt = (x - x0(x, t)) / t: EDM and rectified flow."""

    data_time = 0.0

    def slope(self, x: Tensor, t: Time, x0: Tensor) -> Tensor:
        """dx/dt of the probability flow ODE at t > 0."""
        dtype = torch.promote_types(work_dtype(x), x0.dtype)
        return (x.to(dtype) - x0.to(dtype)) / expand(torch.as_tensor(t, dtype=torch.float64), x)
