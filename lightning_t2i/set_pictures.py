"""Pictures of a synthetic set: its pairs with the real captions nearest to them, and where both modalities lie."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from lightning_t2i.pictures import to_pil

SIDE, LETTERS, LINES = 96, 32, 2  # pixels of a drawn picture; letters of a line below it, and lines


def draw_pairs(images: Tensor, captions: Sequence[Sequence[str]], columns: int = 5) -> Image.Image:
    """A sheet of pictures [M, 3, H, W] with the first caption of each below it."""
    width, height = 2 * SIDE + 16, SIDE + 16 + 14 * LINES
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, picture in enumerate(to_pil(images.clamp(-1, 1))):
        left, top = i % columns * width + 8, i // columns * height
        sheet.paste(picture.resize((SIDE, SIDE), Image.Resampling.NEAREST), (left + SIDE // 2, top + 4))
        lines = textwrap.wrap(captions[i][0], LETTERS, max_lines=LINES, placeholder=" ...") if captions else []
        pen.text((left, top + SIDE + 8), "\n".join(lines), fill="black")
    return sheet


def flattened(points: Tensor) -> Tensor:
    """The first two principal components [N, 2] of points [N, D]."""
    centred = points - points.mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    return centred @ axes[:2].T


def draw_embeddings(sets: dict[str, tuple[Tensor, Tensor]], file: Path) -> None:
    """Pictures and texts of several sets, unit vectors [M, D] each, in the two principal directions of all of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(sets), figsize=(4 * len(sets), 4), sharex=True, sharey=True, squeeze=False)
    places = flattened(torch.cat([z for pair in sets.values() for z in pair])).tolist()
    for axis, (title, pair) in zip(axes[0], sets.items(), strict=True):
        for name, z, marker in zip(("pictures", "texts"), pair, "o^", strict=True):
            own, places = places[: len(z)], places[len(z) :]
            axis.scatter(*zip(*own, strict=True), s=12, marker=marker, label=name)
        axis.set_title(title)
        axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    pyplot.close(figure)
