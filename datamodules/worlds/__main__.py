"""Writes the embedded worlds and shows samples of them: `python -m datamodules.worlds [NAME ...] [--sheet FILE]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from datamodules.records import Shards
from datamodules.worlds import NAMES, ensure
from lightning_t2i.errors import UserError

COLUMNS, ROWS = 6, 2  # samples of each world on the sheet
ZOOM, CELL, TEXT, LINE = 4, 200, 56, 13  # pixels: times a picture's side, cell width, room for captions, line height


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


def sheet(folders: Sequence[Path]) -> Image.Image:
    """Training samples of data sets, evenly spaced, each with the last of its English captions, which tells most."""
    font = ImageFont.load_default(11)
    height = 32 * ZOOM + TEXT
    page = Image.new("RGB", (COLUMNS * CELL, len(folders) * ROWS * height), "white")
    draw = ImageDraw.Draw(page)
    for number, folder in enumerate(folders):
        shards = Shards(folder, "train", ["en"])
        for place in range(COLUMNS * ROWS):
            row = place * len(shards) // (COLUMNS * ROWS)
            x = place % COLUMNS * CELL
            y = (number * ROWS + place // COLUMNS) * height + 8
            picture = shards.picture(row).resize((32 * ZOOM, 32 * ZOOM), Image.Resampling.NEAREST)
            page.paste(picture, (x + (CELL - 32 * ZOOM) // 2, y))
            for line, text in enumerate(wrapped(shards.meta(row)["caption"]["en"][-1], font, CELL - 16)):
                at = (x + CELL / 2, y + 32 * ZOOM + 4 + line * LINE)
                draw.text(at, text, fill="black", font=font, anchor="ma")
    return page


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m datamodules.worlds", description=(__doc__ or "").split(":")[0] + ".")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="draw some samples with captions into this PNG file")
    options = parser.parse_args(arguments)
    try:
        folders = [ensure(name) for name in options.names or NAMES]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.sheet:
        sheet(folders).save(options.sheet)
    print("\n".join(map(str, folders)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
