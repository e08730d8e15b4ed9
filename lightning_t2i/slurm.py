"""What SLURM says about the job that a process belongs to, and what it does to the processes of a job."""

from __future__ import annotations

import os
import signal
import threading

INTERACTIVE = ("bash", "interactive")  # job names in which Lightning takes a process for one that SLURM did not start


def job_id() -> str | None:
    """The id that `scontrol requeue` takes, ARRAY_TASK for a task of an array; None outside of a batch job."""
    job, array = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_ARRAY_JOB_ID")
    if not job or os.environ.get("SLURM_JOB_NAME") in INTERACTIVE:
        return None
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else job


def restarted() -> bool:
    """Whether SLURM has put this job back into the queue before, or torchrun started its workers again.

    The same command then goes on with what it began.
    """
    requeued = job_id() is not None and os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    return requeued or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def outlive_signals(worker: int = 0) -> None:
    """Makes a process that reads data end by SIGTERM of its parent alone; for DataLoader's `worker_init_fn`.

    SLURM sends its signals to every process of a job. A worker that dies of one is an error in the training process,
    which then cannot save. SIGTERM must not be blocked for good either: by it the parent ends a worker, and waits.
    """
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    heard = (signal.SIGTERM, signal.SIGUSR1)
    signal.pthread_sigmask(signal.SIG_BLOCK, heard)  # threads inherit it: none of them is interrupted

    def wait() -> None:
        while True:
            found = signal.sigwaitinfo(heard)
            if found.si_signo == signal.SIGTERM and found.si_pid == os.getppid():
                os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
