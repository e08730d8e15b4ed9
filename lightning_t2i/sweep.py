"""A grid of trainings, and of evaluations of each: a file of lists, one run for each combination.

    python -m lightning_t2i.sweep FILE                   point after point; the same command again goes on
    python -m lightning_t2i.sweep FILE --task 3 --tasks 8     every eighth point from the fourth on: a task of an array
    python -m lightning_t2i.sweep FILE --table           the table of what there is, and nothing else

FILE is YAML:

    config: [FILE, ...]          of every training, or instead of it
    run: NAME                    a run that is there, to be evaluated only
    set: {KEY: VALUE}            overrides of every training and evaluation
    grid: {KEY: [VALUE, ...]}    a training for each combination, runs/SWEEP-HASH
    validate: {KEY: [VALUE, ...]}     an evaluation of each training for each combination; the key `ema` is --ema
    metric: NAME                 of validate.jsonl, to sort by
    best: lowest                 or highest

HASH is of the configs' content, `set` and the point: points may be added later, and a training with other values is
another run. What only an evaluation needs belongs to `validate`, as a list of one. An evaluation is kept for its
checkpoint. A training that failed is told and left; the others go on. runs/SWEEP/ gets sweep.json and sweep.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_t2i.claims.hashes import config_hash, digest
from lightning_t2i.cli.runs import runs_root
from lightning_t2i.errors import UserError
from lightning_t2i.loggers import read_lines
from lightning_t2i.paths import ROOT
from lightning_t2i.report import table
from lightning_t2i.state_io import newest, write_atomically

Point = dict[str, Any]  # override -> value
Launch = Callable[[list[str]], int]  # words of train.py -> exit code
ORDERS = ("lowest", "highest")


def subprocess_launch(words: list[str]) -> int:
    """`train.py WORDS` in a process of its own."""
    return subprocess.run([sys.executable, str(ROOT / "train.py"), *words], check=False).returncode


def combinations(lists: Mapping[str, Sequence[Any]]) -> Iterator[Point]:
    """One of each list, the last list fastest; a single empty point where there are none."""
    return (dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values()))


def words_of(point: Point) -> list[str]:
    """Overrides as words of the command line."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in point.items()]


@dataclass(frozen=True)
class Sweep:
    """A file's content, checked; `name` is that of the file."""

    name: str
    metric: str
    best: str = "lowest"
    config: list[str] = field(default_factory=list)
    run: str | None = None
    set: Point = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    validate: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if bool(self.config) == bool(self.run) or (self.run and self.grid):
            what, fix = "A sweep trains from configs, or evaluates a run", "either config and grid, or run"
            raise UserError(what, where=self.name, given={"config": self.config, "run": self.run}, fix=fix)
        for part in ("grid", "validate"):
            for key, values in getattr(self, part).items():
                if not isinstance(values, list) or not values:
                    raise UserError("Not a list of values", where=f"{self.name}: {part}.{key}", given=values)
        if self.best not in ORDERS:
            raise UserError("No such order", where=f"{self.name}: best", given=self.best, allowed=ORDERS)

    @classmethod
    def read(cls, file: Path) -> Sweep:
        """Reads a file.

        Raises:
            UserError: no such file, unknown keys, or parts that do not fit.
        """
        if not file.is_file():
            raise UserError("There is no such file", where="FILE", given=str(file))
        given = yaml.safe_load(file.read_text(encoding="utf-8"))
        known = [name for name in cls.__dataclass_fields__ if name != "name"]
        if not isinstance(given, dict) or not given.keys() <= set(known) or "metric" not in given:
            found = sorted(given) if isinstance(given, dict) else type(given).__name__
            raise UserError("Not a sweep", where=str(file), given=found, allowed=known, fix="metric is needed")
        return cls(file.stem, **given)

    @property
    def folder(self) -> Path:
        return runs_root() / self.name

    def points(self) -> dict[str, Point]:
        """Run -> its overrides."""
        if self.run:
            return {self.run: {}}
        contents = [config_hash(config) for config in self.config]
        return {f"{self.name}-{digest([contents, self.set, point])}": point for point in combinations(self.grid)}

    def evaluations(self, run: str) -> Iterator[tuple[Point, Path]]:
        """The overrides of each evaluation of a run's newest checkpoint, and the file of what it finds."""
        folder = runs_root() / run
        checkpoint = newest(folder / "checkpoints")
        for change in combinations(self.validate):
            yield change, folder / f"sweep-{digest([checkpoint and checkpoint.name, self.set, change])}.json"

    def do(self, run: str, point: Point, launch: Launch) -> bool:
        """Trains and evaluates what of a point is not done yet; False where something failed."""
        folder = runs_root() / run
        if self.config and not (folder / "finished").is_file():
            configs = [word for file in self.config for word in ("--config", file)]
            if launch(["fit", *configs, "--run", run, *words_of(self.set), *words_of(point)]) != 0:
                return False
        done = True
        for change, file in self.evaluations(run):
            if file.is_file():
                continue
            before = len(read_lines(folder / "validate.jsonl"))
            if launch(["validate", "--run", run, *words_of(self.set), *words_of(change)]) != 0:
                done = False
                continue
            found: dict[str, Any] = {}
            for line in read_lines(folder / "validate.jsonl")[before:]:
                found |= line
            write_atomically(file, json.dumps(found).encode())
        return done

    def rows(self) -> list[dict[str, Any]]:
        """What there is, the best first: {"run", "point", metric: value, ...}.

        Raises:
            UserError: an evaluation has not measured the metric.
        """
        rows = [
            {**json.loads(file.read_text(encoding="utf-8")), "run": run, "point": {**point, **change}}
            for run, point in self.points().items()
            for change, file in self.evaluations(run)
            if file.is_file()
        ]
        for row in rows:
            if self.metric not in row:
                known, where = sorted(name for name in row if "/" in name), f"{self.name}: metric"
                raise UserError("An evaluation has no such metric", where=where, given=self.metric, allowed=known)
        return sorted(rows, key=lambda row: row[self.metric], reverse=self.best == "highest")

    def report(self) -> str:
        """Writes sweep.json and sweep.md; returns the latter's table."""
        rows, keys = self.rows(), [*self.grid, *self.validate]
        body = [[*(str(r["point"][k]) for k in keys), f"{r[self.metric]:.4g}", r["run"]] for r in rows]
        text = table(body, [*keys, self.metric, "run"])
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "sweep.json", json.dumps(rows, indent=1).encode())
        write_atomically(self.folder / "sweep.md", f"# {self.name}\n\n{text}\n".encode())
        return text


def main(arguments: Sequence[str] | None = None, launch: Launch = subprocess_launch) -> int:
    """Runs a sweep; 1 where a point failed, 2 for a mistake."""
    parser = argparse.ArgumentParser("python -m lightning_t2i.sweep", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--task", type=int, default=0, metavar="I", help="this task's number, from 0")
    parser.add_argument("--tasks", type=int, default=1, metavar="N", help="tasks that share the points")
    parser.add_argument("--table", action="store_true", help="only write and print the table")
    options = parser.parse_args(arguments)
    try:
        if not 0 <= options.task < options.tasks:
            raise UserError("No such task", where="--task", given=options.task, allowed=f"0 to {options.tasks - 1}")
        sweep = Sweep.read(options.file)
        mine = [] if options.table else list(sweep.points().items())[options.task :: options.tasks]
        failed = [run for run, point in mine if not sweep.do(run, point, launch)]
        print(sweep.report())
        for run in failed:
            print(f"failed: {run}", file=sys.stderr)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
