"""A run that ends between the save of a step and its validation has the same curve as one that nobody interrupted."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
from signals import Scored, ScoredData
from toy import trainer_for

from callbacks.checkpoints import CheckpointOptions, Checkpoints
from callbacks.missed_validation import MissedValidation
from lightning_t2i.cli.main import main
from lightning_t2i.loggers import Clock, JsonlLogger, read_lines
from lightning_t2i.options import MethodOptions
from lightning_t2i.state_io import newest

STEPS = 9


class BreakAfter(L.Callback):
    """Ends the process, as it were, after the save of a training step."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, *unused) -> None:
        if pl_module.counters.at_boundary and pl_module.counters.step == self.step:
            raise ConnectionError("pulled the plug")


def fit(folder: Path, breaks: int | None = None, logs: bool = True, **options) -> list[tuple[int, float]]:
    """One start of a run; its validations so far, (training step, value)."""
    file, saves = folder / "metrics.jsonl", Checkpoints(folder / "checkpoints", CheckpointOptions(every=3))
    callbacks = [saves, BreakAfter(breaks), MissedValidation(file)]
    options = {"val_check_interval": 3, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0} | options
    trainer = trainer_for(folder, STEPS, callbacks=callbacks, **options)
    trainer.loggers = [JsonlLogger(file, clock=Clock(trainer))] if logs else []
    module = Scored(MethodOptions(accumulate=2))
    try:
        trainer.fit(module, ScoredData(), ckpt_path=newest(saves.folder), weights_only=True)
    except ConnectionError:
        assert breaks is not None
    return [(line["step"], line["val/size"]) for line in read_lines(file) if "val/size" in line]


@pytest.mark.parametrize("breaks", [6, 7, 9], ids=["before a validation", "after it", "before the last"])
def test_a_validation_is_made_up_once(tmp_path, breaks) -> None:
    whole = fit(tmp_path / "whole")
    assert [step for step, _ in whole] == [3, 6, 9]
    assert fit(tmp_path / "broken", breaks) == whole[: (breaks - 1) // 3]
    assert fit(tmp_path / "broken") == whole
    assert fit(tmp_path / "broken") == whole  # and by no later start


@pytest.mark.parametrize(
    ("options", "then"),
    [({"logs": False}, [9]), ({"limit_val_batches": 0}, []), ({"val_check_interval": 4}, [8])],
    ids=["not recorded", "off", "not due"],
)
def test_nothing_is_made_up_that_was_not_due(tmp_path, monkeypatch, options, then) -> None:
    """Of a start that goes on from step 6; where nothing is recorded, its file cannot say what was made."""
    made: list[int] = []
    fit(tmp_path, 6, **options)
    monkeypatch.setattr(Scored, "validation_step", lambda module, *_: made.append(module.counters.step))
    monkeypatch.setattr("callbacks.missed_validation.validate_now", lambda trainer: made.append(trainer.global_step))
    fit(tmp_path, **options)
    assert made == then


def test_the_command_has_it_behind_the_others(tmp_path, monkeypatch) -> None:
    names: list[str] = []
    monkeypatch.setattr(L.Trainer, "fit", lambda self, *_, **__: names.extend(type(c).__name__ for c in self.callbacks))
    monkeypatch.setenv("LIGHTNING_T2I_RUNS", str(tmp_path / "runs"))
    config = tmp_path / "toy.yaml"
    config.write_text("model: {class_path: toy.Toy}\ndata: {class_path: toy.ToyData}\n")
    assert main(["fit", "--config", str(config), "--trainer.accelerator", "cpu", "--trainer.max_steps", "2"]) == 0
    assert names.index("Checkpoints") < names.index("MissedValidation") < names.index("Preemption")
