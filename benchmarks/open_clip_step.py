"""Wukong's style g against open_clip with equal towers: the loss alone, and a training step.

    pip install -e ".[full]" && python -m benchmarks --only open_clip_step

Both have the tiny Wukong's towers (ViT of patches of 8 pixels, causal text tower that is read at [SEP]; width 96, three
layers) with their own layers, random weights, equal numbers of parameters up to the tokens' table of positions, equal
inputs, AdamW with equal options. "loss" is that of features alone, forward and backward. Times are the processor's, of
one thread; contestants take turns, ratios are medians of the turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_t2i.cli.session import quiet
from lightning_t2i.errors import UserError
from lightning_t2i.networks.dual_encoder import DualEncoder
from lightning_t2i.networks.image_tower import ImageTower
from lightning_t2i.networks.load import build_network, read_architecture
from lightning_t2i.processes.similarity import contrastive_loss, strips

IMAGE, TEXT, WIDTH = "configs/networks/tiny_wukong_image.json", "configs/networks/tiny_wukong_text.json", 64
COLUMNS = [["what", ""], ["pairs", "d"], ["ours, CPU s", ".4f"], ["open_clip, CPU s", ".4f"],
           ["open_clip / ours", ".2f"], ["parameters, ours", ",d"], ["open_clip", ",d"], ["turns", "d"]]  # fmt: skip


def theirs() -> Any:
    """open_clip's model of the same sizes.

    Raises:
        UserError: open_clip is not installed.
    """
    try:
        from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    except ImportError as error:
        raise UserError("open_clip is needed", where="open_clip_step", fix='pip install -e ".[full]"') from error
    image, text = read_architecture(IMAGE), read_architecture(TEXT)
    width, heads = image["hidden_size"], image["num_attention_heads"]
    ratio = image["intermediate_size"] / width
    vision = CLIPVisionCfg(
        layers=image["num_hidden_layers"],
        width=width,
        head_width=width // heads,
        mlp_ratio=ratio,
        patch_size=image["patch_size"],
        image_size=image["image_size"],
    )
    words = CLIPTextCfg(
        context_length=text["max_position_embeddings"],
        vocab_size=text["vocab_size"],
        width=text["hidden_size"],
        heads=text["num_attention_heads"],
        layers=text["num_hidden_layers"],
        mlp_ratio=text["intermediate_size"] / text["hidden_size"],
        pool_type="eos",
        eos_id=text["eos_token_id"],
    )
    return CLIP(WIDTH, vision, words, quick_gelu=True)


class Ours(torch.nn.Module):
    """Image tower and dual encoder of style g, both trained."""

    def __init__(self) -> None:
        super().__init__()
        self.image = ImageTower.build(IMAGE, tokens=False)
        self.towers = DualEncoder(build_network(TEXT), self.image.width, WIDTH, tokens=False)

    def loss(self, pictures: Tensor, ids: Tensor) -> Tensor:
        images, texts, mask, scale, _ = self.towers(self.image(pictures), ids)
        return own_loss(images[:, 0], texts[:, 0], scale.mean(), mask)


def own_loss(images: Tensor, texts: Tensor, scale: Tensor, mask: Tensor | None = None) -> Tensor:
    """Of unit vectors [B, D]."""
    valid = torch.ones(len(texts), 1, dtype=torch.bool) if mask is None else mask
    return contrastive_loss(*strips(images[:, None], texts[:, None], valid), scale)


def their_loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    from open_clip.loss import ClipLoss

    found: Tensor = ClipLoss()(images, texts, scale)
    return found


def inputs(pairs: int) -> tuple[Tensor, Tensor]:
    """Pictures, and ids of texts of 5 to 20 tokens."""
    ids = torch.randint(200, 20_000, (pairs, 20))
    lengths = 5 + torch.arange(pairs) * 7 % 16
    place = torch.arange(20)
    ids[place >= lengths[:, None]] = 0
    ids[torch.arange(pairs), lengths - 1] = 102
    return torch.rand(pairs, 3, 32, 32) * 2 - 1, ids


def loss_of_theirs(network: Any, pictures: Tensor, ids: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(ids, (0, network.context_length - ids.shape[1]))  # it takes one length alone
    return their_loss(*network(pictures, padded))


def seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def alternate(ours: Callable[[], Any], other: Callable[[], Any], turns: int) -> tuple[float, float, float]:
    """Median seconds of both, and the median of the ratios of the turns."""
    ours(), other()
    pairs = [(seconds(ours), seconds(other)) for _ in range(turns)]
    a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
    return a, b, statistics.median(y / x for x, y in pairs)


def of_losses(pairs: int, turns: int) -> tuple[float, float, float]:
    x, y = (normalize(torch.randn(pairs, 256), dim=-1).requires_grad_() for _ in range(2))
    scale = torch.tensor(20.0)
    torch.testing.assert_close(own_loss(x, y, scale), their_loss(x, y, scale), rtol=1e-5, atol=1e-5)
    return alternate(lambda: own_loss(x, y, scale).backward(), lambda: their_loss(x, y, scale).backward(), turns)


def of_steps(pairs: int, turns: int) -> tuple[tuple[float, float, float], list[int]]:
    ours, other, (pictures, ids) = Ours(), theirs(), inputs(pairs)
    losses = {ours: lambda: ours.loss(pictures, ids), other: lambda: loss_of_theirs(other, pictures, ids)}
    runs: list[Callable[[], Any]] = []
    for network, loss in losses.items():
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)

        def step(loss: Callable[[], Tensor] = loss, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad(set_to_none=True)
            loss().backward()
            optimizer.step()

        runs.append(step)
    return alternate(runs[0], runs[1], turns), [sum(p.numel() for p in network.parameters()) for network in losses]


def measure(quick: bool = False) -> dict[str, Any]:
    """The table."""
    quiet()
    turns = 2 if quick else 15
    rows: list[list[Any]] = []
    for pairs in (16,) if quick else (64, 512):
        rows.append(["loss", pairs, *of_losses(pairs, turns), None, None, turns])
    for pairs in (8,) if quick else (64, 128):
        found, sizes = of_steps(pairs, turns)
        rows.append(["training step", pairs, *found, *sizes, turns])
    return {"title": "Wukong's style g against open_clip", "tables": [{"columns": COLUMNS, "rows": rows}]}
