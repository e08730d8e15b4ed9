"""Writes the embedded worlds and shows samples of them: `python -m datamodules.worlds [NAME ...] [--sheet FILE]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from datamodules.records import Shards
from datamodules.worlds import NAMES, ensure
from lightning_t2i.errors import UserError
from lightning_t2i.pictures import contact_sheet

COLUMNS, ROWS = 6, 2  # samples of each world on the sheet


def sheet(folders: Sequence[Path]) -> Image.Image:
    """Training samples of data sets, evenly spaced, each with the last of its English captions, which tells most."""
    pictures, texts = [], []
    for folder in folders:
        shards = Shards(folder, "train", ["en"])
        for place in range(COLUMNS * ROWS):
            row = place * len(shards) // (COLUMNS * ROWS)
            pictures.append(shards.picture(row))
            texts.append(shards.meta(row)["caption"]["en"][-1])
    return contact_sheet(pictures, texts, COLUMNS)


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
