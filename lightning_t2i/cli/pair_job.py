"""What `predict` writes for `PairPrompts`: the shards of a pair folder."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from datamodules.pair_prompts import PairPrompts
from datamodules.pair_shards import PairFolder, ShardInProgress
from lightning_t2i.batch import Batch
from lightning_t2i.cli.configs import show
from lightning_t2i.errors import UserError
from lightning_t2i.pairs import noise_checksum, noise_seeds
from lightning_t2i.protocols import Couples


class PairJob(L.Callback):
    """Writes each shard of this process as its batches come, and completes the folder when no shard is missing.

    Args:
        prompts: the stream that is predicted for.
    """

    def __init__(self, prompts: PairPrompts):
        self.prompts = prompts
        self._shard: ShardInProgress | None = None

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if not isinstance(pl_module, Couples):
            given, fix = type(pl_module).__name__, "model: lightning_modules.teacher.Teacher"
            raise UserError("Pairs need a method that maps noise to data", where="model", given=given, fix=fix)
        prompts, facts = self.prompts, {**pl_module.recipe(), **self.prompts.facts}
        self.folder = PairFolder(prompts.folder, prompts.split, prompts.shards, facts, prompts.licence)
        self._mine = set(prompts.mine(trainer.global_rank, trainer.world_size))

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        records = batch["main"].to("cpu")
        positions = records.position.tolist()
        number = positions[0] // self.prompts.samples_per_shard
        if number not in self._mine:  # a repeated batch, see `PairPrompts.passes`
            return
        whole = self.prompts.positions(number)
        if positions[0] == whole[0]:
            shape = tuple(outputs.shape[1:])
            ends = noise_seeds(self.prompts.seed, torch.tensor([whole[0], whole[-1]]))
            self._shard = self.folder.begin(number, {"shape": list(shape), "noise": noise_checksum(ends, shape)})
        if self._shard is not None:
            self._shard.write(positions, outputs, self.prompts.metas(records))
        if positions[-1] == whole[-1]:
            if self._shard is not None:
                self._shard.close()
                self._shard = None
            self._mine.discard(number)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        if self._shard is not None:
            self._shard.abandon()

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        complete = self.folder.join()
        if trainer.is_global_zero:
            there = f"{len(self.folder.done)} of {self.folder.shards} shards"
            print(f"pairs:   {show(self.folder.folder.resolve())}, {'complete' if complete else there}")
