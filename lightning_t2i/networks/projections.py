"""Channel projections (DeMe, arXiv 2410.06664, section 3): y = x + D x over channels, after each block of a network.

    U-Nets          after every down block, on the state that goes on to the next block: skip connections keep the
                    unprojected tensors; after the middle block; after every up block
    transformers    after every block, on the tokens of the picture
    D [C, C]        zero at first. The paper's matrix is W = I + D: so a network begins as it was, bit for bit, weight
                    decay draws W to I and not to 0, and D is its own task vector

An up block that ends in an upsampling convolution or in a residual block with a shortcut takes W into that layer
without a change of the result: those are the *foldable* ones, and a network with no others is exported as a stock one.
A middle block's last residual block has no shortcut, so that folding needs a layer that no stock class builds. A down
block cannot be folded, since its skip connections read what comes before W.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from lightning_t2i.errors import UserError

Blocks = Literal["none", "all", "foldable"]
OURS = "Projected"  # what the name of a stock class begins with, once it has projections
WHY = "its channel projections do not fold into stock layers, since other layers read what comes before them"
TRANSFORMERS = ("transformer_blocks", "single_transformer_blocks")


class ChannelProjection(nn.Module):
    """x + D x over one dimension.

    Args:
        channels: C.
        dim: 1 for feature maps [B, C, h, w], -1 for tokens [B, L, C].
    """

    def __init__(self, channels: int, dim: int):
        super().__init__()
        self.dim = dim
        self.delta = nn.Parameter(torch.zeros(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.dim == -1:
            return x + functional.linear(x, self.delta)
        return x + functional.conv2d(x, self.delta[:, :, None, None])


@dataclass(frozen=True)
class Site:
    """A block whose output is projected: its name, the channels there, and along which dimension they lie."""

    name: str
    channels: int
    dim: int


def _project(block: nn.Module, inputs: Any, output: Any) -> Any:
    """The forward hook: projects what a block hands on to the next one."""
    project: Any = block.projection
    if not isinstance(output, tuple):
        return project(output)
    place = 1 if project.dim == -1 else 0  # (text, picture) of a transformer; (state, skips) of a U-Net
    return (*output[:place], project(output[place]), *output[place + 1 :])


def sites(network: nn.Module) -> list[Site]:
    """Where the paper's rule puts projections, in the order of the forward pass.

    Raises:
        UserError: neither a U-Net nor a transformer of diffusers.
    """
    config: Any = getattr(network, "config", {})
    if hasattr(network, "down_blocks") and hasattr(network, "up_blocks"):
        widths = list(config["block_out_channels"])
        found = [Site(f"down_blocks.{i}", width, 1) for i, width in enumerate(widths)]
        if network.mid_block is not None:
            found.append(Site("mid_block", widths[-1], 1))
        return found + [Site(f"up_blocks.{i}", width, 1) for i, width in enumerate(reversed(widths))]
    lists = [(name, blocks) for name in TRANSFORMERS if (blocks := getattr(network, name, None)) is not None]
    if not lists or "num_attention_heads" not in config:
        what, allowed = "No rule says where this network is projected", "U-Nets and transformers of diffusers"
        raise UserError(what, where="model.projection", given=type(network).__name__, allowed=allowed, fix="none")
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return [Site(f"{name}.{i}", width, -1) for name, blocks in lists for i in range(len(blocks))]


def add_projections(network: nn.Module, blocks: Blocks) -> list[str]:
    """Gives blocks of a network, not yet sharded, a `projection`; returns their names.

    Raises:
        UserError: nothing of the network is foldable, or `sites` knows no rule.
    """
    if blocks == "none":
        return []
    names = [site.name for site in sites(network)]
    if blocks == "foldable":
        names = [name for name in names if name.startswith("up_blocks.") and _is_stock(network.get_submodule(name))]
    if not names:
        what, fix = "No block of this network takes a projection into a stock layer", "model.projection: all"
        raise UserError(what, where="model.projection", given=f"foldable, of {type(network).__name__}", fix=fix)
    inject(network, names)
    return names


def inject(network: nn.Module, names: list[str]) -> None:
    """Gives the named blocks a projection that is the identity, where they have none."""
    at = {site.name: site for site in sites(network)}
    for name in sorted(set(names) - set(projected(network)), key=names.index):
        block = network.get_submodule(name)
        like = next(p for p in block.parameters() if p.is_floating_point())
        block.add_module("projection", ChannelProjection(at[name].channels, at[name].dim).to(like))
        block.register_forward_hook(_project)


def projected(network: nn.Module) -> list[str]:
    """Names of the blocks that have a projection."""
    return [name for name, module in network.named_modules() if isinstance(getattr(module, "projection", None),
                                                                           ChannelProjection)]  # fmt: skip


# ---- folding -------------------------------------------------------------------------------------------------------


def _last(block: Any) -> nn.Module | None:
    """The layer of a U-Net's block whose output is the block's: None where it is an attention."""
    if getattr(block, "upsamplers", None):
        convolution = getattr(block.upsamplers[-1], "conv", None)
        return convolution if isinstance(convolution, nn.Conv2d) else None
    attentions = [a for a in getattr(block, "attentions", None) or () if a is not None]
    is_middle = len(block.resnets) > len(attentions) and not hasattr(block, "upsamplers")
    return block.resnets[-1] if is_middle or not attentions else None


def _is_stock(block: Any) -> bool:
    """Whether the block takes its projection into layers that it has."""
    last = _last(block)
    return last is not None and getattr(last, "conv_shortcut", last) is not None


@torch.no_grad()
def _after(matrix: Tensor, convolution: Any) -> None:
    """Puts W behind a convolution into its weights; the product is float64."""
    weight = convolution.weight
    weight.copy_(torch.einsum("oc,cihw->oihw", matrix, weight.double()))
    if convolution.bias is not None:
        convolution.bias.copy_(matrix @ convolution.bias.double())


@torch.no_grad()
def fold(network: nn.Module, name: str) -> None:
    """Takes the projection of a block into its last layer, for good; the network's output stays as it was.

    A residual block without a shortcut gets one, which no stock class builds: see the top of the file.

    Raises:
        UserError: a down block, an up block that ends in an attention, or a transformer's.
    """
    block: Any = network.get_submodule(name)
    last: Any = _last(block) if name.startswith(("up_blocks", "mid_block")) else None
    if last is None:
        raise UserError("This projection cannot be folded", where=name, given=type(block).__name__, allowed=WHY)
    delta = block.projection.delta.double()
    matrix = torch.eye(len(delta), dtype=delta.dtype, device=delta.device) + delta
    if isinstance(last, nn.Conv2d):
        _after(matrix, last)
    else:
        _after(matrix, last.conv2)
        if last.conv_shortcut is None:
            last.conv_shortcut = nn.Conv2d(len(delta), len(delta), 1, bias=False).to(last.conv2.weight)
            last.conv_shortcut.weight.copy_(matrix[:, :, None, None])
        else:
            _after(matrix, last.conv_shortcut)
    del block.projection
    for key in [key for key, hook in block._forward_hooks.items() if hook is _project]:
        del block._forward_hooks[key]


def fold_stock(network: nn.Module) -> bool:
    """Folds all projections of a network if it is a stock one afterwards; returns whether it is."""
    names = projected(network)
    if not all(n.startswith("up_blocks.") and _is_stock(network.get_submodule(n)) for n in names):
        return False
    for name in names:
        fold(network, name)
    return True


# ---- folders -------------------------------------------------------------------------------------------------------


def mark(folder: Path, component: str, names: list[str]) -> None:
    """Says in a written pipeline folder that its network has projections, so that nothing loads it without them."""
    file = folder / component / "config.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    facts |= {"_class_name": OURS + facts["_class_name"].removeprefix(OURS), "projected": names}
    file.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    file = folder / "model_index.json"
    index = json.loads(file.read_text(encoding="utf-8")) | {component: [__name__, facts["_class_name"]]}
    file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class Loader:
    """Builds and loads networks with projections; `networks.load` takes it for the class that a config names."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> nn.Module:
        from lightning_t2i.networks.load import build_network

        facts = {k: v for k, v in config.items() if k != "projected"}
        network = build_network(facts | {"_class_name": config["_class_name"].removeprefix(OURS)})
        inject(network, list(config["projected"]))
        return network

    @classmethod
    def from_pretrained(
        cls, path: str, subfolder: str = "", torch_dtype: torch.dtype = torch.float32, **unused: Any
    ) -> nn.Module:
        folder = Path(path) / subfolder
        network = cls.from_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        state: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            state |= load_file(file)
        network.load_state_dict(state)
        return network.to(torch_dtype).eval()
