"""A claims file of its own, with runs and results in the test's folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import toy_claims

from lightning_t2i.claims import __main__ as command
from lightning_t2i.claims import hashes


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The test's folder, in which the toy claims run; results are in `results`, golden losses in `golden`."""
    toy_claims.install(tmp_path)
    (tmp_path / "steer").mkdir()
    (tmp_path / "golden").mkdir()
    monkeypatch.setenv("TOY_CLAIMS", str(tmp_path / "steer"))
    monkeypatch.setenv("LIGHTNING_T2I_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(hashes, "FOLDER", tmp_path / "golden")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [n for n in sys.modules if n.split(".")[0] == "own_claims"]:
        del sys.modules[name]
