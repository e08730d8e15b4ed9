"""A Linear layer in int8 inside a network that is moved; see `quantization.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bitsandbytes.nn import Linear8bitLt


class Linear8bit(Linear8bitLt):
    """That of bitsandbytes (0.50), whose CB and SCB stay with its weight when the network around it is moved.

    A move of a network gives each weight new data in place, and so loses what bitsandbytes sets on a new weight: its
    own `to` sees to that, but is called for a layer that is moved alone.
    """

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Linear8bit:
        super()._apply(fn, recurse)
        for held in (self.weight, self.state):
            if held.CB is not None:
                held.CB, held.SCB = self.weight.data, held.SCB.to(self.weight.device)
        return self
