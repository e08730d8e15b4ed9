"""The merge callback: what it writes, that searches see other data than reports, validation of the merged model."""

import json

import lightning as L
import pytest
import tiny_networks
import torch
import torchmetrics
from deme_parts import STEPS, Pictures, ProjectionOptions, deme, made_up, trained
from distilling import same, states
from pictures import PictureStream, fit, records
from toy import Toy, ToyData, trainer_for
from weights import weights_hash

from callbacks import deme_merge
from callbacks.deme_merge import DeMeMerge, MergeOptions
from datamodules.streams import Streams
from lightning_modules.deme import DeMe
from lightning_t2i.errors import UserError
from lightning_t2i.held_out import HeldOut
from lightning_t2i.keys import Keys
from lightning_t2i.metrics.scorers import Scorer, ScorerOptions
from lightning_t2i.networks.denoiser import Denoiser

pytestmark = pytest.mark.filterwarnings("ignore:The .* does not have many workers")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_networks.pipeline_folder(tmp_path_factory.mktemp("pipeline"))


def merged_by(folder, base, options, data=None, **more):
    """A fit of all ranges with the callback, and what it wrote."""
    module = deme(base, folder / "deltas", **more)
    number = 1 if module.range_index is not None else module.num_ranges
    callback = DeMeMerge(folder / "merged", options)
    fit(folder, module, number * STEPS, data or Pictures(), callbacks=[callback])
    file = folder / "merged" / "merge.json"
    return module, json.loads(file.read_text()) if file.is_file() else None


def streams():
    return Streams(PictureStream(), val=PictureStream(), test=PictureStream(batch_size=8))


def test_given_weights_are_merged_at_the_end_of_a_fit(base, tmp_path):
    weights = [0.3, 0.6]
    foldable = ProjectionOptions("foldable")
    module, about = merged_by(tmp_path, base, MergeOptions(True, weights, n=4), projection=foldable)
    assert about["weights"] == weights and about["search"] == "given" and about["base"] == module.identity
    assert [e["index"] for e in about["experts"]] == ["0", "1"]
    written, expected = Denoiser.from_pretrained(str(tmp_path / "merged")), module.plain(weights)
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), tiny_networks.condition()
    with torch.no_grad():
        torch.testing.assert_close(written(x, t, cond), expected(x, t, cond), atol=5e-3, rtol=0)
    report = about["report"]
    assert {f"{n}/loss" for n in ("base", "merged", "switched")} <= report.keys()
    assert report["merged/loss"] == pytest.approx((report["merged/range_0"] + report["merged/range_1"]) / 2)


@pytest.mark.parametrize("method", ["uniform", "grid", "gradient", "quadratic", "coordinate"])
def test_every_search_is_no_worse_than_the_base_on_what_it_saw(base, tmp_path, method):
    options = MergeOptions(True, search=method, grid=[0.0, 1.0], limit=6, n=4)
    _, about = merged_by(tmp_path, base, options)
    loss = about["search_loss"]
    assert about["search"] == method
    assert loss["merged"] <= loss["base"] or method == "uniform"
    if method == "uniform":
        assert about["weights"] == [0.5, 0.5]


def test_searches_and_reports_see_other_data_and_other_noise(base, tmp_path, monkeypatch):
    seen = []
    measure = DeMe.range_losses

    def told(self, network, given, cond, keys):
        seen.append((type(network).__name__, keys.namespace, len(given)))
        return measure(self, network, given, cond, keys)

    monkeypatch.setattr(DeMe, "range_losses", told)
    merged_by(tmp_path, base, MergeOptions(True, limit=3, n=4), data=streams(), num_ranges=2)
    searched = {(keys, size) for kind, keys, size in seen if kind == "function" and keys == "/merge"}
    reported = {(keys, size) for _, keys, size in seen if keys.startswith("/merge/")}
    assert searched == {("/merge", 4)}  # batches of val, of 4
    assert reported == {("/merge/report", 8)}  # of test, of 8


class Brightness(torchmetrics.MeanMetric):
    """A metric of pictures alone, under the name of one of ours."""

    name = "fd@n=4"

    def update(self, images):
        super().update(images.mean((1, 2, 3)))


