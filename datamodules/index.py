"""Indexes tars of pictures where they lie: `python -m datamodules.index URL_OR_FOLDER ... --out FOLDER`.

Tars as open_clip and img2dataset make them (a picture with a .txt, a .json or both), and ours, local or behind a URL of
fsspec. OUT becomes a data-set folder whose shards are where they were. The rows of a finished shard are a file, so that
the same command goes on after an interruption. It also lists the shards again: new ones join, those that are gone
leave, and a local one that has changed (its size or time) is read again. A remote one is known by its name alone;
delete OUT/.parts-SPLIT where one was replaced. In a SLURM array each task makes its share (--task, --tasks); the same
command without them then joins all.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from tqdm import tqdm

from datamodules.index_file import FORMAT, Index, index_path
from datamodules.index_rows import index_shard, is_indexed, part_path
from datamodules.left_out import LeftOut, spelled
from datamodules.pack_tables import lines_of, read_text
from datamodules.parallel import each
from datamodules.remote import Url, filesystem, is_remote
from datamodules.shards import finish
from datamodules.unique_keys import shared_key
from lightning_t2i.errors import UserError


def find_shards(sources: Sequence[str]) -> list[str]:
    """Tars of folders, of text files that list one a line, and those named themselves, with {000..123} spelled out.

    Raises:
        UserError: there is none, or a folder or file of names is missing, or a name is not UTF-8.
    """
    from braceexpand import braceexpand

    found: list[str] = []
    for source in sources:
        if source.endswith(".txt"):
            if not Path(source).is_file():
                raise UserError("No such list of tars", where="URL_OR_FOLDER", given=source)
            found += [line.strip() for line in lines_of(read_text(Path(source))) if line.strip()]
            continue
        for name in braceexpand(source):
            if name.split("?")[0].endswith(".tar"):
                found.append(name if is_remote(name) else str(Path(name).resolve()))
            elif is_remote(name):
                system, path = filesystem(name)
                try:
                    listed = sorted(p for p in system.ls(path, detail=False) if p.split("?")[0].endswith(".tar"))
                except FileNotFoundError as error:
                    raise UserError("There is no such remote folder", where="URL_OR_FOLDER", given=name) from error
                found += [system.unstrip_protocol(p) for p in listed]
            else:
                found += sorted(str(p.resolve()) for p in Path(name).glob("*.tar"))
    if odd := [name for name in found if spelled(name) != name]:
        raise UserError("Names of tars that are not UTF-8", given=", ".join(map(spelled, odd[:10])), fix="rename them")
    if not found:
        raise UserError("No tars to index", where="URL_OR_FOLDER", given=", ".join(sources))
    return list(dict.fromkeys(found))


def plan(out: Path, split: str, sources: Sequence[str], language: str) -> dict[str, Any]:
    """What is indexed: sources and language, which are kept in `out`, and the shards that are there now.

    Tasks of an array that find other shards than one another share them unevenly; the call that joins makes the rest.

    Raises:
        UserError: no shards, or `out` was begun with other sources or another language.
    """
    wanted = {"sources": list(sources), "language": language}
    shards = find_shards(sources)
    out.mkdir(parents=True, exist_ok=True)
    file = out / f".parts-{split}" / "plan.json"
    with FileLock(out / f".{split}.lock"):
        if not file.is_file():
            file.parent.mkdir(exist_ok=True)
            part = file.with_suffix(".part")
            part.write_text(json.dumps(wanted))
            os.replace(part, file)
    told = json.loads(file.read_text())
    if {name: told[name] for name in wanted} != wanted:
        raise UserError(
            "The index was begun with other arguments", where=str(out), given=wanted, fix="name a new --out"
        )
    return {**wanted, "shards": shards}


def make_parts(out: Path, split: str, told: dict[str, Any], workers: int, task: int = 0, tasks: int = 1) -> None:
    """Indexes the shards of a task that are not finished, or have changed since."""
    mine = told["shards"][task::tasks]
    todo = [name for name in mine if not is_indexed(name, out, split)]
    run = partial(index_shard, out=out, split=split, language=told["language"])
    with tqdm(total=len(mine), initial=len(mine) - len(todo), desc="index", unit="shard") as bar:
        for _ in each(run, todo, workers):
            bar.update()


def join(out: Path, split: str, told: dict[str, Any], name: str, licence: str, skip_bad: bool, prefix: bool) -> Index:
    """Joins the rows of all shards to the index of the split, and tells in report.json what was left out and why.

    Raises:
        UserError: shards that are missing or cut (without `skip_bad`), or two samples with one key (without `prefix`).
    """
    parts = {shard: part_path(out, split, shard) for shard in told["shards"]}
    reports = {shard: json.loads(pq.read_schema(part).metadata[b"report"]) for shard, part in parts.items()}
    broken = [f"{shard}: {report['error']}" for shard, report in reports.items() if report["error"]]
    if broken and not skip_bad:
        fix = f"bring them back, delete {out / f'.parts-{split}'} and index again, or leave them out with --skip-bad"
        raise UserError(
            "Shards that cannot be read to their end", where=str(out), given="; ".join(broken[:10]), fix=fix
        )
    good = {shard: part for shard, part in parts.items() if reports[shard]["rows"]}
    if not good:
        raise UserError("No sample in any shard", where=str(out), given=f"{len(parts)} shards")
    kinds = pa.unify_schemas(
        [pq.read_schema(part).remove_metadata() for part in good.values()], promote_options="permissive"
    )
    names = [_place(out, shard) for shard in good]
    own = [Url(shard).name for shard in names]
    titles = own if len(set(own)) == len(own) else names  # a data set keeps its identity when it moves
    hashes = {title: reports[shard]["hash"] for title, shard in zip(titles, good, strict=True)}
    facts = {"format": FORMAT, "split": split, "shards": names, "sha256": hashes, "world": {}}
    facts |= {"n": sum(reports[shard]["rows"] for shard in good), "language": told["language"]}
    path, twice = index_path(out, split), None if prefix else shared_key(good)
    if twice is not None:
        key, first, second = twice
        fix = "--prefix-keys puts the number of the shard before each key"
        raise UserError("Two samples have the same key", where=second, given=f"{key}, as in {first}", fix=fix)
    kinds = kinds.insert(0, pa.field("shard", pa.int32())).with_metadata({b"t2i": json.dumps(facts).encode()})
    with pq.ParquetWriter(f"{path}.part", kinds, compression="zstd") as writer:
        for number, part in enumerate(good.values()):
            table = pq.read_table(part)
            if prefix:
                texts = [f"{number:06d}/{key}" for key in table["key"].to_pylist()]
                table = table.set_column(table.column_names.index("key"), "key", pa.array(texts))
            columns = [
                pa.array([number] * len(table), f.type)
                if f.name == "shard"
                else table[f.name].cast(f.type)
                if f.name in table.column_names
                else pa.array([False] * len(table))
                if pa.types.is_boolean(f.type)
                else pa.nulls(len(table), f.type)
                for f in kinds
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=kinds))
    os.replace(f"{path}.part", path)
    report = out / f"report-{split}.json"
    report.write_text(json.dumps(reports, indent=1, ensure_ascii=False), encoding="utf-8")
    splits = {file.stem.removeprefix("index-"): file for file in sorted(out.glob("index-*.parquet"))}
    finish(out, name, {found: Index.load(out, found) for found in splits}, licence, {"sources": told["sources"]})
    return Index.load(out, split)


def left_out(out: Path, split: str) -> LeftOut:
    """What report-SPLIT.json says was left out: samples by reason, and shards that are missing or cut."""
    found = LeftOut()
    for shard, report in json.loads((out / f"report-{split}.json").read_text(encoding="utf-8")).items():
        for reason, count in report.get("counts", {}).items():
            named = [key for key, why in report["reasons"].items() if why == reason]
            found.add(reason, [f"{Url(shard).name}:{key}" for key in named] or [Url(shard).name], count)
        if report["error"]:
            found.add("cannot be read to its end", [f"{Url(shard).name}: {report['error']}"])
    return found


def _place(out: Path, shard: str) -> str:
    """A local shard below `out` by its relative path, others as they are."""
    if not is_remote(shard) and Path(shard).is_relative_to(out.resolve()):
        return Path(shard).relative_to(out.resolve()).as_posix()
    return shard


def main(arguments: Sequence[str] | None = None) -> int:
    about, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser("python -m datamodules.index", description=about, epilog=details)
    parser.add_argument("sources", nargs="+", metavar="URL_OR_FOLDER", help="tars, folders of tars, a .txt of either")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the data-set folder to write")
    parser.add_argument("--split", default="train", help="(default: %(default)s)")
    parser.add_argument("--language", default="en", help="of captions that do not say theirs (default: %(default)s)")
    parser.add_argument("--name", help="of the data set (default: the folder's)")
    parser.add_argument("--licence", default="unknown", help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument("--task", type=int, help="number of this task of an array, from 0; nothing is joined")
    parser.add_argument("--tasks", type=int, default=1, help="tasks of the array")
    parser.add_argument("--skip-bad", action="store_true", help="leave out missing shards and ends of cut ones")
    parser.add_argument("--prefix-keys", action="store_true", help="put the number of the shard before each key")
    given = parser.parse_args(arguments)
    try:
        told = plan(given.out, given.split, given.sources, given.language)
        if given.task is not None:
            make_parts(given.out, given.split, told, given.workers, given.task, given.tasks)
            return 0
        make_parts(given.out, given.split, told, given.workers)
        name = given.name or given.out.resolve().name
        index = join(given.out, given.split, told, name, given.licence, given.skip_bad, given.prefix_keys)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{given.out}: {len(index)} samples of {len(index.shards)} shards; train on it with `source: {given.out}`")
    for line in left_out(given.out, given.split).lines(given.out / f"report-{given.split}.json"):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
