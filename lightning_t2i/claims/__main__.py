"""Tests the claims of a method's paper again, at small scale.

    python -m lightning_t2i.claims METHOD              prints the budget, runs what is missing, writes docs/results
    python -m lightning_t2i.claims METHOD --dry-run    prints the budget only
    python -m lightning_t2i.claims METHOD --quick      a rehearsal of at most 10 minutes, written below runs/claims
    python -m lightning_t2i.claims METHOD --check      says whether the result is stale, and why
    python -m lightning_t2i.claims METHOD --report     writes Markdown and plot again, from the JSON file alone

METHOD is a method with a claims file, or a dotted module of your own; docs/claims.md says how to write one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from lightning_t2i.claims import hashes, report, results
from lightning_t2i.claims.runner import Runner, folders, root_of
from lightning_t2i.claims.spec import Matrix, Outcome, load
from lightning_t2i.errors import UserError
from lightning_t2i.paths import ROOT
from lightning_t2i.report import table

RESULTS = ROOT / "docs" / "results"


def budget(matrix: Matrix, workers: int) -> str:
    """The table of what the matrix costs, and the wall time that follows."""
    rows = []
    for arm in matrix.arms:
        cost = f"{arm.units:,} x {arm.unit_s:g} s per {arm.unit}"
        rows.append((arm.name, str(len(matrix.seeds)), cost, f"{len(matrix.seeds) * arm.seconds / 60:.1f}"))
    total = sum(len(matrix.seeds) * arm.seconds for arm in matrix.arms) / 60
    wall = matrix.wall(workers) / 60
    return (
        f"{table(rows, ('arm', 'seeds', 'cost of a cell', 'core minutes'))}\n\n"
        f"{len(matrix.cells())} cells, {total:.1f} core minutes; {wall:.1f} minutes on {workers} free cores"
    )


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m lightning_t2i.claims", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("method", metavar="METHOD", help="a method with claims, or a dotted module of your own")
    parser.add_argument("--quick", action="store_true", help="a rehearsal: small arms, at most 10 minutes")
    parser.add_argument("--dry-run", action="store_true", help="print the budget and stop")
    parser.add_argument("--check", action="store_true", help="say whether the result is stale; exit code 1 if so")
    parser.add_argument("--report", action="store_true", help="write Markdown and plot from the JSON file alone")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes at a time (default: 2)")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="a pilot with other seeds")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the result is written")
    return parser.parse_args(arguments)


def outdated(file: Path, matrix: Matrix) -> list[str]:
    """What has changed since the result of a file, a line each; empty when it is fresh."""
    return hashes.changes(results.read_result(file)["hashes"], hashes.hashes(matrix))


def seeded(matrix: Matrix, seeds: Sequence[int] | None) -> Matrix:
    """The matrix with the seeds of a pilot.

    Raises:
        UserError: seeds of the claims themselves, which a threshold must not be chosen from.
    """
    if seeds is None:
        return matrix
    if both := sorted(set(seeds) & set(matrix.seeds)):
        raise UserError(
            "A pilot takes other seeds than the claims", where="--seeds", given=both, fix=f"{max(matrix.seeds) + 100}"
        )
    return replace(matrix, seeds=tuple(seeds))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs, checks or reports; 1 for failed cells or a stale result, 2 for a mistake."""
    given = options(arguments)
    try:
        if given.workers < 1:
            raise UserError("There must be a worker", where="--workers", given=given.workers)
        matrix = seeded(load(given.method, given.quick), given.seeds)
        mode = "pilot" if given.seeds else "quick" if given.quick else "full"
        root = root_of(matrix.method)
        out = given.out or (RESULTS if mode == "full" else root / mode)
        file = out / f"{matrix.method}.json"
        if given.report:
            for written in report.write_report(file, results.read_result(file)):
                print(written)
            return 0
        if given.check:
            lines = outdated(file, matrix)
            print("\n  ".join([f"{file}: {'stale' if lines else 'fresh'}", *lines]))
            return 1 if lines else 0
        print(budget(matrix, given.workers), flush=True)
        if given.dry_run:
            return 0
        results.target(out, matrix.method, mode)
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".lock", timeout=0):
            return _run(matrix, given, mode, root, file)
    except Timeout:
        print(f"error: another command runs the cells in {root}; wait for it", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(matrix: Matrix, given: argparse.Namespace, mode: str, root: Path, file: Path) -> int:
    found = hashes.hashes(matrix)
    places = folders(matrix, found)
    runner = Runner(matrix, places, given.workers, say)
    registration = {}
    if mode == "full":
        known = sum(runner.finished(cell) for cell in places)
        registration = results.register(root, given.method, matrix, known)
    if failed := runner.run():
        names = ", ".join(f"{arm} seed {seed}" for arm, seed in failed)
        say(f"{len(failed)} of {len(places)} cells are missing, so there is no result: {names}")
        return 1
    outcomes = {cell: Outcome.load(place) for cell, place in places.items()}
    result = results.result_of(matrix, found, outcomes, registration, mode)
    results.write_result(file, result)
    say("\n" + table(report.claim_rows(result), report.CLAIM_HEAD))
    for written in [file, *report.write_report(file, result)]:
        say(f"written: {written}")
    return 0


def say(line: str) -> None:
    """Shows a line at once, also in a pipe."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
