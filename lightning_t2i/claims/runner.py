"""Runs the cells of a matrix in worker processes, one thread each, and keeps what they gave.

A cell lies in runs/claims/METHOD/ARM-KEY/seed-S, where KEY is the hash of all that decides its outcome: a finished
cell is never run again, and a killed one goes on from what it left in its folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lightning_t2i.claims.hashes import Hashes, cell_key
from lightning_t2i.claims.spec import OUTCOME, Matrix, Outcome
from lightning_t2i.cli.runs import runs_root
from lightning_t2i.state_io import write_atomically

Key = tuple[str, int]  # arm, seed
TAIL = 15  # lines of a failed cell's log that are shown


def root_of(method: str) -> Path:
    """Where cells, and results that are not the full ones, are kept."""
    return (runs_root() / "claims" / method).resolve()


def folders(matrix: Matrix, found: Hashes) -> dict[Key, Path]:
    """The folder of every cell."""
    keys = {arm.name: cell_key(matrix, arm, found) for arm in matrix.arms}
    root = root_of(matrix.method)
    return {(arm, seed): root / f"{arm}-{keys[arm]}" / f"seed-{seed}" for arm, seed in matrix.cells()}


class Runner:
    """Runs what is missing.

    Args:
        matrix: the cells.
        places: folder of each.
        workers: processes at a time.
        say: takes a line of progress.
    """

    def __init__(self, matrix: Matrix, places: dict[Key, Path], workers: int, say: Callable[[str], None]):
        self.matrix, self.places, self.workers, self.say = matrix, places, workers, say
        self.running: dict[Key, subprocess.Popen[bytes]] = {}
        self.failed: dict[Key, str] = {}  # cell -> why

    def finished(self, cell: Key) -> bool:
        return (self.places[cell] / OUTCOME).is_file()

    def run(self) -> dict[Key, str]:
        """Runs all cells that are not finished; returns those that failed or could not be begun, with the reason."""
        left = [cell for cell in self.matrix.cells() if not self.finished(cell)]
        if kept := len(self.places) - len(left):
            self.say(f"{kept} of {len(self.places)} cells are kept from before")
        try:
            while left or self.running:
                for cell in self._stopped(left):
                    left.remove(cell)
                    self.failed[cell] = "not begun: what it builds on failed"
                ready = [cell for cell in left if all(self.finished(b) for b in self._before(cell))]
                for cell in ready[: self.workers - len(self.running)]:
                    left.remove(cell)
                    self.running[cell] = self._start(cell)
                    self.say(f"begins  {cell[0]} seed {cell[1]}")
                self._reap()
                time.sleep(0.05)
        finally:
            for process in self.running.values():
                process.kill()
                process.wait()
        return self.failed

    def _before(self, cell: Key) -> list[Key]:
        return [(name, cell[1]) for name in self.matrix.arm(cell[0]).after]

    def _stopped(self, left: list[Key]) -> list[Key]:
        return [cell for cell in left if any(before in self.failed for before in self._before(cell))]

    def _start(self, cell: Key) -> subprocess.Popen[bytes]:
        arm, folder = self.matrix.arm(cell[0]), self.places[cell]
        folder.mkdir(parents=True, exist_ok=True)
        after = {name: str(self.places[(name, cell[1])]) for name in arm.after}
        facts = {"cell": arm.function, "options": dict(arm.options), "seed": cell[1], "after": after}
        write_atomically(folder / "cell.json", json.dumps(facts).encode())
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        path = os.pathsep.join([entry or os.getcwd() for entry in sys.path])  # finds what this process found
        environment = {**os.environ, **threads, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}
        command = [sys.executable, "-m", "lightning_t2i.claims.cell", str(folder)]
        with (folder / "log.txt").open("ab") as log:
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment)

    def _reap(self) -> None:
        for cell, process in list(self.running.items()):
            if (code := process.poll()) is None:
                continue
            del self.running[cell]
            if process.stdin is not None:
                process.stdin.close()
            log = self.places[cell] / "log.txt"
            if self.finished(cell):
                outcome = Outcome.load(self.places[cell])
                self.say(f"done    {cell[0]} seed {cell[1]} in {outcome.ended - outcome.began:.0f} s")
            else:
                tail = "\n    ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:])
                self.failed[cell] = f"exit code {code}; the end of {log}:\n    {tail}"
                self.say(f"FAILED  {cell[0]} seed {cell[1]}: {self.failed[cell]}")
