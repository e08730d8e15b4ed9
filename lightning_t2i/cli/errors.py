"""All the mistakes of a config at once.

jsonargparse stops at the first one, so each is noted, dropped and parsed past.
"""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from lightning_t2i.cli.configs import Merged
from lightning_t2i.cli.explain import explain, import_failures
from lightning_t2i.errors import UserError

LIMIT = 20


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
    for path, mistake in list(import_failures(work.config, work)):
        errors.append(mistake)
        dropped.append(path)
        drop(work.config, path)
    for _ in range(LIMIT):
        try:
            return parser.parse_object(deepcopy(work.config)), errors
        except (ArgumentError, TypeError, ValueError, KeyError) as error:
            path, mistake = explain(str(error), parser, work)
        if path not in dropped:  # else it is missing because it was dropped
            errors.append(mistake)
            dropped.append(path)
        while path and not drop(work.config, path):  # of a value that is missing, the class around it goes
            path = path[:-1]
        if not path:
            break
    return None, errors


def drop(config: dict[str, Any], path: list[str]) -> bool:
    """Removes the value at a path; False when there is none."""
    node: Any = config
    for part in path[:-1]:
        if isinstance(node, list):
            node = node[int(part)]
        elif isinstance(node, Mapping):
            node = node.get(part)
    if isinstance(node, dict) and path[-1] in node:
        del node[path[-1]]
        return True
    return False
