"""Decodes the bytes of pictures, saying of those that cannot be decoded that the sample is bad, and cuts squares."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from datamodules.upright import UNDECODED, loaded


class BadSample(Exception):
    """A sample whose bytes cannot be turned into a picture and its captions; the message says why."""


def decode(data: bytes, size: int | None = None) -> Image.Image:
    """The picture in RGB, upright as its EXIF says; transparent pixels become white.

    Args:
        data: an encoded picture.
        size: the shorter side that is needed, see `datamodules.records.Shards.picture`.

    Raises:
        BadSample: it cannot be decoded to its end, or has numbers of no known range.
    """
    try:
        opened = Image.open(io.BytesIO(data))
        if size is not None:
            opened.draft("RGB", (2 * size, 2 * size))
        image = loaded(opened)
        if image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except UnidentifiedImageError as error:
        raise BadSample("picture: unknown format") from error
    except UNDECODED as error:
        raise BadSample(f"picture: {error}") from error


def cut(image: Image.Image, size: tuple[int, int], where: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """Cuts the largest part of a shape out of an RGB picture and resizes it (bicubic, antialiased): uint8 [H, W, 3].

    Args:
        image: RGB picture.
        size: width and height in pixels.
        where: horizontal and vertical place of the cut in [0, 1]; (0.5, 0.5) is the centre.
    """
    (width, height), (w, h) = image.size, size
    # What is larger than the shape is cut; of a square the shorter side is left.
    across, down = (width, _rounded(width * h, w)) if width * h < height * w else (_rounded(height * w, h), height)
    left, top = int(where[0] * (width - across) + 0.5), int(where[1] * (height - down) + 0.5)
    pixels = np.array(image)[top : top + down, left : left + across]
    if (across, down) == size:
        return pixels
    # torch's uint8 kernel is the same filter as Pillow's resize (they differ by at most 2 of 255) in half the time.
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(planes, (h, w), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _rounded(numerator: int, denominator: int) -> int:
    return max(1, (2 * numerator + denominator) // (2 * denominator))


def square(image: Image.Image, size: int, where: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """The largest square of a picture (see `cut`) with sides of `size` pixels: uint8 [size, size, 3]."""
    return cut(image, (size, size), where)


def to_images(pixels: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).to(torch.float32).div_(127.5).sub_(1)
