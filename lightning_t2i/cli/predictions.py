"""What `predict` writes: a picture per prompt, and which prompt it belongs to; or teacher pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L

from datamodules.pair_prompts import PairPrompts
from lightning_t2i.batch import Batch
from lightning_t2i.cli.pair_job import PairJob
from lightning_t2i.errors import UserError
from lightning_t2i.pictures import save_png, to_pil
from lightning_t2i.protocols import Generates


def output(data: L.LightningDataModule, folder: Path) -> L.Callback:
    """The writer for what is predicted: pair shards where the data says so, else pictures below the run's folder."""
    prompts = getattr(data, "finite", {}).get("predict")
    return PairJob(prompts) if isinstance(prompts, PairPrompts) else Predictions(folder / "predictions")


class Predictions(L.Callback):
    """Writes `POSITION.png` and, per rank, `prompts-RANK.jsonl` with {"file", "prompt"} lines.

    Args:
        folder: where to write; pictures of the same names are replaced, all lists of an earlier call removed.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def on_predict_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not isinstance(pl_module, Generates):
            raise UserError("predict needs a method that makes pictures", where="model", given=type(pl_module).__name__)
        self.folder.mkdir(parents=True, exist_ok=True)
        if trainer.is_global_zero:
            for earlier in self.folder.glob("prompts-*.jsonl"):  # also those of ranks that are none now
                earlier.unlink()
        trainer.strategy.barrier()

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        main = batch["main"]
        with self._prompts(trainer).open("a", encoding="utf-8") as stream:
            rows = zip(main.position.tolist(), main.caption or [], to_pil(outputs), strict=True)
            for position, prompt, image in rows:
                file = self.folder / f"{position:06d}.png"
                save_png(image, file, prompt=prompt)
                stream.write(json.dumps({"file": file.name, "prompt": prompt}, ensure_ascii=False) + "\n")

    def _prompts(self, trainer: L.Trainer) -> Path:
        return self.folder / f"prompts-{trainer.global_rank}.jsonl"
