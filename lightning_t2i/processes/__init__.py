"""Noise processes as pure functions: x_t = alpha(t) x0 + sigma(t) eps, conversions, guidance, time laws, samplers."""

from lightning_t2i.processes.base import ContinuousProcess, Process
from lightning_t2i.processes.conversions import PREDICTIONS, convert, convert_coefficients, expand
from lightning_t2i.processes.ddpm import DDPM
from lightning_t2i.processes.edm import EDM
from lightning_t2i.processes.flow import RectifiedFlow
from lightning_t2i.processes.guidance import guided
from lightning_t2i.processes.sampling import sample, solve
from lightning_t2i.processes.timesteps import Karras, LogitNormal, LogNormal, TimeLaw, Uniform, UShaped

__all__ = [
    "DDPM",
    "EDM",
    "PREDICTIONS",
    "ContinuousProcess",
    "Karras",
    "LogNormal",
    "LogitNormal",
    "Process",
    "RectifiedFlow",
    "TimeLaw",
    "UShaped",
    "Uniform",
    "convert",
    "convert_coefficients",
    "expand",
    "guided",
    "sample",
    "solve",
]
