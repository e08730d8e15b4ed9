"""Small data sets written with the real shard writer, and streams that read them without a Trainer."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from datamodules.shards import ShardWriter
from datamodules.streams import Streams
from lightning_t2i.counters import Counters


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def gradient(i: int, height: int = 8, width: int = 8) -> np.ndarray:
    """A picture that tells its sample (red), its rows (green) and its columns (blue)."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = i
    pixels[..., 1] = np.arange(height)[:, None]
    pixels[..., 2] = np.arange(width)
    return pixels


def write_data_set(
    folder: Path,
    n: int = 50,
    bad: Sequence[int] = (),
    width: int = 8,
    captions: Callable[[int], dict] | None = None,
    splits: Sequence[str] = ("train",),
    samples_per_shard: int = 20,
    first: int = 0,
    size: Callable[[int], tuple[int, int]] | None = None,
) -> Path:
    """Writes a data set named as its folder; label and scene hold the row, pictures tell `first` + row.

    `size` gives the width and height of each picture.
    """
    folder.mkdir(exist_ok=True)
    for split in splits:
        with ShardWriter(folder, split, samples_per_shard) as writer:
            for i in range(n):
                caption = captions(i) if captions else {"en": [f"{i} a", f"{i} b"], "zh": [f"{i} 中"]}
                across, down = size(i) if size else (width, 8)
                picture = b"no picture" if i in bad else png(gradient(first + i, down, across))
                writer.write(f"k{i:04d}", picture, "png", {"caption": caption, "label": i, "scene": {"row": i}})
    about = {"name": folder.name, "splits": dict.fromkeys(splits, n)}
    (folder / "dataset.json").write_text(json.dumps(about))
    return folder


def as_rank(data: Streams, rank: int = 0, world: int = 1, batches: int = 0) -> Streams:
    """Attaches what Streams asks of a Trainer."""
    data.trainer = SimpleNamespace(
        global_rank=rank,
        world_size=world,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
        lightning_module=SimpleNamespace(counters=Counters(batches=batches)),
    )
    data.prepare_data()
    data.setup("fit")
    return data
