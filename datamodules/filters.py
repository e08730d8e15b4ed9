"""Filters on the columns of an index: which samples of a data set a stream draws from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from datamodules.index_file import Index
from lightning_t2i.errors import UserError

Where = Mapping[str, Sequence[float | None]]


def passing(index: Index, where: Where) -> np.ndarray:
    """Which rows pass all filters, bool [rows].

    Args:
        index: of the split.
        where: column -> [least, most], both allowed themselves; None leaves an end open. `aspect` is width / height.
            A row without a value (NaN) does not pass.

    Raises:
        UserError: no such column of numbers, or not a range.
    """
    numbers = [n for n in index.columns if index[n].dtype.kind in "iufb" and n != "shard" and "offset" not in n]
    passes: np.ndarray = np.ones(len(index), bool)
    for column, limits in where.items():
        if column not in numbers and column != "aspect":
            allowed = [*numbers, "aspect"]
            raise UserError("The index has no such column of numbers", where="where", given=column, allowed=allowed)
        if len(limits) != 2 or (None not in limits and limits[0] > limits[1]):  # type: ignore[operator]
            raise UserError("Not a range", where=f"where.{column}", given=limits, allowed="[least, most], null is open")
        if column == "aspect":
            values = index["width"] / np.maximum(index["height"], 1)
        else:
            values = index[column].astype(np.float64)
        least, most = (-np.inf if limits[0] is None else limits[0]), (np.inf if limits[1] is None else limits[1])
        passes &= (values >= least) & (values <= most)
    return passes
