"""Filters on the columns of an index: which samples of a data set a stream draws from, and in which buckets."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from datamodules.buckets import Buckets
from datamodules.index_file import Index
from datamodules.rows import OUT, PIECE, Rows
from lightning_t2i.errors import UserError

log = logging.getLogger(__name__)
Where = Mapping[str, Sequence[float | None]]


def chosen_rows(
    index: Index,
    languages: Sequence[str] | None = None,
    where: Where | None = None,
    limit: int | None = None,
    buckets: Buckets | None = None,
) -> Rows:
    """The rows that pass all filters, in the classes of their buckets; a part of the index is looked at at a time.

    Args:
        index: of the split.
        languages: keep samples with a caption in one of these; None keeps all.
        where: see `passing`.
        limit: keep only the first so many of them.
        buckets: pictures that fit none are left out.

    Raises:
        UserError: no such language or column, or not a range.
    """
    n = len(index)
    if languages is None and not where and buckets is None:
        return Rows(n if limit is None else min(limit, n))
    classes, left, misfits = np.full(n, OUT, np.uint8), n if limit is None else limit, 0
    for start in range(0, n, PIECE):
        part = slice(start, min(start + PIECE, n))
        passes = np.ones(part.stop - start, bool)
        if languages is not None:
            passes &= speaking(index, languages, part)
        if where:
            passes &= passing(index, where, part)
        kinds = np.where(passes, np.uint8(0), np.uint8(OUT))
        if buckets is not None:
            kinds = np.where(passes, buckets.of(index["width"][part], index["height"][part]), np.uint8(OUT))
            misfits += int((passes & (kinds == OUT)).sum())
        if (kept := int(np.count_nonzero(kinds != OUT))) > left:
            kinds[np.flatnonzero(kinds != OUT)[left:]] = OUT
        classes[part] = kinds
        left -= min(kept, left)
        if not left:
            break
    if misfits:
        log.warning(
            "%d pictures are left out: they would be enlarged more than %g times in the bucket of their aspect, or "
            "have no known size",
            misfits,
            buckets.max_upscale if buckets else 0,
        )
    return Rows(n, classes, 1 if buckets is None else len(buckets.all))


def speaking(index: Index, languages: Sequence[str], part: slice) -> np.ndarray:
    """Which rows of a part have a caption in one of the languages, bool [rows]."""
    told = [name for name in index.columns if name.startswith("caption_") and name != "caption_length"]
    known = [name.removeprefix("caption_") for name in told]
    for language in languages:
        if language not in known:
            raise UserError("No captions in this language", where="languages", given=language, allowed=known)
    return np.any([index[f"caption_{language}"][part] for language in languages], axis=0)


def passing(index: Index, where: Where, part: slice) -> np.ndarray:
    """Which rows of a part pass all filters, bool [rows].

    Args:
        index: of the split.
        where: column -> [least, most], both allowed themselves; None leaves an end open. `aspect` is width / height.
            A row without a value (NaN) does not pass.
        part: of the index.

    Raises:
        UserError: no such column of numbers, or not a range.
    """
    numbers = [name for name in index.numbers if name != "shard" and "offset" not in name]
    passes: np.ndarray = np.ones(part.stop - part.start, bool)
    for column, limits in where.items():
        if column not in numbers and column != "aspect":
            allowed = [*numbers, "aspect"]
            raise UserError("The index has no such column of numbers", where="where", given=column, allowed=allowed)
        if len(limits) != 2 or (None not in limits and limits[0] > limits[1]):  # type: ignore[operator]
            raise UserError("Not a range", where=f"where.{column}", given=limits, allowed="[least, most], null is open")
        if column == "aspect":
            values = index["width"][part] / np.maximum(index["height"][part], 1)
        else:
            values = index[column][part].astype(np.float64)
        least, most = (-np.inf if limits[0] is None else limits[0]), (np.inf if limits[1] is None else limits[1])
        passes &= (values >= least) & (values <= most)
    return passes
