"""Runs the benchmarks one after the other and writes docs/results/performance.json and docs/performance.md.

python -m benchmarks                    all of them; the cores should have nothing else to do
python -m benchmarks --only loader      one, the others' figures stay
python -m benchmarks --quick            whether they work: prints, stores nothing
python -m benchmarks --render           the page again from the JSON, after the prose or a figure's source changed
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.rendering import provenance, render, tables
from benchmarks.running import benchmarks, measured
from lightning_t2i.errors import UserError
from lightning_t2i.paths import ROOT

PAGE, RESULTS = ROOT / "docs" / "performance.md", ROOT / "docs" / "results" / "performance.json"


def store(found: Mapping[str, Any], page: Path, results: Path) -> None:
    """Puts results beside those of the other benchmarks and renders the page."""
    known = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    merged = {**known, **found}
    text = render(page.read_text(encoding="utf-8"), merged)  # a broken page changes nothing
    results.write_text(json.dumps(merged, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    page.write_text(text, encoding="utf-8")


def main(arguments: Sequence[str] | None = None, page: Path = PAGE, results: Path = RESULTS) -> int:
    """Runs what is asked for; returns 1 when a benchmark failed, 2 for a mistake."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", metavar="NAME", help="may be repeated; default: all")
    parser.add_argument("--quick", action="store_true", help="fewest repetitions; prints and stores nothing")
    parser.add_argument("--render", action="store_true", help="measure nothing, write the page from the JSON")
    options = parser.parse_args(arguments)
    if options.render:
        store({}, page, results)
        return 0
    names = options.only or benchmarks()
    if unknown := [name for name in names if name not in benchmarks()]:
        error = UserError("No such benchmark", where="--only", given=unknown, allowed=benchmarks())
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = 0
    for name in names:
        print(f"{name} …", flush=True)
        try:
            result = measured(name, options.quick)
        except UserError as error:
            failed = 1
            print(f"error: {error}", file=sys.stderr)
            continue
        print(f"{tables(result)}\n\n{provenance(result)}\n", flush=True)
        if not options.quick:
            store({name: result}, page, results)
    return failed


if __name__ == "__main__":
    sys.exit(main())
