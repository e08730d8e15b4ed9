"""Small data sets written with the real shard writer."""

from collections.abc import Callable
from pathlib import Path

import pytest
from data_sets import write_data_set


@pytest.fixture
def make_data_set(tmp_path: Path) -> Callable[..., Path]:
    """make_data_set(n, name="toy", …) -> folder; see tests/helpers/data_sets.py."""

    def make(n: int = 50, name: str = "toy", **options) -> Path:
        return write_data_set(tmp_path / name, n, **options)

    return make
