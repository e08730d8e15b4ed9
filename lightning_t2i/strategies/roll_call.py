"""Who is missing when a collective call fails: every process that ends says so in the store of the process group."""

from __future__ import annotations

import time
from datetime import timedelta

import torch.distributed as dist

WAIT = 2.0  # seconds in which the other processes notice the failure as well
_LOST = "lost contact"


def _name(rank: int) -> str:
    return f"t2i/ended/{rank}"


def begin(store: dist.Store, rank: int) -> None:
    """Forgets how an earlier training of this process ended."""
    store.delete_key(_name(rank))


def lost_contact(error: BaseException) -> bool:
    """Whether an error says that a process took no part in a collective call; gloo's is a plain RuntimeError."""
    of_gloo = ("gloo/transport", "Application timeout caused pair closure")
    return isinstance(error, dist.DistError) or any(said in str(error) for said in of_gloo)


def roll_call(error: BaseException, store: dist.Store, rank: int, world: int, wait: float = WAIT) -> list[str]:
    """Tells the other processes that this one ends with `error`; if it lost contact, asks what became of them.

    Args:
        store: of the process group.
        wait: seconds for the answers of all others together.

    Returns:
        A sentence for each process that ended with an error of its own or gives no answer.
    """
    lost, end, found = lost_contact(error), time.monotonic() + wait, []
    silent = f"of {world} processes does not answer: it was killed, hangs, or still waits for another"
    try:
        store.set(_name(rank), _LOST if lost else f"{type(error).__name__}: {error}")
        for other in [r for r in range(world) if r != rank] if lost else []:
            try:
                store.wait([_name(other)], timedelta(seconds=max(end - time.monotonic(), 0.01)))
            except dist.DistNetworkError:
                raise
            except RuntimeError:  # time is up; only some stores say so by an error of its own
                found.append(f"rank {other} {silent}")
                continue
            word = store.get(_name(other)).decode()
            if word != _LOST:
                found.append(f"rank {other} of {world} processes ended with {word}")
    except dist.DistNetworkError:  # rank 0 keeps the store
        return [f"rank 0 {silent}"]
    return found
