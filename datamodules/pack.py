"""Packs a folder of pictures with captions into a data-set folder: `python -m datamodules.pack FOLDER OUT`.

The pictures' own bytes are kept (bmp, gif and tiff become png). Samples are written in the order of their hashed keys,
so that neighbours in a shard are a random sample. The same folder gives the same bytes, and OUT appears whole or not
at all.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from datamodules.pack_sources import Told, find_pictures, read_captions
from datamodules.shards import Index, ShardWriter, build, finish
from lightning_t2i.errors import UserError

KEPT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
SPLIT_NAME = re.compile(r"[A-Za-z0-9_]+")
KEY_BYTES = 90
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


def read_picture(path: Path) -> tuple[bytes, str] | str:
    """Bytes and file ending of a picture that decodes to its end, or why it does not."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if image.format in KEPT:
                return data, KEPT[image.format]
            png = io.BytesIO()
            image.convert("RGBA" if image.has_transparency_data else "RGB").save(png, "png")
            return png.getvalue(), "png"
    except UnidentifiedImageError:
        return "unknown format"
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return str(error)


def listed(names: Sequence[str], most: int = 10) -> str:
    """Number and names, the first ten of them."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)}: {', '.join(names[:most])}{rest}"


def pack(
    folder: Path,
    out: Path,
    *,
    captions: Path | None = None,
    language: str = "en",
    name: str | None = None,
    licence: str = "unknown",
    val: float = 0.05,
    test: float = 0.05,
    samples_per_shard: int = 1000,
    skip_bad: bool = False,
) -> Path:
    """Writes the data-set folder `out` and returns it.

    Args:
        folder: pictures, in folders as you like.
        out: a new folder.
        captions: jsonl or csv file; None looks in `folder` for one and else takes a .txt beside each picture.
        language: that of captions which do not say theirs.
        name: of the data set; None takes the folder's. Sample ids depend on it.
        licence: of the pictures, recorded in dataset.json.
        val, test: shares of the pictures that do not say their split.
        samples_per_shard: pictures of a shard.
        skip_bad: leave out pictures without caption or that cannot be read, and rows without picture; they are counted
            in dataset.json and named in skipped.txt.

    Raises:
        UserError: no pictures, no captions, bad pictures (without `skip_bad`), two with one key, or `out` exists.
    """
    if (out / "dataset.json").is_file():
        raise UserError("A data set lies there already", where="OUT", given=out, fix="name a new folder")
    if min(val, test) < 0 or val + test >= 1:
        raise UserError("Shares of splits leave nothing to train on", where="--val, --test", given=f"{val}, {test}")
    if samples_per_shard < 1:
        raise UserError("A shard needs a sample", where="--samples-per-shard", given=samples_per_shard)
    told, skipped = plan(folder, captions, language, skip_bad)
    chosen = keyed(told)
    about = {"language": language, "val": val, "test": test, "samples_per_shard": samples_per_shard}

    def write(part: Path) -> None:
        writers: dict[str, ShardWriter] = {}
        unreadable = []
        with ExitStack() as stack:
            for key, picture, found in read_all(folder, chosen):
                if isinstance(found, str):
                    unreadable.append(f"{picture}: {found}")
                    continue
                entry = told[picture]
                split = split_of(key, entry, val, test)
                if split not in writers:
                    writers[split] = stack.enter_context(ShardWriter(part, split, samples_per_shard, about))
                writers[split].write(key, *found, {**entry.more, "caption": entry.captions, "file": picture})
            if (unreadable and not skip_bad) or not writers:
                raise UserError("Pictures that cannot be read", where=str(folder), given=listed(unreadable), fix=SKIP)
        left_out = sorted(skipped + unreadable)
        if left_out:
            (part / "skipped.txt").write_text("".join(f"{line}\n" for line in left_out), encoding="utf-8")
        indices = {split: Index.load(part, split) for split in sorted(writers)}
        finish(part, name or folder.resolve().name, indices, licence, about, skipped=len(left_out))

    return build(out, write)


def plan(folder: Path, captions: Path | None, language: str, skip_bad: bool) -> tuple[dict[str, Told], list[str]]:
    """What is told of each picture to pack, and what is left out and why; the errors are those of `pack`."""
    pictures = find_pictures(folder)
    told = read_captions(folder, pictures, captions, language)
    good = {picture: told[picture] for picture in pictures if picture in told and told[picture].captions}
    if not good:
        kinds = "a jsonl or csv file with the fields file_name and caption, or a .txt beside each picture"
        raise UserError("No picture has a caption", where=str(folder), given=f"{len(pictures)} pictures", allowed=kinds)
    silent = [picture for picture in pictures if picture not in good]
    absent = sorted(set(told) - set(pictures))
    if silent and not skip_bad:
        raise UserError("Pictures without a caption", where=str(folder), given=listed(silent), fix=SKIP)
    if absent and not skip_bad:
        raise UserError("Captions of pictures that are not there", where=str(folder), given=listed(absent), fix=SKIP)
    return good, [f"{picture}: no caption" for picture in silent] + [f"{picture}: no picture" for picture in absent]


def keyed(pictures: Iterable[str]) -> list[tuple[str, str]]:
    """(key, picture) in the order of hashed keys.

    Raises:
        UserError: two pictures get one key.
    """
    owners: dict[str, str] = {}
    for picture in pictures:
        first = owners.setdefault(key_of(picture), picture)
        if first != picture:
            given = f"{first} and {picture} are both {key_of(picture)}"
            raise UserError("Two pictures have the same key", given=given, fix="rename one of them")
    return sorted(owners.items(), key=lambda item: (place_of(item[0]), item[0]))


def split_of(key: str, told: Told, val: float, test: float) -> str:
    """The split that was told, else one by the hashed key, which does not change when pictures are added."""
    if told.split is None:
        # Not the place that orders the samples, of which a split would be one end.
        place = place_of(f"split/{key}")
        return "val" if place < val else "test" if place < val + test else "train"
    if not SPLIT_NAME.fullmatch(told.split):
        raise UserError("Not a name of a split", where=key, given=told.split, allowed="letters, digits and _")
    return told.split


def read_all(folder: Path, chosen: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str, tuple[bytes, str] | str]]:
    """(key, picture, what `read_picture` says) in order; a few are decoded at once."""
    with ThreadPoolExecutor() as pool, tqdm(total=len(chosen), desc="pack", unit="picture") as bar:
        todo = iter(chosen)
        while batch := list(itertools.islice(todo, 64)):
            paths = [folder / picture for _, picture in batch]
            for (key, picture), found in zip(batch, pool.map(read_picture, paths), strict=True):
                yield key, picture, found
                bar.update()


def main(arguments: Sequence[str] | None = None) -> int:
    about, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser("python -m datamodules.pack", description=about, epilog=details)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="pictures, in folders as you like")
    parser.add_argument("out", type=Path, metavar="OUT", help="the data-set folder to write, a new one")
    parser.add_argument("--captions", type=Path, metavar="FILE", help="jsonl or csv file (default: found in FOLDER)")
    parser.add_argument("--language", default="en", help="of captions that do not say theirs (default: %(default)s)")
    parser.add_argument("--name", help="of the data set (default: the folder's)")
    parser.add_argument("--licence", default="unknown", help="of the pictures (default: %(default)s)")
    parser.add_argument("--val", type=float, default=0.05, help="share for validation (default: %(default)s)")
    parser.add_argument("--test", type=float, default=0.05, help="share for tests (default: %(default)s)")
    parser.add_argument("--samples-per-shard", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out what has no caption or cannot be read")
    options = vars(parser.parse_args(arguments))
    try:
        folder = pack(options.pop("folder"), options.pop("out"), **options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{folder}: train on it with `source: {folder}`")
    return 0


if __name__ == "__main__":
    sys.exit(main())
