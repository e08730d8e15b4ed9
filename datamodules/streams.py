"""Composes named streams into the batches of a run and remembers how far each one was consumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from datamodules.bad_samples import Reads
from datamodules.captioned import refuse_other_encoders
from datamodules.order import batch_positions
from datamodules.records import Stream
from lightning_t2i.batch import Batch, Records, map_values
from lightning_t2i.errors import UserError
from lightning_t2i.slurm import outlive_signals

# What a change of a hash says of the data.
MEANINGS = {"sha": ": its shards hold other samples", "rows": ": its filters leave other samples"}


# Bytes up to which a worker sends a tensor as an array: a tensor costs it a file descriptor, and the training process a
# connection to fetch that, about half a millisecond in all.
SMALL = 1 << 16


class _Loads(Dataset):
    """Batch number -> (records, what was read for them); what DataLoader's workers run."""

    def __init__(self, stream: Stream, positions: Callable[[int], Any]):
        self.stream, self.positions = stream, positions

    def __getitem__(self, k: int) -> tuple[Records, Reads]:
        records = self.stream.load(self.positions(k), k)
        if get_worker_info() is not None:
            records = map_values(records, lambda _, x: x.numpy() if x.nbytes <= SMALL else x)
        return records, self.stream.take_fresh()


class _From:
    """Sampler of batch numbers: `start()`, `start() + 1`, ... up to `stop` or without end."""

    def __init__(self, start: Callable[[], int], stop: int | None):
        self.start, self.stop = start, stop

    def __iter__(self) -> Iterator[int]:
        k = self.start()
        while self.stop is None or k < self.stop:
            yield k
            k += 1


def _unchanged(found: Any) -> Any:
    return found


