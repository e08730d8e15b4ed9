"""Packs pictures with captions into a data-set folder: `python -m datamodules.pack FOLDER OUT`.

FOLDER holds pictures, or parquet files or tars that hold them, or is one such file. The pictures' own bytes are kept
(other kinds than jpg, png and webp become png). Samples are written in the order of their hashed keys, so that
neighbours in a shard are a random sample. The same folder gives the same bytes, and OUT appears whole or not at all;
the same command after a kill goes on with the shards that are missing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from datamodules.left_out import LeftOut, listed, spelled
from datamodules.pack_shards import PIECES, Job, Sample, join, make_shards
from datamodules.pack_sources import Place, Told, add_classes, find_pictures, read_captions
from datamodules.pack_stored import archives, find_stored
from datamodules.pack_tables import KINDS, tables_in
from datamodules.shards import TYPES, build, finish
from lightning_t2i.errors import UserError

SPLIT_NAME = re.compile(r"[A-Za-z0-9_]+")
KEY_BYTES = 90
ABSENT, UNNAMED = "no picture", "its name is not UTF-8"
UNMENTIONED, ARCHIVE, LONE = "not in the annotations", "archive beside loose pictures", "text beside no picture"
HARMLESS = (UNMENTIONED, ARCHIVE, LONE)  # left out without --skip-bad
SKIP = "mend them, or leave them out with --skip-bad"


def key_of(name: str) -> str:
    """A sample's key from the picture's relative path: without suffix, dots and slashes, at most 90 bytes."""
    key = re.sub(r"[./\\\s]+", "_", name.rsplit(".", 1)[0])
    if len(key.encode()) > KEY_BYTES:
        end = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
        key = f"{key.encode()[: KEY_BYTES - 17].decode(errors='ignore')}-{end}"
    return key


def place_of(key: str) -> float:
    """The place of a key in [0, 1), which decides its order and, unless it is told, its split."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64


@dataclass
class Plan:
    """The pictures to pack by name, what is left out, and the names of classes where they are known."""

    places: dict[str, Place]
    told: dict[str, Told]
    left_out: LeftOut
    classes: list[str] = field(default_factory=list)


def pack(
    folder: Path,
    out: Path,
    *,
    captions: Path | None = None,
    default_caption: str | None = None,
    class_folders: bool = False,
    class_names: Path | None = None,
    language: str = "en",
    name: str | None = None,
    licence: str = "unknown",
    val: float = 0.05,
    test: float = 0.05,
    samples_per_shard: int = 1000,
    workers: int = 1,
    skip_bad: bool = False,
) -> Path:
    """Writes the data-set folder `out` and returns it.

    Args:
        folder: pictures, in folders as you like, or parquet files or tars with pictures.
        out: a new folder.
        captions: file that names pictures and captions; None looks in `folder` for one and else takes a .txt or .json
            beside each picture.
        default_caption: of pictures that have none.
        class_folders: pictures lie in FOLDER/CLASS or FOLDER/SPLIT/CLASS, see `datamodules.pack_sources.add_classes`.
        class_names: the same, with names and order of the classes.
        language: that of captions which do not say theirs.
        name: of the data set; None takes the folder's. Sample ids depend on it.
        licence: of the pictures, recorded in dataset.json.
        val, test: shares of the pictures that do not say their split.
        samples_per_shard: pictures of a shard.
        workers: processes.
        skip_bad: leave out pictures without caption or that cannot be read, and rows without picture.

    report.json in `out` counts and names what was left out, by reason; `dataset.json` counts it.

    Raises:
        UserError: no pictures, no captions, bad pictures (without `skip_bad`), two with one key, or `out` exists.
    """
    if (out / "dataset.json").is_file():
        raise UserError("A data set lies there already", where="OUT", given=out, fix="name a new folder")
    if min(val, test) < 0 or val + test >= 1:
        raise UserError("Shares of splits leave nothing to train on", where="--val, --test", given=f"{val}, {test}")
    if samples_per_shard < 1:
        raise UserError("A shard needs a sample", where="--samples-per-shard", given=samples_per_shard)
    found = find(folder, captions, language, class_folders, class_names)
    choose(found, folder, language, default_caption, skip_bad)
    jobs = plan_shards(found, val, test, samples_per_shard)
    about = {"language": language, "val": val, "test": test, "samples_per_shard": samples_per_shard}

    def write(part: Path) -> None:
        undecoded = make_shards(part, jobs, workers)
        indices = join(part, jobs, about)
        if (undecoded and not skip_bad) or not indices:
            fix = f"{SKIP}; the shards that are made are kept in {part}"
            raise UserError("Pictures that cannot be read", where=str(folder), given=listed(undecoded), fix=fix)
        found.left_out.add("cannot be decoded", undecoded)
        splits = {split: len(index) for split, index in indices.items()}
        facts = {"packed": splits, "skipped": found.left_out.facts}
        (part / "report.json").write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        more = {"skipped": len(found.left_out), **({"classes": found.classes} if found.classes else {})}
        own = folder.resolve().name if folder.is_dir() else folder.stem
        finish(part, name or own, indices, licence, about, **more)

    build(out, write, goes_on=True)
    shutil.rmtree(out / PIECES, ignore_errors=True)
    return out


