"""Progress in training steps: a bar with an ETA on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0


class Progress(ProgressBar):
    """Steps done of `max_steps`, speed, ETA and the method's losses."""

    def __init__(self) -> None:
        super().__init__()
        self.bar: tqdm | None = None
        self._last = 0

    def enable(self) -> None:
        """Lightning's switch; rank 0 alone shows a bar, whatever it says."""

    def disable(self) -> None:
        """See `enable`."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        terminal = sys.stderr.isatty()
        self._last = trainer.global_step
        self.bar = tqdm(
            total=trainer.max_steps if trainer.max_steps > 0 else None,
            initial=self._last,
            desc="training",
            unit="step",
            dynamic_ncols=terminal,
            ncols=None if terminal else 0,  # 0: the numbers without a bar
            mininterval=0.2 if terminal else SECONDS_BETWEEN_LINES,
            file=sys.stderr if terminal else _Lines(),
            smoothing=0.05,
        )

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *unused: Any) -> None:
        if self.bar is not None and trainer.global_step > self._last:
            losses = {k: f"{float(v):.4g}" for k, v in trainer.progress_bar_metrics.items() if k != "v_num"}
            self.bar.set_postfix(losses, refresh=False)
            self.bar.update(trainer.global_step - self._last)
            self._last = trainer.global_step

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints without breaking the bar."""
        tqdm.write(" ".join(map(str, args)), file=sys.stderr)


class _Lines:
    """A file for tqdm that turns its redrawing into lines."""

    def write(self, text: str) -> None:
        text = text.strip("\r\n ")
        if text:
            sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")

    def flush(self) -> None:
        sys.stderr.flush()
