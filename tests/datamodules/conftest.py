"""Small data sets written with the real shard writer."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.shards import ShardWriter


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


@pytest.fixture
def make_data_set(tmp_path: Path) -> Callable[..., Path]:
    """make_data_set(n, bad=(), width=8, captions=None, splits=("train",)) -> folder; label and scene hold the row."""

    def make(n: int = 50, bad=(), width: int = 8, captions=None, splits=("train",), name: str = "toy") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for split in splits:
            writer = ShardWriter(folder, split, samples_per_shard=20)
            for i in range(n):
                caption = captions(i) if captions else {"en": [f"{i} a", f"{i} b"], "zh": [f"{i} 中"]}
                picture = b"no picture" if i in bad else png(gradient(i, width=width))
                writer.write(f"k{i:04d}", picture, "png", {"caption": caption, "label": i, "scene": {"row": i}})
            writer.close()
        (folder / "dataset.json").write_text(json.dumps({"name": name, "splits": dict.fromkeys(splits, n)}))
        return folder

    return make
