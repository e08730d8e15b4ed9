"""Where files are found: relative paths mean the working directory first, then the repository."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("exported", "data", "assets", "configs", "runs")  # of ours, which a config names before they are made


def resolve(path: str | Path) -> Path:
    """`path` itself when it exists from the working directory, else beside train.py, else unchanged.

    An unchanged path may be a hub id such as "org/name"; whoever opens it says what is missing.
    """
    path = Path(path).expanduser()
    if path.is_absolute() or path.exists():
        return path
    return ROOT / path if (ROOT / path).exists() else path


def may_be_hub_id(text: str) -> bool:
    """Whether a text has the form owner/name of a repository of the hub: no path, and in no folder of ours."""
    return text.count("/") == 1 and not text.startswith((".", "/", "~")) and text.split("/")[0] not in FOLDERS
