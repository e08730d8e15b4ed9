"""What pictures and metrics share: use a method in the middle of its training without leaving a trace in it."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
import numpy as np
import torch

from lightning_t2i.batch import Records
from lightning_t2i.errors import UserError
from lightning_t2i.metrics.scorers import pictures_of

log = logging.getLogger(__name__)


@contextmanager
def undisturbed(module: L.LightningModule) -> Iterator[None]:
    """Eval mode without gradients; afterwards every mode and every global random generator is what it was.

    no_grad, not inference_mode: sharded weights that were gathered in inference mode cannot be trained again.
    """
    modes = {m: m.training for m in module.modules()}
    python, numpy = random.getstate(), np.random.get_state()
    devices = [module.device] if module.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        module.eval()
        try:
            yield
        finally:
            for m, training in modes.items():
                m.training = training
            random.setstate(python)
            np.random.set_state(numpy)


def log_metrics(trainer: L.Trainer, metrics: Mapping[str, float], step: int) -> None:
    """Sends metrics to every logger; `step` counts training steps."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=step)


def records_of(trainer: L.Trainer, split: str) -> Iterator[Records]:
    """The `main` records of a finite split ("val" or "test"), this rank's share of every batch, on the CPU.

    Ends at once when the data module has no such split.
    """
    data = getattr(trainer, "datamodule", None)
    loader: Any = getattr(data, f"{split}_dataloader", None) or list  # None: what Lightning asks for
    for batch in loader():
        yield batch["main"]


def first_records(trainer: L.Trainer, split: str, n: int, device: torch.device | str) -> Iterator[Records]:
    """The first batches of `records_of`, on `device`, until all ranks together have at least n records.

    Ranks count together, for their shares differ where the data has buckets: all stop after the same batch, and what
    they compute may be collective.

    Raises:
        UserError: the split has no records.
    """
    seen = 0
    for records in records_of(trainer, split):
        yield records.to(device)
        seen += _together(trainer, len(records))
        if seen >= n:
            return
    if seen == 0:
        raise UserError("There are no prompts to evaluate on", where=f"data.{split}", fix="give the data a split")


def shared_records(trainer: L.Trainer, split: str, n: int, current: Records | None, where: str) -> list[Records]:
    """The first n records of `records_of` over all ranks and batches, the same on every rank, on the CPU.

    They stay in parts, one of each rank and batch: pictures and embeddings of two need not have one shape. A collective
    call; fewer than n are a warning.

    Args:
        current: what stands in for a split without records, this rank's share of it.
        where: the option that asks for n.
    """
    parts: list[Records] = []
    found = 0
    for records in records_of(trainer, split):
        parts += _shares(trainer, records, n - found)
        found = sum(map(len, parts))
        if found == n:
            break
    if not parts and current is not None:
        parts = _shares(trainer, current, n)
        found = sum(map(len, parts))
    if 0 < found < n and trainer.is_global_zero:
        log.warning("%s is %d, but the data have %d samples to take", where, n, found)
    return parts


def _shares(trainer: L.Trainer, records: Records, n: int) -> list[Records]:
    """The first n of what the ranks have of one batch, in the order of ranks."""
    parts: list[Records] = []
    for rank in range(trainer.world_size):
        if n > 0:
            parts.append(trainer.strategy.broadcast(records.slice(0, n).to("cpu"), rank))
            n -= len(parts[-1])
    return parts


def _together(trainer: L.Trainer, count: int) -> int:
    """The sum over the ranks."""
    if trainer.world_size == 1:
        return count
    return int(trainer.strategy.reduce(torch.tensor(count, device=trainer.strategy.root_device), reduce_op="sum"))


def data_name(trainer: L.Trainer, split: str) -> str:
    """What the data of a finite split is called, for instance "shapes-val"."""
    stream = _stream(trainer, split)
    return stream.identity["data"].replace("/", "-") if stream is not None else split


def data_pictures(trainer: L.Trainer, split: str) -> dict[str, Any]:
    """What tells the pictures of a finite split from others that are called the same, as far as it is known."""
    stream = _stream(trainer, split)
    return pictures_of(stream) if stream is not None else {}


def _stream(trainer: L.Trainer, split: str) -> Any:
    return getattr(getattr(trainer, "datamodule", None), "finite", {}).get(split)
