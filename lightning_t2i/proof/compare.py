"""What differs between two runs, in any bit."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_t2i.loggers import read_lines
from lightning_t2i.state_io import AtomicCheckpointIO, newest

OF_THE_START = ("callbacks", "loops")  # what a run costs, and Lightning's counts of batches since the last start
OF_THE_CLOCK = ("time", "checkpoint/", "perf/")  # logged values that begin so are times and speeds


def leaves(nest: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of everything in a nest of dicts, lists and tuples; an empty one is a value itself."""
    if isinstance(nest, dict) and nest:
        for key, value in nest.items():
            yield from leaves(value, f"{path}/{key}")
    elif isinstance(nest, list | tuple) and nest:
        for i, value in enumerate(nest):
            yield from leaves(value, f"{path}/{i}")
    else:
        yield path, nest


def equal(a: Any, b: Any) -> bool:
    """Whether two values have the same bits: NaN equals itself, and -0.0 is not 0.0."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = a.shape == b.shape and a.dtype == b.dtype
        return alike and torch.equal(_bytes(a), _bytes(b))
    if isinstance(a, float) and isinstance(b, float):
        return struct.pack("d", a) == struct.pack("d", b)
    return type(a) is type(b) and bool(a == b)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def differences(a: Any, b: Any) -> list[str]:
    """Paths at which two nests of plain values and tensors differ."""
    left, right = dict(leaves(a)), dict(leaves(b))
    return [p for p in left | right if p not in left or p not in right or not equal(left[p], right[p])]


def final_state(run: Path) -> dict[str, Any]:
    """The newest checkpoint of a run without what belongs to its last start: weights, EMA, optimizers, positions."""
    checkpoint = newest(run / "checkpoints")
    if checkpoint is None:
        raise FileNotFoundError(f"{run} has no complete checkpoint")
    return {k: v for k, v in AtomicCheckpointIO().load_checkpoint(checkpoint).items() if k not in OF_THE_START}


def logged(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times and speeds."""
    lines = read_lines(run / "metrics.jsonl")
    kept = [{k: v for k, v in line.items() if not k.startswith(OF_THE_CLOCK)} for line in lines]
    return [line for line in kept if line.keys() - {"step", "samples"}]


def trace(run: Path) -> tuple[dict[str, Any], list[str]]:
    """What a run's `Witness` saw: {moment: ids or losses}, and the moments that were another thing the second time."""
    found: dict[str, Any] = {}
    changed = []
    for file in sorted(run.glob("trace-*.jsonl")):
        visits: dict[str, int] = {}
        for line in read_lines(file):
            moment = f"{file.stem}/{line['step']}/{line['micro']}"
            if "ids" in line:  # the micro-batch begins, perhaps once more
                visits[moment] = 0
                key, value = f"{moment}/ids", line["ids"]
            else:
                key, value = f"{moment}/loss {visits[moment]}", [line["group"], line["loss"]]
                visits[moment] += 1
            if found.setdefault(key, value) != value:
                changed.append(key)
    return found, changed


def between(whole: Path, killed: Path) -> list[str]:
    """All that differs between a run that nobody interrupted and one that was killed, and what the latter repeated."""
    (expected, _), (found, changed) = trace(whole), trace(killed)
    return [
        *(f"checkpoint{path}" for path in differences(final_state(whole), final_state(killed))),
        *(f"metrics{path}" for path in differences(logged(whole), logged(killed))),
        *(f"trace{path}" for path in differences(expected, found)),
        *(f"repeated otherwise: {key}" for key in changed),
    ]