def test_metrics_of_base_merged_and_experts_in_turn(base, tmp_path, monkeypatch):
    monkeypatch.setattr(deme_merge, "build_scorer", lambda *_: Scorer(Brightness()))
    options = MergeOptions(True, [5.0, 5.0], n=4, metrics=["fd"])
    module, about = merged_by(tmp_path, base, options)
    found = [about["report"][f"{name}/fd@n=4"] for name in ("base", "merged", "switched")]
    assert len(set(found)) == 3
    batch = records(0, 4)
    images = module.sample(module.condition(batch), module.keys.fork("merge/report"), batch.position, module.plain())
    assert found[0] == pytest.approx(float(images.mean()), abs=1e-4)


def test_nothing_is_merged_before_all_deltas_are_there(base, tmp_path):
    first, about = merged_by(tmp_path, base, MergeOptions(True, [0.5, 0.5], n=4), range_index=0)
    assert about is None and len(first.found_deltas()) == 1
    _, about = merged_by(tmp_path, base, MergeOptions(True, [0.5, 0.5], n=4), range_index=1)
    assert about is not None


def test_a_run_that_was_killed_before_its_merge_merges_when_it_is_resumed(base, tmp_path):
    trained(tmp_path, base)
    module = deme(base, tmp_path / "deltas")
    made = fit(tmp_path / "again", module, 2 * STEPS)
    made.save_checkpoint(tmp_path / "checkpoint")
    later = deme(base, tmp_path / "deltas")
    callback = DeMeMerge(tmp_path / "merged", MergeOptions(True, [1.0, 0.0], n=4))
    trainer = trainer_for(tmp_path, 2 * STEPS, max_epochs=-1, check_val_every_n_epoch=None, callbacks=[callback])
    trainer.fit(later, Pictures(), ckpt_path=str(tmp_path / "checkpoint"), weights_only=True)
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["weights"] == [1.0, 0.0]
    written, first = Denoiser.from_pretrained(str(tmp_path / "merged")), later.experts()[0]
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), tiny_networks.condition()
    with torch.no_grad():
        torch.testing.assert_close(written(x, t, cond), first(x, t, cond), atol=5e-3, rtol=0)


@pytest.fixture(scope="module")
def done(base, tmp_path_factory):
    """A fit of both ranges, and its trainer."""
    folder = tmp_path_factory.mktemp("done")
    module = deme(base, folder / "deltas")
    return fit(folder, module, 2 * STEPS), module


@pytest.mark.parametrize(
    ("options", "evaluations"),
    [
        ({"search": "grid", "grid": [0.0, 1.0]}, 5),  # the base first
        ({"search": "grid", "grid": [0.0, 0.5, 1.0]}, 10),
        ({"search": "coordinate", "limit": 3}, 3),
        ({"search": "coordinate", "limit": 5}, 5),
    ],
    ids=str,
)
def test_grid_and_limit_decide_how_often_a_search_asks(done, tmp_path, options, evaluations):
    trainer, module = done
    DeMeMerge(tmp_path, MergeOptions(True, n=4, **options)).merge(trainer, module)
    assert json.loads((tmp_path / "merge.json").read_text())["evaluations"] == evaluations


def test_n_decides_how_many_samples_are_seen(done, tmp_path, monkeypatch):
    trainer, module = done
    seen = []
    measure = DeMe.range_losses

    def told(self, network, given, cond, keys):
        seen.append(len(given))
        return measure(self, network, given, cond, keys)

    monkeypatch.setattr(DeMe, "range_losses", told)
    for n in (4, 8):
        seen.clear()
        DeMeMerge(tmp_path, MergeOptions(True, [0.5, 0.5], n=n)).merge(trainer, module)
        assert sum(seen) == 3 * n  # for base, merged model and experts in turn


def test_merging_changes_nothing_of_the_training(base, tmp_path):
    plain = trained(tmp_path / "plain", base)
    merging, about = merged_by(tmp_path / "merging", base, MergeOptions(True, limit=3, n=4))
    assert about is not None
    same(states(plain), states(merging))


