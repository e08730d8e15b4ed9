"""What schedules cost, known before anything runs: multiply-accumulates, and bytes of the kept values.

    MACs(S) = N fixed + sum over steps n and components g of S[n, g] w[g]                               exact

w and fixed are counted once, by running the transformer without weights on the meta device, and hold for one picture.
The original counter leaves out the products within attention, and counts FLUX at two rows a picture although it has one
(arXiv 2506.15682; `sdpa=False` and `rows=2` give its figures).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_t2i.batch import Cond
from lightning_t2i.caching.layout import Layout
from lightning_t2i.caching.schedule import Schedule
from lightning_t2i.flops import Operations
from lightning_t2i.networks.backbones import adapter_for

PRODUCTS = ("bmm", "baddbmm", "scaled_dot_product")  # kernels that only attention uses in these networks


class _Split(Operations):
    """Counts the products within attention beside all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = 0

    def add(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        before = self.total
        super().add(func, args, kwargs, out)
        if any(name in func.__name__ for name in PRODUCTS):
            self.attention += self.total - before


@dataclass(frozen=True, eq=False)
class Cost:
    """Costs of one picture.

    fixed: MACs of a step outside of all components; weights: int64 [G], MACs of each component; attention: int64 [G],
    the part of `weights` that lies within attention; elements: int64 [G], numbers that a kept output has, of `itemsize`
    bytes each.
    """

    layout: Layout
    fixed: int
    weights: np.ndarray
    attention: np.ndarray
    elements: np.ndarray
    itemsize: int = 4

    @classmethod
    def of(cls, backbone: nn.Module, shape: tuple[int, ...], tokens: int, rows: int = 2) -> Cost:
        """Counts a transformer, of which only class, config and precision are used.

        Args:
            shape: (C, h, w) of a latent.
            tokens: length of the text.
            rows: rows of a picture: 2 with guidance, 1 without.
        """
        config = dict(backbone.config)
        kind: Any = next(c for c in type(backbone).__mro__ if c.__name__ == Layout.of(backbone).family)
        with torch.device("meta"):
            network = kind.from_config(config).eval()
            cond = Cond(
                torch.empty(rows, tokens, config.get("caption_channels") or config.get("joint_attention_dim")),
                torch.ones(rows, tokens, dtype=torch.bool),
                torch.empty(rows, config.get("pooled_projection_dim") or 1),
                guidance=torch.empty(rows),
            )
            x, t = torch.empty(rows, *shape), torch.empty(rows)
        layout = Layout.of(network)
        modules, counts, sizes = dict(network.named_modules()), {}, {}
        begins: dict[str, tuple[int, int]] = {}
        with torch.no_grad(), _Split() as operations:
            for name in layout.components:

                def enter(module: nn.Module, args: Any, name: str = name) -> None:
                    begins[name] = operations.total, operations.attention

                def leave(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                    counts[name] = operations.total - begins[name][0], operations.attention - begins[name][1]
                    sizes[name] = sum(x.numel() for x in tree_leaves(output) if isinstance(x, Tensor))

                modules[name].register_forward_pre_hook(enter)
                modules[name].register_forward_hook(leave)
            adapter_for(network)(network, x, t, cond)
        table = np.array([counts[name] for name in layout.components], np.int64) // 2
        elements = np.array([sizes[name] for name in layout.components], np.int64)
        itemsize = next(p.element_size() for p in backbone.parameters() if p.is_floating_point())
        fixed = operations.total // 2 - int(table[:, 0].sum())
        return cls(layout, fixed, table[:, 0], table[:, 1], elements, itemsize)

    def priced(self, sdpa: bool) -> np.ndarray:
        """int64 [G]: MACs of each component, with the products within attention or without."""
        return self.weights if sdpa else self.weights - self.attention

    def macs(self, schedule: Schedule, sdpa: bool = True) -> int:
        """MACs of a picture, dead computations left out."""
        return schedule.steps * self.fixed + int(self.priced(sdpa) @ schedule.plan.live.sum(0))

    def full(self, steps: int, sdpa: bool = True) -> int:
        """MACs of a picture without a cache."""
        return steps * (self.fixed + int(self.priced(sdpa).sum()))

    @property
    def most_bytes(self) -> int:
        """Bytes of a picture's kept values where those of all components are kept: no schedule keeps more."""
        return int(self.elements.sum()) * self.itemsize

    def slot_bytes(self, schedule: Schedule) -> int:
        """Largest number of bytes that a picture's kept values take between two steps."""
        return int((schedule.plan.keep @ self.elements).max()) * self.itemsize
