"""Streams: the same samples for any ranks and workers, exact resume, finite passes, and life inside a Trainer."""

import os
import random
from itertools import chain

import pytest
import torch
from data_sets import as_rank
from recorder import Recorder, trainer

from datamodules.buckets import Buckets
from datamodules.image_text import ImageText
from datamodules.order import keyed
from datamodules.prompts import Prompts
from datamodules.streams import StreamLoader, Streams
from lightning_t2i.errors import UserError


def pictures(folder, **options) -> ImageText:
    return ImageText(str(folder), **{"size": 8, "batch_size": 6, "lanes": 8, "block": 10, **options})


def first_ids(data: Streams, batches: int, name: str = "main") -> list[list[int]]:
    iterator = iter(data.train_dataloader())
    return [next(iterator)[name].id.tolist() for _ in range(batches)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_ids_do_not_depend_on_ranks_or_workers_and_survive_resume(make_data_set, workers, world):
    folder = make_data_set()
    whole = first_ids(as_rank(Streams(pictures(folder))), 20)  # more than two epochs of 50
    assert len({i for batch in whole[:8] for i in batch}) == 48
    resumed = []
    for rank in range(world):
        first = as_rank(Streams(pictures(folder), workers=workers), rank, world)
        ids = first_ids(first, 7)
        # Workers have read ahead; only what the method counted is consumed.
        first.trainer.lightning_module.counters.batches = 5
        state = first.state_dict()
        second = as_rank(Streams(pictures(folder), workers=workers), rank, world, batches=5)
        second.load_state_dict(state)
        resumed.append(ids[:5] + first_ids(second, 15))
    assert [list(chain(*parts)) for parts in zip(*resumed, strict=True)] == whole


def test_resume_at_another_number_of_ranks(make_data_set):
    folder = make_data_set()
    whole = first_ids(as_rank(Streams(pictures(folder))), 8)
    one = as_rank(Streams(pictures(folder)), batches=3)
    state = one.state_dict()
    parts = []
    for rank in range(3):
        data = as_rank(Streams(pictures(folder)), rank, 3, batches=3)
        data.load_state_dict(state)
        parts.append(first_ids(data, 5))
    assert [list(chain(*batch)) for batch in zip(*parts, strict=True)] == whole[3:]


def test_a_second_iteration_goes_on_where_the_method_stands(make_data_set):
    data = as_rank(Streams(pictures(make_data_set())))
    whole = first_ids(data, 9)
    data.trainer.lightning_module.counters.batches = 4
    assert first_ids(data, 5) == whole[4:]


def test_streams_have_their_own_size_position_and_order(make_data_set):
    folder, other = make_data_set(), make_data_set(name="other")
    streams = {"main": pictures(folder), "real": pictures(folder, batch_size=4)}
    data = as_rank(Streams(**streams))
    batch = next(iter(data.train_dataloader()))
    assert list(batch) == ["main", "real"]
    assert len(batch["main"]) == 6
    assert len(batch["real"]) == 4
    assert batch["main"].label[:4].tolist() != batch["real"].label.tolist()
    data.trainer.lightning_module.counters.batches = 10
    state = data.state_dict()
    # A stream that joins later starts at its beginning while the others go on.
    joined = as_rank(Streams(**streams, pairs=pictures(other, batch_size=2)), batches=10)
    joined.load_state_dict(state)
    joined.trainer.lightning_module.counters.batches = 13
    assert joined.cursors() == {"main": 13, "real": 13, "pairs": 3}
    state = joined.state_dict()
    again = as_rank(Streams(**streams, pairs=pictures(other, batch_size=2)), batches=13)
    again.load_state_dict(state)
    batch = next(iter(again.train_dataloader()))
    assert {name: records.cursor for name, records in batch.items()} == {"main": 14, "pairs": 4, "real": 14}
    assert batch["pairs"].position.tolist() == [6, 7]


@pytest.mark.parametrize(
    ("change", "seed", "named"),
    [
        ({"batch_size": 4}, 0, "'batch_size' of the stream 'main'"),
        ({"limit": 40}, 0, "'rows' of the stream 'main'"),
        ({"lanes": 4}, 0, "'lanes' of the stream 'main'"),
        ({"block": 5}, 0, "'block' of the stream 'main'"),
        ({}, 1, "'seed' of the stream 'main'"),
    ],
)
def test_a_changed_stream_is_refused_by_name(make_data_set, change, seed, named):
    folder = make_data_set()
    state = as_rank(Streams(pictures(folder)), batches=2).state_dict()
    with pytest.raises(UserError, match=named):
        as_rank(Streams(pictures(folder, **change), seed=seed)).load_state_dict(state)


def test_changed_data_a_lost_stream_and_a_step_that_is_cut_are_refused(make_data_set):
    folder, other = make_data_set(), make_data_set(name="other")
    state = as_rank(Streams(pictures(folder), real=pictures(folder)), batches=4).state_dict()
    with pytest.raises(UserError, match=r"'data' of the stream 'main'[\s\S]*other/train"):
        as_rank(Streams(pictures(other), real=pictures(folder))).load_state_dict(state)
    with pytest.raises(UserError, match="stream 'real' that this run lacks"):
        as_rank(Streams(pictures(folder))).load_state_dict(state)
    with pytest.raises(UserError, match="3 micro-batches a step, 4 consumed"):
        as_rank(Streams(pictures(folder), real=pictures(folder), accumulate=3)).load_state_dict(state)


def test_a_batch_that_does_not_divide_is_refused(make_data_set):
    with pytest.raises(UserError, match="6 samples over 4"):
        as_rank(Streams(pictures(make_data_set())), 0, 4).train_dataloader()


def test_state_is_plain_and_loaders_leave_the_global_generators_alone(make_data_set):
    data = as_rank(Streams(pictures(make_data_set(), crop="random", flip=True), workers=2), batches=3)
    state = data.state_dict()
    assert state["batches"] == 3
    assert {type(v) for v in state["streams"]["main"].values()} == {str, int}
    before = torch.get_rng_state(), random.getstate()
    first_ids(data, 3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_finite_passes_are_in_order_complete_and_repeatable(make_data_set, workers, world):
    folder = make_data_set()  # 50 samples: eight batches of 6 and two left over
    passes = []
    for rank in range(world):
        data = Streams(val=pictures(folder), workers=workers)
        data = as_rank(data, rank, world)
        loader = data.val_dataloader()
        first = [batch["main"] for batch in loader]
        second = [batch["main"] for batch in loader]
        assert [r.caption for r in first] == [r.caption for r in second]
        assert len(loader) == len(first) == 9
        passes.append([records.label.tolist() for records in first])
    assert [label for parts in zip(*passes, strict=True) for part in parts for label in part] == list(range(50))


@pytest.mark.parametrize("sizes", [None, Buckets(sizes=((8, 8), (8, 4)))])
@pytest.mark.parametrize("consumed", [0, 11])
def test_workers_share_the_plan_of_the_epoch_that_they_begin_in(make_data_set, monkeypatch, tmp_path, consumed, sizes):
    def noted(text):
        with (tmp_path / "planned").open("a") as file:
            file.write(f"{os.getpid()}\n")
        return keyed(text)

    folder = make_data_set(n=120, size=lambda i: (8, 8 if i % 3 else 4))
    monkeypatch.setattr("datamodules.order.keyed", noted)
    data = as_rank(Streams(pictures(folder, buckets=sizes), workers=2), batches=consumed)
    iterator = iter(data.train_dataloader())
    for _ in range(4):
        next(iterator)
    assert set((tmp_path / "planned").read_text().split()) == {str(os.getpid())}
    for _ in range(20):
        next(iterator)
    assert len(set((tmp_path / "planned").read_text().split())) == 3  # of the next one each makes its own


def test_workers_report_bad_samples_and_the_limit_holds(make_data_set):
    folder = make_data_set(bad=(3, 33))
    data = as_rank(Streams(pictures(folder, max_bad_fraction=0.04), workers=2))
    first_ids(data, 10)
    assert sorted(data.training["main"].bad) == ["train-000000.tar:k0003", "train-000001.tar:k0033"]
    with pytest.raises(UserError, match="max_bad_fraction"):
        first_ids(as_rank(Streams(pictures(folder, max_bad_fraction=0.02), workers=2)), 10)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_trainer_resumes_with_the_same_ids(make_data_set, tmp_path, workers):
    folder = make_data_set()
    saved = str(tmp_path / "run.ckpt")
    val = pictures(folder, limit=10)
    whole = Recorder(12, (7, saved))
    trainer(tmp_path, val_check_interval=5).fit(whole, datamodule=Streams(pictures(folder), val=val, workers=workers))
    second = Recorder(12)
    data = Streams(pictures(folder), val=val, workers=workers)
    trainer(tmp_path, val_check_interval=5).fit(second, datamodule=data, ckpt_path=saved)
    assert len(whole.seen) == 12 * 6
    assert second.seen == whole.seen[7 * 6 :]


def test_a_trainer_validates_tests_and_predicts(make_data_set, tmp_path):
    folder = make_data_set(n=20, splits=("train", "val", "test"))
    data = Streams(
        pictures(folder),
        val=pictures(folder, split="val"),
        test=pictures(folder, split="test"),
        predict=Prompts(str(folder), split="test", batch_size=6),
    )
    module = Recorder(4)
    run = trainer(tmp_path, val_check_interval=2)
    run.fit(module, datamodule=data)
    assert module.passes["val"] == [*range(20), *range(20)]
    run.test(module, datamodule=data, verbose=False)
    run.predict(module, datamodule=data, return_predictions=False)
    assert module.passes["test"] == module.passes["predict"] == list(range(20))


def test_a_trainer_without_validation_data_skips_it(make_data_set, tmp_path):
    module = Recorder(3)
    with pytest.warns(UserWarning, match="have no `val_dataloader`. Skipping"):
        trainer(tmp_path, val_check_interval=2).fit(module, datamodule=Streams(pictures(make_data_set())))
    assert len(module.seen) == 18
    assert module.passes["val"] == []


def test_records_move_to_the_device_of_the_run(make_data_set):
    data = as_rank(Streams(pictures(make_data_set())))
    batch = next(iter(data.train_dataloader()))
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)["main"]
    assert {moved.image.device.type, moved.id.device.type, moved.position.device.type} == {"meta"}
    assert moved.caption == batch["main"].caption


def run_rank(rank: int, folder: str) -> dict[str, list[int]]:
    module = Recorder(4)
    data = Streams(pictures(folder), val=pictures(folder, batch_size=8))
    run = trainer(folder, devices=2, strategy="ddp", val_check_interval=4)
    run.fit(module, datamodule=data)
    return {"seen": module.seen, "val": module.passes["val"]}


def test_two_processes_share_batches_and_validation(make_data_set, ranks):
    folder = make_data_set()
    whole = first_ids(as_rank(Streams(pictures(folder))), 4)
    first, second = ranks(run_rank, str(folder))
    for k, ids in enumerate(whole):
        assert first["seen"][3 * k : 3 * k + 3] + second["seen"][3 * k : 3 * k + 3] == ids
    assert sorted(first["val"] + second["val"]) == list(range(50))
    assert len(first["val"]) == len(second["val"])


def test_a_loader_needs_no_trainer(make_data_set):
    stream = pictures(make_data_set())
    stream.setup()
    stream.begin(0, "main")
    loader = StreamLoader({"main": stream}, lambda _: 2)
    assert next(iter(loader))["main"].cursor == 3
    with pytest.raises(TypeError):
        len(loader)
