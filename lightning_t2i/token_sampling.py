"""Drawing the tokens of pictures: in parallel steps of a random order, or one by one in the raster order.

    random    for k = 0 ... K - 1:  z = network(x, known),  x_i ~ head(z_i) for the next tokens i of the order
    raster    for i = 0 ... L - 1:  z_i = network(x_(i-1); the keys and values of earlier tokens),  x_i ~ head(z_i)

(MAR, arXiv 2406.11838, section 4; Fluid, arXiv 2410.13863.) How many tokens a step takes and how it is guided:
lightning_t2i/token_orders.py. The text is aligned once and its keys and values are kept; without guidance the null
text is never looked at; the head runs on the tokens of the step alone, except where it has to say how sure it is of
the others. All shapes are known beforehand, and all draws are keyed by the picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_t2i.batch import Cond
from lightning_t2i.errors import UserError
from lightning_t2i.keys import Keys
from lightning_t2i.networks.token_heads import DiffusionHead, Sampled
from lightning_t2i.networks.token_transformer import Text, TokenTransformer
from lightning_t2i.token_orders import Schedule, guidance_scales, most_confident, permutations, remaining


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Args:
        steps: K, of the random order; the raster order takes one for each token.
        head_steps: steps of a diffusion or flow head for one token.
        guidance: w; at exactly 1 there is none.
        schedule: "linear" in the share of known tokens, or "constant".
        skip: random order: a step whose guidance is this close to 1 is not guided, which saves its null branch and
            changes the pictures a little; at 0 they are exact.
        temperature: tau, of the head.
        policy: which tokens a step of the random order takes: "random", or those that the head is most sure of
            ("confidence", MaskGIT's; discrete tokens).
        choice_noise: of "confidence": scale of the Gumbel noise in the choice, falling to 0 in the last step.
        top_k, top_p: discrete tokens: keep only so many of the likeliest, or the likeliest of this total probability.
    """

    steps: int = 64
    head_steps: int = 100
    guidance: float = 3.0
    schedule: Schedule = "linear"
    skip: float = 0.0
    temperature: float = 1.0
    policy: Literal["random", "confidence"] = "random"
    choice_noise: float = 4.5
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("head_steps", 1), ("guidance", 0), ("skip", 0), ("temperature", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}", where=f"sampling.{name}",
                                given=getattr(self, name))  # fmt: skip
        if self.top_k is not None and self.top_k < 1:
            raise UserError("No token would be left", where="sampling.top_k", given=self.top_k, allowed="1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError("Not a probability", where="sampling.top_p", given=self.top_p, allowed="in (0, 1]")

    def refuse_unfit(self, network: TokenTransformer) -> None:
        """Refuses what a network cannot do.

        Raises:
            UserError: more steps than tokens or than a diffusion has times, or options that would have no effect.
        """
        if network.config.order == "random":
            remaining(network.config.length, self.steps)
        if network.config.head == "diffusion" and self.head_steps > DiffusionHead.t_end:
            allowed = f"at most {DiffusionHead.t_end}"
            what = "The diffusion of a token has fewer times"
            raise UserError(what, where="sampling.head_steps", given=self.head_steps, allowed=allowed)
        refused = [(name, "the raster order has one order") for name in ("policy", "skip")]
        refused = refused if network.config.order == "raster" else []
        if not network.discrete:
            refused += [(name, "continuous tokens have no probabilities") for name in ("policy", "top_k", "top_p")]
        for name, why in refused:
            if getattr(self, name) != (off := getattr(type(self), name)):
                what = f"This has no effect here: {why}"
                raise UserError(what, where=f"sampling.{name}", given=getattr(self, name), allowed=str(off))


@torch.no_grad()
def sample_tokens(network: TokenTransformer, cond: Cond, keys: Keys, positions: Tensor, options: Sampling) -> Tensor:
    """Tokens [B, L, c] or int64 [B, L] for the conditions of B pictures at these positions."""
    assert cond.embeds is not None
    text = network.align(cond.embeds, cond.mask, keep=True)
    null = network.null(len(positions), keep=True) if options.guidance != 1 else None
    draw = sample_random if network.config.order == "random" else sample_raster
    return draw(network, text, null, keys, positions, options)


def sample_random(
    network: TokenTransformer, text: Text, null: Text | None, keys: Keys, positions: Tensor, options: Sampling
) -> Tensor:
    """As `sample_tokens`, in K parallel steps."""
    facts = network.config
    length, batch = facts.length, len(positions)
    left = remaining(length, options.steps)
    order = permutations(keys, "order", positions, length)
    everywhere = torch.arange(length, device=positions.device).expand(batch, -1)
    known = torch.zeros(batch, length, dtype=torch.bool, device=positions.device)
    tokens = _blank(network, batch, length, positions.device)
    before = length
    for k, (m, scale) in enumerate(
        zip(left, guidance_scales(options.schedule, options.guidance, left, length), strict=True)
    ):
        guided = null is not None and scale != 1 and abs(scale - 1) > options.skip
        sure = options.policy == "confidence"
        places = everywhere if sure else order[:, m:before]
        z = _rows(network(tokens, text, known), places)
        z_null = _rows(network(tokens, null, known), places) if guided else None
        found = _draw(network, z, z_null, keys, f"token/{k}", positions, scale if guided else 1.0, options)
        chosen = found.tokens.unflatten(0, places.shape)
        if sure:
            assert found.confidence is not None
            gumbel = -(-keys.uniform(f"choice/{k}", positions, (length,)).log()).log()
            noise = options.choice_noise * (1 - (k + 1) / options.steps) * gumbel
            stays = most_confident(found.confidence.view_as(known), ~known, m, noise)
            tokens, known = torch.where(known, tokens, chosen), ~stays
        else:
            tokens.scatter_(1, places if tokens.dim() == 2 else places[..., None].expand_as(chosen), chosen)
            known.scatter_(1, places, True)
        before = m
    return tokens


def sample_raster(
    network: TokenTransformer, text: Text, null: Text | None, keys: Keys, positions: Tensor, options: Sampling
) -> Tensor:
    """As `sample_tokens`, one token after the other."""
    length = network.config.length
    scales = guidance_scales(options.schedule, options.guidance, remaining(length, length), length)
    cache, null_cache = network.cache(text), network.cache(null) if null is not None else None
    tokens: list[Tensor] = []
    for i, scale in enumerate(scales):
        last = tokens[-1] if tokens else None
        z = network(last, text, cache=cache)[:, 0]
        z_null = network(last, null, cache=null_cache)[:, 0] if null is not None else None
        tokens.append(_draw(network, z, z_null, keys, f"token/{i}", positions, scale, options).tokens[:, None])
    return torch.cat(tokens, 1)


def _blank(network: TokenTransformer, batch: int, length: int, device: torch.device) -> Tensor:
    """Tokens of which none is known."""
    if network.discrete:
        return torch.zeros(batch, length, dtype=torch.int64, device=device)
    return torch.zeros(batch, length, network.config.channels, device=device)


def _rows(z: Tensor, places: Tensor) -> Tensor:
    """z [B, L, d] at places [B, n]: [B n, d]."""
    return z.gather(1, places[..., None].expand(-1, -1, z.shape[2])).flatten(0, 1)


def _draw(
    network: TokenTransformer, z: Tensor, z_null: Tensor | None, keys: Keys, name: str, positions: Tensor,
    scale: float, options: Sampling,
) -> Sampled:  # fmt: skip
    """Draws a token for each row [B n, d], the rows of a picture after each other."""
    count, width = network.draws(options.head_steps)
    noise = keys.normal(name, positions, (count, len(z) // len(positions), width))
    kept = {n: v for n, v in (("top_k", options.top_k), ("top_p", options.top_p)) if v is not None}
    return network.sample(z, noise.transpose(0, 1).flatten(1, 2), options.temperature, scale, z_null, **kept)