def find(
    folder: Path, captions: Path | None, language: str, class_folders: bool = False, class_names: Path | None = None
) -> Plan:
    """The pictures of a folder or file and what is told of them, which may have no captions; arguments as of `pack`.

    Raises:
        UserError: no such folder, no picture in it, or captions or classes that cannot be understood.
    """
    if not folder.exists():
        raise UserError("No such folder", where="FOLDER", given=folder)
    places, texts = find_pictures(folder) if folder.is_dir() else ({}, [])
    left_out, classes = LeftOut(), []
    if places:
        left_out.add(ARCHIVE, [path.relative_to(folder).as_posix() for some in archives(folder) for path in some])
        left_out.add(LONE, texts if captions is None and not tables_in(folder) else [])
        told = read_captions(folder, places, captions, language)
        if class_folders or class_names is not None:
            classes = add_classes(told, places, class_names, language)
    else:
        stored = find_stored(folder, language)
        places, told, left_out, classes = stored.places, stored.told, stored.left_out, stored.classes
        for option, given in (("--captions", captions), ("--class-folders", class_folders or class_names)):
            if places and given:
                fix = f"leave {option} out, or unpack them first"
                raise UserError("Parquet files and tars say themselves what is in them", where=option, fix=fix)
    if not places:
        allowed = "jpg, png, webp and all else that Pillow opens, or .parquet or .tar files that hold pictures"
        raise UserError("No pictures in the folder or below it", where="FOLDER", given=folder, allowed=allowed)
    left_out.add(ABSENT, sorted(set(told) - set(places)))
    left_out.add(UNNAMED, [picture for picture in places if spelled(picture) != picture])
    places = {picture: place for picture, place in places.items() if spelled(picture) == picture}
    if captions is not None and captions.suffix == ".json":  # which pictures belong to the set is what it says
        left_out.add(UNMENTIONED, [picture for picture in places if picture not in told])
        places = {picture: place for picture, place in places.items() if picture in told}
    return Plan(places, {picture: told.get(picture, Told()) for picture in places}, left_out, classes)


def choose(found: Plan, folder: Path, language: str, default_caption: str | None, skip_bad: bool) -> None:
    """Leaves out pictures without a caption; errors are those of `pack`."""
    for reason, of in found.left_out.facts.items():
        if reason not in HARMLESS and not skip_bad:
            what = "Captions of pictures that are not there" if reason == ABSENT else f"Not to be packed: {reason}"
            raise UserError(what, where=str(folder), given=listed(of["names"]), fix=SKIP)
    silent = [picture for picture, told in found.told.items() if not told.captions]
    if default_caption is not None:
        for picture in silent:
            found.told[picture].add(language, [default_caption])
        silent = silent if not default_caption.strip() else []
    if len(silent) == len(found.told):
        kinds = "a jsonl, csv or parquet file with the fields file_name and caption, or a .txt beside each picture"
        fix = "--default-caption TEXT where no captions are needed, --class-folders where folders are classes"
        given = f"{len(silent)} pictures"
        raise UserError("No picture has a caption", where=str(folder), given=given, allowed=kinds, fix=fix)
    if silent and not skip_bad:
        fix = f"{SKIP}, or give them one with --default-caption"
        raise UserError("Pictures without a caption", where=str(folder), given=listed(silent), fix=fix)
    found.left_out.add("no caption", silent)
    for picture in silent:
        del found.places[picture], found.told[picture]


