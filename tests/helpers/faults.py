"""One of two processes that train together, in which rank 1 first reads a NaN and then a rank gets a signal."""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
from toy import Toy, ToyData, trainer_for

from callbacks.checkpoints import CheckpointOptions, Checkpoints
from lightning_t2i.guards import NonFiniteError
from lightning_t2i.method import MethodModule

BROKEN, PATIENCE = 30, 8  # position of the NaN: the last but one of batch 3; seconds of a collective call


class BrokenData(ToyData):
    """ToyData with one point that is no number."""

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        main = batch["main"]
        main.latent[main.position == BROKEN] = float("nan")
        return batch


class Signal(L.Callback):
    """Sends a signal to the process of one rank before its fourth training step; writes how long each group waits."""

    def __init__(self, rank: int, number: signal.Signals, saver: Checkpoints, file: Path):
        self.rank, self.number, self.saver, self.file = rank, number, saver, file

    def on_train_start(self, trainer, module: MethodModule):
        groups = [dist.group.WORLD, *module._device_mesh.get_all_groups(), self.saver.saving.ranks.group]
        backends = [group._get_backend(torch.device("cpu")) for group in groups]
        self.file.write_text(json.dumps([backend.options._timeout.total_seconds() for backend in backends]))

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_rank == self.rank and module.counters.step == 3:
            os.kill(os.getpid(), self.number)


def main() -> None:
    folder, rank, hit, name = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    broken = Toy(dropout=0.0)
    try:
        trainer_for(folder / "broken", 8, shard=2).fit(broken, BrokenData(), weights_only=True)
    except NonFiniteError as error:
        found = {"error": str(error), "step": broken.counters.step}
        (folder / f"nan-{rank}.json").write_text(json.dumps(found))
    saver = Checkpoints(folder / "checkpoints", CheckpointOptions(every=2))
    hits = Signal(hit, signal.Signals[name], saver, folder / f"timeouts-{rank}.json")
    trainer = trainer_for(folder, 8, shard=2, callbacks=[saver, hits], timeout=timedelta(seconds=PATIENCE))
    trainer.fit(Toy(), ToyData(), weights_only=True)


if __name__ == "__main__":
    main()
