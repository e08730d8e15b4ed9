"""How each diffusers backbone is called: the differences between their signatures, and nothing else.

Each adapter maps (backbone, x [B, C, h, w], t [B], cond) to the raw output [B, C, h, w]. t is the time input of that
family: DDPM's integer, 1000 t for flows, ln(sigma) / 4 for EDM. The backbone is called through its forward only, so
that it can be the root of a sharded network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from lightning_t2i.batch import Cond
from lightning_t2i.errors import UserError

LAST = ("conv_out", "proj_out", "out_conv")  # names of the last layer
Adapter = Callable[[nn.Module, Tensor, Tensor, Cond | None], Tensor]


def _call_unet2d(net: nn.Module, x: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
    labels = cond.label if cond is not None and net.class_embedding is not None else None
    return net(x, t, class_labels=labels, return_dict=False)[0]


def _call_unet2d_condition(net: nn.Module, x: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
    cond = _needed(cond, net, "embeds")
    added = None
    if net.config.addition_embed_type == "text_time":  # SDXL
        _needed(cond, net, "pooled")
        added = {"text_embeds": cond.pooled, "time_ids": _size_ids(net, x, cond)}
    return net(
        x,
        t,
        encoder_hidden_states=cond.embeds,
        encoder_attention_mask=cond.mask,
        class_labels=cond.label if net.class_embedding is not None else None,
        added_cond_kwargs=added,
        return_dict=False,
    )[0]


def _call_pixart(net: nn.Module, x: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
    cond = _needed(cond, net, "embeds")
    added = {"resolution": None, "aspect_ratio": None}
    if net.use_additional_conditions:  # the 1024 px networks
        size = _size_ids(net, x, cond)[:, 4:6].to(x.dtype)
        added = {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}
    return net(
        x,
        encoder_hidden_states=cond.embeds,
        timestep=t,
        added_cond_kwargs=added,
        encoder_attention_mask=cond.mask,
        return_dict=False,
    )[0]


def _call_sd3(net: nn.Module, x: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
    cond = _needed(cond, net, "embeds", "pooled")
    return net(
        x, encoder_hidden_states=cond.embeds, pooled_projections=cond.pooled, timestep=t, return_dict=False
    )[0]  # fmt: skip


def _call_flux(net: nn.Module, x: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
    """FLUX takes 2x2 patches as tokens, positions as ids, and multiplies the time by 1000 itself."""
    cond = _needed(cond, net, "embeds", "pooled")
    batch, channels, height, width = x.shape
    rows, columns = height // 2, width // 2
    tokens = x.view(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)
    ids = torch.zeros(rows, columns, 3, device=x.device, dtype=x.dtype)
    ids[..., 1] += torch.arange(rows, device=x.device)[:, None]
    ids[..., 2] += torch.arange(columns, device=x.device)[None, :]
    text, guidance = cast(Tensor, cond.embeds), None
    if net.config.guidance_embeds:
        guidance = _needed(cond, net, "guidance").guidance
    out = net(
        tokens,
        encoder_hidden_states=text,
        pooled_projections=cond.pooled,
        timestep=t / 1000,
        img_ids=ids.view(-1, 3),
        txt_ids=ids.new_zeros(text.shape[1], 3),
        guidance=guidance,
        return_dict=False,
    )[0]
    return out.view(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def _call_plain(net: nn.Module, x: Tensor, t: Tensor, cond: Cond | None) -> Tensor:
    return net(x, t, cond)


ADAPTERS: dict[str, Adapter] = {
    "UNet2DModel": _call_unet2d,
    "UNet2DConditionModel": _call_unet2d_condition,
    "PixArtTransformer2DModel": _call_pixart,
    "SD3Transformer2DModel": _call_sd3,
    "FluxTransformer2DModel": _call_flux,
}


def _needed(cond: Cond | None, net: nn.Module, *names: str) -> Cond:
    """`cond`, checked to have the named fields."""
    cond = Cond() if cond is None else cond
    missing = [name for name in names if getattr(cond, name) is None]
    if missing:
        raise ValueError(f"{type(net).__name__} needs Cond with {', '.join(missing)}")
    return cond


def is_told_size(net: nn.Module) -> bool:
    """Whether a network is told the size of its pictures: the U-Net of SDXL, and PixArt's for 1024 px."""
    xl = getattr(getattr(net, "config", None), "addition_embed_type", None) == "text_time"
    return xl or getattr(net, "use_additional_conditions", False)


def _size_ids(net: nn.Module, x: Tensor, cond: Cond) -> Tensor:
    """The condition's, or those of whole pictures whose latents are x: [h, w, 0, 0, h, w] in pixels, int64 [B, 6].

    `load_backbone` leaves at the network how many pixels its latents span, where that is not 8 as in the large ones.
    """
    if cond.size_ids is not None:
        return cond.size_ids
    factor = getattr(net, "picture_factor", 8)
    ids = torch.zeros(len(x), 6, dtype=torch.int64, device=x.device)
    ids[:, 0::4], ids[:, 1::4] = factor * x.shape[-2], factor * x.shape[-1]
    return ids


def adapter_for(backbone: nn.Module) -> Adapter:
    """The adapter of a backbone by the name of its class or of a base class (a sharded module is a subclass).

    Any other module is called as `backbone(x, t, cond)`.
    """
    for cls in type(backbone).__mro__:
        if cls.__name__ in ADAPTERS:
            return ADAPTERS[cls.__name__]
    return _call_plain


@torch.no_grad()
def negate_output(backbone: nn.Module) -> None:
    """Turns the sign of a network's output, by its last layer.

    Raises:
        UserError: it is not known by name.
    """
    last = next((m for name in LAST if (m := getattr(backbone, name, None)) is not None), None)
    if last is None:
        raise UserError("The last layer of this network is not known", given=type(backbone).__name__, allowed=LAST)
    for parameter in last.parameters():
        parameter.neg_()
