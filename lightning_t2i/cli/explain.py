"""jsonargparse's messages in our own words: which key, what was given, what is allowed, how to repair it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import itertools
import pkgutil
import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import SequenceMatcher
from typing import Any

from jsonargparse import ArgumentParser

from lightning_t2i.cli.configs import Merged
from lightning_t2i.cli.listing import method_classes
from lightning_t2i.errors import UserError, closest

_TOKENS = re.compile(
    r'Parser key "(?P<key>[^"]*)"'
    r"|(?:Option '|Group '(?P<group>[^']+)' does not accept option ')(?P<unknown>[^']+)'"
    r"|module '(?P<module>[^']+)' has no attribute '(?P<attribute>[^']+)'"
    r"|No module named '(?P<missing>[^']+)'"
    r"|arguments are required: (?P<required>\S+)"
    r"|Key \"(?P<required_key>[^\"]+)\" is required"
    r"|(?P<subclass>does not correspond to a subclass of \w+)",
    re.MULTILINE,
)


def descend(config: Any, keys: Iterable[str]) -> tuple[list[str], Any]:
    """Follows keys as jsonargparse names them, which leave out `init_args`; returns the full path and the value."""
    path: list[str] = []
    for key in keys:
        for part in key.split("."):
            if isinstance(config, Mapping) and "class_path" in config and part not in (*config, "init_args"):
                path, config = [*path, "init_args"], config.get("init_args")
            path = [*path, part]
            if isinstance(config, list) and part.isdigit() and int(part) < len(config):
                config = config[int(part)]
            else:
                config = config.get(part) if isinstance(config, Mapping) else None
    return path, config


def accepted(target: Any) -> list[str]:
    """Parameter names of a class or function, those of its bases too where it takes **kwargs."""
    names: list[str] = []
    for owner in inspect.getmro(target) if inspect.isclass(target) else [target]:
        if inspect.isclass(owner) and "__init__" not in vars(owner):
            continue
        with contextlib.suppress(TypeError, ValueError):
            parameters = inspect.signature(owner).parameters.values()
            names += [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return [n for n in dict.fromkeys(names) if n != "self"]


def find(class_path: str) -> Any:
    """The object that a dotted path names, or None."""
    module, _, name = class_path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None) if module else None
    except ImportError:
        return None


def explain(message: str, parser: ArgumentParser, merged: Merged) -> tuple[list[str], UserError]:
    """Path to drop, and the mistake in our own words, from a message of jsonargparse."""
    keys: list[str] = []
    leaf: re.Match[str] | None = None
    end = 0
    for found in _TOKENS.finditer(message):
        if found["key"] is None:
            leaf = found
            break
        keys.append(found["key"])
        end = found.end()
    path, value = descend(merged.config, keys)
    if leaf is None:
        return path, _wrong_value(path, value, _inner(message, end), merged)
    if leaf["required"] or leaf["required_key"]:
        path = descend(merged.config, [*keys, (leaf["required"] or leaf["required_key"]).rstrip(",")])[0]
        where = ".".join(path)
        return path, UserError("A value is missing", where=where, fix=f"give it in the config, or as --{where} VALUE")
    if leaf["unknown"]:
        return _unknown_key(path, value, leaf, parser, message, merged)
    return _unknown_class(path, value, leaf, merged)


def _at(path: list[str], merged: Merged) -> str:
    where = ".".join(path)
    source = merged.source_of(where)
    return f"{where} ({source})" if source else where


def _inner(message: str, start: int) -> str:
    """The lines of a message that are indented under the line in which `start` is."""
    head = message.rfind("\n", 0, start) + 1
    indent = len(message[head:]) - len(message[head:].lstrip())
    lines = message[start:].splitlines()[1:]
    inside = itertools.takewhile(lambda line: len(line) - len(line.lstrip()) > indent, lines)
    return "\n".join(inside) or message


def _wrong_value(path: list[str], value: Any, message: str, merged: Merged) -> UserError:
    types = re.findall(r"Expected an? (.+?)(?:\. Got value|$)", message, re.MULTILINE)
    literal = re.search(r"Literal\[(.*?)\]", " ".join(types))
    if literal:
        allowed: Any = [word.strip(" '\"") for word in literal[1].split(",")]
    elif types:
        names = (re.sub(r"<class '(?:.*\.)?(\w+)'>", r"\1", t).replace("typing.", "") for t in types)
        allowed = " or ".join("null" if n == "NoneType" else n for n in names)
    else:
        lines = [line.strip(" -") for line in message.splitlines() if not re.search("Errors:|Given|Subtypes", line)]
        reason = next((line for line in reversed(lines) if line), "no reason is told")
        return UserError(f"A value is refused: {reason[:300]}", where=_at(path, merged), given=repr(value)[:200])
    return UserError("A value has the wrong type", where=_at(path, merged), given=repr(value), allowed=allowed)


def _unknown_key(
    path: list[str], value: Any, leaf: re.Match[str], parser: ArgumentParser, message: str, merged: Merged
) -> Any:
    unknown = leaf["unknown"]
    owners = re.findall(r"Problem with given class_path '([^']+)'", message[: leaf.start()])
    if leaf["group"]:
        path = leaf["group"].split(".")
    if isinstance(value, Mapping) and isinstance(value.get("class_path"), str):
        owners.append(value["class_path"])
    target = find(owners[-1]) if path and owners else None
    if target is not None:
        names = accepted(target)
    else:
        known = [a.dest for a in parser._actions if a.dest not in ("help", "config", "print_config")]
        start = f"{'.'.join(path)}." if path else ""
        names = list(dict.fromkeys(n[len(start) :].split(".")[0] for n in known if n.startswith(start)))
    names = [n for n in names if "print_" not in n and n != "params"]
    top = unknown.split(".")[0]
    head = [*path, *(["init_args"] if isinstance(value, Mapping) and "class_path" in value else []), top]
    given = descend(merged.config, head)[1] if not owners or isinstance(value, Mapping) else None
    near = closest(top, names)
    if len(names) > 12:
        names = [*sorted(names, key=lambda n: -SequenceMatcher(None, n, top).ratio())[:6], f"and {len(names) - 6} more"]
    fix = f"write {near} instead of {top}" if near else f"remove {top}"
    return head, UserError(
        "Unknown key", where=_at(head, merged), given=given, allowed=", ".join(names) or None, fix=fix
    )


def _unknown_class(path: list[str], value: Any, leaf: re.Match[str], merged: Merged) -> tuple[list[str], UserError]:
    given = str(value.get("class_path") if isinstance(value, Mapping) else value)
    where = _at([*path, "class_path"], merged)
    if path == ["model"]:
        candidates = method_classes()
    else:
        package, _, last = (leaf["missing"] or f"{leaf['module']}.{leaf['attribute']}").rpartition(".")
        candidates = [f"{package}.{name}" for name in _contents(package)]
        near = closest(f"{package}.{last}", candidates)
        candidates = [near + given[len(f"{package}.{last}") :]] if near else []
    near = closest(given, candidates)
    what = "The class is not of the kind that belongs here" if leaf["subclass"] else "There is no such class"
    allowed = ", ".join(candidates) if 1 < len(candidates) <= 12 else None
    fix = f"class_path: {near}" if near else None
    return path, UserError(what, where=where, given=given, allowed=allowed, fix=fix)


def import_failures(config: Any, merged: Merged, path: tuple[str, ...] = ()) -> Iterator[tuple[list[str], UserError]]:
    """Classes of a config whose module exists but cannot be imported: path to drop, and why."""
    if isinstance(config, Mapping):
        class_path = config.get("class_path")
        module = class_path.rpartition(".")[0] if isinstance(class_path, str) else ""
        if reason := _import_failure(module):
            what, where = f"The module of the class cannot be imported: {reason}", _at([*path, "class_path"], merged)
            yield (
                list(path),
                UserError(what, where=where, given=class_path, fix=f"python -c 'import {module}' shows where"),
            )
            return
    items = config.items() if isinstance(config, Mapping) else enumerate(config) if isinstance(config, list) else ()
    for key, value in items:
        yield from import_failures(value, merged, (*path, str(key)))


def _import_failure(module: str) -> str | None:
    """Why a module that exists cannot be imported; None when it can, or does not exist."""
    try:
        if module and importlib.util.find_spec(module) is not None:
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        return None if f"{module}.".startswith(f"{error.name}.") else str(error)
    except Exception as error:  # a module may raise anything
        return f"{type(error).__name__}: {error}"
    return None


def _contents(package: str) -> list[str]:
    """Public classes and modules of a package or module; empty when it cannot be imported."""
    try:
        module = importlib.import_module(package)
    except (ImportError, ValueError):
        return []
    classes = [name for name in dir(module) if inspect.isclass(getattr(module, name)) and name[0] != "_"]
    return classes + [m.name for m in pkgutil.iter_modules(getattr(module, "__path__", []))]
