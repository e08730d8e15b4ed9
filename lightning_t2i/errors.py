"""One error type for everything a user can get wrong."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a config, a command or the data, told in the five parts that lead to its repair.

    Args:
        what: what happened, one sentence without a full stop.
        where: the config key path, command-line option or file.
        given: the value that was given.
        allowed: the allowed values, or a sentence; of a collection the closest match to `given` is named first.
        fix: what to do, preferably a command or the value to write.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        given: object = None,
        allowed: Iterable[object] | str | None = None,
        fix: str | None = None,
    ):
        self.what, self.where, self.given, self.fix = what, where, given, fix
        lines = [what]
        if where is not None:
            lines.append(f"  where:   {where}")
        if given is not None:
            lines.append(f"  given:   {given}")
        if allowed is not None:
            lines.append(f"  allowed: {allowed if isinstance(allowed, str) else describe(allowed, given)}")
        if fix is not None:
            lines.append(f"  fix:     {fix}")
        super().__init__("\n".join(lines))


_FIXES = {
    errno.ENOSPC: "make room there; what was saved before is whole, and the same command goes on from it",
    errno.EROFS: "write to another folder; LIGHTNING_T2I_RUNS=FOLDER holds runs",
}
_FIXES |= {errno.EDQUOT: _FIXES[errno.ENOSPC], errno.EACCES: _FIXES[errno.EROFS]}


def of_the_disk(error: OSError) -> UserError | None:
    """A full disk or a folder that may not be written, told as a user's error; None for any other error."""
    if error.errno not in _FIXES:
        return None
    return UserError(str(error.strerror), where=error.filename, fix=_FIXES[error.errno])


def closest(given: object, allowed: Iterable[object]) -> str | None:
    """The member of `allowed` that is spelled most like `given`, or None when nothing comes near."""
    matches = difflib.get_close_matches(str(given), [str(a) for a in allowed], n=1, cutoff=0.5)
    return matches[0] if matches else None


def describe(allowed: Iterable[object], given: object = None) -> str:
    """`allowed` as one line, the closest match to `given` first when there is one."""
    names = [str(a) for a in allowed]
    match = closest(given, names) if given is not None else None
    return ", ".join(names) + (f" (did you mean {match}?)" if match else "")
