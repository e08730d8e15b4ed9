"""A time budget for what is done beside training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lightning as L


class Budget:
    """Keeps extra work within a share of the training time so far.

    The first piece of work is always allowed; another one when it would keep within the share if it took as long as
    the longest so far.

    Args:
        max_fraction: share in (0, 1].
        clock: seconds.
    """

    def __init__(self, max_fraction: float, clock: Callable[[], float]):
        self.max_fraction, self.clock = max_fraction, clock
        self.spent = self.longest = 0.0
        self.skipped = 0
        self._start = clock()

    def start(self) -> None:
        """Training begins now."""
        self._start, self.spent = self.clock(), 0.0

    def allows(self, trainer: L.Trainer) -> bool:
        """Whether there is time for one more; rank 0 decides for all."""
        trained = self.clock() - self._start - self.spent
        fits = self.spent == 0 or self.spent + self.longest <= self.max_fraction * trained
        fits = trainer.strategy.broadcast(fits)
        self.skipped += not fits
        return fits

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Books the time of what runs inside."""
        start = self.clock()
        try:
            yield
        finally:
            took = self.clock() - start
            self.spent, self.longest = self.spent + took, max(self.longest, took)
