"""The token transformer of Fluid (arXiv 2410.13863): from known tokens and a text to a vector for every token.

    random    u_i = known_i ? embed(x_i) : mask      attention over all tokens     z_i foretells x_i from the known ones
    raster    u_i = i ? embed(x_(i-1)) : start       causal attention              z_i foretells x_i from x_0 … x_(i-1)
    z = norm(blocks(u + P, text)) + Q                P, Q: a learned vector for each place (as MAR, arXiv 2406.11838)
    text = aligner(linear(T5 states)), or one learned null token where there is none

and a head turns z_i into a distribution of x_i, see token_heads. With `positions` "rope" P and Q are fixed sines of row
and column and the attention between tokens turns its queries and keys, so that the length is not bound to a table;
embed is layer-normed, of codes only beside such sines (a deviation: their embedding is small beside them).
Discrete tokens share one matrix between their embedding and the logits. All shapes are static: which tokens are known
is a mask. Everything is called on the network itself, so that under FSDP2 its weights are whole.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.functional import linear

from lightning_t2i.errors import UserError
from lightning_t2i.networks.token_blocks import AlignerBlock, KeysValues, TokenBlock, rotary_table, sine_table
from lightning_t2i.networks.token_head_network import in_float32
from lightning_t2i.networks.token_heads import HEADS, Sampled, Terms

CHOICES = {"order": ("random", "raster"), "positions": ("learned", "rope"), "head": tuple(HEADS)}


class Text(NamedTuple):
    """Aligned text.

    states [B, N, width]; mask bool [B, N], True for real words; kv: keys and values for each block, where they are
    kept because the text stays the same over many calls.
    """

    states: Tensor
    mask: Tensor
    kv: tuple[KeysValues, ...] | None = None


class Cache:
    """Keys and values of the tokens before the current one, of each block: sampling in the raster order.

    Args:
        past: zeros [B, heads, L, width / heads], twice for each block.
    """

    def __init__(self, past: list[KeysValues]):
        self.past = past
        self.place = torch.zeros(1, dtype=torch.int64, device=past[0][0].device)  # the next one, a tensor: static graph

    def __len__(self) -> int:
        return self.past[0][0].shape[2]


class TokenTransformer(ModelMixin, ConfigMixin):
    """The network of this file with its head.

    Args:
        order: "random" or "raster".
        length: L, tokens of a picture.
        channels: c, values of a continuous token.
        vocabulary: V, number of discrete tokens.
        width, depth, heads: of the blocks.
        text_width: of the text encoder's states.
        aligner_depth, aligner_mlp_ratio: of the blocks over the text.
        mlp_ratio: of the blocks over the tokens.
        positions: "learned" tables or "rope".
        head: "diffusion", "flow" or "regression" for continuous tokens, "categorical" for discrete ones.
        head_depth: residual blocks of the head.
        head_width: null: `width`.
        head_options: further arguments of the head, see token_heads.
        dropout: of attention and perceptrons.

    Raises:
        UserError: a choice that there is not, or widths that heads or sines do not divide.
    """

    config_name = "config.json"
    _supports_gradient_checkpointing = True
    _no_split_modules = ["AlignerBlock", "TokenBlock", "HeadNetwork"]
    _keep_in_fp32_blocks = ("FinalLayer",)
    shard_forward_methods = ("align", "null", "loss", "sample")
    compute_dtype: torch.dtype | None = (
        None  # it is there: shard_network leaves the inputs as they are, noise in float32
    )

    @register_to_config
    def __init__(
        self,
        order: str = "random",
        length: int = 256,
        channels: int = 16,
        vocabulary: int = 8192,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        text_width: int = 4096,
        aligner_depth: int = 6,
        aligner_mlp_ratio: float = 2.0,
        mlp_ratio: float = 4.0,
        positions: str = "learned",
        head: str = "diffusion",
        head_depth: int = 6,
        head_width: int | None = None,
        head_options: dict[str, Any] | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        _refuse(order=order, positions=positions, head=head)
        if width % heads or (
            positions == "rope" and (width // heads % 4 or width % 4 or math.isqrt(length) ** 2 != length)
        ):
            what = "The heads do not divide the width; rope also needs heads of 4 n channels and a square of tokens"
            raise UserError(what, where="width, heads, length, positions", given=(width, heads, length, positions))
        self.gradient_checkpointing = False
        if self.discrete:
            self.embedding = nn.Embedding(vocabulary, width)
        else:
            self.token_in = nn.Linear(channels, width)
        # An embedding is as small as a learned table, and sines of unit size would drown it.
        small = self.discrete and positions == "learned"
        self.token_norm = nn.Identity() if small else nn.LayerNorm(width, eps=1e-6)
        self.first = nn.Parameter(torch.empty(width))  # the mask token, or the start of the raster order
        self.null_text = nn.Parameter(torch.empty(width))
        if positions == "learned":
            self.places_in, self.places_out = (nn.Parameter(torch.empty(length, width)) for _ in range(2))
        self.text_in = nn.Linear(text_width, width)
        self.aligner = nn.ModuleList(
            AlignerBlock(width, heads, aligner_mlp_ratio, dropout) for _ in range(aligner_depth)
        )
        self.text_norm = nn.LayerNorm(width, eps=1e-6)
        self.blocks = nn.ModuleList(TokenBlock(width, heads, mlp_ratio, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for parameter in self.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.02)
        # ModelMixin would give the config's "head" for an attribute of that name.
        self.token_head = HEADS[head](width, channels, head_depth, head_width or width, **(head_options or {}))

    @property
    def discrete(self) -> bool:
        """Whether tokens are numbers, not vectors."""
        return self.config.head == "categorical"

    # ---- text ----

    def align(
        self, embeddings: Tensor, mask: Tensor | None = None, drop: Tensor | None = None, keep: bool = False
    ) -> Text:
        """States of the text encoder [B, N, text_width] to aligned text.

        Args:
            mask: bool [B, N], True for real words; None: all are. A row without any becomes the null token.
            drop: bool [B], rows that become the null token (classifier-free guidance, arXiv 2207.12598).
            keep: compute every block's keys and values now, for texts that are used in several calls.
        """
        real = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=embeddings.device) if mask is None else mask
        empty = ~real.any(1) if drop is None else ~real.any(1) | drop
        alone = torch.zeros_like(real)
        alone[:, 0] = True
        real = torch.where(empty[:, None], alone, real)
        x = self.text_in(embeddings.to(self.text_in.weight.dtype))
        for block in self.aligner:
            x = self._through(block, x, real)
        x = torch.where(empty[:, None, None], self.null_text.to(x.dtype), self.text_norm(x))
        return self._kept(x, real) if keep else Text(x, real)

    def null(self, count: int, keep: bool = False) -> Text:
        """The null token as text of `count` samples, N = 1; `keep` as in `align`."""
        states = self.null_text.expand(count, 1, -1)
        mask = torch.ones(count, 1, dtype=torch.bool, device=states.device)
        return self._kept(states, mask) if keep else Text(states, mask)

    def _kept(self, states: Tensor, mask: Tensor) -> Text:
        return Text(states, mask, tuple(block(None, states) for block in self.blocks))

    # ---- tokens ----

    def forward(
        self, tokens: Tensor | None, text: Text, known: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Tokens [B, L, c] or int64 [B, L] -> z [B, L, width].

        Args:
            text: of `align` or `null`.
            known: random order: bool [B, L], True where a token is given; the values elsewhere have no effect.
            cache: raster order, one place a call: `tokens` is the token before that place, [B, 1, c] or [B, 1], None
                at the first; returns z [B, 1, width].
        """
        x, causal, mask, past = self._inputs(tokens, text, known, cache is not None), False, None, None
        length = x.shape[1]
        rotary: Tensor | None = None
        if self.config.positions == "rope":
            size = len(cache) if cache is not None else length
            rotary = rotary_table(size, self.config.width // self.config.heads, x.device)
            places = (sine_table(size, self.config.width, x.device),) * 2
        else:
            places = (self.places_in, self.places_out)
        if cache is not None:
            places = (places[0][cache.place], places[1][cache.place])
            rotary = None if rotary is None else rotary[:, cache.place]
            mask = (torch.arange(len(cache), device=x.device) <= cache.place)[None, None, None]
        else:
            causal = self.config.order == "raster"
        x = x + places[0].to(x.dtype)
        for i, block in enumerate(self.blocks):
            given = text.states if text.kv is None else text.kv[i]
            if cache is not None:
                past = (*cache.past[i], cache.place)
            x = self._through(block, x, given, text.mask, mask, causal, rotary, past)
        if cache is not None:
            cache.place.add_(1)
        return self.norm(x) + places[1].to(x.dtype)

    def cache(self, text: Text) -> Cache:
        """An empty cache for the samples of `text`."""
        facts = self.config
        shape = (len(text.states), facts.heads, facts.length, facts.width // facts.heads)
        return Cache([(text.states.new_zeros(shape), text.states.new_zeros(shape)) for _ in self.blocks])

    def _inputs(self, tokens: Tensor | None, text: Text, known: Tensor | None, stepwise: bool) -> Tensor:
        """What goes into the blocks at each place, without positions."""
        if tokens is None:
            return self.first.to(text.states.dtype).expand(len(text.states), 1, -1)
        if self.config.order == "random":
            if known is None:
                raise ValueError("the random order needs to know which tokens are known")
            given = known if tokens.dim() == 2 else known[:, :, None]
            x = self._embed(torch.where(given, tokens, torch.zeros_like(tokens)))
            return torch.where(known[:, :, None], x, self.first.to(x.dtype))
        x = self._embed(tokens if stepwise else tokens[:, :-1])
        return x if stepwise else torch.cat([self.first.to(x.dtype).expand(len(x), 1, -1), x], 1)

    def _embed(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) if self.discrete else self.token_in(tokens.to(self.token_in.weight.dtype))
        return self.token_norm(x)

    def _through(self, block: nn.Module, *inputs: Any) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    # ---- head ----

    def draws(self, steps: int) -> tuple[int, int]:
        """How many standard normal vectors of which width `sample` takes for a token in so many steps of the head."""
        return self.token_head.draws(steps)

    def loss(self, z: Tensor, target: Tensor, u: Tensor | None = None, noise: Tensor | None = None) -> Terms:
        """The loss of each token, not reduced.

        Args:
            z: [M, width], rows of what `forward` returned.
            target: [M, c] or int64 [M]; no gradient goes into it.
            u: uniform draws in (0, 1) [M, m], from which m times of each token come; not for discrete tokens.
            noise: standard normal [M, m, c].
        """
        return self.token_head.loss(self._to_head(z), target.detach(), u, noise)

    def sample(
        self,
        z: Tensor,
        noise: Tensor,
        temperature: float = 1.0,
        guidance: float = 1.0,
        z_null: Tensor | None = None,
        **options: Any,
    ) -> Sampled:
        """Tokens of z [M, width].

        Args:
            noise: standard normal [n, M, w] with (n, w) of `draws`.
            temperature: see the head.
            guidance: w of u + w (c - u); at exactly 1 `z_null` has no part and at exactly 0 `z` has none.
            z_null: [M, width], of the null text.
            options: of the head.

        Raises:
            ValueError: guidance without `z_null`.
        """
        if guidance != 1 and z_null is None:
            raise ValueError("guidance needs what the network says of the null text")
        if guidance == 0:
            z, z_null, guidance = z_null, None, 1.0
        both = z if guidance == 1 else torch.cat([z, z_null])
        return self.token_head.sample(self._to_head(both), noise, temperature, guidance, **options)

    def _to_head(self, z: Tensor) -> Tensor:
        """z, or its logits: there the embedding's own matrix is the output layer."""
        return in_float32(linear, z, self.embedding.weight) if self.discrete else z


def _refuse(**given: str) -> None:
    for name, value in given.items():
        if value not in CHOICES[name]:
            raise UserError("No such token transformer", where=name, given=value, allowed=CHOICES[name])
