"""The cells of methods that make pictures, on two training steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.worlds import ensure
from datamodules.worlds.shapes_scenes import TASKS
from lightning_t2i.claims.spec import Cell, Outcome, load
from lightning_t2i.claims.training import RUN, fit, generate, measure, prompts, shapes_scores, tune
from lightning_t2i.cli.restore import trained
from lightning_t2i.metrics.shapes_score import ShapesScore

pytestmark = [
    pytest.mark.filterwarnings("ignore:Unable to serialize instance"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]
SHORT = {
    "trainer.max_steps": 2,
    "trainer.limit_val_batches": 0,
    "trainer.enable_progress_bar": False,
    "samples.enabled": False,
    "model.steps": 2,
    "data.main.latents": None,
    "data.main.batch_size": 4,
    "data.val": None,
    "data.test": None,
}


def test_scores_of_prompts_average_to_the_shapes_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of unequal size: a plain mean over prompts would be another number."""
    tasks = [TASKS[0]] * 3 + [TASKS[1]] * 2 + [TASKS[2]]
    right = [True, True, False, False, True, False]
    scores, metric = shapes_scores(right, tasks), ShapesScore()
    monkeypatch.setattr("lightning_t2i.metrics.shapes_score.satisfied", lambda images, scenes: np.array(right))
    metric.update(torch.zeros(6, 3, 32, 32), [{"task": task, "held_out": False} for task in tasks])
    assert sum(scores) / len(scores) == pytest.approx(float(metric.compute()["overall"]))
    assert sum(scores) / len(scores) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert sum(scores) / len(scores) != pytest.approx(sum(right) / len(right))


def test_a_training_is_tuned_and_measured_with_both_kinds_of_weights(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("LIGHTNING_T2I_RUNS", str(tmp_path))
    few = str(ensure("shapes", train=256, val=0, test=0, retrieval=0))
    options = {"config": "configs/diffusion/tiny.yaml", "overrides": {**SHORT, "data.main.source": few}}
    cell = Cell(5, tmp_path / "train", options)
    cell.folder.mkdir()
    done = fit(cell)
    assert done.numbers["seconds_per_step"] > 0
    environment = json.loads((cell.folder / RUN / "env.json").read_text())
    assert fit(cell) == done  # a finished training is not begun again
    # A longer one goes on from the checkpoint.
    fit(Cell(5, cell.folder, {**options, "overrides": {**options["overrides"], "trainer.max_steps": 3}}))
    assert json.loads((cell.folder / RUN / "finished").read_text())["step"] == 2  # finished is finished
    (cell.folder / RUN / "finished").unlink()
    fit(Cell(5, cell.folder, {**options, "overrides": {**options["overrides"], "trainer.max_steps": 3}}))
    starts = json.loads((cell.folder / RUN / "env.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 2] and len(environment["starts"]) == 1

    ema, raw = (trained(cell.folder / RUN, weights) for weights in ("ema", "raw"))
    assert ema.common.seed == 5 and ema.counters.step == 3 and not raw.training
    (batch,) = prompts("test", 6)
    same, other = (next(m.generator_of("denoiser").parameters()) for m in (ema, raw))
    assert not torch.equal(same, other)
    found = measure(ema, "test", 6, 5, ["shapes_score", "fd"], guidance=2.0)
    assert found == measure(ema, "test", 6, 5, ["shapes_score", "fd"], guidance=2.0)
    assert len(found.scores["shapes_score"]) == len(batch) == 6 and found.numbers["fd"] > 0
    assert found.numbers["fd"] != measure(raw, "test", 6, 5, ["fd"], guidance=2.0).numbers["fd"]
    assert found.numbers["fd"] != measure(ema, "test", 6, 5, ["fd"], guidance=4.0).numbers["fd"]
    assert found.prompts != measure(ema, "val", 6, 5, ["shapes_score"], guidance=2.0).prompts

    after = {"train": cell.folder, "tune": tmp_path / "tune"}
    after["tune"].mkdir()
    chosen = tune(Cell(5, after["tune"], {"split": "val", "n": 6, "guidance": [2.0, 4.0], "weights": "ema"}, after))
    scores = {scale: chosen.numbers[f"shapes_score@guidance={scale:g}"] for scale in (2.0, 4.0)}
    best = chosen.numbers["guidance"]
    assert best == max(scores, key=scores.__getitem__)  # of equals the smaller one
    Outcome(chosen, 0.0, 1.0).save(after["tune"])
    sampling = {"split": "test", "n": 6, "guidance": "tune", "weights": "ema", "metrics": ["shapes_score", "fd"]}
    tuned = generate(Cell(5, tmp_path / "a", sampling, after))
    again = measure(ema, "test", 6, 5, ["shapes_score", "fd"], guidance=best)
    assert tuned.numbers == {**again.numbers, "guidance": best} and tuned.scores == again.scores


@pytest.mark.parametrize("quick", [False, True])
def test_claims_of_diffusion_fit_their_budget_and_score_on_test_prompts(quick: bool) -> None:
    matrix = load("diffusion", quick)  # refuses a matrix over its budget
    assert matrix.seeds == (0, 1, 2) and matrix.quick is quick
    measured = [a for a in matrix.arms if a.cell is generate]
    assert {a.options["split"] for a in measured} == {"test"}
    assert {a.options["split"] for a in matrix.arms if a.cell is tune} == {"val"}
    assert len({a.options["n"] for a in measured}) == 1 and (quick or measured[0].options["n"] >= 400)
    assert all(a.after[0] == "train" for a in matrix.arms if a.name != "train")
