"""A training step of Fluid's token transformer against an encoder-decoder that drops masked tokens, as MAR's is.

    python -m benchmarks --only fluid_step

Both have the same blocks, head and weights. "one stack" is ours: all blocks over all tokens, each picture with a mask
ratio of its own. "encoder-decoder" runs the first half of the blocks over known tokens alone, and the second over all;
so that the batch stays rectangular all pictures share one ratio, the mean of MAR's law, .867, and BUFFER more tokens,
a quarter of a picture's as in MAR, give the encoder something to do where nothing is known.

"masked tokens" of the head are ours: masked rows alone, in a number that is known beforehand, z through its layer once
for the m noises of a token. "all tokens" is MAR's: every token, z repeated m times before its layer, and the loss of
known tokens times zero; what is trained is the same.

A step is forward and backward pass; the data lie in memory. Operations are counted (torch.utils.flop_counter); a ratio
is that of a turn's times. Times are the processor's, of one thread, in which other work on the machine enters least.
The laws teach different numbers of tokens in a step, so the table has tokens a second too.
"""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_t2i.cli.session import quiet
from lightning_t2i.keys import Keys
from lightning_t2i.networks.token_heads import masked_rows
from lightning_t2i.networks.token_transformer import Text, TokenTransformer
from lightning_t2i.token_orders import MOMENTS, MaskLaw, ranked

LENGTH, CHANNELS, WORDS, TEXT_WIDTH, COPIES, BUFFER = 64, 4, 32, 64, 4, 16
WAYS = [
    ("one stack", "cosine", "masked tokens"),
    ("one stack", "cosine", "all tokens"),
    ("one stack", "truncnorm", "masked tokens"),
    ("encoder-decoder", "truncnorm", "masked tokens"),
    ("encoder-decoder", "truncnorm", "all tokens"),
]
COLUMNS = [["width x depth", ""], ["pictures", "d"], ["transformer", ""], ["mask law", ""], ["head on", ""]]
COLUMNS += [["masked tokens", ".0f"], ["Gflop", ".1f"], ["CPU s a step", ".3f"], ["Gflop/s", ".0f"]]
COLUMNS += [
    ["masked tokens/s", ",.0f"],
    ["MAR's step / this", ".2f"],
    ["MAR's s a token / this", ".2f"],
    ["turns", "d"],
]


class EncoderDecoder(nn.Module):
    """The blocks of a token transformer, half of them over known tokens alone.

    Args:
        network: its layers are used, none of them twice.
    """

    def __init__(self, network: TokenTransformer):
        super().__init__()
        self.network = network
        self.buffer_in, self.buffer_out = (nn.Parameter(torch.randn(BUFFER, network.config.width)) for _ in range(2))

    def forward(self, tokens: Tensor, text: Text, known: Tensor, count: int) -> Tensor:
        """z [B, L, width] of tokens [B, L, c], of which `count` of each picture are known."""
        net, (batch, half) = self.network, (len(tokens), len(self.network.blocks) // 2)
        width = net.config.width
        x = net.token_norm(net.token_in(tokens)) + net.places_in
        rows = known.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count, None].expand(-1, -1, width)
        h = torch.cat([self.buffer_in.expand(batch, -1, -1), x.gather(1, rows)], 1)
        for block in net.blocks[:half]:
            h = block(h, text.states, text.mask)
        every = (net.first + net.places_in).expand(batch, -1, -1).scatter(1, rows, h[:, BUFFER:])
        h = torch.cat([h[:, :BUFFER] + self.buffer_out, every], 1)
        for block in net.blocks[half:]:
            h = block(h, text.states, text.mask)
        return net.norm(h[:, BUFFER:]) + net.places_out


