"""Makes a folder for `python -m datamodules.pack` of the published Chinese retrieval sets, several captions a picture.

    python -m datamodules.retrieval_sets KIND ANNOTATIONS PICTURES OUT --split SPLIT

    flickr30k-cn   ANNOTATIONS: lines "1007129816.jpg#0<TAB>caption"; also Flickr8K-CN
    coco-cn        the same lines, "COCO_train2014_000000000036#zhm#0<TAB>caption"
    aic-icc        JSON list of {"image_id": "x.jpg", "caption": [five captions]}
    muge           jsonl of {"query_text": ..., "item_ids": [...]}; PICTURES: lines "id<TAB>base64 of a JPEG"

OUT gets captions.jsonl, to which each call adds one split, and the pictures in OUT/pictures (links, for a folder). The
licences of these sets forbid to pass them on; none of them is here.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from datamodules.pack_tables import lines_of, read_text
from lightning_t2i.errors import UserError
from lightning_t2i.state_io import write_atomically

Captions = dict[str, list[str]]  # name of a picture, without its ending -> captions
FOLDER = "pictures"


def tabbed(text: str) -> Captions:
    """Lines of "NAME#...<TAB>caption"."""
    found: Captions = {}
    for line in lines_of(text):
        place, tab, caption = line.partition("\t")
        if tab:
            found.setdefault(Path(place.partition("#")[0]).stem, []).append(caption.strip())
    return found


def listed(text: str) -> Captions:
    """AIC-ICC's JSON list."""
    return {Path(entry["image_id"]).stem: [c.strip() for c in entry["caption"]] for entry in json.loads(text)}


def queried(text: str) -> Captions:
    """MUGE's queries: a picture has the texts of all queries that it is right for."""
    found: Captions = {}
    for line in filter(None, lines_of(text)):
        entry = json.loads(line)
        for item in entry["item_ids"]:
            found.setdefault(str(item), []).append(entry["query_text"].strip())
    return found


KINDS: dict[str, Callable[[str], Captions]] = {
    "flickr30k-cn": tabbed,
    "coco-cn": tabbed,
    "aic-icc": listed,
    "muge": queried,
}


def pictures(source: Path, folder: Path, names: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """(name, file in `folder`) of each of `names` that is there: links to files, or decoded lines."""
    wanted = set(names)
    if source.is_dir():
        for file in sorted(source.rglob("*")):
            if file.stem in wanted and file.is_file():
                place = folder / file.name
                if not place.exists():
                    os.symlink(file.resolve(), place)
                yield file.stem, place
        return
    with source.open(encoding="utf-8") as stream:
        for line in stream:
            name, _, data = line.rstrip("\n").partition("\t")
            if name in wanted:
                (place := folder / f"{name}.jpg").write_bytes(base64.b64decode(data))
                yield name, place


def convert(kind: str, annotations: Path, source: Path, out: Path, split: str) -> int:
    """Adds a split to `out`; returns how many pictures it has.

    Raises:
        UserError: an unknown kind, a split that is there already, or a captioned picture that is not there.
    """
    if kind not in KINDS:
        raise UserError("No such retrieval set", where="KIND", given=kind, allowed=KINDS)
    captions = KINDS[kind](read_text(annotations))
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    table = out / "captions.jsonl"
    known = table.read_text(encoding="utf-8") if table.is_file() else ""
    if f'"split": "{split}"' in known:
        raise UserError("This split is there already", where=str(table), given=split)
    found = dict(pictures(source, out / FOLDER, list(captions)))
    if missing := sorted(captions.keys() - found.keys()):
        given = f"{len(missing)}, the first is {missing[0]}"
        raise UserError("Pictures of captions are not there", where=str(source), given=given)
    rows = [
        {"file_name": f"{FOLDER}/{place.name}", "captions": captions[name], "split": split}
        for name, place in found.items()
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(table, (known + lines).encode())
    return len(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    about = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser("python -m datamodules.retrieval_sets", description=about)
    parser.add_argument("kind", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("annotations", type=Path, metavar="ANNOTATIONS")
    parser.add_argument("pictures", type=Path, metavar="PICTURES", help="folder, or MUGE's table")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--split", default="train", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        count = convert(options.kind, options.annotations, options.pictures, options.out, options.split)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{count} pictures of {options.split}; then: python -m datamodules.pack {options.out} FOLDER --language zh")
    return 0


if __name__ == "__main__":
    sys.exit(main())
