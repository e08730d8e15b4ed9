"""Config files: `base:` lists, deep merges and dotted overrides, before jsonargparse sees anything."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_t2i.errors import UserError, closest
from lightning_t2i.paths import resolve

Path_ = tuple[str, ...]
FILES = (".yaml", ".yml", ".json")
SECTIONS_WITH_CLASS = ("model", "data")


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: `off` and `no` are words, 1e-4 is a number; a key that appears twice is refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if not key.tag.endswith(":merge")]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key '{twice}' appears twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, expression) for tag, expression in rules if not tag.endswith((":bool", ":float", ":timestamp"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\.?\d[\d_]*(?:\.\d*)?(?:[eE][-+]?\d+)|\d[\d_]*\.\d*|\.\d+|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def read_yaml(text: str) -> Any:
    """The value of one YAML document; raises yaml.YAMLError."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


@dataclass
class Merged:
    """Configs merged in order.

    config: the result; sources: dotted key of each value -> where it was written; errors: what went wrong on the way,
    so that everything can be told at once.
    """

    config: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    errors: list[UserError] = field(default_factory=list)

    def add_file(self, path: Path, stack: tuple[Path, ...] = ()) -> None:
        """Merges a file, the files of its `base:` first."""
        found = (path if stack else resolve(path)).resolve()
        by = f" named in `base:` of {show(stack[-1])}" if stack else ""
        if found in stack:
            chain = " -> ".join(show(p) for p in (*stack[stack.index(found) :], found))
            self.errors.append(UserError("The configs name each other in a circle", where="base", given=chain))
            return
        if not found.is_file():
            there = {p.stem: p.name for p in found.parent.glob("*.yaml")}
            near = there.get(closest(found.stem, there) or "")
            fix = f"{path.parent / near}" if near else "python train.py list shows the configs"
            self.errors.append(
                UserError(
                    f"The config file{by} does not exist", where="base" if stack else "--config", given=path, fix=fix
                )
            )
            return
        try:
            content = read_yaml(found.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            self.errors.append(
                UserError("The config file is not readable YAML", where=show(found), given=" ".join(str(error).split()))
            )
            return
        if not isinstance(content, dict | None):
            self.errors.append(
                UserError("A config file must be a mapping", where=show(found), given=type(content).__name__)
            )
            return
        content = content or {}
        base = content.pop("base", None) or []
        if not isinstance(base, list | str) or not all(isinstance(name, str) for name in base):
            self.errors.append(
                UserError("`base` must be a file or a list of files", where=f"base in {show(found)}", given=base)
            )
            base = []
        for name in [base] if isinstance(base, str) else base:
            self.add_file(found.parent / name, (*stack, found))
        for key, value in content.items():
            self.add(tuple(str(key).split(".")), value, show(found))

    def add_override(self, key: str, text: str | None) -> None:
        """Merges one `--key text` of the command line; the `init_args` of a class may be left out of the key."""
        try:
            value = True if text is None else read_yaml(text)
        except yaml.YAMLError:
            value = text  # prompts and the like need no quotes
        parts, node = [], self.config
        for part in key.split("."):
            if (
                isinstance(node, Mapping)
                and "class_path" in node
                and part not in ("class_path", "init_args", "dict_kwargs")
            ):
                parts.append("init_args")
                node = node.get("init_args") or {}
            parts.append(part)
            node = node.get(part) if isinstance(node, Mapping) else None  # type: ignore[assignment]
        self.add(tuple(parts), value, "command line")

    def add(self, path: Path_, value: Any, source: str) -> None:
        """Merges one value at a path: mappings key by key, everything else replaces what was there."""
        for part in reversed(path[1:]):
            value = {part: value}
        self._merge(self.config, path[0], value, path[:1], source)

    def _merge(self, node: dict[str, Any], key: str, value: Any, path: Path_, source: str) -> None:
        if isinstance(value, str) and value.endswith(FILES) and (len(path) == 1 or key == "init_args"):
            self._refuse_file(path, value, source)
            return
        if len(path) == 1 and key in SECTIONS_WITH_CLASS and isinstance(value, str):
            value = {"class_path": value}
        old = node.get(key)
        for text, other in ((old, value), (value, old)):
            if isinstance(text, str) and text.endswith(FILES) and isinstance(other, Mapping):
                self._refuse_file(path, text, source)
                return
        if not isinstance(value, Mapping):
            self._forget(path)
            node[key] = value
            self.sources[".".join(path)] = source
            return
        if not isinstance(old, dict):
            self._forget(path)
            old = node[key] = {}
            self.sources[".".join(path)] = source
        # What a file says of init_args before any file names a class is meant for the class to come.
        changed = "class_path" in value and old.get("class_path", value["class_path"]) != value["class_path"]
        if changed and not (path == ("model",) and is_subclass(value["class_path"], old.get("class_path"))):
            for name in ("init_args", "dict_kwargs"):
                old.pop(name, None)
                self._forget((*path, name))
        for name, child in value.items():
            self._merge(old, str(name), child, (*path, str(name)), source)

    def _forget(self, path: Path_) -> None:
        dotted = ".".join(path)
        for key in [k for k in self.sources if k == dotted or k.startswith(f"{dotted}.")]:
            del self.sources[key]

    def _refuse_file(self, path: Path_, value: str, source: str) -> None:
        self.errors.append(
            UserError(
                "A section cannot be the name of a file: file and other keys of the section would replace each other",
                where=f"{'.'.join(path)} in {source}",
                given=value,
                fix=f"base: [{value}] at the top of the file (paths are relative to it) merges both",
            )
        )

    def source_of(self, key: str) -> str | None:
        """Where the value at a dotted key, or the nearest mapping around it, was written."""
        parts = key.split(".")
        return next((s for n in range(len(parts), 0, -1) if (s := self.sources.get(".".join(parts[:n])))), None)


def is_subclass(new: str, old: str | None) -> bool:
    """Whether the class of one path derives from that of another; a follow-up method inherits its parent's settings."""
    if old is None:
        return False
    try:
        classes = [getattr(importlib.import_module(p.rpartition(".")[0]), p.rpartition(".")[2]) for p in (new, old)]
        return issubclass(*classes)
    except Exception:  # a module may raise anything; the parser will say what is wrong
        return False


def show(path: Path) -> str:
    """A path as a user would type it here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def merge(files: Iterable[Path], overrides: Iterable[tuple[str, str | None]] = ()) -> Merged:
    """Config files in order, then the overrides of the command line."""
    merged = Merged()
    for file in files:
        merged.add_file(Path(file))
    for key, text in overrides:
        merged.add_override(key, text)
    return merged


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> {dotted key: value}; an empty mapping stays a value."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