class StreamLoader:
    """Iterates the batches of several streams side by side, as dicts of Records.

    Args:
        streams: name -> stream, begun.
        start: name -> number of the first batch. It is asked at every `iter`: a new iteration goes on where the
            consumer stands, not where workers have read ahead to.
        rank, world: which slice of every batch to read.
        finite: one pass (see `Stream.passes`), not the endless sequence of the order.
        workers: worker processes per stream; they change speed only.
        pin: copy batches to page-locked memory.
    """

    def __init__(
        self,
        streams: dict[str, Stream],
        start: Callable[[str], int],
        rank: int = 0,
        world: int = 1,
        finite: bool = False,
        workers: int = 0,
        pin: bool = False,
    ):
        self.streams, self.start, self.pin = streams, start, pin
        self.length: int | None = None
        self.loaders: dict[str, DataLoader] = {}
        self.loads: dict[str, _Loads] = {}
        for name, stream in streams.items():
            positions: Callable[[int], Any] = partial(batch_positions, size=stream.batch_size, rank=rank, world=world)
            if finite:
                passes = stream.passes(rank, world)
                self.length, positions = len(passes), passes.__getitem__
            else:
                positions(0)  # refuses a size that does not divide, before any worker
            self.loads[name] = _Loads(stream, positions)
            self.loaders[name] = DataLoader(
                self.loads[name],
                sampler=_From(partial(start, name), self.length),
                batch_size=None,
                collate_fn=_unchanged,
                num_workers=workers,
                worker_init_fn=outlive_signals,
                persistent_workers=workers > 0,
                pin_memory=pin,
                generator=torch.Generator(),  # the draw of a base seed must not touch the global generator
            )

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("an endless loader has no length")
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        iterators = {}
        for name, loader in self.loaders.items():
            if loader.num_workers and self.length is None:  # they are forked now and share what is planned before
                self.streams[name].order.ready(int(self.loads[name].positions(self.start(name))[0]))
            iterators[name] = iter(loader)
        while True:
            batch: Batch = {}
            for name, iterator in iterators.items():
                found = next(iterator, None)
                if found is None:
                    return
                sent, fresh = found
                batch[name] = map_values(sent, self._tensor, np.ndarray)
                self.streams[name].report(fresh)
            yield batch

    def _tensor(self, name: str, array: np.ndarray) -> Tensor:
        """What a worker sent as an array."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self.pin else tensor


class Streams(L.LightningDataModule):
    """The data of a run: endless named streams for training, finite ones for validation, test and prediction.

    A training batch is a dict that holds one micro-batch of each training stream. What a stream yields depends on the
    seed, the stream's name and its data alone, not on ranks or workers. The state is, per stream, what identifies it
    and its cursor: the number of batches that training consumed, which the method's counters know; batches that were
    only read ahead do not count. The finite streams are read in index order, each sample once (see
    `datamodules.order.finite_batches`), as `{"main": Records}`.

    Args:
        main: the stream that every method reads.
        pairs: teacher pairs, for methods that regress on them.
        real: real pictures, for methods with an adversarial or fake-score term.
        val: validation stream.
        test: test stream.
        predict: stream of prompts to generate for.
        seed: seed of order, captions, crops and flips; linked to the run's seed.
        accumulate: micro-batches of a training step; linked to the method's. A run resumes between two steps only.
        workers: worker processes per training stream (0 reads in the training process); they change speed only.
    """

    def __init__(
        self,
        main: Stream | None = None,
        pairs: Stream | None = None,
        real: Stream | None = None,
        val: Stream | None = None,
        test: Stream | None = None,
        predict: Stream | None = None,
        seed: int = 0,
        accumulate: int = 1,
        workers: int = 0,
    ):
        super().__init__()
        training = {"main": main, "pairs": pairs, "real": real}
        finite = {"val": val, "test": test, "predict": predict}
        self.training = {name: stream for name, stream in training.items() if stream is not None}
        self.finite = {name: stream for name, stream in finite.items() if stream is not None}
        for name in finite.keys() - self.finite.keys():
            setattr(self, f"{name}_dataloader", None)  # to Lightning, a loop that has no data and is skipped
        self.seed, self.accumulate, self.workers = seed, accumulate, workers
        self._starts = dict.fromkeys(self.training, 0)
        self._base = 0  # micro-batches that the method had consumed when `_starts` was right
        self._ready: set[str] = set()

    def prepare_data(self) -> None:
        for stream in [*self.training.values(), *self.finite.values()]:
            stream.prepare()

    def setup(self, stage: str | None = None) -> None:
        wanted = {"fit": {*self.training, "val"}, "validate": {"val"}, "test": {"test"}, "predict": {"predict"}}
        for name, stream in {**self.training, **self.finite}.items():
            if name in self._ready or (stage is not None and name not in wanted[stage]):
                continue
            stream.setup()
            stream.begin(self.seed, name, shuffle=name in self.training)
            self._ready.add(name)

    def cursors(self) -> dict[str, int]:
        """Batches of each training stream that training has consumed so far."""
        consumed = max(self._counted() - self._base, 0)
        return {name: start + consumed for name, start in self._starts.items()}

    def _counted(self) -> int:
        counters = getattr(getattr(self.trainer, "lightning_module", None), "counters", None)
        return counters.batches if counters is not None else 0

    def _facts(self, name: str) -> dict[str, Any]:
        stream = self.training[name]
        return {**stream.identity, "batch_size": stream.batch_size, "seed": self.seed}

    def state_dict(self) -> dict[str, Any]:
        """`batches` consumed by the method and, per stream, its facts and its cursor. Plain values."""
        if not self._ready & set(self.training):
            return {}
        cursors = self.cursors()
        streams = {name: {**self._facts(name), "cursor": cursors[name]} for name in self.training}
        return {"batches": self._counted(), "streams": streams}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where the state was saved; a stream that the state does not know starts at its beginning.

        Raises:
            UserError: data, batch size, order or seed of a stream changed, or the cursor is inside a training step.
        """
        if not state_dict:
            return
        self.setup("fit")
        if state_dict["batches"] % self.accumulate:
            raise UserError(
                "The checkpoint does not fall between two training steps of this run",
                where="model.common.accumulate",
                given=f"{self.accumulate} micro-batches a step, {state_dict['batches']} consumed",
                fix="go back to the old accumulate, or start a new run with --run NAME",
            )
        for name, saved in state_dict["streams"].items():
            if name not in self.training:
                raise UserError(f"The checkpoint has a stream '{name}' that this run lacks", where=f"data.{name}")
            facts = self._facts(name)
            for key in sorted(facts.keys() | saved.keys() - {"cursor"}):
                if facts.get(key) != saved.get(key):
                    raise UserError(
                        f"'{key}' of the stream '{name}' is not what it was when the checkpoint was saved"
                        + MEANINGS.get(key, ""),
                        where="data.seed" if key == "seed" else f"data.{name}",
                        given=facts.get(key),
                        allowed=str(saved.get(key)),
                        fix="go back to the old value, or start a new run with --run NAME",
                    )
            self._starts[name] = saved["cursor"]
        self._base = state_dict["batches"]

    def _loader(self, streams: dict[str, Stream], finite: bool, workers: int) -> StreamLoader:
        trainer = self.trainer
        refuse_other_encoders(getattr(trainer, "lightning_module", None), streams)
        return StreamLoader(
            streams,
            (lambda name: 0) if finite else (lambda name: self.cursors()[name]),
            rank=trainer.global_rank if trainer else 0,
            world=trainer.world_size if trainer else 1,
            finite=finite,
            workers=workers,
            pin=trainer is not None and trainer.strategy.root_device.type == "cuda",
        )

    def _finite_loader(self, name: str) -> StreamLoader:
        return self._loader({"main": self.finite[name]}, finite=True, workers=self.workers)

    def train_dataloader(self) -> StreamLoader:
        if "main" not in self.training:
            raise UserError("Training needs the stream 'main'", where="data.main", given="null")
        return self._loader(self.training, finite=False, workers=self.workers)

    def val_dataloader(self) -> StreamLoader:
        return self._finite_loader("val")

    def test_dataloader(self) -> StreamLoader:
        return self._finite_loader("test")

    def predict_dataloader(self) -> StreamLoader:
        return self._finite_loader("predict")

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Copies from page-locked memory overlap with computation; Lightning itself overlaps bare tensors only."""
        return {name: records.to(device, non_blocking=device.type == "cuda") for name, records in batch.items()}
