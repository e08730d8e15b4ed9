"""Shows what a data set holds: `python -m datamodules.look URL_OR_FOLDER_OR_WORLD`.

Prints counts, captions and their lengths, languages, sizes, classes, pictures that look the same and pictures that
cannot be read, and draws a contact sheet. Reads data-set folders, embedded worlds, tars where they lie, and folders
that could be packed.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from datamodules.duplicates import difference_hash, duplicates, thumbnail
from datamodules.left_out import listed
from datamodules.look_sources import Seen, open_source
from datamodules.pictures import BadSample, decode
from datamodules.shards import picture_size
from datamodules.wukong_csv import chinese_characters
from lightning_t2i.errors import UserError
from lightning_t2i.pictures import can_draw, contact_sheet

SHOWN = 24  # pictures of the contact sheet
SIDE = 128  # pixels that they have there


@dataclass
class Look:
    """What was seen of the samples that were looked at."""

    samples: int = 0
    lengths: dict[str, list[int]] = field(default_factory=dict)  # by language, characters of every caption
    pictures: Counter[str] = field(default_factory=Counter)  # by language
    silent: int = 0  # without a caption
    chinese: Counter[str] = field(default_factory=Counter)  # captions with Chinese characters, by language
    sizes: list[tuple[int, int]] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    labels: Counter[int] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)
    names: list[tuple[str, str]] = field(default_factory=list)  # split and key of readable pictures
    hashes: list[int] = field(default_factory=list)
    thumbnails: list[np.ndarray] = field(default_factory=list)
    shown: list[tuple[Image.Image, str]] = field(default_factory=list)

    def add(self, seen: Seen, show: bool) -> None:
        """Adds a sample; `show` puts it on the contact sheet."""
        self.samples += 1
        self.silent += not seen.captions
        for language, texts in seen.captions.items():
            self.pictures[language] += 1
            self.lengths.setdefault(language, []).extend(map(len, texts))
            self.chinese[language] += sum(chinese_characters(text) > 0 for text in texts)
        if isinstance(seen.label, int):
            self.labels[seen.label] += 1
        try:
            image = decode(seen.data, SIDE)
        except BadSample as reason:
            self.unreadable.append(f"{seen.key}: {reason}")
            return
        self.sizes.append(picture_size(seen.data))
        self.formats[seen.ext] += 1
        self.names.append((seen.split, seen.key))
        self.hashes.append(difference_hash(image))
        self.thumbnails.append(thumbnail(image))
        if show:
            image.thumbnail((SIDE, SIDE))
            texts = [text for texts in seen.captions.values() for text in texts if can_draw(text)]
            self.shown.append((image, texts[0] if texts else seen.key))

    def lines(self) -> Iterator[str]:
        """For the terminal."""
        for language, lengths in self.lengths.items():
            yield f"captions    {language}: {len(lengths):,} of {self.pictures[language]:,} pictures"
            yield f"            {_spread(lengths)} characters"
            foreign = self.chinese[language] if language != "zh" else len(lengths) - self.chinese[language]
            if foreign:
                yield f"            {foreign:,} {'without' if language == 'zh' else 'with'} Chinese characters"
        if self.silent:
            yield f"            {self.silent:,} pictures without any"
        if self.sizes:
            sides, aspects = [min(size) for size in self.sizes], [w / max(h, 1) for w, h in self.sizes]
            yield f"size        shorter side {_spread(sides)} pixels"
            yield f"            width / height {_spread(aspects)}"
            yield f"format      {', '.join(f'{ext} {n:,}' for ext, n in self.formats.most_common())}"
        if self.labels:
            yield f"classes     {len(self.labels):,}, labels {min(self.labels)} to {max(self.labels)}"
            yield f"            {_spread(self.labels.values())} pictures of a class"
        yield from self._duplicates()
        if self.unreadable:
            yield f"unreadable  {listed(self.unreadable, 5)}"

    def _duplicates(self) -> Iterator[str]:
        groups = [[self.names[i] for i in group] for group in duplicates(self.hashes, self.thumbnails)]
        across = sum(len({split for split, _ in group}) > 1 for group in groups)
        copies = sum(len(group) - 1 for group in groups)
        yield f"duplicates  {copies:,} look as another picture does; {len(groups):,} groups, {across:,} over splits"
        for group in groups[:5]:
            names = ["/".join(filter(None, name)) for name in group]
            yield f"            {' = '.join(names[:4])}{' = ...' if names[4:] else ''}"


def _spread(values: Iterable[float]) -> str:
    """Least, median, 95th percentile and most."""
    least, half, most95, most = (f"{v:.4g}" for v in np.quantile(list(values), (0, 0.5, 0.95, 1)))
    return least if least == most else f"{least} to {most}, median {half}, 95 % at most {most95}"


def look(source: str, samples: int, language: str) -> tuple[str, Look]:
    """How many samples there are, as a line, and what was seen of at most so many of them, evenly spaced.

    Raises:
        UserError: nothing is there that can be looked at.
    """
    if samples < 1:
        raise UserError("Nothing to look at", where="--samples", given=samples, allowed=">= 1")
    opened = open_source(source, samples, language)
    found, step = Look(), max(1, opened.chosen // SHOWN)
    for number, seen in enumerate(tqdm(opened.samples, total=opened.chosen, desc="look", unit="picture")):
        found.add(seen, number % step == 0 and len(found.shown) < SHOWN)
    return f"{opened.counts}; looked at {found.samples:,}", found


def main(arguments: Sequence[str] | None = None) -> int:
    about, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser("python -m datamodules.look", description=about, epilog=details)
    parser.add_argument("source", metavar="URL_OR_FOLDER_OR_WORLD")
    parser.add_argument("--samples", type=int, default=2000, help="to look at, at most (default: %(default)s)")
    parser.add_argument("--language", default="en", help="of captions that do not say theirs (default: %(default)s)")
    parser.add_argument("--sheet", type=Path, default=Path("look.png"), help="contact sheet (default: %(default)s)")
    given = parser.parse_args(arguments)
    try:
        counts, found = look(given.source, given.samples, given.language)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join([f"{given.source}: {counts}", *found.lines()]))
    if found.shown:
        given.sheet.parent.mkdir(parents=True, exist_ok=True)
        images, texts = zip(*found.shown, strict=True)
        contact_sheet(images, texts, side=SIDE).save(given.sheet)
        print(f"sheet       {given.sheet}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
