"""Pictures that look the same, also after another compression or size: difference hashes, confirmed by thumbnails."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

BANDS = 8  # of 8 bits: two hashes that differ in fewer bits than there are bands have a band in common
NEAR = BANDS - 1  # bits
SIDE = 16  # pixels of a thumbnail
CLOSE = 32  # of 255: most that any pixel of two thumbnails differs


def difference_hash(image: Image.Image) -> int:
    """64 bits of an RGB picture: where its 8 rows of 9 grey levels get lighter from left to right."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    bits = grey[:, 1:] > grey[:, :-1] + 1  # of even areas the noise does not count
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def thumbnail(image: Image.Image) -> np.ndarray:
    """int16 [16, 16, 3] of an RGB picture."""
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), np.int16)


def duplicates(hashes: Sequence[int], thumbnails: Sequence[np.ndarray]) -> list[list[int]]:
    """Groups of two and more pictures that look the same as the group's first, by their places in the sequences."""
    values, small = np.array(hashes, np.uint64), np.array(thumbnails).reshape(len(thumbnails), SIDE * SIDE * 3)
    groups: dict[int, list[int]] = {}
    known: dict[tuple[int, int], list[int]] = {}  # (band, its bits) -> first pictures of groups
    for i, value in enumerate(hashes):
        bands = [(band, value >> 8 * band & 255) for band in range(BANDS)]
        firsts = np.unique(np.array([first for band in bands for first in known.get(band, ())], np.int64))
        firsts = firsts[np.bitwise_count(values[firsts] ^ values[i]) <= NEAR]
        firsts = firsts[np.abs(small[firsts] - small[i]).max(axis=1, initial=0) <= CLOSE]
        if len(firsts):
            groups[int(firsts[0])].append(i)
            continue
        groups[i] = [i]
        for band in bands:
            known.setdefault(band, []).append(i)
    return [group for group in groups.values() if len(group) > 1]
