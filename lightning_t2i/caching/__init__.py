"""Caching schedules: what of a diffusion transformer is computed in which sampling step, and what it costs."""

from lightning_t2i.caching.cost import Cost
from lightning_t2i.caching.executor import Executor, apply
from lightning_t2i.caching.layout import Layout
from lightning_t2i.caching.schedule import Schedule

__all__ = ["Cost", "Executor", "Layout", "Schedule", "apply"]
