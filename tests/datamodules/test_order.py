"""The global order: a permutation per epoch that ranks, workers and batch grouping cannot change."""

import hashlib
import pickle

import numpy as np
import pytest

from datamodules.buckets import BucketOrder
from datamodules.order import GlobalOrder, batch_positions, finite_batches, keyed
from lightning_t2i.errors import UserError


def spelled_out(n: int, sha: str, seed: object, epoch: int, lanes: int, block: int) -> list[int]:
    """The definition of the module's docstring, step by step, for one epoch."""
    digest = hashlib.blake2b(f"{seed}\0{epoch}\0{sha}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))
    blocks = [list(range(start, min(start + block, n))) for start in range(0, n, block)]
    order = generator.permutation(len(blocks))
    inside = np.tile(np.arange(block, dtype=np.uint16), (len(blocks), 1))
    generator.permuted(inside, axis=1, out=inside)
    last = generator.permutation(len(blocks[-1]))
    shuffled = []
    for b in order:
        places = last if b == len(blocks) - 1 else inside[b]
        shuffled += [blocks[b][place] for place in places]
    cut = [part.tolist() for part in np.array_split(np.array(shuffled), lanes)]
    return [cut[q % lanes][q // lanes] for q in range(n)]


@pytest.mark.parametrize(("n", "lanes", "block"), [(1000, 16, 32), (1003, 16, 32), (37, 8, 5), (64, 64, 64), (7, 3, 1)])
def test_rows_follow_the_definition(n, lanes, block):
    order = GlobalOrder(n, "sha", 3, lanes, block)
    for epoch in (0, 1, 5):
        positions = np.arange(epoch * n, (epoch + 1) * n)
        assert order.rows(positions).tolist() == spelled_out(n, "sha", 3, epoch, lanes, block)


def test_every_epoch_is_a_permutation_and_epochs_differ():
    order = GlobalOrder(1003, "sha", 0)
    epochs = order.rows(np.arange(3 * 1003)).reshape(3, 1003)
    for rows in epochs:
        assert sorted(rows) == list(range(1003))
    assert not (epochs[0] == epochs[1]).all()
    assert not (epochs[1] == epochs[2]).all()


def test_seed_and_index_decide_the_order():
    places = np.arange(500)
    first = GlobalOrder(500, "a", 0).rows(places)
    assert (GlobalOrder(500, "a", 0).rows(places) == first).all()
    assert not (GlobalOrder(500, "b", 0).rows(places) == first).all()
    assert not (GlobalOrder(500, "a", 1).rows(places) == first).all()


def test_positions_may_be_asked_in_any_grouping():
    order, other = GlobalOrder(100, "a", 0, lanes=8, block=10), GlobalOrder(100, "a", 0, lanes=8, block=10)
    together = order.rows(np.arange(1000))
    backwards = np.array([other.row(p) for p in range(999, -1, -1)])
    assert (together == backwards[::-1]).all()


def test_a_lane_stays_in_few_blocks():
    order = GlobalOrder(64 * 100, "a", 0, lanes=16, block=100)
    lane = order.rows(np.arange(5, 64 * 100, 16))  # lane 5: 400 rows
    assert len(set(lane // 100)) <= 5
    assert len(set(lane[:100] // 100)) <= 2


def test_shuffle_false_is_index_order():
    order = GlobalOrder(10, "a", 0, shuffle=False)
    assert order.rows(np.arange(25)).tolist() == [*range(10), *range(10), *range(5)]


def test_block_rows_start_at_the_row_and_stay_in_its_block():
    order = GlobalOrder(25, "a", 0, block=10)
    assert list(order.block_rows(13)) == [13, 14, 15, 16, 17, 18, 19, 10, 11, 12]
    assert list(order.block_rows(23)) == [23, 24, 20, 21, 22]


def test_a_hundred_million_rows_are_planned_within_memory():
    order = GlobalOrder(20_000_000, "a", 0)
    order.row(0)
    plan = order._plan(0)
    assert sum(part.nbytes for part in plan) < 3 * 20_000_000  # bytes per row: 100 million stay under 0.3 GB


def test_one_epoch_is_planned_at_a_time_and_another_process_plans_its_own():
    order, whole = GlobalOrder(1000, "a", 0, 16, 32), GlobalOrder(1000, "a", 0, 16, 32).rows(np.arange(4000))
    for start in range(0, 4000, 64):  # batches touch two epochs at 1000, 2000 and 3000
        assert order.rows(np.arange(start, min(start + 64, 4000))).tolist() == whole[start : start + 64].tolist()
        assert list(order._plans) == [min(start + 63, 3999) // 1000]
    sent = pickle.dumps(order)
    assert len(sent) < 1000 and pickle.loads(sent).rows(np.arange(4000)).tolist() == whole.tolist()


@pytest.mark.parametrize("start", [0, 35])
def test_every_bucket_is_planned_before_its_batches_are_read(start, monkeypatch):
    def made() -> BucketOrder:
        return BucketOrder([0, 300, 310, 900], 20, "a", 0, lanes=8, block=10)

    order, planned = made(), []
    rows = made().rows(np.arange(20 * start, 20 * start + 400))
    order.ready(20 * start)
    monkeypatch.setattr("datamodules.order.keyed", lambda text: planned.append(text) or keyed(text))
    assert order.rows(np.arange(20 * start, 20 * start + 20)).tolist() == rows[:20].tolist() and planned == []
    for bucket, other in order.orders.items():
        first = next(k for k in range(start, start + 400) if made().turn(k)[0] == bucket)
        other.row(made().turn(first)[1] * 20)
        assert planned == []


def test_rank_slices_make_up_the_batch():
    whole = batch_positions(7, 12)
    assert whole.tolist() == list(range(84, 96))
    for world in (1, 2, 3, 4):
        parts = [batch_positions(7, 12, rank, world) for rank in range(world)]
        assert np.concatenate(parts).tolist() == whole.tolist()


def test_a_batch_that_does_not_divide_is_refused_with_the_numbers():
    with pytest.raises(UserError, match=r"10 samples over 4 processes[\s\S]*8 or 12"):
        batch_positions(0, 10, 0, 4)
    with pytest.raises(UserError, match=r"data.x.batch_size[\s\S]*multiples of 4, for example 4 or 8"):
        batch_positions(0, 2, 0, 4, "data.x.batch_size")


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("n", [12, 13, 14, 17, 23, 5, 3])
def test_a_finite_pass_has_each_row_once_and_equal_batch_counts(n, world):
    ranks = [finite_batches(n, 6, rank, world) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    rows = []
    for batches in zip(*ranks, strict=True):
        assert all(len(part) for part in batches)
        assert max(map(len, batches)) - min(map(len, batches)) <= 1
        rows += [row for part in batches for row in part]
    assert rows == list(range(n))


def test_a_finite_pass_needs_a_row_per_rank():
    with pytest.raises(UserError, match="1 samples over 2"):
        finite_batches(1, 2, 0, 2)


@pytest.mark.parametrize("bad", [{"lanes": 0}, {"block": 0}, {"block": 65537}])
def test_bad_orders_are_refused(bad):
    with pytest.raises(UserError, match="Bad order"):
        GlobalOrder(10, "a", 0, **bad)
