"""Token-wise similarity: our tiled loss against a dense one, in memory and time; retrieval's memory and time.

    python -m benchmarks --only similarity

"dense" is one einsum of all cosines, masked, and amax both ways, with autograd; "tiled" is
lightning_t2i/processes/similarity.py. Both give the loss of both directions and all gradients, in float32.

Bytes "kept" are what autograd saves between forward and backward, features left out, which both keep. Bytes at the peak
are those of tensors alive in forward and backward beyond features and their gradients, followed by an allocator that
watches every operation (lightning_t2i/preflight/allocator.py). For the large sizes bytes are counted on tensors without
data, one direction of 128 pictures against 4,096 texts. Times are the processor's, of one thread, medians.

Retrieval is the search of lightning_t2i/metrics/retrieval.py, both ways at once. Its temporary bytes are those at the
peak beyond features; the bound (`bound`) does not grow with the product of pictures and texts: 30,000 pictures of 49
tokens and 5,000 texts have 38 MB.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_t2i.cli.session import quiet
from lightning_t2i.metrics.retrieval import BLOCK, search
from lightning_t2i.preflight.allocator import Allocator
from lightning_t2i.processes.similarity import TILE, contrastive_loss, token_similarity

WAYS = ("dense", "tiled")
TOKENS, WIDTH = 32, 256


def dense(images: Tensor, texts: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """sI [b, B] and sT [B, b] with all cosines at once."""
    cosines = torch.einsum("ikd,jrd->ikjr", images, texts)
    there = cosines.masked_fill(~mask, -torch.inf).amax(3).mean(1)
    best = cosines.amax(1) * mask
    return there, (best.sum(2) / mask.sum(1)).T


def tiled(images: Tensor, texts: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    there, back = token_similarity(images, texts, None, mask, back=True)
    assert back is not None
    return there, back


FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {"dense": dense, "tiled": tiled}


def features(b: int, many: int, n: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Unit tokens of b pictures and `many` texts, and a mask of 10 to 32 tokens."""
    images = normalize(torch.randn(b, n, WIDTH, device=device), dim=-1).requires_grad_()
    texts = normalize(torch.randn(many, TOKENS, WIDTH, device=device), dim=-1).requires_grad_()
    lengths = 10 + torch.arange(many, device=device) * 7 % (TOKENS - 9)
    return images, texts, torch.arange(TOKENS, device=device) < lengths[:, None]


def kept(way: str, b: int, many: int, n: int, device: str = "meta") -> int:
    """Bytes that autograd saves, without the features."""
    images, texts, mask = features(b, many, n, device)
    own = {t.untyped_storage()._cdata for t in (images, texts)} if device != "meta" else set()
    sizes = {images.shape, texts.shape, images.flatten(0, 1).shape, texts.flatten(0, 1).shape}
    total: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape not in sizes and tensor.untyped_storage()._cdata not in own:
            total[tensor.untyped_storage()._cdata] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = FUNCTIONS[way](images, texts, mask)
    del found
    return sum(total.values())


def step(way: str, b: int, many: int, n: int) -> None:
    images, texts, mask = features(b, many, n)
    there, back = FUNCTIONS[way](images, texts, mask)
    rows = there[:, :b], back[:b]
    contrastive_loss(rows[0], rows[1], torch.tensor(20.0)).backward()


def peak(function: Callable[[], Any], held: int) -> int:
    """Bytes alive at the worst moment of a call beyond `held`."""
    with Allocator() as allocator:
        found = function()
    del found
    return max(allocator.peak - held, 0)


def seconds(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def loss_rows(sizes: list[tuple[int, int, int]], turns: int) -> list[list[Any]]:
    rows: list[list[Any]] = []
    for b, many, n in sizes:
        held = 2 * 4 * WIDTH * (b * n + many * TOKENS)  # features and their gradients
        steps = {way: partial(step, way, b, many, n) for way in WAYS}
        saved = {way: kept(way, b, many, n) for way in WAYS}
        peaks = {way: peak(steps[way], held) for way in WAYS}
        spent: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(turns):
            for way in WAYS:
                spent[way].append(seconds(steps[way]))
        times = {way: statistics.median(spent[way]) for way in WAYS}
        gain = statistics.median(a / c for a, c in zip(spent["dense"], spent["tiled"], strict=True))
        for way in WAYS:
            rows.append([b, many, n, way, saved[way] / 1e6, saved["dense"] / saved[way], peaks[way] / 1e6,
                         peaks["dense"] / peaks[way], times[way], gain if way == "tiled" else 1.0, turns])  # fmt: skip
    return rows


def large_rows(sizes: list[tuple[int, int, int]]) -> list[list[Any]]:
    """Bytes that are kept at sizes that no table of times could hold."""
    rows = []
    for b, many, n in sizes:
        found = {way: kept(way, b, many, n) for way in WAYS}
        rows += [[b, many, n, way, found[way] / 1e9, found["dense"] / found[way]] for way in WAYS]
    return rows


def both_ways(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """sI and sT of unit tokens, those of y with zeros for pads."""
    there, back = token_similarity(x, y, None, y.abs().amax(-1) > 0, back=True)
    assert back is not None
    return there, back


def bound(pictures: int, texts: int, n: int) -> int:
    """Bytes that a search needs at most beyond features: cosines of a tile, two blocks of texts, the best of each."""
    cosines = 3 * max(TILE["cpu"], BLOCK * n * TOKENS)
    return 4 * (cosines + 2 * BLOCK * TOKENS * WIDTH) + 240 * (pictures + texts)


def retrieval_rows(sizes: list[tuple[int, int, int]]) -> list[list[Any]]:
    """Temporary bytes, their bound and seconds of a search."""
    rows = []
    for pictures, texts, n in sizes:
        images, words, mask = features(pictures, texts, n)
        images, words = images.detach(), words.detach() * mask[..., None]
        find = partial(search, both_ways, images, words)
        held = 4 * (images.numel() + words.numel())
        rows.append([pictures, texts, n, peak(find, held) / 1e6, bound(pictures, texts, n) / 1e6, seconds(find)])
    return rows


def measure(quick: bool = False) -> dict[str, Any]:
    """The tables."""
    quiet()
    torch.manual_seed(0)
    size = [["pictures", "d"], ["texts", "d"], ["tokens of a picture", "d"]]
    columns = [*size, ["loss", ""], ["kept MB", ".2f"], ["dense / this", ".1f"], ["peak MB", ".1f"]]
    columns += [["dense / this, peak", ".1f"], ["CPU s", ".3f"], ["dense's time / this", ".2f"], ["turns", "d"]]
    found = loss_rows([(8, 16, 4)] if quick else [(64, 512, 49), (64, 512, 12)], 1 if quick else 5)
    large = large_rows([(8, 16, 4)] if quick else [(128, 4096, 256), (128, 4096, 49), (128, 4096, 24)])
    searched = retrieval_rows([(20, 10, 4)] if quick else [(3000, 500, 12), (1000, 1000, 12), (1000, 1000, 49)])
    return {
        "title": "Token-wise similarity",
        "tables": [
            {"columns": columns, "rows": found},
            {"columns": [*size, ["loss", ""], ["kept GB", ".3f"], ["dense / this", ".1f"]], "rows": large},
            {"columns": [*size, ["temporary MB", ".1f"], ["bound MB", ".1f"], ["CPU s", ".2f"]], "rows": searched},
        ],
    }
