"""Sampling of Fluid's tokens in a random order against the loop that MAR's sampler is, with equal noise and outputs.

    python -m benchmarks --only fluid_sampling

MAR's loop, with text: a pass of the transformer takes pictures with their text and without as one batch, the null text
padded to the length of the others, and every block computes keys and values of the text again; then both halves of
the batch go through the whole diffusion of the step's tokens, although the state of the first alone is used, z
and times go through their layers in every step of it for every row, each residual block computes its own modulation,
and the numbers of the schedule are looked up for every row. The lines of the table take these away one after the other:

    text           keys and values of the text once for each prompt
    null           the null text is one token, in a pass of its own
    state          one state for both halves of the guidance
    projection     z once for each token
    times          the embedding of the times once
    modulation     one product for all residual blocks
    numbers        the schedule as numbers: with it the loop is ours, lightning_t2i/token_sampling.py

These change no output (tests/benchmarks/test_fluid_benchmarks.py). The last line does: steps whose guidance is within
SKIP of 1 are not guided. Weights are random; all lines take turns; a gain is the ratio of a turn's times, and the table
has medians of all turns. Times are the processor's, of one thread, in which other work on the machine enters least.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad, silu

from lightning_t2i.batch import Cond
from lightning_t2i.cli.session import quiet
from lightning_t2i.keys import Keys
from lightning_t2i.networks.token_transformer import Text, TokenTransformer
from lightning_t2i.token_orders import guidance_scales, permutations, remaining
from lightning_t2i.token_sampling import Sampling, sample_tokens

SAVINGS = ("text", "null", "state", "projection", "times", "modulation", "numbers")
LENGTH, CHANNELS, WORDS, TEXT_WIDTH, SKIP = 64, 4, 32, 64, 0.25
COLUMNS = [["width x depth", ""], ["pictures", "d"], ["K", "d"], ["head steps", "d"], ["saved", ""], ["outputs", ""]]
COLUMNS += [["CPU s a batch", ".2f"], ["gain of this line", ".2f"], ["MAR's loop / this", ".2f"], ["turns", "d"]]


@dataclass(frozen=True)
class Contest:
    """What is sampled: `pictures` of a network of this size."""

    width: int
    depth: int
    heads: int
    pictures: int
    sampling: Sampling

    def network(self) -> TokenTransformer:
        """With random weights, none of which is zero as at the start of a training; estimates of x are bounded."""
        facts = {"width": self.width, "depth": self.depth, "heads": self.heads, "text_width": TEXT_WIDTH}
        net = TokenTransformer(length=LENGTH, channels=CHANNELS, head_options={"clip": 3.0}, head_depth=3, **facts)
        for layer in (net.token_head.network.modulation, net.token_head.network.final):
            nn.init.normal_(layer.weight, std=self.width**-0.5)
        return net.eval()

    def cond(self) -> Cond:
        mask = torch.arange(WORDS) < torch.randint(8, WORDS + 1, (self.pictures, 1))
        return Cond(embeds=torch.randn(self.pictures, WORDS, TEXT_WIDTH), mask=mask)


class Loop:
    """MAR's loop without what is `saved`."""

    def __init__(self, network: TokenTransformer, saved: frozenset[str]):
        self.network, self.saved = network, saved

    @torch.no_grad()
    def __call__(self, cond: Cond, keys: Keys, positions: Tensor, options: Sampling) -> Tensor:
        """As `sample_tokens`, for the random order and guidance above 1."""
        net, batch = self.network, len(positions)
        left = remaining(LENGTH, options.steps)
        order = permutations(keys, "order", positions, LENGTH)
        passes = self.texts(cond, batch)
        tokens, known = torch.zeros(batch, LENGTH, CHANNELS), torch.zeros(batch, LENGTH, dtype=torch.bool)
        before, scales = LENGTH, guidance_scales(options.schedule, options.guidance, left, LENGTH)
        for k, (m, scale) in enumerate(zip(left, scales, strict=True)):
            places = order[:, m:before]
            halves = 2 // len(passes)
            z = torch.cat([net(tokens.repeat(halves, 1, 1), text, known.repeat(halves, 1)) for text in passes])
            rows = z.gather(1, places.repeat(2, 1)[:, :, None].expand(-1, -1, z.shape[2])).flatten(0, 1)
            noise = keys.normal(f"token/{k}", positions, (options.head_steps, m_of(places), CHANNELS))
            found = self.head(rows, noise.transpose(0, 1).flatten(1, 2), options.temperature, scale)
            tokens.scatter_(1, places[:, :, None].expand(-1, -1, CHANNELS), found.unflatten(0, places.shape))
            known.scatter_(1, places, True)
            before = m
        return tokens

    def texts(self, cond: Cond, batch: int) -> list[Text]:
        """The text of each pass of a step."""
        assert cond.embeds is not None
        texts = [self.network.align(cond.embeds, cond.mask), self.network.null(batch)]
        if "null" not in self.saved:
            states, masks = ([text[i] for text in texts] for i in (0, 1))
            states[1], masks[1] = pad(states[1], (0, 0, 0, WORDS - 1)), pad(masks[1], (0, WORDS - 1))
            texts = [Text(torch.cat(states), torch.cat(masks))]
        if "text" not in self.saved:
            return texts
        return [t._replace(kv=tuple(block(None, t.states) for block in self.network.blocks)) for t in texts]

    def head(self, z: Tensor, noise: Tensor, temperature: float, scale: float) -> Tensor:
        """Tokens [M, c] of z [2 M, width]."""
        head, saved, half = self.network.token_head, self.saved, len(z) // 2
        diffusion = head.diffusion.respaced(len(noise))
        times = torch.tensor(diffusion.times)
        condition = head.condition(z) if "projection" in saved else None
        embedded = head.embed(times) if "times" in saved else None

        def say(x: Tensor, j: int) -> tuple[Tensor, Tensor]:
            """What the network says of the state of the half with the text, with and without it."""
            x = torch.cat([x[:half], x[:half]])
            at = head.embed(times[j].expand(len(x))) if embedded is None else embedded[j]
            y = at + (head.condition(z) if condition is None else condition)
            out = head.network(x, y) if "modulation" in saved else blockwise(head.network, x, y)
            told, null = out.chunk(2)
            eps = null[:, :CHANNELS] + scale * (told - null)[:, :CHANNELS]
            if "state" in saved:
                return eps, told[:, CHANNELS:]
            return torch.cat([eps, eps]), out[:, CHANNELS:]

        noise = noise if "state" in saved else noise.repeat(1, 2, 1)
        if "numbers" in saved:
            return diffusion.sample(say, noise, temperature, head.clip)[:half]
        return with_tables(diffusion, say, noise, temperature, head.clip)[:half]