def plan_shards(found: Plan, val: float, test: float, samples_per_shard: int) -> list[Job]:
    """The shards to make, each with its samples in their order.

    Raises:
        UserError: two pictures get one key, or a split has no name.
    """
    owners: dict[str, str] = {}
    for picture in found.places:
        first = owners.setdefault(key_of(picture), picture)
        if first != picture:
            given = f"{first} and {picture} are both {key_of(picture)}"
            raise UserError("Two pictures have the same key", given=given, fix="rename one of them")
    numbers = {n for told in found.told.values() for n, v in told.more.items() if isinstance(v, bool | int | float)}
    numbers = {name for name in numbers if name not in TYPES and not name.startswith("caption_")}
    splits: dict[str, list[Sample]] = {}
    for key, picture in sorted(owners.items(), key=lambda item: order_of(item[0], item[1], found.places[item[1]])):
        told = found.told[picture]
        meta = {**told.more, "caption": told.captions, "file": picture}
        columns = {name: _number(told.more.get(name)) for name in sorted(numbers)}
        columns["caption_length"] = max(len(text) for texts in told.captions.values() for text in texts)
        sample = Sample(key, found.places[picture], meta, columns)
        splits.setdefault(split_of(key, told, val, test), []).append(sample)
    return [
        Job(split, number, tuple(samples[first : first + samples_per_shard]))
        for split, samples in sorted(splits.items())
        for number, first in enumerate(range(0, len(samples), samples_per_shard))
    ]


def _number(value: object) -> float:
    return float(value) if isinstance(value, bool | int | float) else float("nan")


def order_of(key: str, picture: str, place: Place) -> tuple[float, float, str]:
    """Order of samples: by the hashed key; rows of a parquet file stay in their row group, which is read as a whole."""
    group = place_of(f"{PurePosixPath(picture).parent}/{place.group}") if place.group >= 0 else 0.0
    return group, place_of(key), key


def split_of(key: str, told: Told, val: float, test: float) -> str:
    """The split that was told, else one by the hashed key, which does not change when pictures are added."""
    if told.split is None:
        # Not the place that orders the samples, of which a split would be one end.
        place = place_of(f"split/{key}")
        return "val" if place < val else "test" if place < val + test else "train"
    if not SPLIT_NAME.fullmatch(told.split):
        raise UserError("Not a name of a split", where=key, given=told.split, allowed="letters, digits and _")
    return told.split


def describe(out: Path) -> list[str]:
    """What a data-set folder made by `pack` holds and what was left out, as lines for the terminal."""
    about = json.loads((out / "dataset.json").read_text(encoding="utf-8"))
    counts = ", ".join(f"{split} {n:,}" for split, n in about["splits"].items())
    classes = f"; {len(about['classes']):,} classes" if "classes" in about else ""
    left_out = LeftOut()
    for reason, of in json.loads((out / "report.json").read_text(encoding="utf-8"))["skipped"].items():
        left_out.add(reason, of["names"])
    return [f"{out}: {counts}{classes}; train on it with `source: {out}`", *left_out.lines(out / "report.json")]


def main(arguments: Sequence[str] | None = None) -> int:
    about, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser("python -m datamodules.pack", description=about, epilog=details)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="pictures, or parquet files or tars of pictures")
    parser.add_argument("out", type=Path, metavar="OUT", help="the data-set folder to write, a new one")
    parser.add_argument("--captions", type=Path, metavar="FILE", help=f"{', '.join(KINDS)} (default: found in FOLDER)")
    parser.add_argument("--default-caption", metavar="TEXT", help="of pictures that have none")
    parser.add_argument("--class-folders", action="store_true", help="pictures lie in CLASS/ or SPLIT/CLASS/")
    parser.add_argument("--class-names", type=Path, metavar="FILE", help="lines 'CLASS name, name' in label order")
    parser.add_argument("--language", default="en", help="of captions that do not say theirs (default: %(default)s)")
    parser.add_argument("--name", help="of the data set (default: the folder's)")
    parser.add_argument("--licence", default="unknown", help="of the pictures (default: %(default)s)")
    parser.add_argument("--val", type=float, default=0.05, help="share for validation (default: %(default)s)")
    parser.add_argument("--test", type=float, default=0.05, help="share for tests (default: %(default)s)")
    parser.add_argument("--samples-per-shard", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out what has no caption or cannot be read")
    options = vars(parser.parse_args(arguments))
    try:
        out = pack(options.pop("folder"), options.pop("out"), **options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(describe(out)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
