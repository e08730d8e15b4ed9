"""kill -9 of trainings that read streams: with those that go on they read what a training that was not killed reads."""

import json
import os
import signal
from itertools import chain
from pathlib import Path

import pytest
from data_sets import as_rank, write_data_set
from recorder import Recorder, trainer

from datamodules.buckets import Buckets
from datamodules.image_text import ImageText
from datamodules.streams import Streams

BATCHES, SAVED, KILLED = 14, 4, 11  # batches of a whole run, between two checkpoints, and before the kill
SIZES = ((8, 8), (16, 8), (8, 16))


class Written(Recorder):
    """Writes the samples of each batch to a file at once, saves now and then, and is killed after a batch."""

    def __init__(self, folder: Path, kill: int | None):
        super().__init__(BATCHES)
        self.folder, self.kill = folder, kill

    def training_step(self, batch, index):
        super().training_step(batch, index)
        line = {name: [list(r.image.shape[1:]), r.id.tolist(), r.caption] for name, r in batch.items()}
        with (self.folder / f"read-{self.trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps([self.counters.batches, line]) + "\n")

    def on_train_batch_end(self, *unused):
        super().on_train_batch_end(*unused)
        if self.counters.batches % SAVED == 0:
            self.trainer.save_checkpoint(self.folder / "run.part")
            if self.trainer.is_global_zero:
                os.replace(self.folder / "run.part", self.folder / "run.ckpt")
            self.trainer.strategy.barrier()
        if self.counters.batches == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)


def streams(data: str, workers: int) -> Streams:
    options = {"batch_size": 6, "lanes": 8, "block": 10, "crop": "random"}
    buckets = ImageText(data, buckets=Buckets(sizes=SIZES), **options)
    return Streams(buckets, real=ImageText(data, size=8, **options), workers=workers)


def train(rank: int, data: str, folder: str, world: int, workers: int, kill: int | None) -> None:
    saved = Path(folder) / "run.ckpt"
    several = {"devices": world, "strategy": "ddp"} if world > 1 else {}
    run = trainer(folder, val_check_interval=1000, limit_val_batches=0, **several)
    module = Written(Path(folder), kill)
    run.fit(module, datamodule=streams(data, workers), ckpt_path=str(saved) if saved.exists() else None)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """50 pictures in three shapes."""
    sizes = [(9, 8), (8, 9), (20, 10), (10, 20), (11, 11)]
    return str(write_data_set(tmp_path_factory.mktemp("data") / "toy", size=lambda i: sizes[i % 5]))


@pytest.fixture(scope="module")
def whole(data) -> list[dict]:
    """What one process without workers reads, when nothing happens."""
    batches = iter(as_rank(streams(data, 0)).train_dataloader())
    found = [next(batches) for _ in range(BATCHES)]
    return [{n: [list(r.image.shape[1:]), r.id.tolist(), r.caption] for n, r in batch.items()} for batch in found]


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 2)])
def test_samples_after_kill_9_are_those_of_a_whole_run(data, whole, tmp_path, ranks, world, workers):
    assert len({tuple(batch["main"][0]) for batch in whole}) == 3
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(pytest.fail.Exception, match="rank 0 ended with -9"):
        ranks(train, data, str(folder), world, workers, KILLED, world=world)
    ranks(train, data, str(folder), world, workers, None, world=world)
    parts = []
    for rank in range(world):
        lines = [json.loads(line) for line in (folder / f"read-{rank}.jsonl").read_text().splitlines()]
        again = [*range(KILLED), *range(KILLED // SAVED * SAVED, BATCHES)]  # what was read after the checkpoint
        assert [number for number, _ in lines] == again
        found: dict[int, dict] = {}
        for number, line in lines:
            assert found.setdefault(number, line) == line
        parts.append([found[k] for k in range(BATCHES)])
    for k, batch in enumerate(whole):
        for name, (shape, ids, captions) in batch.items():
            read = [part[k][name] for part in parts]
            assert [r[0] for r in read] == [shape] * world
            assert list(chain(*(r[1] for r in read))) == ids and list(chain(*(r[2] for r in read))) == captions
