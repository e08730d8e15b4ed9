"""Which checkpoints of a run stay: the last ones, the best by a metric, and every n-th for ever."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger

from lightning_t2i.errors import UserError
from lightning_t2i.loggers import Clock
from lightning_t2i.state_io import complete_checkpoints, read_marker, remove, write_atomically

log = logging.getLogger(__name__)

SCORES = "scores.json"  # beside the checkpoints: {training step: value of the metric}


@dataclass(frozen=True)
class BestOptions:
    """Which checkpoints are the best.

    Args:
        metric: a name as it is logged, such as "val/loss". A checkpoint has the value that is logged at its training
            step, so validation has to run at steps of checkpoints.
        mode: which end of the metric is good.
        keep: number of checkpoints kept for it.
    """

    metric: str
    mode: Literal["min", "max"] = "min"
    keep: int = 1

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise UserError("At least one checkpoint must be kept", where="checkpoints.best.keep", given=self.keep)


def kept(steps: Collection[int], last: int, every: int, best: BestOptions | None, scores: Mapping[int, float]) -> set:
    """The training steps whose checkpoints stay.

    Args:
        last: so many of the newest.
        every: multiples of it; 0: none.
        scores: step -> value of `best.metric`; the newer of equal ones is better, what is not finite is no score.
    """
    found = set(sorted(steps)[-last:])
    found |= {step for step in steps if every and step % every == 0}
    if best is not None:
        sign = 1 if best.mode == "min" else -1
        scored = [step for step in steps if math.isfinite(scores.get(step, math.nan))]
        found |= set(sorted(scored, key=lambda step: (sign * scores[step], -step))[: best.keep])
    return found


def prune(folder: Path, last: int, every: int, best: BestOptions | None, scores: Mapping[int, float]) -> list[int]:
    """Removes the checkpoints that do not stay, see `kept`; returns their training steps."""
    there = {int(read_marker(path)["step"]): path for path in complete_checkpoints(folder)}
    gone = sorted(there.keys() - kept(there, last, every, best, scores))
    for step in gone:
        remove(there[step])
    return gone


class Scores(Logger):
    """Hears what is logged and keeps the values of one metric, also over a restart.

    Args:
        folder: checkpoints folder.
        metric: its name.
        resumed: training steps done; values of later steps belong to work that is done again.
        clock: see `Clock`.
    """

    def __init__(self, folder: Path, metric: str, resumed: int, clock: Clock):
        super().__init__()
        self.file, self.metric, self.clock = folder / SCORES, metric, clock
        known = json.loads(self.file.read_text()) if self.file.is_file() else {}
        self.values = {int(step): value for step, value in known.items() if int(step) <= resumed}
        self.names: set[str] = set()
        self._warned = False

    name = version = None

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        values, step, _ = self.clock.stamp(metrics, step)
        self.names |= values.keys()
        if self.metric in values:
            self.values[step] = float(values[self.metric])
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.file, json.dumps(self.values).encode())

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """There is nothing to keep."""

    def miss(self, steps: Collection[int]) -> None:
        """Says once that checkpoints were removed without a value, and what there is to choose from."""
        if not self._warned and (unscored := [step for step in steps if step not in self.values]):
            self._warned = True
            log.warning(
                "checkpoints.best: the checkpoint of step %d was removed without a value of '%s'. Validation has to "
                "run at steps of checkpoints. Logged so far: %s",
                unscored[0], self.metric, ", ".join(sorted(self.names)) or "nothing",
            )  # fmt: skip
