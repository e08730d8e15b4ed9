"""docs/performance.md from measured results: a pure function of the page and the JSON.

What stands between `<!-- measured: NAME -->` and `<!-- end -->` is replaced by the tables of that benchmark and a line
that says where they were measured; all else is kept. A result that has no place on the page gets a section at its end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

PLACE = re.compile(r"<!-- measured: (\w+) -->\n.*?<!-- end -->", flags=re.S)
OPENED = re.compile(r"<!-- measured: ")


def table(columns: Sequence[Sequence[str]], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; each column is (name, format)."""
    formats = [spec for _, spec in columns]
    cells = [["" if v is None else format(v, s) for v, s in zip(row, formats, strict=True)] for row in rows]
    lines = [[name for name, _ in columns], ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables(result: Mapping[str, Any]) -> str:
    return "\n\n".join(table(found["columns"], found["rows"]) for found in result["tables"])


def provenance(result: Mapping[str, Any]) -> str:
    """Where, when and how it was measured, as far as that is known; other work on the machine is said.

    `note` is a sentence of whoever wrote down figures that no benchmark measured.
    """
    versions = ", ".join(f"{name} {version}" for name, version in (result.get("versions") or {}).items())
    threads = result.get("threads")
    parts = [
        str(result.get("machine") or ""),
        f"{result['cores']} cores" if result.get("cores") else "",
        f"{threads} thread{'s' if threads != 1 else ''}" if threads else "",
        versions,
    ]
    lines = [f"Machine: {', '.join(part for part in parts if part)}."] if any(parts) else []
    if result.get("busy_cores") is not None and result["busy_cores"] > 0.2:
        lines.append(f"Other work kept {result['busy_cores']:.1f} cores busy: times are too long.")
    if result.get("command"):
        lines.append(f"Command: `{result['command']}`.")
    if result.get("date"):
        commit = f", commit {result['commit']}" if result.get("commit") else ""
        lines.append(f"Measured {result['date']}{commit}.")
    if result.get("note"):
        lines.append(result["note"])
    return "\n".join(lines)


def section(name: str, result: Mapping[str, Any] | None) -> str:
    """A place with its markers."""
    text = f"{tables(result)}\n\n{provenance(result)}" if result else "Not measured yet."
    return f"<!-- measured: {name} -->\n{text}\n<!-- end -->"


def render(page: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page with its measured parts replaced.

    Raises:
        ValueError: a marker is not closed, or a name has two places.
    """
    names = PLACE.findall(page)
    if len(OPENED.findall(page)) != len(names) or len(set(names)) != len(names):
        raise ValueError("each `<!-- measured: NAME -->` needs one `<!-- end -->`, and each name one place")
    page = PLACE.sub(lambda found: section(found[1], results.get(found[1])), page)
    for name in sorted(results.keys() - set(names)):
        page = f"{page.rstrip()}\n\n## {results[name]['title']}\n\n{section(name, results[name])}\n"
    return page
