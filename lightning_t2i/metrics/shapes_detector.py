"""Finds the objects of shapes pictures by rule: nearest palette colour, connected components, template match.

    background   the background colour nearest to most pixels
    components   4-connected pixels of one nearest palette colour that contain CORE inner pixels, so that the rings of
                 mixed colour around other objects are none
    coverage     a(p) = <p - g, c - g> / |c - g|^2, clipped to [0, 1], in the component and its rim
    shape        of the template t, over shapes, sides and places, with the greatest 2 <a, t> / (<a, a> + <t, t>)

A true scene is found exactly, also under Gaussian noise of 24 grey levels or a Gaussian blur of 0.7 pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from scipy import ndimage
from torch import Tensor

from datamodules.worlds.shapes_draw import BACKGROUNDS, COLOURS, LEVELS, SHAPES, SIDE, coverage
from datamodules.worlds.shapes_scenes import fulfils

CORE = 3  # inner pixels of an object: all four neighbours belong to its component
MATCH = 0.8  # least agreement with the best template; what agrees less is no object
FAR = 100.0  # greatest distance of an object's mean colour from the palette, of 441
SIDES = range(6, 16)  # of templates; true sides are 9 and 12
WINDOW = 20  # pixels around a component that templates are laid on

NAMES = tuple(COLOURS)
GROUNDS = np.array(list(BACKGROUNDS.values()), np.float32)
PALETTE = np.array(list(COLOURS.values()), np.float32)
CROSS = ndimage.generate_binary_structure(2, 1)


@cache
def templates() -> tuple[np.ndarray, np.ndarray, list[tuple[str, int, int, int]]]:
    """Masks [n, WINDOW^2] in [0, 1], their squared norms [n], and shape, side and corner of each in the window."""
    masks, kinds = [], []
    for side in SIDES:
        middle = (WINDOW - side) // 2
        for shape in SHAPES:
            for x in range(middle - 1, middle + 3):
                for y in range(middle - 1, middle + 3):
                    mask: np.ndarray = np.zeros((WINDOW, WINDOW), np.float32)
                    mask[y : y + side, x : x + side] = coverage(shape, side) / LEVELS
                    masks.append(mask.ravel())
                    kinds.append((shape, side, x, y))
    stack = np.stack(masks)
    return stack, np.square(stack).sum(1), kinds


def distances(picture: np.ndarray) -> np.ndarray:
    """Squared distances of pixels [..., 3] from the background colours: [..., 3]."""
    found: np.ndarray = np.square(picture[..., None, :] - GROUNDS).sum(-1)
    return found


def commonest(to_grounds: np.ndarray) -> int:
    """The background colour nearest to most pixels."""
    return int(np.bincount(to_grounds.argmin(-1).ravel(), minlength=len(GROUNDS)).argmax())


def backgrounds(images: Tensor) -> np.ndarray:
    """Which of BACKGROUNDS each picture [B, 3, 32, 32] in [-1, 1] has: int [B]."""
    return np.array([commonest(distances(picture)) for picture in to_pixels(images)])


def detect(pixels: np.ndarray) -> list[dict[str, Any]]:
    """Objects of a picture, uint8 or float [32, 32, 3] in 0..255: {shape, colour, box, area, match}, largest first.

    `box` is that of the best template, `area` its covered pixels, `match` the agreement in [0, 1].
    """
    picture: np.ndarray = pixels.astype(np.float32)
    to_grounds = distances(picture)
    ground = commonest(to_grounds)
    to_palette = np.square(picture[..., None, :] - PALETTE).sum(-1)
    nearest = np.where(to_grounds.min(-1) < to_palette.min(-1), -1, to_palette.argmin(-1))
    found = []
    for colour in np.unique(nearest[nearest >= 0]):
        pieces, n = ndimage.label(nearest == colour, CROSS)
        inner = ndimage.binary_erosion(nearest == colour, CROSS)
        cores = np.bincount(pieces[inner], minlength=n + 1)
        for piece in range(1, n + 1):
            if cores[piece] >= CORE:
                found.append(match(picture, pieces == piece, int(colour), GROUNDS[ground]))
    return sorted((item for item in found if item is not None), key=lambda item: -item["area"])


def match(picture: np.ndarray, piece: np.ndarray, colour: int, ground: np.ndarray) -> dict[str, Any] | None:
    """What a component [32, 32] shows, or None when no shape fits or its colour is far from the palette's."""
    if np.linalg.norm(picture[ndimage.binary_erosion(piece, CROSS)].mean(0) - PALETTE[colour]) > FAR:
        return None
    direction = PALETTE[colour] - ground
    alpha = np.clip((picture - ground) @ direction / (direction @ direction), 0, 1)
    alpha *= ndimage.binary_dilation(piece, CROSS)
    rows, columns = np.flatnonzero(piece.any(1)), np.flatnonzero(piece.any(0))
    # The window's middle is the component's; the border of WINDOW pixels lets it leave the picture.
    top = (rows[0] + rows[-1] + 1) // 2 - WINDOW // 2
    left = (columns[0] + columns[-1] + 1) // 2 - WINDOW // 2
    window = np.pad(alpha, WINDOW)[top + WINDOW : top + 2 * WINDOW, left + WINDOW : left + 2 * WINDOW].ravel()
    masks, norms, kinds = templates()
    agreement = 2 * (masks @ window) / (norms + window @ window)
    best = int(agreement.argmax())
    if agreement[best] < MATCH:
        return None
    shape, side, x, y = kinds[best]
    box = [int(left + x), int(top + y), int(left + x + side), int(top + y + side)]
    area = float(masks[best].sum())
    return {"shape": shape, "colour": NAMES[colour], "box": box, "area": area, "match": float(agreement[best])}


def to_pixels(images: Tensor) -> np.ndarray:
    """Pictures [B, 3, 32, 32] in [-1, 1] -> float32 [B, 32, 32, 3] in 0..255; what is out of range is clipped."""
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, SIDE, SIDE):
        raise ValueError(f"pictures of the shapes world are [B, 3, {SIDE}, {SIDE}], not {list(images.shape)}")
    scaled = (images.detach().float().clamp(-1, 1) + 1) * 127.5
    return scaled.permute(0, 2, 3, 1).cpu().numpy()


def satisfied(images: Tensor, scenes: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Whether each picture [B, 3, 32, 32] in [-1, 1] shows what its scene's prompt asks for: bool [B]."""
    return np.array([fulfils(detect(p), scene) for p, scene in zip(to_pixels(images), scenes, strict=True)], bool)
