"""All the mistakes of a config at once.

jsonargparse stops at the first one, so each is noted, dropped and parsed past.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import itertools
import pkgutil
import re
from argparse import ArgumentError
from collections.abc import Iterable, Mapping
from copy import deepcopy
from difflib import SequenceMatcher
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from lightning_t2i.cli.configs import Merged
from lightning_t2i.cli.listing import method_classes
from lightning_t2i.errors import UserError, closest

LIMIT = 20
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


class Mistakes(UserError):
    """Several mistakes of a user, told together."""

    def __init__(self, errors: Iterable[UserError]):
        self.errors = list(errors)
        super().__init__(self.errors[0].what)
        n = len(self.errors)
        self.args = (
            str(self.errors[0])
            if n == 1
            else f"{n} problems\n\n" + "\n\n".join(f"{i}. {e}" for i, e in enumerate(self.errors, 1)),
        )


def descend(config: Any, keys: Iterable[str]) -> tuple[list[str], Any]:
    """Follows keys as jsonargparse names them, which leave out `init_args`; returns the full path and the value."""
    path: list[str] = []
    for key in keys:
        for part in key.split("."):
            if isinstance(config, Mapping) and part not in config and isinstance(config.get("init_args"), Mapping):
                path, config = [*path, "init_args"], config["init_args"]
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
        name = (leaf["required"] or leaf["required_key"]).rstrip(",")
        where = ".".join([*path, name])
        return [*path, name], UserError(
            "A value is missing", where=where, fix=f"give it in the config, or as --{where} VALUE"
        )
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
    problem = re.search(r"Problem with given class_path '([^']+)':\n\s*(.+)", message)
    if problem:
        where = _at([*path, "class_path"], merged)
        return UserError(f"The class cannot be used: {problem[2]}", where=where, given=problem[1])
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
    return head, UserError("Unknown key", where=_at(head, merged), given=given, allowed=", ".join(names), fix=fix)


def _unknown_class(path: list[str], value: Any, leaf: re.Match[str], merged: Merged) -> tuple[list[str], UserError]:
    given = str(value.get("class_path") if isinstance(value, Mapping) else value)
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
    return path, UserError(what, where=_at([*path, "class_path"], merged), given=given, allowed=allowed, fix=fix)


def _contents(package: str) -> list[str]:
    """Public classes and modules of a package or module; empty when it cannot be imported."""
    try:
        module = importlib.import_module(package)
    except (ImportError, ValueError):
        return []
    classes = [name for name in dir(module) if inspect.isclass(getattr(module, name)) and name[0] != "_"]
    return classes + [m.name for m in pkgutil.iter_modules(getattr(module, "__path__", []))]


def locate(error: UserError, values: Mapping[str, Any]) -> UserError:
    """Completes the key of an error whose constructor knew only the end of it, where one value of the config fits."""
    where = error.where
    if where is not None and where not in values:
        found = [k for k, v in values.items() if k.endswith(f".{where}") and str(v) == str(error.given)]
        if len(found) == 1:
            error.where = found[0]
            error.args = (str(error).replace(f"where:   {where}", f"where:   {found[0]}"),)
    return error


def parse_all(parser: ArgumentParser, merged: Merged) -> tuple[Namespace | None, list[UserError]]:
    """Parses a merged config; mistakes are dropped one by one, at most 20 times.

    Returns:
        The parsed config without what was wrong in it (None when nothing could be parsed), and the mistakes.
    """
    errors: list[UserError] = []
    dropped: list[list[str]] = []
    work = Merged(deepcopy(merged.config), merged.sources)
    for _ in range(LIMIT):
        try:
            return parser.parse_object(deepcopy(work.config)), errors
        except (ArgumentError, TypeError, ValueError, KeyError) as error:
            path, mistake = explain(str(error), parser, work)
        if path in dropped or any(
            path[: len(d)] == d or d[: len(path)] == path for d in dropped if "required" in mistake.what
        ):
            break
        if not (mistake.what == "A value is missing" and any(d[: len(path)] == path for d in dropped)):
            errors.append(mistake)
        dropped.append(path)
        if not drop(work.config, path):
            break
    return None, errors


def drop(config: dict[str, Any], path: list[str]) -> bool:
    """Removes the value at a path; False when there is none."""
    node: Any = config
    for part in path[:-1]:
        node = (
            node[int(part)]
            if isinstance(node, list) and part.isdigit()
            else node.get(part)
            if isinstance(node, Mapping)
            else None
        )
    if isinstance(node, dict) and path and path[-1] in node:
        del node[path[-1]]
        return True
    return False
