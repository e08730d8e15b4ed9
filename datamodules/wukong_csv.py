"""Chooses pairs of Wukong's lists (url, caption) by the paper's rules (arXiv 2202.06767, section 3), before download.

    python -m datamodules.wukong_csv OUT.csv wukong_100m_*.csv [--sensitive WORDS.txt] [--names NAMES.txt]

    characters   one Chinese character at least, fewer than 32
    file name    captions such as "000.jpg" say nothing
    frequency    captions of more than 10 pictures are boilerplate ("view the source page"); counted in a first pass
    sensitive    captions with a word of a list of yours are left out
    query        at most 1,000 pairs of a query, where the lists have that column
    size         what a list says of width and height: 200 pixels at least, aspect ratio at most 3

Names of a list of yours become <人名>. OUT.csv has the columns key, url, caption; the key is a hash of the URL, so that
no row number ever decides which caption belongs to which picture. What each rule dropped is printed.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from datamodules.pack_tables import lines_of, read_text
from lightning_t2i.errors import UserError

CHINESE = re.compile("[\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f]")
FILE_NAME = re.compile(r"\S+\.(jpe?g|png|gif|bmp|webp|tiff?)", re.IGNORECASE)
NAME = "<人名>"
MOST_CHARACTERS, MOST_PICTURES, MOST_OF_QUERY = 32, 10, 1000
SMALLEST, WIDEST = 200, 3.0  # pixels of the shorter side; aspect ratio


def chinese_characters(text: str) -> int:
    return len(CHINESE.findall(text))


def is_file_name(text: str) -> bool:
    return FILE_NAME.fullmatch(text.strip()) is not None


def size_is_right(width: int, height: int) -> bool:
    """Whether both sides have 200 pixels and the longer one is at most three times the shorter."""
    return min(width, height) >= SMALLEST and max(width, height) <= WIDEST * min(width, height)


def replace_names(text: str, names: Iterable[str]) -> str:
    """Every name that occurs becomes the special string, the longest first."""
    for name in sorted(names, key=len, reverse=True):
        text = text.replace(name, NAME)
    return text


def key_of(url: str) -> str:
    """The key of a pair: 16 hex digits of its URL's hash."""
    return hashlib.blake2b(url.encode(), digest_size=8).hexdigest()


@dataclass
class Rules:
    """Which pairs stay; `dropped` counts what each rule left out.

    frequency: how often each caption occurs in all lists; sensitive: words that no caption may have; names: person
    names; count_of: how often a query was seen so far.
    """

    frequency: Mapping[str, int] = field(default_factory=dict)
    sensitive: Sequence[str] = ()
    names: Sequence[str] = ()
    dropped: Counter[str] = field(default_factory=Counter)
    count_of: Counter[str] = field(default_factory=Counter)

    def broken(self, row: Mapping[str, str]) -> str | None:
        """The first rule that a row breaks, None if it stays."""
        caption, query = row["caption"], row.get("query", "")
        checks: list[tuple[str, Callable[[], bool]]] = [
            ("characters", lambda: 1 <= chinese_characters(caption) < MOST_CHARACTERS),
            ("file name", lambda: not is_file_name(caption)),
            ("frequency", lambda: self.frequency.get(digest(caption), 0) <= MOST_PICTURES),
            ("sensitive", lambda: not any(word in caption for word in self.sensitive)),
            ("size", lambda: not row.get("width") or size_is_right(int(row["width"]), int(row["height"]))),
            ("query", lambda: not query or self.count_of[query] < MOST_OF_QUERY),
        ]
        return next((name for name, holds in checks if not holds()), None)

    def kept(self, rows: Iterable[Mapping[str, str]]) -> Iterator[dict[str, str]]:
        """key, url and caption of the rows that stay, each URL once."""
        seen: set[str] = set()
        for row in rows:
            key = key_of(row["url"])
            rule = "url" if key in seen else self.broken(row)
            if rule is not None:
                self.dropped[rule] += 1
                continue
            seen.add(key)
            self.count_of[row.get("query", "")] += 1
            yield {"key": key, "url": row["url"], "caption": replace_names(row["caption"], self.names)}


def digest(caption: str) -> str:
    """Eight bytes in place of a caption: 100 M of them fit in memory."""
    return hashlib.blake2b(caption.strip().encode(), digest_size=8).digest().decode("latin-1")


def read(files: Sequence[Path]) -> Iterator[dict[str, str]]:
    """The rows of all lists, with stripped captions.

    Raises:
        UserError: a list is missing, or lacks a column.
    """
    for file in files:
        if not file.is_file():
            raise UserError("No such list", where="LIST", given=file)
        with file.open(encoding="utf-8", newline="") as stream:
            table = csv.DictReader(stream)
            if missing := {"url", "caption"} - set(table.fieldnames or ()):
                raise UserError("A list lacks a column", where=str(file), given=sorted(missing), allowed="url, caption")
            for row in table:
                yield {**row, "caption": (row["caption"] or "").strip()}


def frequencies(rows: Iterable[Mapping[str, str]]) -> dict[str, int]:
    """How often each caption occurs, by its digest; those that occur once are left out."""
    count = Counter(digest(row["caption"]) for row in rows)
    return {key: n for key, n in count.items() if n > 1}


def choose(out: Path, files: Sequence[Path], sensitive: Sequence[str] = (), names: Sequence[str] = ()) -> Rules:
    """Writes the chosen pairs of the lists to `out`, which appears whole, in two passes.

    Returns:
        The rules with their counts.
    """
    rules = Rules(frequencies(tqdm(read(files), desc="count", unit="row")), sensitive, names)
    part = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with part.open("w", encoding="utf-8", newline="") as stream:
            table = csv.DictWriter(stream, ("key", "url", "caption"))
            table.writeheader()
            table.writerows(rules.kept(tqdm(read(files), desc="choose", unit="row")))
        os.replace(part, out)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return rules


def _words(file: Path | None) -> list[str]:
    if file is None:
        return []
    return [word for line in lines_of(read_text(file)) if (word := line.strip())]


def main(arguments: Sequence[str] | None = None) -> int:
    about = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser("python -m datamodules.wukong_csv", description=about)
    parser.add_argument("out", type=Path, metavar="OUT", help="the CSV file to write")
    parser.add_argument("lists", type=Path, nargs="+", metavar="LIST", help="CSV files with url and caption")
    parser.add_argument("--sensitive", type=Path, metavar="FILE", help="words, one a line, that no caption may have")
    parser.add_argument("--names", type=Path, metavar="FILE", help="person names, one a line, to be replaced")
    options = parser.parse_args(arguments)
    try:
        rules = choose(options.out, options.lists, _words(options.sensitive), _words(options.names))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    lost = ", ".join(f"{name} {count:,}" for name, count in rules.dropped.most_common()) or "nothing"
    print(f"{rules.count_of.total():,} pairs in {options.out}; left out: {lost}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
