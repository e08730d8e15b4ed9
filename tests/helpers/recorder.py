"""A training that learns nothing and writes down what it is given."""

from __future__ import annotations

import lightning as L
import torch

from lightning_t2i.counters import Counters


class Recorder(L.LightningModule):
    """Writes down what it is given and stops, or saves, after so many batches."""

    def __init__(self, stop: int, save: tuple[int, str] | None = None):
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.counters, self.stop, self.save = Counters(), stop, save
        self.seen: list[int] = []
        self.passes: dict[str, list[int]] = {"val": [], "test": [], "predict": []}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, _):
        assert self.counters.batches + 1 == batch["main"].cursor
        self.seen += batch["main"].id.tolist()

    def on_train_batch_end(self, *_):
        self.counters.batches += 1
        if self.save and self.counters.batches == self.save[0]:
            self.trainer.save_checkpoint(self.save[1])
        self.trainer.should_stop = self.counters.batches >= self.stop

    def on_save_checkpoint(self, checkpoint):
        checkpoint["counters"] = self.counters.state()

    def on_load_checkpoint(self, checkpoint):
        self.counters.load(checkpoint["counters"])

    def validation_step(self, batch, _):
        self.passes["val"] += batch["main"].label.tolist()

    def test_step(self, batch, _):
        self.passes["test"] += batch["main"].label.tolist()

    def predict_step(self, batch, _):
        assert batch["main"].image is None
        self.passes["predict"] += batch["main"].label.tolist()
        return batch["main"].label


def trainer(folder, **options) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
