"""RepBlend: an iteration that matches heads alone against one that matches a whole encoder, as LoRS does.

    python -m benchmarks --only repblend

Both have M = 99 pairs, T = 8 inner steps of b = 20, and the truncated gradient of lightning_t2i/trajectory_matching.py.
The encoder is a ViT-S/16 at 112 pixels of random weights (22 M parameters, 1.1 GMAC a picture); texts have 768 numbers.
"heads" encodes each picture once and takes one gradient to pixels; "most" keeps the activations of 66 pictures and
encodes the others again on the way back, 16 at a time; "chunks" all of them. "encoder" differentiates all of the
encoder's weights twice in every inner step.

Operations and bytes at the peak (of tensors alive beyond the weights) are counted on tensors without data, by an
allocator that watches every operation (lightning_t2i/preflight/allocator.py). Times are the processor's, of one thread.
Bytes of an expert are counted from shapes: eleven snapshots of both trained branches, NFNet-L0 and BERT's vectors.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import normalize

from lightning_t2i.blending import Blending, Plan
from lightning_t2i.cli.session import quiet
from lightning_t2i.keys import Keys
from lightning_t2i.networks.frozen_pair import encoded
from lightning_t2i.networks.nfnet import NFNet
from lightning_t2i.networks.projection import Branches, Head, Student, each
from lightning_t2i.preflight.allocator import Allocator
from lightning_t2i.soft_contrast import similarity, wbce
from lightning_t2i.trajectory_matching import Segment, tesla

WAYS = ("encoder", "heads", "most", "chunks")
TEXT, CHUNK, RANK, ALPHA, TEMPERATURE = 768, 16, 10, 3.0, 0.07


class Vision(nn.Module):
    """A ViT of random weights: pictures -> vectors [B, width]."""

    def __init__(self, width: int, layers: int, heads: int, size: int):
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModel

        self.width, self.size = width, size
        config = CLIPVisionConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads,
            image_size=size, patch_size=16, hidden_act="gelu",
        )  # fmt: skip
        self.network = CLIPVisionModel(config)

    def attend(self, way: str) -> None:
        """Attention by "sdpa", or "eager", which can be differentiated twice."""
        self.network.set_attn_implementation(way)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.network(pixels).pooler_output


class Contest:
    """One iteration in each way.

    Args:
        vision: arguments of `Vision`; pairs, steps, batch: M, T, b.
    """

    def __init__(self, vision: tuple[int, int, int, int], pairs: int, steps: int, batch: int):
        self.encoder = Vision(*vision)
        self.pairs, self.steps, self.batch = pairs, steps, batch
        self.student = Student.of(self.encoder.width, TEXT)
        keys, places = Keys(0), torch.arange(pairs)
        self.plan = Plan.draw(keys, "x", pairs, steps, batch, Blending())
        self.pixels = keys.normal("pixels", places[:, None].flatten(), (3, vision[3], vision[3]))
        factors = (torch.ones(pairs), keys.normal("left", places, (RANK,)), torch.zeros(pairs, RANK))
        self.rest = [keys.normal("texts", places, (TEXT,)), *factors]
        self.rates = torch.full((2,), 0.1)
        heads = each(lambda w: w[0], self.student.initial(keys, torch.tensor([0])))
        self.shapes = {name: p.shape for name, p in self.encoder.named_parameters()}
        whole = torch.cat([p.detach().flatten() for p in self.encoder.parameters()])
        self.starts = {"heads": heads, "encoder": (whole, heads[1])}

    def iteration(self, way: str) -> list[Tensor]:
        """Gradients to pixels, texts and factors."""
        if way == "encoder":
            return self.whole()
        return self.heads(None if way == "heads" else CHUNK, 2 * self.pairs // 3 if way == "most" else 0)

    def _segment(self, kind: str) -> Segment:
        start = self.starts[kind]
        return Segment((start[0], start[1]), (start[0] + 1e-3, start[1] + 1e-3))

    def heads(self, chunk: int | None, kept: int) -> list[Tensor]:
        self.encoder.requires_grad_(False).attend("sdpa")
        pixels = self.pixels.clone().requires_grad_()
        features = encoded(self.encoder, pixels[self.plan.used], chunk, kept)
        leaves = [t.detach().requires_grad_() for t in (features, *self.rest)]

        def step(k: int, theta: Branches) -> Tensor:
            rows = self.plan.rows[k]
            x, y = self.plan.mixed(k, leaves[0][self.plan.place[rows]], leaves[1][rows], Blending())
            logits = self.student.logits(theta, x, y)
            return wbce(logits, similarity(tuple(leaves[2:]), ALPHA, rows))

        found = tesla(step, leaves, self.rates, self._segment("heads"), self.steps).gradients
        (gradient,) = torch.autograd.grad((features * found[0]).sum(), pixels)
        return [gradient, *found[1:]]

    def whole(self) -> list[Tensor]:
        self.encoder.attend("eager")
        leaves = [t.clone().requires_grad_() for t in (self.pixels, *self.rest)]

        def step(k: int, theta: Branches) -> Tensor:
            rows = self.plan.rows[k]
            parts = theta[0].split([shape.numel() for shape in self.shapes.values()])
            named = {n: p.view(s) for p, (n, s) in zip(parts, self.shapes.items(), strict=True)}
            x = normalize(torch.func.functional_call(self.encoder, named, (leaves[0][rows],)), dim=-1)
            logits = x @ self.student.text(theta[1], leaves[1][rows]).T / TEMPERATURE
            return wbce(logits, similarity(tuple(leaves[2:]), ALPHA, rows))

        return tesla(step, leaves, self.rates, self._segment("encoder"), self.steps).gradients


def counted(make: Callable[[], Contest], way: str) -> tuple[float, int]:
    """Operations and bytes at the peak of an iteration beyond what is there before it, on tensors without data."""
    contest = make()
    with ExitStack() as stack:
        mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        contest.encoder = _fake(contest.encoder, mode)
        contest.pixels, contest.rates = mode.from_tensor(contest.pixels), mode.from_tensor(contest.rates)
        contest.rest = [mode.from_tensor(t) for t in contest.rest]
        contest.starts = {k: (mode.from_tensor(a), mode.from_tensor(b)) for k, (a, b) in contest.starts.items()}
        with Allocator() as allocator:
            kept = contest.iteration(way)
    del kept
    return float(allocator.total), allocator.peak


def _fake(network: Vision, mode: FakeTensorMode) -> Vision:
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(mode.from_tensor(parameter.detach()))
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else mode.from_tensor(buffer)
    return network


def storage() -> list[list[Any]]:
    """Bytes of eleven snapshots in float32, at the shapes of the papers."""
    with torch.device("meta"):
        encoder = sum(p.numel() for p in NFNet().parameters())
    text = Head(TEXT, NFNet.width).numel
    sizes = {"encoder": encoder + text, "heads": Head(NFNet.width, NFNet.width).numel + text}
    return [[way, 11 * 4 * n / 2**30, sizes[way] / sizes["encoder"]] for way, n in sizes.items()]


def contest_rows(make: Callable[[], Contest], turns: int) -> list[list[Any]]:
    contest = make()
    spent: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(turns):
        for way in WAYS:
            start = time.process_time()
            contest.iteration(way)
            spent[way].append(time.process_time() - start)
    bills = {way: counted(make, way) for way in WAYS}
    rows = []
    for way in WAYS:
        gain = statistics.median(a / b for a, b in zip(spent["encoder"], spent[way], strict=True))
        operations, peak = bills[way]
        rows.append([way, statistics.median(spent[way]), gain, operations / 1e9, bills["encoder"][0] / operations,
                     peak / 1e6, peak / bills["encoder"][1], turns])  # fmt: skip
    return rows


def measure(quick: bool = False) -> dict[str, Any]:
    """The tables."""
    quiet()
    torch.manual_seed(0)

    def make() -> Contest:
        return Contest((32, 2, 2, 32), 10, 2, 4) if quick else Contest((384, 12, 6, 112), 99, 8, 20)

    columns = [["matched", ""], ["CPU s", ".2f"], ["encoder's time / this", ".1f"], ["Gflop", ".1f"]]
    columns += [["encoder's / this", ".1f"], ["peak MB", ".0f"], ["this / encoder's", ".2f"], ["turns", "d"]]
    return {
        "title": "An iteration of RepBlend",
        "tables": [
            {"columns": columns, "rows": contest_rows(make, 1 if quick else 2)},
            {"columns": [["matched", ""], ["GiB of an expert", ".2f"], ["share", ".2f"]], "rows": storage()},
        ],
    }
