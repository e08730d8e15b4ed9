"""docs/claims.md: made from the results that are committed, all of which are fresh, beside the papers' figures."""

import json
from pathlib import Path

import pytest
import yaml

from lightning_t2i.claims.__main__ import RESULTS, outdated
from lightning_t2i.claims.page import PAGE, PAPERS, ours, rendered
from lightning_t2i.claims.spec import load, methods

RUN = [method for method in methods() if (RESULTS / f"{method}.json").is_file()]


def test_the_page_is_made_from_the_committed_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert rendered(page, RESULTS) == page, "python -m lightning_t2i.claims.page"


@pytest.mark.parametrize("method", RUN)
def test_no_committed_result_is_stale(method: str) -> None:
    assert outdated(RESULTS / f"{method}.json", load(method)) == []


def test_the_figures_of_the_papers_are_about_claims_that_there_are() -> None:
    papers = yaml.safe_load(PAPERS.read_text(encoding="utf-8"))
    assert set(papers) == set(methods())
    for method, figures in papers.items():
        numbers = {claim.id.partition("-")[0] for claim in load(method).claims}
        assert set(figures) <= numbers, method


def test_verdicts_are_counted_and_shown_beside_the_papers(tmp_path: Path) -> None:
    result = json.loads((RESULTS / "dmd.json").read_text(encoding="utf-8"))
    result["claims"] = result["claims"][:2]
    result["claims"][0] |= {"id": "1-x", "verdict": "contradicted", "baseline": None, "metric": "fd", "measured": 2.5}
    result["claims"][1] |= {"id": "1-y", "verdict": "contradicted", "baseline": 2.0, "metric": "fd", "measured": -0.5}
    (tmp_path / "dmd.json").write_text(json.dumps(result))
    page = rendered("Before.\n\n<!-- claims -->\nold\n<!-- end -->\n\nAfter.\n", tmp_path)
    assert page.startswith("Before.\n\n<!-- claims -->\n| method |") and page.endswith("|\n<!-- end -->\n\nAfter.\n")
    assert "| `dmd` | [2 claims](results/dmd.md) | 0 | 0 | 2 | 0 |" in page
    assert "| `fluid` | not run in full |" in page and "old" not in page
    (first,), (second,) = ([line for line in page.splitlines() if f"| {name} |" in line] for name in ("1-x", "1-y"))
    assert "FID 2.62" in first and "fd 2.5 |" in first
    assert "FID 2.62" not in second and "fd 1.5 against 2 |" in second, "the paper's figure is told once"


def test_a_page_without_a_place_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="<!-- claims -->"):
        rendered("No place.\n", tmp_path)


def test_a_claim_without_a_baseline_shows_the_metric_alone() -> None:
    assert ours({"metric": "r", "measured": 0.91, "baseline": None}) == "r 0.91"
