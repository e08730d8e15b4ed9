"""Metrics in a run: what is measured, when, at what cost."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from mean import Mean

from callbacks.eval_metrics import EvalMetrics, EvalOptions
from lightning_t2i.errors import UserError
from lightning_t2i.metrics import scorers
from lightning_t2i.metrics.frechet import FrechetDistance
from lightning_t2i.metrics.scorers import DistanceScorer, Scorer, ScorerOptions, build_scorer
from lightning_t2i.networks.classifier import ClassifierConfig, ShapesClassifier


@pytest.fixture(autouse=True)
def _mean_is_a_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scorers.SCORERS, "mean", lambda options, name: Scorer(Mean(), lambda r: (r.caption,)))


def test_values_are_logged_at_their_steps_under_their_names(studio) -> None:
    notebook = studio.Notebook()
    callback = EvalMetrics(EvalOptions(metrics=["mean"], every=3, n=8, max_fraction=1.0), clock=lambda: 0.0)
    method = studio.Painter()
    studio.trainer(callback, steps=7, logger=notebook).fit(method, studio.Easel())
    assert sorted(notebook.values("eval/mean@n=8")) == [3, 6]
    # Four prompts of known length twice, grey level length / 32 plus a bias and noise of mean zero.
    grey = sum(len(p) for p in studio.prompts) / 4 / 32
    assert notebook.values("eval/mean@n=8")[3] == pytest.approx(grey, abs=0.1)
    assert callback.results["eval/mean@n=8"] == notebook.values("eval/mean@n=8")[6]


def test_number_is_rounded_up_to_whole_batches_and_never_more_than_the_data(studio) -> None:
    for n, expected in ((1, 4), (5, 8), (9, 10), (400, 10)):
        callback = EvalMetrics(EvalOptions(metrics=["mean"], every=1, n=n), clock=lambda: 0.0)
        studio.trainer(callback, steps=1).fit(studio.Painter(), studio.Easel())
        assert f"eval/mean@n={expected}" in callback.results


def test_noise_is_that_of_the_position(studio) -> None:
    method = studio.Painter()
    callback = EvalMetrics(EvalOptions(metrics=["mean"], every=1, n=8, max_fraction=1.0), clock=lambda: 0.0)
    studio.trainer(callback, steps=2).fit(method, studio.Easel())
    assert method.sampled == [(1, [0, 1, 2, 3]), (1, [4, 5, 6, 7]), (2, [0, 1, 2, 3]), (2, [4, 5, 6, 7])]


class Slow(Mean):
    """Moves a clock while it computes."""

    clock: Any

    def compute(self) -> torch.Tensor:
        type(self).clock.now += 3.0
        return super().compute()


def test_budget_leaves_evaluations_out_and_says_so_once(studio, ticking, monkeypatch, caplog) -> None:
    Slow.clock = clock = ticking()
    monkeypatch.setitem(scorers.SCORERS, "slow", lambda options, name: Scorer(Slow(), lambda r: (r.caption,)))

    class Painter(studio.Painter):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            clock.now += 10.0
            super().training_step(batch, batch_idx)

    notebook = studio.Notebook()
    callback = EvalMetrics(EvalOptions(metrics=["slow"], every=1, n=4, max_fraction=0.1), clock=clock)
    with caplog.at_level(logging.WARNING, "callbacks.eval_metrics"):
        studio.trainer(callback, steps=20, logger=notebook).fit(Painter(), studio.Easel())
    # After k evaluations of 3 s the next one fits once 3 (k + 1) <= 0.1 * 10 s * steps; the first is always made.
    assert sorted(notebook.values("eval/mean@n=4")) == [1, 6, 9, 12, 15, 18]
    assert callback.budget.spent == 18 and callback.budget.skipped == 14
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 1 and "eval.max_fraction is 0.1" in messages[0] and "took 3.0 s" in messages[0]


def test_real_clock_and_default_budget(studio) -> None:
    callback = EvalMetrics(EvalOptions(metrics=["mean"], every=1, n=4))
    studio.trainer(callback, steps=5).fit(studio.Painter(), studio.Easel())
    assert callback.budget.spent > 0 and "eval/mean@n=4" in callback.results  # the first is always made


def test_validate_and_test_know_no_limit(studio) -> None:
    method, notebook = studio.Painter(), studio.Notebook()
    callback = EvalMetrics(EvalOptions(metrics=["mean"], n=400, max_fraction=1e-9))
    trainer = studio.trainer(callback, logger=notebook, limit_val_batches=1.0)
    trainer.validate(method, studio.Easel(), verbose=False)
    assert "eval/mean@n=10" in callback.results
    trainer.test(method, studio.Easel(), verbose=False)
    assert "test/mean@n=10" in callback.results and callback.results["test/seconds"] > 0


def test_switched_off_and_nothing_asked_for(studio) -> None:
    for options in (EvalOptions(enabled=False, metrics=["mean"], every=1), EvalOptions(every=1)):
        method = studio.Painter()
        studio.trainer(EvalMetrics(options), steps=2).fit(method, studio.Easel())
        assert method.sampled == []


def test_training_is_the_same_with_and_without_metrics(studio) -> None:
    weights = []
    for metrics in (["mean"], []):
        method = studio.Painter()
        callback = EvalMetrics(EvalOptions(metrics=metrics, every=1, max_fraction=1.0), clock=lambda: 0.0)
        studio.trainer(callback, steps=4).fit(method, studio.Easel())
        weights.append(method.brush.linear.weight.clone())
    assert torch.equal(*weights)


def test_unknown_metric_is_named_with_its_closest_match() -> None:
    with pytest.raises(UserError, match=r"did you mean shapes_score\?"):
        EvalOptions(metrics=["shape_score"])


def test_data_without_the_split_is_an_error(studio) -> None:
    callback = EvalMetrics(EvalOptions(metrics=["mean"], every=1))
    with pytest.raises(UserError, match=r"data\.val"):
        studio.trainer(callback, steps=1).fit(studio.Painter(), studio.Easel(n=0))


@pytest.fixture
def classifier(tmp_path: Path) -> str:
    ShapesClassifier(ClassifierConfig(widths=(8, 8, 8))).save_pretrained(tmp_path / "classifier")
    return str(tmp_path / "classifier")


def test_distances_take_their_reference_from_the_data_once(studio, classifier: str) -> None:
    notebook = studio.Notebook()
    networks = ScorerOptions(classifier=classifier, reference="easel", statistics=classifier)
    callback = EvalMetrics(EvalOptions(metrics=["fd", "kd"], every=1, n=8, networks=networks), clock=lambda: 0.0)
    studio.trainer(callback, steps=2, logger=notebook).fit(studio.Painter(), studio.Easel())
    assert sorted(notebook.values("eval/fd@n=8,ref=easel:8")) == [1, 2]
    assert sorted(notebook.values("eval/kd@n=8,ref=easel:8")) == [1, 2]
    assert int(callback._scorers[0].metric.referenced) == 8


def test_saved_reference_serves_data_without_pictures(studio, classifier: str, tmp_path: Path) -> None:
    networks = ScorerOptions(classifier=classifier, statistics=str(tmp_path))
    options = EvalOptions(metrics=["fd"], every=1, n=8, networks=networks)
    first = EvalMetrics(options, clock=lambda: 0.0)
    studio.trainer(first, steps=1).fit(studio.Painter(), studio.Easel())
    first._scorers[0].metric.save_reference(tmp_path / "fd-val.safetensors")
    second = EvalMetrics(options, clock=lambda: 0.0)
    studio.trainer(second, steps=1).fit(studio.Painter(), studio.Easel(pictures=False))
    name = "eval/fd@n=8,ref=val:8"
    assert second.results[name] == pytest.approx(first.results[name], rel=1e-6) and first.results[name] > 0


def test_distance_without_pictures_and_file_names_the_command(studio, classifier: str, tmp_path: Path) -> None:
    networks = ScorerOptions(classifier=classifier, statistics=str(tmp_path))
    callback = EvalMetrics(EvalOptions(metrics=["fd"], every=1, networks=networks))
    with pytest.raises(UserError, match="python -m lightning_t2i.metrics.reference"):
        studio.trainer(callback, steps=1).fit(studio.Painter(), studio.Easel(pictures=False))


def test_clip_score_needs_a_clip() -> None:
    with pytest.raises(UserError, match=r"eval\.networks\.clip"):
        build_scorer("clip_score", ScorerOptions(), "val")


def test_parts_of_a_metric_get_names_of_their_own() -> None:
    class Parts(Mean):
        def compute(self) -> dict[str, float]:  # type: ignore[override]
            self.computed_n = 7
            return {"overall": 0.5, "counting": 0.25}

    metric = Parts()
    metric.update(torch.zeros(1, 3, 2, 2), ["a"])
    assert Scorer(metric).results() == {"mean/overall@n=7": 0.5, "mean/counting@n=7": 0.25}


def evaluated_by_a_rank(rank: int, folder: str) -> dict[str, float]:
    import importlib.util

    spec = importlib.util.spec_from_file_location("studio", Path(__file__).with_name("conftest.py"))
    helper = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helper)
    scorers.SCORERS["mean"] = lambda options, name: Scorer(Mean(), lambda r: (r.caption,))
    extractor = ShapesClassifier.from_pretrained(f"{folder}/classifier")
    scorers.SCORERS["fd"] = lambda options, name: DistanceScorer(FrechetDistance(extractor, name), Path("missing"))
    callback = EvalMetrics(EvalOptions(metrics=["mean", "fd"], every=2, n=8))
    from lightning_t2i.strategies import FSDP2

    world = torch.distributed.get_world_size()
    strategy = FSDP2(1, world) if world > 1 else "auto"
    trainer = helper.Studio(Path(folder)).trainer(callback, steps=2, strategy=strategy, devices=world)
    trainer.fit(helper.Painter(dropout=0.0), helper.Easel())
    return {k: v for k, v in callback.results.items() if k != "eval/seconds"}


def test_two_ranks_measure_what_one_measures(ranks, tmp_path: Path, classifier: str) -> None:
    first, second = ranks(evaluated_by_a_rank, str(tmp_path))
    alone = ranks(evaluated_by_a_rank, str(tmp_path), world=1)[0]
    assert first == second == pytest.approx(alone, rel=1e-4)
    assert sorted(first) == ["eval/fd@n=8,ref=val:8", "eval/mean@n=8"]
