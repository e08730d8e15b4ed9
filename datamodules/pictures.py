"""Decodes the bytes of a picture, and says of those that cannot be decoded that the sample is bad."""

from __future__ import annotations

import io

from PIL import Image, UnidentifiedImageError


class BadSample(Exception):
    """A sample whose bytes cannot be turned into a picture and its captions; the message says why."""


def decode(data: bytes, size: int | None = None) -> Image.Image:
    """The picture in RGB; transparent pixels become white.

    Args:
        data: an encoded picture.
        size: the shorter side that is needed, see `datamodules.records.Shards.picture`.

    Raises:
        BadSample: it cannot be decoded to its end.
    """
    try:
        image = Image.open(io.BytesIO(data))
        if size is not None:
            image.draft("RGB", (2 * size, 2 * size))
        image.load()
    except UnidentifiedImageError as error:
        raise BadSample("picture: unknown format") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow's decoders raise
        raise BadSample(f"picture: {error}") from error
    if image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")
