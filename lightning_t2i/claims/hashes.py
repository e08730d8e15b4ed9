"""What a result depends on: golden losses, configs and data. Equal hashes mean that it would come out the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_t2i.claims.spec import Arm, Matrix
from lightning_t2i.cli.configs import flatten, merge
from lightning_t2i.golden import FOLDER
from lightning_t2i.paths import resolve

Hashes = dict[str, Any]  # golden: digest, configs: {arm: digest}, data: {source: digest}


def digest(value: Any) -> str:
    """Hash of plain values or bytes, 12 hex digits; the order of keys does not count."""
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:12]


def golden_hash(method: str) -> str:
    """Of the golden losses, which change when the method's mathematics does; "absent" while there are none."""
    file = FOLDER / f"{method}.json"
    return digest(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else "absent"


def config_hash(config: str, overrides: Mapping[str, Any] | None = None) -> str:
    """Of a config with what it is based on and the architecture files that it names; comments do not count.

    Args:
        overrides: {dotted key: value} put on top, so that what the file has there does not count either.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    merged = merge([Path(config)], [(key, json.dumps(value)) for key, value in (overrides or {}).items()])
    if merged.errors:
        raise merged.errors[0]
    return digest([merged.config, {name: digest(file.read_bytes()) for name, file in _networks(merged.config)}])


def _networks(config: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    for value in flatten(config).values():
        if isinstance(value, str) and value.endswith(".json") and resolve(value).is_file():
            yield value, resolve(value)


def data_hash(source: str) -> str:
    """Of a data set, by the hashes of its shards; an embedded world is rendered first if need be."""
    from datamodules.records import data_folder

    return str(json.loads((data_folder(source) / "dataset.json").read_text(encoding="utf-8"))["sha256"])[:12]


def hashes(matrix: Matrix) -> Hashes:
    """All that the results of a matrix depend on."""
    configured = [(arm.name, arm.options) for arm in matrix.arms if "config" in arm.options]
    found = [golden_hash(method) for method in matrix.golden or (matrix.method,)]
    return {
        "golden": found[0] if len(found) == 1 else digest(found),
        "configs": {name: config_hash(options["config"], options.get("overrides")) for name, options in configured},
        "data": {source: data_hash(source) for source in matrix.data},
    }


def cell_key(matrix: Matrix, arm: Arm, found: Hashes) -> str:
    """What the cells of an arm are kept under: its function, options and hashes, and those of what it builds on."""
    config = found["configs"].get(arm.name)
    before = [cell_key(matrix, matrix.arm(name), found) for name in arm.after]
    return digest([arm.function, dict(arm.options), config, found["golden"], found["data"], before])


def changes(old: Hashes, new: Hashes) -> list[str]:
    """A line for each hash that differs; a result is stale when there is one."""
    a, b = flatten(old), flatten(new)
    return [f"{k}: {a.get(k, 'absent')} -> {b.get(k, 'absent')}" for k in sorted(a | b) if a.get(k) != b.get(k)]
