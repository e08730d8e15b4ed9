"""Caching schedules: which parts of a diffusion transformer are computed in which sampling step, and what that costs."""

from lightning_t2i.caching.cost import Cost
from lightning_t2i.caching.executor import Executor, apply
from lightning_t2i.caching.layout import Layout
from lightning_t2i.caching.schedule import Schedule

__all__ = ["Cost", "Executor", "Layout", "Schedule", "apply"]
