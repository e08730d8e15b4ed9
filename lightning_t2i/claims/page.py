"""docs/claims.md from the results: `python -m lightning_t2i.claims.page`.

What stands between `<!-- claims -->` and `<!-- end -->` is replaced by a table of all methods and a table of the claims
of each, beside what its paper reports (papers.yaml). All else on the page is written by hand.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from lightning_t2i.claims.report import span
from lightning_t2i.claims.results import Result, read_result
from lightning_t2i.claims.spec import methods
from lightning_t2i.paths import ROOT
from lightning_t2i.report import table
from lightning_t2i.state_io import write_atomically

PAGE = ROOT / "docs" / "claims.md"
PAPERS = Path(__file__).with_name("papers.yaml")
PLACE = re.compile(r"(?<=<!-- claims -->\n).*(?=<!-- end -->)", flags=re.S)
VERDICTS = ("reproduced", "inconclusive", "contradicted", "reported-only")


def reported(figures: dict[str, str], claim: str) -> str:
    """What the paper reports for a claim: the figure whose name is the claim's id up to its first hyphen."""
    return figures.get(claim.partition("-")[0], "")


def ours(claim: dict[str, Any]) -> str:
    """The metric of the arm, and of its baseline."""
    if claim["baseline"] is None:
        return f"{claim['metric']} {claim['measured']:.3g}"
    arm = claim["measured"] + claim["baseline"]
    return f"{claim['metric']} {arm:.3g} against {claim['baseline']:.3g}"


def claims_of(result: Result, figures: dict[str, str]) -> str:
    """The claims of a method; the paper's figure stands beside the first claim that it is about."""
    rows, told = [], ""
    for claim in result["claims"]:
        figure = reported(figures, claim["id"])
        rows.append([
            claim["id"], claim["text"], figure if figure != told else "", ours(claim), f"{claim['measured']:+.3g}",
            span(claim["interval"]), f"**{claim['verdict']}**",
        ])  # fmt: skip
        told = figure
    head = ("claim", "", "the paper", "here, mean of the seeds", "effect", "95 % over seeds", "verdict")
    return table(rows, head)


def summary(results: dict[str, Result | None]) -> str:
    """A row for each method: how many claims got which verdict."""
    rows = []
    for method, result in results.items():
        if result is None:
            rows.append([f"`{method}`", "not run in full", *([""] * (len(VERDICTS) + 1))])
            continue
        counts = Counter(claim["verdict"] for claim in result["claims"])
        made = f"{(result['commit'] or 'none')[:12]}, {result['wall_s'] / 60:.0f} min"
        page = f"[{len(result['claims'])} claims](results/{method}.md)"
        rows.append([f"`{method}`", page, *(str(counts[verdict]) for verdict in VERDICTS), made])
    return table(rows, ("method", "result", *VERDICTS, "commit, wall time"))


def rendered(page: str, folder: Path) -> str:
    """The page with its part that is made from the results of a folder.

    Raises:
        ValueError: the page has no such part.
    """
    if not PLACE.search(page):
        raise ValueError(f"{PAGE.name} needs the lines <!-- claims --> and <!-- end -->")
    papers = yaml.safe_load(PAPERS.read_text(encoding="utf-8"))
    files = {method: folder / f"{method}.json" for method in methods()}
    results = {method: read_result(file) if file.is_file() else None for method, file in files.items()}
    parts = [summary(results)]
    for method, result in results.items():
        if result is not None:
            parts.append(f"### Claims of {method}\n\n{claims_of(result, papers.get(method, {}))}")
    text = "\n\n".join(parts) + "\n"
    return PLACE.sub(lambda _: text, page)


def main() -> None:
    page = rendered(PAGE.read_text(encoding="utf-8"), ROOT / "docs" / "results")
    write_atomically(PAGE, page.encode())


if __name__ == "__main__":
    main()
