"""Two U-Nets in series, InstaFlow-1.7B's network (arXiv 2309.06380, section 5): both begin as the same U-Net.

    junction    what is removed where they meet                                            what passes there
    full        nothing                                                                    the first one's output
    features    the first one's output layers, the second one's input layer                the top features
    drop_top    also the top up block of the first and the top down block of the second    features one level down

The paper removes one block at the junction and does not say which parts it has; `drop_top` is this repository's
reading: the second's top up block takes the skips of the first's top down block, and a 1x1 convolution matches the
widths. With `residual` the output, or the features below the output layers, is first + gate (second - first) with a
gate that begins at 0, so that the stack begins as the one U-Net; the paper's has none.

The file imports diffusers alone: it is shipped inside exported folders.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

Junction = Literal["full", "features", "drop_top"]
Skips = tuple[Tensor, ...]


class StackedUNet(UNet2DConditionModel):
    """Two U-Nets of the same configuration, each told time and text; called as one is.

    Args:
        junction, residual: see above.
        unet: configuration of one of them.
    """

    def __init__(self, junction: Junction = "full", residual: bool = False, **unet: Any):
        super().__init__(**unet)
        if junction not in ("full", "features", "drop_top") or (residual and junction == "drop_top"):
            raise ValueError(f"no such junction of U-Nets: {junction}{' with residual' if residual else ''}")
        self.register_to_config(junction=junction, residual=residual)
        self.second = UNet2DConditionModel(**unet)
        self.gate = nn.Parameter(torch.zeros(1)) if residual else None
        if junction != "full":
            self.conv_norm_out, self.conv_act, self.conv_out, self.second.conv_in = None, None, None, None
        if junction == "drop_top":
            top, below = self.config.block_out_channels[:2]
            del self.up_blocks[-1], self.second.down_blocks[0]
            self.up_blocks[-1].upsamplers = None
            self.narrow = nn.Conv2d(below, top, 1)

    @classmethod
    def _get_init_keys(cls, input_class: Any) -> set[str]:
        return UNet2DConditionModel._get_init_keys(UNet2DConditionModel) | {"junction", "residual"}

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
        **unused: Any,
    ) -> Any:
        """sample [B, C, h, w], timestep [B] or scalar, encoder_hidden_states [B, L, D] -> [B, C, h, w]."""
        if any(value is not None for value in unused.values()):
            raise ValueError(f"stacked U-Nets take none of {', '.join(unused)}")
        bias = None
        if encoder_attention_mask is not None:
            bias = ((1 - encoder_attention_mask.to(sample.dtype)) * -10000.0).unsqueeze(1)
        text = {"encoder_hidden_states": encoder_hidden_states, "encoder_attention_mask": bias}
        second, junction = self.second, self.config.junction
        emb, emb_2 = (n.time_embedding(n.get_time_embed(sample=sample, timestep=timestep)) for n in (self, second))
        start = self.conv_in(sample)
        first, skips = _through(self, start, (start,), emb, text)
        if junction == "full":
            first = _out(self, first)
            start = second.conv_in(first)
            out = self._joined(first, _out(second, _through(second, start, (start,), emb_2, text)[0]))
        elif junction == "features":
            out = _out(second, self._joined(first, _through(second, first, (first,), emb_2, text)[0]))
        else:
            start = self.narrow(first)
            out = _out(second, _through(second, start, (*skips, start), emb_2, text)[0])
        return UNet2DConditionOutput(sample=out) if return_dict else (out,)

    def _joined(self, first: Tensor, second: Tensor) -> Tensor:
        return second if self.gate is None else first + self.gate.view(1, 1, 1, 1) * (second - first)


def _through(net: Any, h: Tensor, skips: Skips, emb: Tensor, text: dict[str, Any]) -> tuple[Tensor, Skips]:
    """Features after the blocks of a U-Net that are there, and the skips that no block took."""
    for block in net.down_blocks:
        h, more = block(hidden_states=h, temb=emb, **(text if getattr(block, "has_cross_attention", False) else {}))
        skips += more
    if net.mid_block is not None:
        h = net.mid_block(h, emb, **(text if getattr(net.mid_block, "has_cross_attention", False) else {}))
    for block in net.up_blocks:
        more = text if getattr(block, "has_cross_attention", False) else {}
        taken, skips = skips[-len(block.resnets) :], skips[: -len(block.resnets)]
        h = block(hidden_states=h, temb=emb, res_hidden_states_tuple=taken, **more)
    return h, skips


def _out(net: Any, h: Tensor) -> Tensor:
    """The output layers of a U-Net."""
    return net.conv_out(h if net.conv_norm_out is None else net.conv_act(net.conv_norm_out(h)))


def stacked(unet: nn.Module, junction: Junction, residual: bool = False) -> StackedUNet:
    """Two copies of a U-Net, float32, in training mode; of one without weights (on meta) two without.

    Raises:
        TypeError: not a UNet2DConditionModel.
    """
    if not isinstance(unet, UNet2DConditionModel):
        raise TypeError(f"only a UNet2DConditionModel can be stacked, not a {type(unet).__name__}")
    config: Any = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    with torch.device(next(unet.parameters()).device):
        double = StackedUNet(junction, residual, **config)
    weights = unet.state_dict()
    known = {name: weights[key] for name in double.state_dict() if (key := _source(name, junction)) in weights}
    double.load_state_dict(known, strict=False)
    return double.train()


def _source(name: str, junction: Junction) -> str:
    """What a parameter of the stack is called in one U-Net; the second one's down blocks may lack the first."""
    down = "second.down_blocks."
    if junction == "drop_top" and name.startswith(down):
        number, rest = name.removeprefix(down).split(".", 1)
        return f"down_blocks.{int(number) + 1}.{rest}"
    return name.removeprefix("second.")
