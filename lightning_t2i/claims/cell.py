"""Runs one cell in a process of its own: `python -m lightning_t2i.claims.cell FOLDER`, as the runner starts it.

FOLDER/cell.json says what to run; FOLDER/outcome.json appears, whole or not at all, when it is done. The process ends
with the one that started it: its standard input is a pipe from there, which closes however that process ends.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from lightning_t2i.claims.spec import Cell, Outcome


def end_with_parent() -> None:
    """Leaves at once when the pipe closes: two processes must never train in one folder."""

    def wait() -> None:
        os.read(0, 1)  # below Python's buffer, whose lock would keep the interpreter from ending
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def run_cell(folder: Path) -> None:
    """Calls the function that cell.json names and writes the outcome."""
    facts = json.loads((folder / "cell.json").read_text(encoding="utf-8"))
    module, name = facts["cell"].split(":")
    function = getattr(importlib.import_module(module), name)
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)
    began = time.time()
    after = {arm: Path(path) for arm, path in facts["after"].items()}
    measured = function(Cell(facts["seed"], folder, facts["options"], after))
    Outcome(measured, began, time.time()).save(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the cell of a folder."""
    folder = Path((sys.argv[1:] if arguments is None else arguments)[0])
    end_with_parent()
    with FileLock(folder / ".lock", timeout=60):  # an earlier process of a killed command may still be leaving
        run_cell(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
