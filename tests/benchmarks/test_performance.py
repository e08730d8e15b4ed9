"""docs/performance.md is a function of its JSON: figures are never written by hand, prose is never lost."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
from toy import Toy, ToyData

from benchmarks import __main__ as command
from benchmarks import forward_units, running
from benchmarks.forward_units import within
from benchmarks.rendering import render, table
from lightning_t2i.errors import UserError

COLUMNS = [["what", ""], ["rate", ",.0f"], ["ratio", ".2f"]]
PAGE = "# Page\n\nBefore.\n\n<!-- measured: one -->\nold\n<!-- end -->\n\nAfter, 1.23 by hand.\n"


def result(rate: float, **more) -> dict:
    return {"title": "One", "tables": [{"columns": COLUMNS, "rows": [["ours", rate, 2.0], ["bare", None, 1]]}], **more}


def test_a_table_formats_its_cells() -> None:
    lines = table(COLUMNS, [["ours", 1234.5, 1.999], ["bare", None, 1]]).splitlines()
    assert lines[0] == "| what | rate | ratio |"
    assert lines[2:] == ["| ours | 1,234 | 2.00 |", "| bare |  | 1.00 |"]


def test_measured_parts_are_replaced_and_prose_is_kept() -> None:
    once = render(PAGE, {"one": result(1000.0, machine="A box", cores=2, threads=1, date="2026-01-02", commit="abc")})
    assert "old" not in once and "| ours | 1,000 | 2.00 |" in once
    assert "Machine: A box, 2 cores, 1 thread." in once and "Measured 2026-01-02, commit abc." in once
    assert once.startswith("# Page\n\nBefore.\n\n<!-- measured: one -->\n|")
    assert once.endswith("<!-- end -->\n\nAfter, 1.23 by hand.\n")
    again = render(once, {"one": result(1000.0, machine="A box", cores=2, threads=1, date="2026-01-02", commit="abc")})
    assert again == once
    assert "| ours | 5 |" in render(once, {"one": result(5.0)})


def test_places_without_results_and_results_without_places() -> None:
    page = render(PAGE, {"two": {**result(7.0), "title": "Two"}})
    assert "<!-- measured: one -->\nNot measured yet.\n<!-- end -->" in page
    assert "\n## Two\n\n<!-- measured: two -->\n| what |" in page and page.count("<!-- end -->") == 2
    assert render(page, {"two": {**result(7.0), "title": "Two"}}) == page


@pytest.mark.parametrize("page", [PAGE.replace("<!-- end -->", ""), PAGE + PAGE])
def test_a_broken_page_is_refused(page) -> None:
    with pytest.raises(ValueError, match="one"):
        render(page, {"one": result(1.0)})


@pytest.mark.parametrize(("busy", "said"), [(None, False), (0.05, False), (1.96, True)])
def test_a_busy_machine_is_told(busy, said) -> None:
    page = render(PAGE, {"one": result(1.0, busy_cores=busy)})
    assert ("Other work kept 2.0 cores busy" in page) == said


def test_the_committed_page_is_what_the_committed_figures_give() -> None:
    page, results = command.PAGE.read_text(encoding="utf-8"), json.loads(command.RESULTS.read_text(encoding="utf-8"))
    assert render(page, results) == page, "run `python -m benchmarks --render`"
    row = re.search(r"\| 6 \| \d\.\d\d \|", page)[0]
    assert render(page.replace(row, "| 6 | 0.01 |"), results) == page  # a figure changed by hand would be noticed


def test_figures_of_nobody_say_who_wrote_them_down() -> None:
    page = render(PAGE, {"one": result(1.0, note="By hand.")})
    assert "\n\nBy hand.\n<!-- end -->" in page and "Machine" not in page


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A page and its JSON, and benchmarks that return what they are called with."""
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text(PAGE)
    results.write_text(json.dumps({"one": result(1.0), "by_hand": {**result(3.0), "title": "By hand"}}))
    monkeypatch.setattr(command, "benchmarks", lambda: ["one", "two"])

    def measured(name: str, quick: bool) -> dict:
        if name == "two":
            raise UserError("The benchmark failed", where=name)
        return result(10.0 if quick else 20.0)

    monkeypatch.setattr(command, "measured", measured)
    return page, results


