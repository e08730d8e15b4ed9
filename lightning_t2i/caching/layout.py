"""Layout: which submodules of a stock diffusers transformer a schedule decides about, and in which order.

    class of a block             components, in this order
    BasicTransformerBlock        attn1 (self-attention), attn2 (cross-attention), ff             PixArt
    FluxTransformerBlock         attn (image and text output), ff, ff_context                    FLUX, dual stream
    FluxSingleTransformerBlock   attn, proj_mlp (before its GELU), proj_out                      FLUX, single stream

What is kept of a component is what its module returns, before gate and residual (arXiv 2506.15682).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_t2i.errors import UserError

COMPONENTS = {
    "BasicTransformerBlock": ("attn1", "attn2", "ff"),
    "FluxTransformerBlock": ("attn", "ff", "ff_context"),
    "FluxSingleTransformerBlock": ("attn", "proj_mlp", "proj_out"),
}
PER_BLOCK = 3
STACKS = {
    "PixArtTransformer2DModel": ("transformer_blocks",),
    "FluxTransformer2DModel": ("transformer_blocks", "single_transformer_blocks"),
}


@dataclass(frozen=True)
class Stack:
    """Blocks of one class in a row: the attribute that holds them, the name of their class, how many."""

    path: str
    kind: str
    count: int


@dataclass(frozen=True)
class Layout:
    """The columns of a schedule: 3 components of every block, stack by stack.

    Args:
        family: class of the transformer.
        stacks: its blocks in the order in which they are called.
    """

    family: str
    stacks: tuple[Stack, ...]

    @classmethod
    def of(cls, backbone: nn.Module) -> Layout:
        """The layout of a transformer, sharded or not.

        Raises:
            UserError: its family or the class of its blocks is not served, or an option of it would call a component
                several times or give it further outputs.
        """
        family = next((c.__name__ for c in type(backbone).__mro__ if c.__name__ in STACKS), None)
        if family is None:
            what, given = "Caching schedules are made for PixArt and FLUX", type(backbone).__name__
            raise UserError(what, where="model.network", given=given, allowed=list(STACKS))
        stacks = []
        for path in STACKS[family]:
            blocks: Any = getattr(backbone, path)
            if len(blocks):  # a network may have no blocks of the one kind
                stacks.append(Stack(path, _kind(blocks[0]), len(blocks)))
            for block in blocks:
                _refuse_options(block)
        return cls(family, tuple(stacks))

    @property
    def blocks(self) -> list[tuple[str, str]]:
        """(module path, class) of every block."""
        return [(f"{s.path}.{i}", s.kind) for s in self.stacks for i in range(s.count)]

    @property
    def components(self) -> list[str]:
        """Module path of every column."""
        return [f"{path}.{name}" for path, kind in self.blocks for name in COMPONENTS[kind]]

    @property
    def width(self) -> int:
        """Number of columns."""
        return PER_BLOCK * sum(stack.count for stack in self.stacks)

    def columns(self, *names: str) -> list[int]:
        """The columns of the components with one of these names."""
        return [i for i, path in enumerate(self.components) if path.rsplit(".", 1)[-1] in names]

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        stacks = [{"blocks": s.path, "class": s.kind, "count": s.count, "components": list(COMPONENTS[s.kind])}
                  for s in self.stacks]  # fmt: skip
        return {"family": self.family, "stacks": stacks}

    @classmethod
    def from_plain(cls, content: dict[str, Any]) -> Layout:
        """What `plain` gave."""
        stacks = (Stack(s["blocks"], s["class"], s["count"]) for s in content["stacks"])
        return cls(content["family"], tuple(stacks))


def _kind(block: nn.Module) -> str:
    kind = next((c.__name__ for c in type(block).__mro__ if c.__name__ in COMPONENTS), None)
    if kind is None or (kind == "BasicTransformerBlock" and getattr(block, "norm_type", "") != "ada_norm_single"):
        what, given = "Blocks of this class are not served", f"{type(block).__name__}"
        raise UserError(what, where="model.network", given=given, allowed=list(COMPONENTS))
    return kind


def _refuse_options(block: Any) -> None:
    if getattr(block, "_chunk_size", None) is not None:
        what, fix = "A chunked feed-forward calls its module several times", "disable_forward_chunking()"
        raise UserError(f"{what}, so that it cannot be cached", where="feed-forward chunking", fix=fix)
    processor = getattr(getattr(block, "attn", None), "processor", None)
    if "IPAdapter" in type(processor).__name__:
        what = "An IP adapter gives the attention a third output, which no schedule knows"
        raise UserError(what, where="attention processor", given=type(processor).__name__, fix="unload_ip_adapter()")
