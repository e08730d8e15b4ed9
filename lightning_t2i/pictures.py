"""Pictures as people see them: tensors to 8-bit images, and grids of them with their texts."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

MARGIN = 8
LINE = 16
CHARACTER = 7  # width of a line's average character, pixels
INK = (32, 32, 32)


def to_pil(images: Tensor) -> list[Image.Image]:
    """[B, 3, H, W] or [B, 1, H, W] in [-1, 1] (values outside are clipped) -> B pictures."""
    pixels = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu().permute(0, 2, 3, 1)
    return [Image.fromarray(p) for p in np.ascontiguousarray(pixels.expand(-1, -1, -1, 3))]


def can_draw(text: str) -> bool:
    """Whether the font that comes with Pillow has all the letters; it knows Latin scripts only."""
    return all(ord(letter) < 0x250 for letter in text)


def draw_grid(
    rows: Sequence[Sequence[Image.Image]], texts: Sequence[str], titles: Sequence[str], least: int = 96
) -> Image.Image:
    """One row of pictures for each text, the text at the left, column titles above.

    Args:
        rows: equally long, pictures of one size.
        texts: one a row; a text that the font lacks letters for is replaced by its number.
        titles: one a column; the empty string draws nothing.
        least: pictures smaller than this many pixels are enlarged by whole factors, without smoothing.
    """
    font = ImageFont.load_default(12)
    width, height = rows[0][0].size
    factor = max(1, -(-least // height))
    width, height = width * factor, height * factor
    text_width = 24 * CHARACTER
    left, top = text_width + 2 * MARGIN, LINE + MARGIN if any(titles) else MARGIN
    size = (left + len(rows[0]) * (width + MARGIN), top + len(rows) * (height + MARGIN))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        draw.text((left + column * (width + MARGIN), MARGIN // 2), title, INK, font)
    for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
        y = top + number * (height + MARGIN)
        shown = text if can_draw(text) else f"prompt {number + 1}"
        lines = textwrap.wrap(shown, text_width // CHARACTER)[: height // LINE]
        draw.multiline_text((MARGIN, y), "\n".join(lines), INK, font)
        for column, image in enumerate(row):
            enlarged = image.resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (left + column * (width + MARGIN), y))
    return canvas


def wrapped(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """`text` in lines of at most `width` pixels."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def contact_sheet(
    images: Sequence[Image.Image], texts: Sequence[str], columns: int = 6, side: int = 128, room: int = 4
) -> Image.Image:
    """Pictures of any sizes in rows, each with its text below it.

    Args:
        images: shown whole, their longer side `side` pixels; smaller ones are enlarged by whole factors.
        texts: one a picture, cut to `room` lines.
        columns: pictures of a row.
        side: pixels of the square that a picture has.
        room: lines of text below it.
    """
    font, line, cell = ImageFont.load_default(11), 13, side + 72
    height = side + room * line + 4
    page = Image.new("RGB", (columns * cell, -(-len(images) // columns) * height), "white")
    draw = ImageDraw.Draw(page)
    for number, (image, text) in enumerate(zip(images, texts, strict=True)):
        x, y = number % columns * cell, number // columns * height + 8
        image = _fitted(image, side)
        page.paste(image, (x + (cell - image.width) // 2, y))
        for i, words in enumerate(wrapped(text, font, cell - 16)[:room]):
            draw.text((x + cell / 2, y + side + 4 + i * line), words, fill="black", font=font, anchor="ma")
    return page


def _fitted(image: Image.Image, side: int) -> Image.Image:
    longer = max(image.size)
    if longer <= side:
        factor = side // longer
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    width, height = (max(1, round(length * side / longer)) for length in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def save_png(image: Image.Image, path: Path, **texts: str) -> None:
    """Writes a PNG that readers see whole or not at all; `texts` are kept in the file, in any script."""
    notes = PngInfo()
    for name, text in texts.items():
        notes.add_itxt(name, text)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    image.save(temporary, "PNG", pnginfo=notes)
    temporary.replace(path)
