"""ECAD: how processes share a generation, which shares and scores are refused, and networks that are cut over them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import caching
import pytest
import torch
from caching import fit, method, pipeline
from torch import Tensor

from lightning_t2i.caching.calibration import refuse_shares
from lightning_t2i.caching.comparison import stock_caches
from lightning_t2i.caching.rewards import Reward
from lightning_t2i.errors import UserError
from lightning_t2i.strategies import sharding

pytestmark = pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode")


def stock_caches_at_the_end(rank: int, folder: str, source: str, replicate: int) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    module = method(source, guidance=1.0, micro_batch=3, search={"population": 2})
    module.finish = lambda: found.update(stock_caches(module))
    Path(folder).mkdir(exist_ok=True)
    caching.trainer_for(Path(folder), 1, replicate=replicate).fit(module, caching.data(Path(folder)))
    return found


@pytest.mark.slow
def test_processes_with_unlike_numbers_of_micro_batches_compare_stock_caches(tmp_path: Path, ranks: Any) -> None:
    """Three micro-batches on two processes: one calls the network twice as often as the other."""
    source = pipeline(tmp_path / "flux", "flux")
    alone = stock_caches_at_the_end(0, str(tmp_path / "alone"), source, 1)
    assert ranks(stock_caches_at_the_end, str(tmp_path / "both"), source, 2) == [alone, alone]
    assert 0 < alone["TaylorSeer 3"]["relative_macs"] < 1


def test_batches_that_processes_cannot_share_are_refused_with_a_way_out() -> None:
    refuse_shares(100, 10, 1000, 100, 10)
    for world, fix in ((16, (96, 10)), (512, (64, 8)), (3, (99, 10)), (11, (99, 10))):
        with pytest.raises(UserError, match="every prompt with every seed") as told:
            refuse_shares(100, 10, 1000, 1, world)
        limit, seeds = fix
        assert f"limit: {limit}, model.seeds: {seeds}, data.main.batch_size: {limit * seeds}" in str(told.value)
        refuse_shares(limit, seeds, limit * seeds, 1, world)
    with pytest.raises(UserError, match="limit: 100, model.seeds: 10, data.main.batch_size: 1000"):
        refuse_shares(100, 10, 992, 100, 8)
    with pytest.raises(UserError, match="no pictures") as told:
        refuse_shares(100, 10, 1000, 100, 20)
    assert "10 micro-batches of 100 on 20 processes" in str(told.value) and "micro_batch: 50" in str(told.value)
    refuse_shares(100, 10, 1000, 50, 20)


def idle_on_ranks(rank: int, folder: str, source: str) -> str:
    with pytest.raises(UserError) as told:
        fit(Path(folder), method(source, micro_batch=8), 1, replicate=2)
    return told.value.what


def test_a_search_that_would_leave_a_process_idle_does_not_begin(tmp_path: Path, ranks: Any) -> None:
    source = pipeline(tmp_path / "pipeline")
    assert ranks(idle_on_ranks, str(tmp_path / "run"), source) == ["Some processes would make no pictures"] * 2


class Broken(caching.Stripes):
    """No number for the last prompt of a micro-batch."""

    def __call__(self, images: Tensor, records: Any) -> Tensor:
        return super().__call__(images, records).where(records.id != records.id.max(), torch.nan)


def test_scores_that_are_not_finite_end_the_search(tmp_path: Path) -> None:
    module = method(pipeline(tmp_path / "pipeline"))
    reward: Reward = Broken()
    module.reward = reward
    with pytest.raises(UserError, match="not finite") as told:
        fit(tmp_path / "run", module, 1)
    assert told.value.where == "model.reward" and "Broken: 8 of 16" in str(told.value)


def cut_on_ranks(rank: int, folder: str, source: str) -> list[str]:
    sharding.REPLICATE_BELOW_BYTES, found = 0, []
    for race, size in ((True, 4), (False, 3)):
        with pytest.raises(UserError) as told:
            fit(Path(folder), method(source, micro_batch=size, search={"race": race}), 1, replicate=1, shard=2)
        found.append(str(told.value))
    return found


def test_a_network_that_is_cut_needs_equal_shares(tmp_path: Path, ranks: Any) -> None:
    """Told before its captions are encoded, where processes would wait for each other for ever."""
    for race, uneven in ranks(cut_on_ranks, str(tmp_path / "run"), pipeline(tmp_path / "pipeline"), timeout=120):
        assert "denoiser, text; race True, 2 micro-batches on 2 processes" in race
        assert "denoiser, text; race False, 3 micro-batches on 2 processes" in uneven
