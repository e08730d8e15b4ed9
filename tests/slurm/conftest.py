"""The cluster that the tests of this folder share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import PATH, PROGRAMS, Cluster


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """These tests run where they are asked for, with `-m slurm`: they start daemons and take minutes."""
    if "slurm" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("slurm")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def cluster(repo: Path) -> Iterator[Cluster]:
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: ./run slurm-test installs SLURM where apt works")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    made = Cluster(folder, repo)
    try:
        made.start()
        yield made
    finally:
        made.close()
        shutil.rmtree(folder, ignore_errors=True)
