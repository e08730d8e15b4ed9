"""What the processes of one start tell each other before they form a group: the checkpoint that rank 0 chose."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from lightning_t2i.errors import UserError
from lightning_t2i.state_io import write_atomically

HANDED_DOWN = "LIGHTNING_T2I_RESUME"  # rank 0's decision, for the processes that it launches
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
TORCHRUN = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")


def rank() -> int:
    """Global rank of this process as the launcher tells it; 0 for the one that launches the others."""
    names = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
    return next((int(os.environ[n]) for n in names if n in os.environ), 0)


def token() -> str | None:
    """What the processes of one start under SLURM or torchrun have in common, and no other start has.

    Raises:
        UserError: torchrun was given nothing that tells its starts apart.
    """
    found = [os.environ.get(n, "0") for names in (SLURM, TORCHRUN) if names[0] in os.environ for n in names]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # FOLDER/attempt_N/RANK/error.json, FOLDER is new each time
        if os.environ.get("GROUP_WORLD_SIZE") == "1" and file:
            found.append(str(Path(file).parents[1]))
        elif os.environ["TORCHELASTIC_RUN_ID"] == "none" and "SLURM_STEP_ID" not in os.environ:
            raise UserError(
                "Nothing tells this start of torchrun from an earlier one, whose word rank 1 might take for rank 0's",
                where="torchrun",
                given="static rendezvous without --rdzv-id",
                fix="--standalone on one machine; on several --rdzv-backend c10d --rdzv-endpoint HOST:PORT "
                "--rdzv-id NAME, a new NAME for each start",
            )
    return "/".join(found) or None


def tell(folder: Path, resume: Path | None, name: str = "launch.json") -> None:
    """Rank 0's decision, for those it launches and for those that a launcher started beside it."""
    os.environ[HANDED_DOWN] = str(resume or "")
    if (mine := token()) is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / name, json.dumps({"launch": mine, "resume": str(resume or "")}).encode())


def hear(folder: Path, name: str = "launch.json", timeout: float = 600.0) -> Path | None:
    """Waits for what rank 0 tells.

    Raises:
        UserError: it tells nothing.
    """
    if HANDED_DOWN in os.environ:
        return Path(os.environ[HANDED_DOWN]) if os.environ[HANDED_DOWN] else None
    mine, end = token(), time.monotonic() + timeout
    while time.monotonic() < end:
        try:
            word = json.loads((folder / name).read_text())
        except (OSError, ValueError):
            word = {}
        if mine is not None and word.get("launch") == mine:
            return Path(word["resume"]) if word["resume"] else None
        time.sleep(0.2)
    raise UserError(
        "Rank 0 did not say where to resume",
        where=str(folder),
        fix="see rank 0's messages; the folder must be on a shared disk",
    )


def agreed(folder: Path, name: str, choose: Callable[[], Path | None]) -> Path | None:
    """What rank 0 chooses, on every rank."""
    if rank() != 0:
        return hear(folder, name)
    chosen = choose()
    tell(folder, chosen, name)
    return chosen