def m_of(places: Tensor) -> int:
    return places.shape[1]


def blockwise(network: Any, x: Tensor, y: Tensor) -> Tensor:
    """The head's network with a product for the modulation of each residual block."""
    weights, biases = network.modulation.weight, network.modulation.bias
    width, h = y.shape[-1], network.inside(x.to(y.dtype))
    for i, (norm, mlp) in enumerate(zip(network.norms, network.mlps, strict=True)):
        own = slice(3 * i * width, 3 * (i + 1) * width)
        shift, scale, gate = linear(silu(y), weights[own], biases[own]).chunk(3, -1)
        h = h + gate * mlp(norm(h) * (1 + scale) + shift)
    shift, scale = linear(silu(y), weights[-2 * width :], biases[-2 * width :]).chunk(2, -1)
    return network.final(network.norm(h) * (1 + scale) + shift)


def with_tables(
    diffusion: Any, say: Callable[[Tensor, int], Any], noise: Tensor, temperature: float, clip: float | None
) -> Tensor:
    """As `TokenDiffusion.sample`, with numbers of the schedule that are looked up for every row."""
    x = noise[0]
    for step, j in enumerate(reversed(range(len(diffusion.times)))):
        t = torch.full((len(x),), j)
        eps, v = say(x, j)
        alpha, sigma, c1, c2, large, small = diffusion.table(x.device)[t][:, :, None].to(eps.dtype).unbind(1)
        estimate = x / alpha - sigma / alpha * eps
        x = c1 * (estimate if clip is None else estimate.clamp(-clip, clip)) + c2 * x
        deviation = ((v + 1) / 4 * large + (1 - v) / 4 * small).exp()
        x = x + (t > 0)[:, None] * temperature * deviation * noise[min(step + 1, len(noise) - 1)]
    return x


def lines(contest: Contest, turns: int) -> list[list[Any]]:
    """The table of one contest."""
    network, cond, places, keys = contest.network(), contest.cond(), torch.arange(contest.pictures), Keys(0)
    ways: list[tuple[str, str, Callable[[], Tensor]]] = []
    options = contest.sampling
    for count in range(len(SAVINGS)):
        loop = Loop(network, frozenset(SAVINGS[:count]))
        name = f"+ {SAVINGS[count - 1]}" if count else "nothing: MAR's loop"
        ways.append((name, "equal", lambda loop=loop: loop(cond, keys, places, options)))  # type: ignore[misc]
    ours = f"+ {SAVINGS[-1]}: ours"
    ways.append((ours, "equal", lambda: sample_tokens(network, cond, keys, places, options)))
    fewer = replace(options, skip=SKIP)
    ways.append((f"+ w within {SKIP} of 1", "changed", lambda: sample_tokens(network, cond, keys, places, fewer)))
    seconds: list[list[float]] = [[] for _ in ways]
    for turn in range(turns + 1):
        for kept, (_, _, way) in zip(seconds, ways, strict=True):
            start = time.process_time()
            way()
            if turn:  # the first warms up
                kept.append(time.process_time() - start)
    rows: list[list[Any]] = []
    size = [f"{contest.width} x {contest.depth}", contest.pictures, options.steps, options.head_steps]
    for i, (name, outputs, _) in enumerate(ways):
        gain = ratio(seconds[i - 1], seconds[i]) if i else None
        rows.append([*size, name, outputs, statistics.median(seconds[i]), gain, ratio(seconds[0], seconds[i]), turns])
    return rows


def ratio(before: list[float], after: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(before, after, strict=True))


def measure(quick: bool = False) -> dict[str, Any]:
    """Our sampler against MAR's loop."""
    quiet()
    if quick:
        contests = [(Contest(32, 2, 2, 2, Sampling(steps=4, head_steps=3)), 1)]
    else:
        contests = [
            (Contest(128, 4, 4, 4, Sampling(steps=16, head_steps=25)), 3),
            (Contest(128, 4, 4, 4, Sampling(steps=16, head_steps=100)), 2),
        ]
    rows = [row for contest, turns in contests for row in lines(contest, turns)]
    return {"title": "Fluid's sampler against MAR's loop", "tables": [{"columns": COLUMNS, "rows": rows}]}
