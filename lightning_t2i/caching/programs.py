"""Blocks as pure functions of a mask: what a schedule reuses is an input, and what it computes an output.

    program(mask, block, slots, inputs) -> the block's output, and of each component what was computed, else None

A mask of three bits says which components run. Being a constant, it leaves no branch: a block class has at most 8
programs, for every schedule, step and block. What only feeds a component that does not run (norm, modulation) is not
computed. The order of operations is that of diffusers' blocks, so that eager programs give their bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor

Mask: TypeAlias = tuple[bool, ...]
Found: TypeAlias = tuple[Any, tuple[Any, Any, Any]]


def pixart_block(
    mask: Mask, block: Any, slots: list[Any], h: Tensor, bias: Tensor | None, text: Tensor, text_bias: Tensor | None,
    time: Tensor,
) -> Found:  # fmt: skip
    """BasicTransformerBlock of PixArt: h [B, L, D], text [B, T, D], time [B, 6 D] (adaLN-single)."""
    modulation = block.scale_shift_table[None] + time.reshape(h.shape[0], 6, -1)
    shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation.chunk(6, dim=1)
    a, c, f = slots
    if mask[0]:
        a = block.attn1(block.norm1(h) * (1 + scale) + shift, encoder_hidden_states=None, attention_mask=bias)
    h = gate * a + h
    if mask[1]:
        c = block.attn2(h, encoder_hidden_states=text, attention_mask=text_bias)
    h = c + h
    if mask[2]:
        f = block.ff(block.norm2(h) * (1 + ff_scale) + ff_shift)
    return ff_gate * f + h, _computed(mask, a, c, f)


def flux_block(
    mask: Mask, block: Any, slots: list[Any], h: Tensor, text: Tensor, temb: Tensor, rope: Any
) -> Found:  # fmt: skip
    """FluxTransformerBlock: image stream h [B, L, D], text stream [B, T, D], temb [B, D]."""
    x, gate, ff_shift, ff_scale, ff_gate = block.norm1(h, emb=temb)
    y, text_gate, text_shift, text_scale, text_ff_gate = block.norm1_context(text, emb=temb)
    a, f, g = slots
    if mask[0]:
        a = block.attn(hidden_states=x, encoder_hidden_states=y, image_rotary_emb=rope)
    h = h + gate.unsqueeze(1) * a[0]
    if mask[1]:
        f = block.ff(block.norm2(h) * (1 + ff_scale[:, None]) + ff_shift[:, None])
    h = h + ff_gate.unsqueeze(1) * f
    text = text + text_gate.unsqueeze(1) * a[1]
    if mask[2]:
        g = block.ff_context(block.norm2_context(text) * (1 + text_scale[:, None]) + text_shift[:, None])
    text = text + text_ff_gate.unsqueeze(1) * g
    return (_clipped(text), h), _computed(mask, a, f, g)


def flux_single_block(
    mask: Mask, block: Any, slots: list[Any], h: Tensor, text: Tensor, temb: Tensor, rope: Any
) -> Found:  # fmt: skip
    """FluxSingleTransformerBlock: both streams in one row of tokens; the GELU of the MLP runs in every step."""
    tokens = text.shape[1]
    h = torch.cat([text, h], dim=1)
    x, gate = block.norm(h, emb=temb)
    a, m, p = slots
    if mask[1]:
        m = block.proj_mlp(x)
    if mask[0]:
        a = block.attn(hidden_states=x, image_rotary_emb=rope)
    if mask[2]:
        p = block.proj_out(torch.cat([a, block.act_mlp(m)], dim=2))
    h = _clipped(h + gate.unsqueeze(1) * p)
    return (h[:, :tokens], h[:, tokens:]), _computed(mask, a, m, p)


def _computed(mask: Mask, *values: Any) -> tuple[Any, ...]:
    return tuple(value if bit else None for bit, value in zip(mask, values, strict=True))


def _clipped(x: Tensor) -> Tensor:
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


@dataclass(frozen=True)
class Program:
    """A block as a function, and what it takes of the arguments that its network calls the block with."""

    function: Callable[..., Found]
    inputs: Callable[..., tuple[Any, ...]]


def _pixart_inputs(
    hidden_states: Tensor, attention_mask: Any = None, encoder_hidden_states: Any = None,
    encoder_attention_mask: Any = None, timestep: Any = None, **unused: Any,
) -> tuple[Any, ...]:  # fmt: skip
    return hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep


def _flux_inputs(
    hidden_states: Tensor, encoder_hidden_states: Any, temb: Any, image_rotary_emb: Any = None, **unused: Any
) -> tuple[Any, ...]:
    return hidden_states, encoder_hidden_states, temb, image_rotary_emb


PROGRAMS = {
    "BasicTransformerBlock": Program(pixart_block, _pixart_inputs),
    "FluxTransformerBlock": Program(flux_block, _flux_inputs),
    "FluxSingleTransformerBlock": Program(flux_single_block, _flux_inputs),
}


@cache
def program(kind: str, mask: Mask, compiled: bool) -> Callable[..., Found]:
    """The program of a mask for a class of blocks.

    Compiled ones have a code object each, under which torch.compile files what it has compiled: masks do not count
    against each other's limit of recompilations.
    """
    function: Any = PROGRAMS[kind].function
    if not compiled:
        return function
    name = f"{function.__name__}_{''.join(str(int(bit)) for bit in mask)}"
    own = FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)
    return torch.compile(own, fullgraph=True, dynamic=False)