class Contest:
    """A network and a batch that lies in memory."""

    def __init__(self, width: int, depth: int, heads: int, pictures: int):
        facts = {"width": width, "depth": depth, "heads": heads, "text_width": TEXT_WIDTH, "head_depth": 3}
        self.network = TokenTransformer(length=LENGTH, channels=CHANNELS, **facts)
        self.halves = EncoderDecoder(self.network)
        self.name, self.pictures = f"{width} x {depth}", pictures
        self.places, self.keys = torch.arange(pictures), Keys(0)
        self.tokens = torch.randn(pictures, LENGTH, CHANNELS)
        self.text = torch.randn(pictures, WORDS, TEXT_WIDTH)
        self.real = torch.arange(WORDS) < torch.randint(8, WORDS + 1, (pictures, 1))

    def masks(self, transformer: str, law: str) -> tuple[Tensor, int]:
        """Masks bool [B, L], and the rows of a head that runs on masked tokens alone."""
        if transformer == "one stack":
            own = MaskLaw(law, math.gcd(32, self.pictures))  # type: ignore[arg-type]
            return own.masks(self.keys, self.places, LENGTH), own.rows(self.pictures, LENGTH)
        count = math.ceil(MOMENTS[law][0] * LENGTH)
        return ranked(self.keys.words("mask", self.places, LENGTH)) < count, count * self.pictures

    def step(self, transformer: str, law: str, head: str) -> tuple[Tensor, int]:
        """Forward and backward pass: the loss, a mean over masked tokens, and their number."""
        masked, bound = self.masks(transformer, law)
        text = self.network.align(self.text, self.real)
        if transformer == "one stack":
            z = self.network(self.tokens, text, ~masked)
        else:
            z = self.halves(self.tokens, text, ~masked, LENGTH - bound // self.pictures)
        u = self.keys.uniform("t", self.places, (LENGTH, COPIES)).flatten(0, 1)
        noise = self.keys.normal("eps", self.places, (LENGTH, COPIES, CHANNELS)).flatten(0, 1)
        z, target = z.flatten(0, 1), self.tokens.flatten(0, 1)
        if head == "masked tokens":
            rows, weight = masked_rows(~masked, bound)
            total = self.network.loss(z[rows], target[rows], u[rows], noise[rows]).total.mean(1)
        else:
            many = (x.repeat_interleave(COPIES, 0) for x in (z, target))
            total = self.network.loss(*many, u.view(-1, 1), noise.view(-1, 1, CHANNELS)).total.view(-1, COPIES).mean(1)
            weight = masked.flatten().float()
        loss = (total * weight).sum() / weight.sum()
        loss.backward()
        return loss.detach(), int(masked.sum())


def lines(contest: Contest, turns: int) -> list[list[Any]]:
    """The table of one contest."""
    counts: list[tuple[float, int]] = []
    for way in WAYS:
        with FlopCounterMode(display=False) as counter:
            _, masked = contest.step(*way)
        counts.append((counter.get_total_flops() / 1e9, masked))
    seconds: list[list[float]] = [[] for _ in WAYS]
    for _ in range(turns):
        for kept, way in zip(seconds, WAYS, strict=True):
            start = time.process_time()
            contest.step(*way)
            kept.append(time.process_time() - start)
            contest.halves.zero_grad()
    rows: list[list[Any]] = []
    for way, own, (flops, masked) in zip(WAYS, seconds, counts, strict=True):
        middle = statistics.median(own)
        gain = statistics.median(a / b for a, b in zip(seconds[-1], own, strict=True))
        rates = [flops / middle, masked / middle, gain, gain * masked / counts[-1][1]]
        rows.append([contest.name, contest.pictures, *way, masked, flops, middle, *rates, turns])
    return rows


def measure(quick: bool = False) -> dict[str, Any]:
    """Our training step against an encoder-decoder's."""
    quiet()
    sizes = [((32, 2, 2, 4), 1)] if quick else [((128, 4, 4, 32), 7), ((384, 8, 6, 16), 3)]
    rows = [row for size, turns in sizes for row in lines(Contest(*size), turns)]
    title = "A training step of Fluid against an encoder-decoder's"
    return {"title": title, "tables": [{"columns": COLUMNS, "rows": rows}]}