def test_only_one_is_measured_and_the_others_are_kept(files) -> None:
    page, results = files
    assert command.main(["--only", "one"], page, results) == 0
    found = json.loads(results.read_text())
    assert found == {"one": result(20.0), "by_hand": {**result(3.0), "title": "By hand"}}
    assert "| ours | 20 |" in page.read_text() and "| ours | 3 |" in page.read_text()
    assert render(page.read_text(), found) == page.read_text()


def test_a_quick_run_stores_nothing(files, capsys) -> None:
    page, results = files
    before = page.read_text(), results.read_text()
    assert command.main(["--only", "one", "--quick"], page, results) == 0
    assert (page.read_text(), results.read_text()) == before and "| ours | 10 |" in capsys.readouterr().out


def test_a_failing_benchmark_does_not_stop_the_others(files, capsys) -> None:
    page, results = files
    assert command.main([], page, results) == 1
    assert "two" in capsys.readouterr().err and json.loads(results.read_text())["one"] == result(20.0)


def test_an_unknown_benchmark_is_refused(files, capsys) -> None:
    assert command.main(["--only", "tow"], *files) == 2
    assert "tow" in capsys.readouterr().err


def test_render_alone_measures_nothing(files) -> None:
    page, results = files
    assert command.main(["--render"], page, results) == 0
    assert "| ours | 1 |" in page.read_text()


# ---- running -------------------------------------------------------------------------------------------------------


def test_benchmarks_are_found_by_what_they_offer(tmp_path) -> None:
    (tmp_path / "a.py").write_text("def measure(quick: bool = False):\n    return {}\n")
    (tmp_path / "b.py").write_text("def measure(options):\n    return {}\n")
    (tmp_path / "c.py").write_text("def main():\n    return {}\n")
    assert running.benchmarks(tmp_path) == ["a"]
    assert {"forward_units", "loader", "step_overhead"} <= set(running.benchmarks())


def test_a_benchmark_runs_in_a_process_of_its_own(monkeypatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    assert running.isolated("torch", "get_num_threads") == 1
    assert running.isolated("os", "getenv", key="MALLOC_TRIM_THRESHOLD_") is None
    with pytest.raises(UserError, match="at least one data point"):
        running.isolated("statistics", "mean", data=[])


def test_what_is_said_of_the_machine() -> None:
    facts = running.surroundings()
    assert facts["machine"] and facts["cores"] >= 1 and set(facts["versions"]) >= {"Python", "torch"}
    busy = running.busy_cores(0.05)
    assert busy is None or 0 <= busy <= facts["cores"]


class Counted(Toy):
    """The generator is due every fifth step; see tests/lightning_t2i/test_forward_units.py for the sum."""

    def forward_units(self) -> dict[str, float]:
        return {"generator": 1 + 2 / 5, "generator_ema": 1 / 5, "critic": 9 + 3 / 5}


class CountedData(ToyData):
    training = {"main": SimpleNamespace(batch_size=8)}


def test_forward_units_of_a_method_over_whole_periods(monkeypatch) -> None:
    monkeypatch.setattr(forward_units, "prepared", lambda name: (Counted(), CountedData()))
    found = forward_units.of_method("toy", quick=True)
    rows = {row[1]: row for row in found["units"]}
    assert rows["generator"][:4] == ["toy", "generator", pytest.approx(1.4), pytest.approx(1.4)]
    assert rows["critic"][4] == pytest.approx(0.0) and rows["critic"][5] > 0
    assert rows["scale"][2:5] == [0.0, 1.0, None]  # called, and nobody said so
    method, batch, seconds, rate, memory, predicted, counted, good = found["speed"]
    assert (method, batch, good) == ("toy", 8, "no") and rate == pytest.approx(8 / seconds) and memory > 0
    assert counted == pytest.approx(predicted + 1)
    page = render(PAGE, {"one": forward_units.result([found])})
    assert "| toy | generator_ema | 0.20 | 0.20 | 0.0% |" in page and "| toy | scale | 0.00 | 1.00 |  |" in page
    monkeypatch.setattr(forward_units, "prepared", lambda name: (Toy(), CountedData()))
    assert forward_units.of_method("toy", quick=True) is None


@pytest.mark.parametrize(
    ("predicted", "counted", "good"), [(3.0, 3.4, True), (3.0, 3.5, False), (0.0, 0.1, False), (1.0, 0.0, False)]
)
def test_the_bar_of_forward_units(predicted, counted, good) -> None:
    assert within(["m", "net", predicted, counted]) == good
