"""Copies of finished checkpoints in another place, such as an object store; the run itself stays on a disk."""

from __future__ import annotations

import re
from pathlib import Path

from lightning_t2i.errors import UserError
from lightning_t2i.state_io import MARKER, complete_checkpoints, read_marker


def on_a_disk(place: str | Path, where: str) -> Path:
    """A folder for runs or checkpoints.

    Raises:
        UserError: it is an address such as s3://bucket/runs.
    """
    if re.match(r"[A-Za-z][\w+.-]+:/", str(place)):  # of the two slashes a Path keeps one
        raise UserError(
            "A run needs a disk: object stores can neither rename a folder at once nor say that a file is safe, so a "
            "kill could leave a checkpoint that looks complete",
            where=where,
            given=place,
            allowed="a folder on a local or shared disk",
            fix="checkpoints.mirror copies finished checkpoints to such an address",
        )
    return Path(place)


def mirror_of(place: str, run: str) -> str:
    """Where the copies of a run's checkpoints are."""
    return f"{place.rstrip('/')}/{run}"


def refuse_others(place: str, run: str) -> None:
    """For a training that starts from the beginning: its checkpoints would stand among those of an earlier one.

    Raises:
        UserError: checkpoints of a run of this name are there already, or the place cannot be read.
    """
    mirror = Mirror(address := mirror_of(place, run))
    try:
        found = mirror.files.glob(f"{mirror.place}/step-*/{MARKER}")
    except Exception as error:  # whatever a file system of fsspec's raises
        what, fix = "The place for copies of checkpoints cannot be read", f"{type(error).__name__}: {error}"
        raise UserError(what, where="checkpoints.mirror", given=address, fix=fix) from error
    if found:
        raise UserError(
            "Copies of another training's checkpoints are there, and this one starts from the beginning",
            where="checkpoints.mirror",
            given=address,
            allowed="a folder without checkpoints",
            fix=f"rename {address}, or train under another name with --run OTHER_NAME",
        )


class Mirror:
    """Copies complete checkpoints to `PLACE/step-XXXXXXXX`, the marker last; never removes any there.

    Args:
        place: an address that fsspec knows, or a folder.

    Raises:
        UserError: fsspec does not know it, or lacks a package for it.
    """

    def __init__(self, place: str):
        import fsspec

        try:
            self.files, self.place = fsspec.url_to_fs(place)
        except (ImportError, ValueError) as error:
            raise UserError(
                "Checkpoints cannot be copied there", where="checkpoints.mirror", given=place, fix=str(error)
            ) from error

    def update(self, folder: Path, newest: Path) -> None:
        """Copies `newest`, which may replace an older one, and what else is not there yet."""
        for path in complete_checkpoints(folder):
            if path == newest or not self.files.exists(f"{self.place}/{path.name}/{MARKER}"):
                self._copy(path)

    def _copy(self, path: Path) -> None:
        target = f"{self.place}/{path.name}"
        self.files.makedirs(target, exist_ok=True)
        if self.files.exists(f"{target}/{MARKER}"):
            self.files.rm_file(f"{target}/{MARKER}")
        for name in [*read_marker(path)["files"], MARKER]:
            self.files.put_file(str(path / name), f"{target}/{name}")
