"""What Pillow leaves to do before a picture is as it was meant: it turns as EXIF says, and 16 bits become 8."""

from __future__ import annotations

import struct

import numpy as np
from PIL import ExifTags, Image

# What Pillow raises for broken bytes (of AVIF, BLP and DDS a RuntimeError), and what it catches of its own readers.
UNDECODED = (
    *(OSError, ValueError, SyntaxError, RuntimeError, LookupError, TypeError, struct.error),
    Image.DecompressionBombError,
)
SIDEWAYS = {
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TURNS = {  # EXIF's number -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    **SIDEWAYS,
}


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How a picture that is opened, but not loaded, has to be turned."""
    if image.format == "TIFF":  # Pillow turns it, and its size
        return None
    try:
        # Not the PNG's own getexif, which decodes it for what may stand behind the pixels: headers are asked for sizes.
        return TURNS.get(Image.Image.getexif(image).get(ExifTags.Base.Orientation))
    except UNDECODED:  # broken EXIF says nothing
        return None


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height that `loaded` gives a picture that is opened, from its header alone."""
    width, height = image.size
    return (height, width) if _turn(image) in SIDEWAYS.values() else (width, height)


def loaded(image: Image.Image) -> Image.Image:
    """The picture that is opened, decoded to its end, upright, with 8 bits a channel.

    `ImageOps.exif_transpose` copies pictures that are upright, and writes EXIF anew, which fails where it is broken.

    Raises:
        ValueError: its numbers have no known black and white.
        one of `UNDECODED`: what Pillow says of its bytes.
    """
    turn = _turn(image)
    image.load()
    return _eight_bits(image if turn is None else image.transpose(turn))


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow's own conversion cuts numbers off at 255: 16 bits became white, fractions black."""
    if image.mode == "F":
        raise ValueError("numbers with fractions, of which black and white are not known")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() >= 1 << 16:
        raise ValueError("numbers beyond 16 bits, of which black and white are not known")
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    clear = image.info.get("transparency")
    if clear is not None:
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey
