"""Work that a training does not wait for, and whose failure it hears of all the same."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch


class Background:
    """Does jobs one after the other, in a thread or at once.

    A process that ends waits for its jobs, unless it is killed.

    Args:
        asynchronous: in a thread; else `submit` returns when the job is done and raises what went wrong.
        device: of this process. CUDA's first is every new thread's own, and what a job asks of it would lie there.
    """

    def __init__(self, asynchronous: bool, device: torch.device):
        use = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
        self._pool = ThreadPoolExecutor(1, "checkpoint", *use) if asynchronous else None
        self._jobs: list[Future[object]] = []

    def submit(self, job: Callable[[], object]) -> None:
        if self._pool is None:
            job()
        else:
            self._jobs.append(self._pool.submit(job))

    def wait(self) -> None:
        """Waits for all jobs.

        Raises:
            Exception: the first that a job raised since the last call.
        """
        jobs, self._jobs = self._jobs, []
        failures = [job.exception() for job in jobs]
        for failure in failures:
            if failure is not None:
                raise failure

    def close(self) -> None:
        """Waits for all jobs and ends the thread."""
        if self._pool is not None:
            self._pool.shutdown()
