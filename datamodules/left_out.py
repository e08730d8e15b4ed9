"""What an import left out and why: counted and named, for a file and for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def listed(names: Sequence[str], most: int = 10, count: int | None = None) -> str:
    """Number and names, the first ten of them; `count` where not all are named."""
    count = len(names) if count is None else count
    rest = f" and {count - most:,} more" if count > most else ""
    return f"{count:,}: {', '.join(names[:most])}{rest}"


def spelled(name: str) -> str:
    """A name as it can be written: bytes of a file's or member's name that are no UTF-8 are escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


class LeftOut:
    """Samples that are not in a data set, by reason."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}

    def add(self, reason: str, names: Sequence[str], count: int | None = None) -> None:
        """Adds samples; `count` where not all are named."""
        if names:
            self._names.setdefault(reason, []).extend(map(spelled, names))
            self._counts[reason] = self._counts.get(reason, 0) + (len(names) if count is None else count)

    def __len__(self) -> int:
        return sum(self._counts.values())

    @property
    def facts(self) -> dict[str, Any]:
        """reason -> count and sorted names, the most frequent first."""
        reasons = sorted(self._counts, key=lambda reason: (-self._counts[reason], reason))
        return {reason: {"count": self._counts[reason], "names": sorted(self._names[reason])} for reason in reasons}

    def lines(self, report: object) -> list[str]:
        """A line for each reason with its first names, and where all of them are (`report`); nothing of nothing."""
        if not self._counts:
            return []
        wide = max(map(len, self._counts))
        rows = [f"  {reason:<{wide}}  {listed(of['names'], 3, of['count'])}" for reason, of in self.facts.items()]
        return [f"left out: {len(self):,}, named in {report}", *rows]
