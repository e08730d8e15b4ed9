"""The embedded worlds: data sets that are written on first use, with nothing to download.

`ensure("shapes")` returns a data-set folder as any other (see `datamodules.shards`). Worlds lie under
`LIGHTNING_T2I_DATA`, or `data/` of the repository, in a folder named by a hash of their parameters.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from datamodules.shards import build
from lightning_t2i.errors import UserError
from lightning_t2i.paths import ROOT

NAMES = ("shapes", "openmoji")  # each a module here with a frozen dataclass Parameters and write(folder, parameters)


def cache() -> Path:
    """Where worlds are written."""
    return Path(os.environ.get("LIGHTNING_T2I_DATA") or ROOT / "data")


def ensure(name: str, **parameters: Any) -> Path:
    """The folder of a world, written first if need be; processes that ask at once wait for the one that writes.

    Args:
        name: "shapes" or "openmoji".
        parameters: fields of the world's `Parameters` that differ from their defaults.

    Raises:
        UserError: no such world or parameter.
    """
    if name not in NAMES:
        raise UserError(
            "Neither a data-set folder nor an embedded world", where="source", given=name, allowed=NAMES,
            fix="python -m datamodules.pack FOLDER OUT makes a data-set folder of your own pictures",
        )  # fmt: skip
    world = importlib.import_module(f"datamodules.worlds.{name}")
    known = [field.name for field in fields(world.Parameters)]
    for parameter in parameters:
        if parameter not in known:
            raise UserError(f"The {name} world has no such parameter", given=parameter, allowed=known)
    chosen = world.Parameters(**parameters)
    text = json.dumps({"version": world.VERSION, **asdict(chosen)}, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    return build(cache() / f"{name}-{digest}", lambda folder: world.write(folder, chosen))
