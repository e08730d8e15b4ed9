"""Pictures of shapes scenes: palette, coverage masks, rendering, and PNG bytes that no library version changes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (225, 35, 35),
    "green": (40, 165, 60),
    "blue": (40, 70, 225),
    "yellow": (250, 225, 50),
    "orange": (245, 130, 20),
    "purple": (140, 40, 175),
    "cyan": (50, 205, 225),
    "pink": (250, 140, 195),
}
BACKGROUNDS = {"white": (250, 250, 250), "grey": (115, 115, 115), "black": (15, 15, 15)}
SIDE = 32
LEVELS = 64  # of coverage: 8 x 8 points in a pixel


@cache
def coverage(shape: str, size: int) -> np.ndarray:
    """How much of each pixel a shape covers that fills a box: int [size, size], 0 to LEVELS."""
    at = (np.arange(8 * size) + 0.5) / (8 * size) - 0.5
    x, y = at[None, :], at[:, None]
    inside = {
        "circle": x * x + y * y <= 0.25,
        "square": np.ones((8 * size, 8 * size), bool),
        "triangle": np.abs(x) <= (y + 0.5) / 2,
        "cross": (np.abs(x) <= 1 / 6) | (np.abs(y) <= 1 / 6),
    }[shape]
    return inside.reshape(size, 8, size, 8).sum((1, 3))


def render(scene: Mapping[str, Any]) -> np.ndarray:
    """The picture of a scene, uint8 [32, 32, 3]; integer arithmetic, so the same everywhere."""
    pixels: np.ndarray = np.empty((SIDE, SIDE, 3), np.int64)
    pixels[:] = BACKGROUNDS[scene["background"]]
    for item in scene["objects"]:
        x0, y0, x1, y1 = item["box"]
        mask = coverage(item["shape"], x1 - x0)[..., None]
        under = pixels[y0:y1, x0:x1]
        colour = np.array(COLOURS[item["colour"]])
        pixels[y0:y1, x0:x1] = (under * (LEVELS - mask) + colour * mask + LEVELS // 2) // LEVELS
    return pixels.astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    """PNG bytes of uint8 [H, W, 3], at most 21,000 pixels, stored without compression.

    Compressors differ between builds of zlib, and with them the bytes; tar's padding costs more than they would save.
    """
    height, width, _ = pixels.shape
    raw = np.pad(pixels.reshape(height, width * 3), ((0, 0), (1, 0))).tobytes()  # each row starts with filter 0
    stored = b"\x78\x01\x01" + struct.pack("<HH", len(raw), len(raw) ^ 0xFFFF) + raw
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", stored + struct.pack(">I", zlib.adler32(raw))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
