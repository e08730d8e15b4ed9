"""A run's method with the weights of a checkpoint, outside of a training."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L

from lightning_t2i.cli.configs import merge
from lightning_t2i.cli.session import Session, quiet
from lightning_t2i.errors import UserError
from lightning_t2i.method import MethodModule
from lightning_t2i.posthoc import use_average
from lightning_t2i.state_io import AtomicCheckpointIO, newest


def restore(
    method: MethodModule, run: Path, checkpoint: Path | None = None, ema: str | None = None
) -> tuple[Path, dict[str, Any]]:
    """Builds the networks of a method, in float32, and gives them the weights of a checkpoint; eval mode.

    Args:
        run: run folder; its newest checkpoint is taken where none is named.
        ema: the average that twins get, see `use_average`; None is the first of each group.

    Returns:
        The checkpoint's folder and its state; tensors that were not needed are still in the files.

    Raises:
        UserError: there is no complete checkpoint, or no such average.
    """
    found = checkpoint or newest(run / "checkpoints")
    if found is None:
        raise UserError("The run has no complete checkpoint", where="--run", given=run, fix="fit it first")
    state = AtomicCheckpointIO().load_checkpoint(found, whole=False)
    # bf16 is the strategy's to do, which is not here; and what is exported keeps all bits of the weights.
    method.common = dataclasses.replace(method.common, precision="fp32")
    method.configure_model()
    method.on_load_checkpoint(state)
    method.load_state_dict(state["state_dict"])
    if ema is not None:
        use_average(method.groups.values(), ema, run / "ema", method.counters.step)
    method.eval()
    return found, state


class UseAverage(L.Callback):
    """Evaluates another average than the first of each group.

    Args:
        label, run: see `use_average` and `restore`.
    """

    def __init__(self, label: str, run: Path):
        self.label, self.run = label, run

    def _use(self, trainer: L.Trainer, pl_module: Any) -> None:
        use_average(pl_module.groups.values(), self.label, self.run / "ema", pl_module.counters.step)

    on_validation_start = on_test_start = on_predict_start = _use


def constructed(config: Path, overrides: Mapping[str, Any] | None = None) -> MethodModule:
    """The method of a config file; its networks are built by `configure_model`.

    Args:
        overrides: {dotted key: value} of what the file has otherwise.
    """
    quiet()
    session = Session()
    words = [(key, json.dumps(value)) for key, value in (overrides or {}).items()]
    session.parse(merge([config], words), "validate")
    session.construct()
    return session.method


def trained(run: Path, weights: str = "ema") -> MethodModule:
    """The method of a run folder with the weights of its newest checkpoint, in eval mode.

    Args:
        weights: "ema" samples from the averaged weights as the method does, "raw" from those of the last step; else an
            average of `use_average`.
    """
    method = constructed(run / "config.yaml")
    restore(method, run, ema=None if weights in ("ema", "raw") else weights)
    if weights == "raw":
        for group in method.groups.values():
            group.ema = None  # `generator_of` then gives the weights themselves
    return method