def test_a_validation_sees_the_merged_model_and_leaves_the_expert(base, tmp_path):
    module, hashes = trained(tmp_path, base), []
    before = weights_hash(module.student_ema)

    class Watch(L.Callback):
        def on_validation_batch_end(self, trainer, pl_module, *unused):
            hashes.append(weights_hash(pl_module.student_ema))

    def validated(callbacks):
        trainer = L.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, callbacks=callbacks,
            enable_model_summary=False, default_root_dir=str(tmp_path),
        )  # fmt: skip
        (losses,) = trainer.validate(module, Pictures(), verbose=False)
        return losses["val/loss"]

    options = MergeOptions(True, [0.7, 0.2], in_validation=True)
    expert, merged = validated([]), validated([DeMeMerge(tmp_path / "merged", options), Watch()])
    assert merged != expert
    assert set(hashes) == {weights_hash(module.plain([0.7, 0.2]))}
    assert weights_hash(module.student_ema) == before

    class Fail(L.Callback):
        def on_validation_batch_end(self, *unused):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        validated([DeMeMerge(tmp_path / "merged", options), Fail()])
    assert weights_hash(module.student_ema) == before
    seen = []

    class Fit(L.Callback):
        def on_validation_batch_end(self, trainer, pl_module, *unused):
            seen.append(weights_hash(pl_module.student_ema) == weights_hash(pl_module.plain([0.7, 0.2])))

    again = deme(base, tmp_path / "deltas", range_index=1)  # all deltas are there, those of before
    callbacks = [DeMeMerge(tmp_path / "merged", options), Fit()]
    fit(tmp_path, again, STEPS, Pictures(), callbacks=callbacks, val_check_interval=1)
    assert seen and not any(seen)


def test_the_gradient_of_the_objective_is_its_slope(base, tmp_path):
    module = deme(base, tmp_path)
    module.configure_model()
    made_up(module.eval(), 0.02)
    with torch.no_grad():
        data = [(r, module.condition(r)) for r in (records(0, 8),)]
    objective, w, h = HeldOut(module, data, Keys(0)), [0.3, 0.5], 1e-2
    value, slope = objective.gradient(w)
    assert value == pytest.approx(objective.value(w), rel=1e-5)
    for i in range(2):
        up, down = ([x + sign * h * (i == k) for k, x in enumerate(w)] for sign in (1, -1))
        assert slope[i] == pytest.approx((objective.value(up) - objective.value(down)) / (2 * h), rel=0.05, abs=1e-4)
    assert objective.value([0.0, 0.0]) == pytest.approx(
        float(module.range_losses(module.teacher, *data[0], Keys(0)).mean()), rel=1e-5
    )


def test_weights_that_are_not_one_for_each_range_are_refused_before_the_training(base, tmp_path):
    with pytest.raises(UserError, match="one weight for each range"):
        merged_by(tmp_path, base, MergeOptions(True, [0.1, 0.2, 0.3]))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
@pytest.mark.parametrize(
    ("options", "streams", "message"),
    [
        ({"search": "grid", "grid": [0.01 * i for i in range(100)]}, {"val": True}, "too many points"),
        ({}, {"test": True}, "no prompts"),
        ({"weights": [0.5, 0.5]}, {}, "no prompts"),
        ({"weights": [0.5, 0.5], "metrics": ["fd"], "networks": {"classifier": "nowhere"}}, None, "nowhere"),
    ],
)
def test_what_could_not_be_merged_is_refused_before_the_training(base, tmp_path, options, streams, message):
    networks = ScorerOptions(**options.pop("networks", {}))
    data = Pictures()
    if streams is not None:
        data = Streams(PictureStream(), **{name: PictureStream() for name in streams})
    with pytest.raises(UserError, match=message):
        merged_by(tmp_path, base, MergeOptions(True, n=4, networks=networks, **options), data)
    assert not (tmp_path / "deltas").exists()


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_given_weights_need_no_validation_data(base, tmp_path):
    _, about = merged_by(
        tmp_path, base, MergeOptions(True, [0.5, 0.5], n=4), Streams(PictureStream(), test=PictureStream())
    )
    assert about is not None


def test_options_and_methods_that_do_not_fit_are_refused(tmp_path):
    wrong = [
        ({"n": 0}, "n must be at least 1"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"metrics": ["none"]}, "merge.metrics"),
        ({"in_validation": True, "enabled": True}, "does not search"),
        ({"in_validation": True, "weights": [1.0]}, "does not search"),
    ]
    for options, message in wrong:
        with pytest.raises(UserError, match=message):
            MergeOptions(**options)
    with pytest.raises(UserError, match="no experts"):
        fit(tmp_path, Toy(), 1, ToyData(), callbacks=[DeMeMerge(tmp_path, MergeOptions(True))])
