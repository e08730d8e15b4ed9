"""RepBlend: the properties of its spec, P1 to P15, gradients, options, processes, what is frozen, bad input."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pictures import PictureStream, fit
from repblend_parts import (
    BATCH,
    PAIRS,
    SIDE,
    STEPS,
    Problem,
    TwoCaptions,
    encoders,
    experts,
    repblend,
    sgd,
    streams,
    trained,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize
from weights import weights_hash

from datamodules.streams import Streams
from lightning_modules.experts import FOLDER, Course, Recipe, Trajectories, save_experts
from lightning_modules.experts import trained as descended
from lightning_modules.repblend import RepBlend
from lightning_t2i import retrieval_student
from lightning_t2i.blending import Blending, Plan, blend
from lightning_t2i.cli.configs import merge
from lightning_t2i.cli.restore import constructed
from lightning_t2i.errors import UserError
from lightning_t2i.keys import Keys
from lightning_t2i.metrics.collapse import collapse, concentration, gap, intra, stripes, threshold
from lightning_t2i.metrics.retrieval import RetrievalRecall
from lightning_t2i.networks.classifier import ClassifierConfig, ShapesClassifier
from lightning_t2i.networks.frozen_pair import FrozenImages, FrozenTexts, encoded
from lightning_t2i.networks.nfnet import NFNet
from lightning_t2i.networks.projection import Head, Student
from lightning_t2i.options import MethodOptions
from lightning_t2i.pair_features import PairFeatures
from lightning_t2i.paths import ROOT
from lightning_t2i.protocols import Exports
from lightning_t2i.retrieval_student import Protocol, TrainingSet
from lightning_t2i.soft_contrast import OBJECTIVES, similarity, wbce
from lightning_t2i.state_io import AtomicCheckpointIO
from lightning_t2i.synthetic_set import SyntheticSet
from lightning_t2i.trajectory_matching import Segment, tesla, unrolled

pytestmark = pytest.mark.filterwarnings("ignore:The .* does not have many workers")
FACTORS = (1, 3)


@pytest.fixture(autouse=True)
def _features_stay_here(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_T2I_DATA", str(tmp_path / "data"))


def solved(problem: Problem, method: Any = tesla, merged: bool = False, **options: Any) -> Any:
    step = problem.loss()
    return method(step, problem.leaves, problem.rates, problem.segment, problem.steps, merged, **options)


# ---- P1 to P5: heads, similarity, objective, blending ----------------------------------------------------------------


def test_P1_heads_have_the_published_sizes():
    assert Head(2304, 2304).numel == 10_626_048
    assert Head(768, 2304).numel == 7_087_104


def test_P1_the_encoder_of_the_paper_has_its_size():
    with torch.device("meta"):
        network = NFNet()
        features = network(torch.zeros(1, 3, 224, 224))
    assert sum(p.numel() for p in network.parameters()) == 32_769_488
    assert features.shape == (1, 2304)


def test_P1_a_file_holds_the_snapshots_and_little_else(tmp_path):
    weights = (torch.randn(2, 300), torch.randn(2, 500))
    files = save_experts(tmp_path, [weights] * 11, {"image": "x"})
    assert len(files) == 2
    for file in files:
        assert 0 <= file.stat().st_size - 11 * 4 * 800 < 400


def test_P1_a_head_is_what_torchs_layers_make_of_its_weights():
    head = Head(5, 7)
    weights = head.initial(Keys(0), "x", torch.arange(2))
    w1, b1, w2, b2, weight, bias = head.parts(weights[1])
    v = torch.randn(3, 5)
    linear = torch.nn.functional.linear
    h = linear(v, w1, b1)
    u = linear(torch.nn.functional.gelu(h), w2, b2)
    expected = normalize(torch.nn.functional.layer_norm(u + h, (7,), weight, bias), dim=-1)
    torch.testing.assert_close(head(weights[1], v), expected)
    stacked = head(weights, torch.stack([v, v]))
    torch.testing.assert_close(stacked[1], expected)
    assert float(w1.abs().max()) <= 5**-0.5 and float(w2.abs().max()) <= 7**-0.5
    assert not torch.equal(head.initial(Keys(0), "x", torch.tensor([0])), weights[1:])
    keep = torch.zeros(3, 7, dtype=torch.bool)
    dropped = normalize(torch.nn.functional.layer_norm(h, (7,), weight, bias), dim=-1)
    torch.testing.assert_close(head(weights[1], v, keep), dropped)


@pytest.mark.parametrize("alpha", [0.5, 3.0])
@pytest.mark.parametrize("rank", [1, 4])
def test_P2_similarity_is_the_identity_at_the_start_and_its_slices_are_its_own(alpha, rank):
    m, rows = 6, torch.tensor([4, 0, 3])
    left = torch.randn(m, rank, requires_grad=True)
    right, a = torch.zeros(m, rank, requires_grad=True), torch.ones(m, requires_grad=True)
    whole = similarity((a, left, right), alpha, torch.arange(m))
    assert torch.equal(whole, torch.eye(m))
    wbce(torch.randn(m, m), whole).backward()
    assert float(left.grad.abs().max()) == 0 and float(right.grad.abs().max()) > 0
    factors = (a.detach() + torch.randn(m), left.detach(), torch.randn(m, rank))
    full = similarity(factors, alpha, torch.arange(m))
    expected = torch.diag(factors[0]) + alpha / rank * factors[1] @ factors[2].T
    torch.testing.assert_close(full, expected)
    torch.testing.assert_close(similarity(factors, alpha, rows), full[rows][:, rows])
    assert torch.linalg.matrix_rank(full - torch.diag(factors[0]), tol=1e-4) <= rank
    dense = torch.randn(m, m)
    assert torch.equal(similarity((dense,), alpha, rows), dense[rows][:, rows])
    assert torch.equal(similarity((), alpha, rows), torch.eye(3))


def test_P3_wbce_in_closed_form():
    assert float(wbce(torch.zeros(5, 5), torch.eye(5))) == pytest.approx(math.log(2), rel=1e-6)
    logits, target = torch.randn(4, 4, dtype=torch.float64), torch.rand(4, 4, dtype=torch.float64)
    torch.testing.assert_close(wbce(logits, target), wbce(logits.T, target.T))
    q = logits.sigmoid()
    e = -target * q.log() - (1 - target) * (1 - q).log()
    positive = target > 0.5
    torch.testing.assert_close(wbce(logits, target), (e[positive].mean() + e[~positive].mean()) / 2)
    torch.testing.assert_close(wbce(logits, target, 1e-6), wbce(logits, target), rtol=1e-4, atol=1e-5)
    saturated = wbce(torch.full((2, 2), 40.0), torch.diag(torch.tensor([1.6, 1.6])))
    assert float(wbce(torch.diag(torch.full((2,), 40.0)) * 2 - 40, 1.6 * torch.eye(2))) < 0 < float(saturated)


def test_P3_the_gradient_of_wbce_is_the_weighted_error():
    logits = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    target = torch.rand(4, 4, dtype=torch.float64)
    wbce(logits, target).backward()
    positive = target > 0.5
    weight = torch.where(positive, 1 / (2 * positive.sum()), 1 / (2 * (~positive).sum()))
    torch.testing.assert_close(logits.grad, weight * (logits.detach().sigmoid() - target))
    direction, h = torch.randn_like(target), 1e-6
    with torch.no_grad():
        slope = (wbce(logits + h * direction, target) - wbce(logits - h * direction, target)) / (2 * h)
    torch.testing.assert_close((logits.grad * direction).sum(), slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("trivial", ["share", "order"])
def test_P4_a_blend_that_changes_nothing_is_none_bit_by_bit(trivial):
    problem, plain = Problem(blending=Blending()), Problem()
    shares, orders = problem.plan.shares, problem.plan.orders
    if trivial == "share":
        shares = torch.ones_like(shares)
    else:
        orders = torch.arange(BATCH).expand_as(orders)
    changed = solved(problem)
    problem.plan = replace(problem.plan, shares=shares, orders=orders)
    found, expected = solved(problem), solved(plain)
    assert torch.equal(found.loss, expected.loss) and not torch.equal(changed.loss, expected.loss)
    for a, b in zip(found.gradients, expected.gradients, strict=True):
        if trivial == "share":
            assert torch.equal(a, b)
        else:  # lam g + (1 - lam) g is rounded
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_P4_a_blend_is_a_lerp_and_shrinks_the_variance_as_it_should():
    rows, order = torch.randn(4, 3), torch.tensor([1, 0, 3, 2])
    share = torch.full((4, 1), 0.25)
    torch.testing.assert_close(blend(rows, share, order), 0.25 * rows + 0.75 * rows[order])
    for shape in (0.2, 1.0, 3.0):
        blending = Blending(concentration=shape, each=True)
        drawn = blending.shares(Keys(0), "x", 40_000)
        expected = (shape + 1) / (2 * shape + 1)
        assert float((drawn**2 + (1 - drawn) ** 2).mean()) == pytest.approx(expected, abs=0.01)
    sharp = Blending(concentration=1e-3, each=True).shares(Keys(0), "x", 2000)
    assert float(torch.minimum(sharp, 1 - sharp).mean()) < 0.002
    assert len(Blending().shares(Keys(0), "x", 5).unique()) == 1


def test_P5_rows_and_stored_ids_permuted_together_change_nothing():
    problem = Problem(blending=Blending())
    order = torch.randperm(PAIRS)
    where = order.argsort()
    expected = solved(problem)
    problem.leaves = [leaf.detach()[order].requires_grad_() for leaf in problem.leaves]
    problem.plan = replace(problem.plan, rows=where[problem.plan.rows])
    found = solved(problem)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)
    for a, b in zip(found.gradients[:-1], expected.gradients[:-1], strict=True):
        torch.testing.assert_close(a, b[order], rtol=1e-6, atol=1e-12)


# ---- P6 to P10: the gradient of the outer loop -----------------------------------------------------------------------


def test_P6_the_second_pass_takes_the_very_gradients_of_the_first():
    for blending in (Blending(), Blending("noise")):
        problem, seen = Problem(blending=blending), []
        step = problem.loss()

        def listening(k, theta, step=step, seen=seen):
            value = step(k, theta)
            seen.append((k, torch.autograd.grad(value, theta, create_graph=True)[0].detach()))
            return step(k, theta)

        tesla(listening, problem.leaves, problem.rates, problem.segment, STEPS)
        first, second = seen[:STEPS], seen[STEPS:]
        assert [k for k, _ in first] == [k for k, _ in second] == list(range(STEPS))
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, second, strict=True))


def test_P6_dropout_drawn_anew_is_the_published_difference():
    problem = Problem(steps=1)
    whole = solved(problem, unrolled).gradients[0]
    replayed, anew = solved(problem), solved(problem, again=problem.loss(anew=True))
    torch.testing.assert_close(replayed.gradients[0], whole, rtol=1e-10, atol=1e-14)
    assert float((anew.gradients[0] - whole).norm() / whole.norm()) > 0.05
    assert torch.equal(replayed.loss, anew.loss)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("factors", [3, 1, 0])
def test_P7_one_step_has_the_whole_gradient(merged, factors):
    problem = Problem(steps=1, blending=Blending(), factors=factors)
    found, whole = solved(problem, tesla, merged), solved(problem, unrolled, merged)
    torch.testing.assert_close(found.loss, whole.loss, rtol=1e-10, atol=0)
    for a, b in zip(found.gradients, whole.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


def surrogate(problem: Problem, leaves: list[Tensor], rates: Tensor, merged: bool) -> Tensor:
    """J of theta*_s - eta sum_k g_k with every theta_k where it is with the problem's own leaves."""
    theta, passed = problem.segment.start, []
    for k in range(problem.steps):
        at = tuple(t.detach().requires_grad_() for t in theta)
        passed.append(at)
        g = torch.autograd.grad(problem.loss()(k, at), at)
        theta = tuple(t - eta * part for t, eta, part in zip(theta, problem.rates, g, strict=True))
    step = problem.loss(leaves)
    found = [torch.autograd.grad(step(k, at), at, create_graph=True) for k, at in enumerate(passed)]
    ends = [
        start - rates[m] * torch.stack([g[m] for g in found]).sum(0) for m, start in enumerate(problem.segment.start)
    ]
    scales = problem.segment.scales(merged)
    return sum(c * (e - t).square().sum() for c, e, t in zip(scales, ends, problem.segment.target, strict=True))


def slope(value: Any, leaves: list[Tensor], directions: list[Tensor], h: float = 1e-5) -> float:
    """Central difference of a function of leaves along directions."""
    ends = [value([(x + s * h * v).detach().requires_grad_() for x, v in zip(leaves, directions, strict=True)])
            for s in (1, -1)]  # fmt: skip
    return float((ends[0] - ends[1]).detach() / (2 * h))


@pytest.mark.parametrize("merged", [False, True])
def test_P7_tesla_is_the_gradient_of_its_surrogate_and_its_finite_differences(merged):
    problem = Problem(blending=Blending())
    found = solved(problem, tesla, merged)
    rates = problem.rates.clone().requires_grad_()
    value = surrogate(problem, problem.leaves, rates, merged)
    torch.testing.assert_close(value.detach(), found.loss)
    for a, b in zip(found.gradients, torch.autograd.grad(value, [*problem.leaves, rates]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
    whole = solved(problem, unrolled, merged)
    assert not torch.allclose(found.gradients[0], whole.gradients[0], rtol=1e-2)
    directions = [torch.randn_like(x) for x in [*problem.leaves, rates]]
    expected = sum(float((g * v).sum()) for g, v in zip(found.gradients, directions, strict=True))
    measured = slope(lambda x: surrogate(problem, x[:-1], x[-1], merged), [*problem.leaves, rates], directions)
    assert measured == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("merged", [False, True])
def test_P7_the_unrolled_gradient_is_that_of_finite_differences(merged):
    problem = Problem(blending=Blending())
    leaves = [*problem.leaves, problem.rates]
    found = solved(problem, unrolled, merged)
    directions = [torch.randn_like(x) for x in leaves]

    def value(x: list[Tensor]) -> Tensor:
        return unrolled(problem.loss(x[:-1]), x[:-1], x[-1], problem.segment, STEPS, merged).loss

    expected = sum(float((g * v).sum()) for g, v in zip(found.gradients, directions, strict=True))
    assert slope(value, leaves, directions) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("method", [tesla, unrolled])
def test_P8_the_loops_own_end_as_target_costs_nothing_and_moves_nothing(method, merged):
    problem = Problem(blending=Blending())
    theta, step = problem.segment.start, problem.loss()
    total = [torch.zeros_like(t) for t in theta]
    for k in range(STEPS):
        at = tuple(t.detach().requires_grad_() for t in theta)
        g = torch.autograd.grad(step(k, at), at)
        total = [a + b for a, b in zip(total, g, strict=True)]
        theta = tuple(t - eta * part for t, eta, part in zip(theta, problem.rates, g, strict=True))
    problem.segment = Segment(problem.segment.start, theta)
    found = solved(problem, method, merged)
    assert float(found.loss) < 1e-25
    assert max(float(g.abs().max()) for g in found.gradients) < 1e-12


@pytest.mark.parametrize(("merged", "value"), [(False, 2.0), (True, 1.0)])
@pytest.mark.parametrize("method", [tesla, unrolled])
def test_P9_without_rates_nothing_moves(method, merged, value):
    problem = Problem(blending=Blending())
    problem.rates = torch.zeros(2, dtype=torch.float64)
    found = solved(problem, method, merged)
    assert float(found.loss) == pytest.approx(value, rel=1e-12)
    assert all(float(g.abs().max()) == 0 for g in found.gradients[:-1])
    step = problem.loss()
    for m, (start, target) in enumerate(zip(problem.segment.start, problem.segment.target, strict=True)):
        at = tuple(t.clone().requires_grad_() for t in problem.segment.start)
        total = sum(torch.autograd.grad(step(k, at), at)[m] for k in range(STEPS))
        expected = -2 * problem.segment.scales(merged)[m] * (total * (start - target)).sum()
        torch.testing.assert_close(found.gradients[-1][m], expected)


def test_P10_separate_is_twice_merged_where_both_heads_moved_as_far():
    problem = Problem(blending=Blending())
    (x, y), (tx, ty) = problem.segment.start, problem.segment.target
    far = (ty - y) * ((tx - x).norm() / (ty - y).norm())
    problem.segment = Segment((x, y), (tx, y + far))
    separate, merged = solved(problem, tesla, False), solved(problem, tesla, True)
    torch.testing.assert_close(separate.loss, 2 * merged.loss)
    for a, b in zip(separate.gradients, merged.gradients, strict=True):
        torch.testing.assert_close(a, 2 * b)


# ---- P11: snapshots; experts -----------------------------------------------------------------------------------------


def features_of(module: Any) -> PairFeatures:
    data = streams()
    data.setup()
    pair = (module.image, module.text)
    return PairFeatures.of(data.training["main"], pair, [module.frozen_identities[n] for n in ("image", "text")], "cpu")


def test_P11_snapshots_are_no_views_of_the_weights(tmp_path):
    module = experts(tmp_path)
    module.configure_model()
    course = Course(module.student, features_of(module), Recipe(2, 2, 16), 4)
    snapshots = list(descended(course, [0, 1], Recipe(2, 2, 16)))
    storages = {w.untyped_storage().data_ptr() for pair in snapshots for w in pair}
    assert len(snapshots) == 3 and len(storages) == 6
    for before, after in pairwise(snapshots):
        assert all(float((a - b).square().sum()) > 0 for a, b in zip(before, after, strict=True))
    held = Trajectories(tuple(torch.stack(side, 1) for side in zip(*snapshots, strict=True)))
    segment = held.segment(1, 0, 1)
    segment.start[0].zero_()
    assert float(held.snapshot(1, 0)[0].abs().max()) > 0
    still = Trajectories(tuple(w[:, None].expand(-1, 3, -1) for w in snapshots[0]))
    with pytest.raises(UserError, match="does not move"):
        still.segment(0, 0, 2)


def test_P11_a_run_writes_the_trajectories_of_plain_descent(tmp_path):
    module = experts(tmp_path)
    fit(tmp_path, module, 4, streams(), limit_val_batches=0)  # 32 pairs, two batches of an epoch
    files = sorted((tmp_path / FOLDER).glob("expert-*.safetensors"))
    assert [f.name for f in files] == ["expert-0000.safetensors", "expert-0001.safetensors"]
    course = Course(module.student, features_of(module), Recipe(2, 2, 16), 4)
    expected = list(descended(course, [0, 1], Recipe(2, 2, 16)))
    for number, file in enumerate(files):
        found = load_file(file)
        assert found["image"].shape[0] == 3 and found["image"].dtype == torch.float32
        for epoch, pair in enumerate(expected):
            torch.testing.assert_close(found["image"][epoch], pair[0][number], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found["text"][epoch], pair[1][number], rtol=1e-5, atol=1e-6)
    assert not torch.equal(load_file(files[0])["image"], load_file(files[1])["image"])
    read = Trajectories(tmp_path / FOLDER)
    assert len(read) == 2 and read.length == 3
    assert torch.equal(read.snapshot(1, 2)[1], load_file(files[1])["text"][2])


def test_experts_learn_which_caption_belongs_to_which_picture():
    features = PairFeatures(torch.randn(24, 8), torch.randn(24, 6), torch.arange(24), ["x"] * 24)
    course = Course(Student.of(8, 6), features, Recipe(1, 40, 24), 0)
    *_, end = descended(course, [0], Recipe(1, 40, 24))
    initial = course.student.initial(course.keys, torch.tensor([0]))
    before, after = (float(course.losses(0, [0], weights).detach()) for weights in (initial, end))
    assert after < 0.9 * before


def test_every_pair_is_seen_once_an_epoch_and_in_another_order_by_each_expert(tmp_path):
    module = experts(tmp_path)
    module.configure_model()
    course = Course(module.student, features_of(module), Recipe(2, 2, 16), 0)
    epochs = [torch.cat([course.rows(2 * e + k, n) for k in range(2)]) for e in range(2) for n in range(2)]
    assert all(sorted(rows.tolist()) == list(range(32)) for rows in epochs)
    assert len({tuple(rows.tolist()) for rows in epochs}) == 4


def test_experts_that_go_on_leave_the_same_files(tmp_path):
    fit(tmp_path / "whole", experts(tmp_path), 4, streams(), limit_val_batches=0)
    half = fit(tmp_path / "half", experts(tmp_path), 3, streams(), limit_val_batches=0)
    half.save_checkpoint(tmp_path / "half.ckpt")
    assert [f.name for f in (tmp_path / "half" / FOLDER).glob("expert-*")] != []
    fit_from(tmp_path / "half", experts(tmp_path), 4, tmp_path / "half.ckpt")
    whole, again = (sorted((tmp_path / name / FOLDER).glob("expert-*")) for name in ("whole", "half"))
    assert [f.read_bytes() for f in whole] == [f.read_bytes() for f in again]


def test_experts_that_were_killed_at_their_end_leave_their_files_when_resumed(tmp_path):
    fit(tmp_path, experts(tmp_path), 4, streams(), limit_val_batches=0).save_checkpoint(tmp_path / "end.ckpt")
    files = {file: file.read_bytes() for file in (tmp_path / FOLDER).glob("expert-*")}
    for file in files:
        file.unlink()
    fit_from(tmp_path, experts(tmp_path), 4, tmp_path / "end.ckpt")
    assert len(files) == 2 and all(file.read_bytes() == content for file, content in files.items())


def test_experts_validate(tmp_path):
    module = experts(tmp_path)
    trainer = fit(tmp_path, module, 2, streams(), val_check_interval=2)
    assert 0 < float(trainer.callback_metrics["val/loss"]) < 10


def test_the_update_of_the_heads_is_an_option(tmp_path):
    still, usual = experts(tmp_path, heads=sgd(0.0)), experts(tmp_path)
    for module in (still, usual):
        fit(tmp_path, module, 1, streams(), limit_val_batches=0)
    initial = still.student.initial(Keys(4).fork("experts"), torch.arange(2))
    assert torch.equal(still.state_dict()["heads.image"], initial[0])
    assert not torch.equal(usual.state_dict()["heads.image"], initial[0])


def test_more_processes_than_experts_are_refused_by_all(tmp_path, monkeypatch):
    module = experts(tmp_path, count=2)
    module.configure_model()
    monkeypatch.setattr(type(module), "trainer", SimpleNamespace(world_size=3))
    with pytest.raises(UserError, match="A process has no expert"):
        module.on_fit_start()


def test_real_pairs_are_encoded_once_and_pictures_read_no_more(tmp_path, monkeypatch):
    module = experts(tmp_path)
    module.configure_model()
    seen: list[int] = []
    module.image.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    fetch = TwoCaptions.fetch
    monkeypatch.setattr(TwoCaptions, "fetch", lambda self, rows, at: (read.append(len(rows)), fetch(self, rows, at))[1])
    read: list[int] = []
    first = features_of(module)
    assert seen == [16] and sum(read) == 17  # the first one is looked at before
    read.clear()
    again = features_of(module)
    assert seen == [16] and read == [1]
    assert again.captions == first.captions and len(again.captions) == 32 == len(set(again.captions))
    assert again.owner.tolist() == [row for row in range(16) for _ in range(2)]
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in ("images", "texts"))
    (file,) = (tmp_path / "data").rglob("features-*.safetensors")
    save_file({name: tensor for name, tensor in load_file(file).items() if name in ("images", "texts")}, file)
    assert features_of(module).captions == first.captions  # a file without captions is made anew
    assert seen == [16, 16]


def rank_features(rank: int, folder: str) -> dict[str, Any]:
    module = experts(Path(folder))
    module.configure_model()
    seen: list[int] = []
    module.image.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    found = features_of(module)
    return {"seen": sum(seen), "images": found.images, "captions": found.captions}


def test_one_process_encodes_real_pairs_for_both(tmp_path, ranks):
    encoders(tmp_path)
    first, second = ranks(rank_features, str(tmp_path))
    assert (first["seen"], second["seen"]) == (16, 0)
    assert torch.equal(first["images"], second["images"]) and first["captions"] == second["captions"]


@pytest.fixture(scope="module")
def experts_alone(tmp_path_factory) -> dict[str, Tensor]:
    return alone(rank_experts, tmp_path_factory.mktemp("experts"))


def alone(train: Any, folder: Path) -> dict[str, Tensor]:
    """What one process trains, in a folder with features of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_T2I_DATA", str(folder / "data"))
        return train(0, str(folder), 1, 1)


def rank_experts(rank: int, folder: str, replicate: int, shard: int) -> dict[str, Tensor]:
    module = experts(Path(folder), count=4)
    fit(
        Path(folder) / f"{replicate}{shard}",
        module,
        4,
        streams(),
        replicate=replicate,
        shard=shard,
        limit_val_batches=0,
    )
    return module.state_dict()


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2)], ids=str)
def test_one_and_two_processes_train_the_same_experts(tmp_path, ranks, experts_alone, mesh):
    one = experts_alone
    for two in ranks(rank_experts, str(tmp_path), *mesh):
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)
    joined = [load_file(f) for f in sorted((tmp_path / f"{mesh[0]}{mesh[1]}" / FOLDER).glob("expert-*"))]
    assert len(joined) == 4
    torch.testing.assert_close(joined[2]["image"][-1], one["heads.image"][2], rtol=1e-4, atol=1e-6)


# ---- P12: pixels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chunk", "kept"), [(None, 0), (3, 0), (3, 4), (3, 99)])
def test_P12_the_pixels_gradient_is_that_of_an_encoder_in_every_step(tmp_path, chunk, kept):
    module = repblend(tmp_path)
    module.configure_model()
    module.double()
    problem = Problem(blending=Blending())
    student = Student.of(8, 4, 6)
    problem.stub.student = module.student = student
    start = tuple(w[0].double() for w in student.initial(Keys(1), torch.tensor([0])))
    problem.segment = Segment(start, tuple(w + 0.01 for w in start))
    pixels = torch.randn(PAIRS, 3, SIDE, SIDE, dtype=torch.float64, requires_grad=True)
    cached = encoded(module.image, pixels, chunk, kept)
    leaves = [cached.detach().requires_grad_(), *problem.leaves[1:]]
    g = tesla(problem.loss(leaves), leaves, problem.rates, problem.segment, STEPS).gradients[0]
    (found,) = torch.autograd.grad((cached * g).sum(), pixels)

    def encoding(k: int, theta: tuple[Tensor, Tensor]) -> Tensor:
        return problem.loss([module.image(pixels), *problem.leaves[1:]])(k, theta)

    expected = tesla(encoding, [pixels, *problem.leaves[1:]], problem.rates, problem.segment, STEPS).gradients[0]
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-14)
    assert float(expected.abs().max()) > 0


# ---- P13, P14: what is measured --------------------------------------------------------------------------------------


def test_P13_collapse_in_closed_form():
    same = normalize(torch.ones(4, 6), dim=1)
    assert intra(same) == pytest.approx(1) and intra(torch.eye(5)) == 0
    simplex = normalize(torch.eye(7) - 1 / 7, dim=1)
    assert intra(simplex) == pytest.approx(-1 / 6, abs=1e-6)
    x, y = normalize(torch.randn(30, 8), dim=1), normalize(torch.randn(30, 8), dim=1)
    assert gap(x, x) == 0 and gap(x, -x) == pytest.approx(2 * float(x.mean(0).norm()), rel=1e-5)
    found = collapse(x, y, threshold(x, y))
    assert found["cr42"] == pytest.approx(0.42, abs=0.01)
    assert found["diversity"] == pytest.approx(1 - (intra(x) + intra(y)) / 2)
    assert found["pair"] == pytest.approx(float((x * y).sum(1).mean()))
    assert concentration(same, same, 0.5) == 1.0 and "cr42" not in collapse(x, y)
    assert float(collapse(x, x)["pair"]) == pytest.approx(1)


def test_P13_stripes_are_what_a_sum_over_rows_and_columns_explains():
    u, v = torch.randn(8), torch.randn(8)
    striped = u[:, None] + v[None] + torch.diag(torch.randn(8))
    assert stripes(striped) == pytest.approx(1, abs=1e-6)
    assert stripes(torch.randn(30, 30)) < 0.2
    assert stripes(torch.eye(4)) == 0.0


def test_P14_recalls_of_known_scores():
    eye = torch.eye(20)
    recall = RetrievalRecall()
    recall.add(eye, torch.arange(20), eye.repeat_interleave(5, 0), torch.arange(20).repeat_interleave(5))

    def cosines(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return a @ b.T, b @ a.T

    assert set(recall.compute(cosines).values()) == {1.0}

    def one_caption(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:  # only a picture's last caption is like it
        scores = a @ b.T - 2 * (torch.arange(len(b)) % 5 != 4)
        return scores, scores.T

    assert recall.compute(one_caption)["i2t/r1"] == 1.0
    n, found = 200, []
    for seed in range(20):
        drawn = torch.randn(n, n, generator=torch.Generator().manual_seed(seed))
        table = RetrievalRecall()
        table.add(drawn, torch.arange(n), torch.eye(n), torch.arange(n))
        found.append(table.compute(cosines)["i2t/r10"])
    assert sum(found) / 20 == pytest.approx(10 / n, abs=0.02)


# ---- P15: resume; processes; what is frozen --------------------------------------------------------------------------


def test_P15_a_training_that_goes_on_ends_with_the_same_bits(tmp_path):
    whole = repblend(tmp_path)
    complete = trained(tmp_path / "whole", whole, 4)
    complete.save_checkpoint(tmp_path / "whole.ckpt")
    half = trained(tmp_path / "half", repblend(tmp_path), 2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    again = repblend(tmp_path)
    trainer = fit_from(tmp_path / "again", again, 4, tmp_path / "half.ckpt")
    trainer.save_checkpoint(tmp_path / "again.ckpt")
    states = [AtomicCheckpointIO().load_checkpoint(tmp_path / f"{name}.ckpt") for name in ("whole", "again")]
    assert states[0]["state_dict"].keys() == states[1]["state_dict"].keys()
    for name, tensor in states[0]["state_dict"].items():
        assert torch.equal(tensor, states[1]["state_dict"][name]), name
    for name, group in states[0]["t2i"]["groups"].items():
        for parameter, entries in group["states"].items():
            other = states[1]["t2i"]["groups"][name]["states"][parameter]
            assert torch.equal(entries["momentum_buffer"], other["momentum_buffer"])


def fit_from(folder: Path, module: Any, steps: int, checkpoint: Path) -> Any:
    from toy import trainer_for

    trainer = trainer_for(
        folder, steps, max_epochs=-1, check_val_every_n_epoch=None, num_sanity_val_steps=0, limit_val_batches=0
    )
    trainer.fit(module, streams(), ckpt_path=str(checkpoint), weights_only=True)
    return trainer


def rank_repblend(rank: int, folder: str, replicate: int, shard: int) -> dict[str, Tensor]:
    accumulate = 4 // (replicate * shard)
    module = repblend(Path(folder), MethodOptions(accumulate=accumulate))
    trained(Path(folder) / f"{replicate}{shard}", module, 2, replicate=replicate, shard=shard)
    return module.state_dict()


@pytest.fixture(scope="module")
def set_alone(tmp_path_factory) -> dict[str, Tensor]:
    return alone(rank_repblend, tmp_path_factory.mktemp("set"))


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2)], ids=str)
def test_one_and_two_processes_agree_over_as_many_segments(tmp_path, ranks, set_alone, mesh):
    one = set_alone
    for two in ranks(rank_repblend, str(tmp_path), *mesh):
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)


def test_segments_of_a_step_are_averaged(tmp_path):
    class Second(RepBlend):
        global_rank = 1  # takes the second segment of a step

    first, second, both = (repblend(tmp_path, MethodOptions(accumulate=n)) for n in (1, 1, 2))
    second.__class__ = Second
    for module in (first, second, both):
        trained(tmp_path, module, 1)
    for name in ("images.pixels", "texts.vectors", "similarity.a"):  # plain descent from the same place
        one, other, found = (module.state_dict()[name] for module in (first, second, both))
        torch.testing.assert_close(found, (one + other) / 2, rtol=1e-4, atol=1e-6)
        assert float((one - other).abs().max()) > 1e-4


def test_frozen_encoders_stay_as_they_are_and_out_of_the_checkpoint(tmp_path):
    module = repblend(tmp_path)
    module.configure_model()
    hashes = [weights_hash(module.image), weights_hash(module.text)]
    trained(tmp_path, module, 2)
    assert [weights_hash(module.image), weights_hash(module.text)] == hashes
    frozen = [*module.image.parameters(), *module.text.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    assert not module.image.training and not module.text.training
    assert {name.split(".")[0] for name in module.state_dict()} == {"images", "texts", "rates", "similarity"}
    other = repblend(tmp_path, encoders=replace(encoders(tmp_path), image="assets/tiny/classifier"), size=32)
    other.configure_model()
    trainer = trained(tmp_path, module, 2)
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    with pytest.raises(UserError, match="another frozen network"):
        other.on_load_checkpoint(AtomicCheckpointIO().load_checkpoint(tmp_path / "c.ckpt"))


def test_all_parts_of_the_set_are_updated_and_the_loss_falls(tmp_path):
    module = repblend(tmp_path, recipe=Recipe(1, epochs=2, batch_size=16), max_start=1, blending=Blending("none"))
    losses = []
    backward = module.backward
    module.backward = lambda names, loss, **s: (losses.append(float(loss.detach())), backward(names, loss, **s))
    trained(tmp_path, module, 12)
    before = repblend(tmp_path, recipe=Recipe(1, epochs=2, batch_size=16), max_start=1)
    trained(tmp_path, before, 1)
    for name, tensor in module.state_dict().items():
        assert not torch.equal(tensor, before.state_dict()[name]) or name == "similarity.left"
    assert sum(losses[-4:]) < sum(losses[:4])


# ---- options ---------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "no blend": {"blending": Blending("none")},
    "noise": {"blending": Blending("noise")},
    "other Beta": {"blending": Blending(concentration=0.2)},
    "each row": {"blending": Blending(each=True)},
    "pictures alone": {"blending": Blending(branches="image")},
    "texts alone": {"blending": Blending(branches="text")},
    "merged": {"merged": True},
    "unrolled": {"gradient": "unrolled"},
    "anew": {"replay": False},
    "steps": {"inner_steps": 2},
    "batch": {"inner_batch": 5},
    "epochs": {"expert_epochs": 2},
    "start": {"max_start": 1},
    "rate": {"rate": 0.2},
    "herding": {"initial": "herding"},
    "k-center": {"initial": "k_center"},
    "forgetting": {"initial": "forgetting"},
    "noise to begin": {"initial": "noise"},
    "temperature": {"encoders": {"temperature": 0.1}},
    "recipe": {"recipe": Recipe(3, epochs=3, batch_size=8)},
    **{name: {"objective": name} for name in OBJECTIVES if name not in ("wbce", "wbce_epsilon")},
}


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("usual")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_T2I_DATA", str(folder / "data"))
        module = repblend(folder)
        trained(folder, module, 1)
    return folder, module.state_dict()


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_changes_the_training(usual, tmp_path, name):
    folder, expected = usual
    options = dict(OPTIONS[name])
    if isinstance(options.get("encoders"), dict):
        options["encoders"] = replace(encoders(folder), **options["encoders"])
    module = repblend(folder, **options)
    trained(tmp_path, module, 1)
    found = module.state_dict()
    assert any(not torch.equal(found[key], expected[key]) for key in ("images.pixels", "texts.vectors"))


@pytest.mark.parametrize(("option", "numbers"), [
    ({"target": "dense"}, {"similarity.dense": (PAIRS, PAIRS)}),
    ({"target": "identity"}, {}),
    ({"rank": 3}, {"similarity.a": (PAIRS,), "similarity.left": (PAIRS, 3), "similarity.right": (PAIRS, 3)}),
    ({"pairs": 6}, {"images.pixels": (6, 3, SIDE, SIDE), "similarity.a": (6,)}),
])  # fmt: skip
def test_options_of_shape_decide_what_is_trained(tmp_path, option, numbers):
    module = repblend(tmp_path, **option)
    module.configure_model()
    shapes = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    found = {name: shape for name, shape in shapes.items() if name.startswith("similarity") or name in numbers}
    for name, shape in numbers.items():
        assert shapes[name] == shape
    assert option.get("target") is None or found == numbers


def test_alpha_is_an_option_of_the_training(usual, tmp_path):
    module = repblend(usual[0], alpha=1.0)
    trained(tmp_path, module, 1)
    assert not torch.equal(module.state_dict()["similarity.right"], usual[1]["similarity.right"])


@pytest.mark.parametrize(("protocol", "retrievals"), [(Protocol(3, 1, every=1), 6), (Protocol(1, 4, every=2), 3)])
def test_the_protocol_decides_how_the_set_is_measured(usual, tmp_path, monkeypatch, protocol, retrievals):
    seen = []
    retrieve = retrieval_student.retrieve
    monkeypatch.setattr(retrieval_student, "retrieve", lambda *given: (seen.append(1), retrieve(*given))[1])
    trained(tmp_path, repblend(usual[0], protocol=protocol), 1, val=2, val_check_interval=1)
    assert len(seen) == retrievals


def test_alpha_scales_the_factors():
    low, high = (Problem(alpha=alpha).loss()(0, Problem().segment.start).item() for alpha in (0.1, 3.0))
    assert low != high


def test_rates_stay_above_their_floor(tmp_path):
    module = repblend(tmp_path, rate=0.01, floor=0.02)
    trained(tmp_path, module, 1)
    assert float(module.state_dict()["rates.eta"].min()) == pytest.approx(0.02)


def test_encoding_again_changes_memory_alone(tmp_path, usual):
    passes = []
    for options in ({}, {}, {"chunk": 3, "kept": 5}, {"chunk": 3}):  # the first one encodes the real pictures
        module = repblend(usual[0], **options)
        module.configure_model()
        seen: list[int] = []
        module.image.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(len(given[0])))
        trained(tmp_path, module, 1)
        passes.append(sum(seen))
        torch.testing.assert_close(module.state_dict()["images.pixels"], usual[1]["images.pixels"])
    assert passes[1] < passes[2] < passes[3]


def test_the_width_of_the_heads_is_an_option(tmp_path):
    module = repblend(tmp_path, encoders=encoders(tmp_path, width=12))
    module.configure_model()
    assert module.student.image.width == module.student.text.width == 12


# ---- validation, test, export ----------------------------------------------------------------------------------------


def test_validation_and_test_report_recalls_and_collapse(tmp_path):
    module = repblend(tmp_path)
    trainer = trained(tmp_path, module, 2, val=2, val_check_interval=2)
    names = {"val/mean", "val/last/t2i/r1", "val/reference/mean", "val/collapse/gap", "val/collapse/stripes"}
    assert names <= trainer.callback_metrics.keys()
    real = TrainingSet.of_pairs(module.known, torch.arange(len(module.known)))  # fewer than are drawn: all of them
    usual = threshold(*module.student.embed(module.judge, real.images, real.texts))
    pairs = module.training_set()
    expected = concentration(*module.student.embed(module.judge, pairs.images, pairs.texts), usual)
    assert float(trainer.callback_metrics["val/collapse/cr42"]) == pytest.approx(expected, abs=1e-3)
    for name in ("pairs-before.png", "pairs-after.png", "embeddings-before.png", "embeddings-after.png"):
        assert (tmp_path / name).stat().st_size > 1000
    trainer.test(module, streams(), verbose=False)
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert values["test/reference/mean"] >= values["test/last/mean"] >= 0
    assert values["test/reference/mean"] >= values["test/selected/mean"]


def test_it_exports_a_set_that_comes_back_as_it_was(tmp_path):
    module = repblend(tmp_path)
    trained(tmp_path, module, 2)
    assert isinstance(module, Exports)
    data = streams()
    data.setup("validate")
    module.export(tmp_path / "out", data.val_dataloader())
    found = SyntheticSet.load(tmp_path / "out")
    state = module.state_dict()
    assert torch.equal(found.images, state["images.pixels"]) and torch.equal(found.texts, state["texts.vectors"])
    assert torch.equal(found.rates, state["rates.eta"])
    assert torch.equal(found.similarity, similarity(tuple(module.learned()[3:]), 3.0, torch.arange(PAIRS)))
    assert found.images.dtype == torch.float32 and len(found.captions[0]) == 3
    identities = {name: found.facts[name] for name in ("image", "text")}
    assert identities == {name: module.frozen_identities[name] for name in identities}
    assert found.facts["image_head"]["inputs"] == 8 and found.facts["alpha"] == 3.0
    with pytest.raises(UserError, match="synthetic set"):
        SyntheticSet.load(tmp_path)


def test_an_export_has_a_card(tmp_path):
    from lightning_t2i.cli.stock import read_stock

    module = repblend(tmp_path)
    module.configure_model()
    module.export(tmp_path / "out", [])
    stock = read_stock(tmp_path / "out")
    assert stock.library == "lightning-t2i" and "SyntheticSet" in stock.snippet
    assert stock.networks[0].parameters == PAIRS * (1 + 2 * 2) + 2


# ---- bad input -------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "objective": ({"objective": "triplet"}, "objective"),
    "batch": ({"inner_batch": 99}, "inner batch"),
    "steps": ({"inner_steps": 0}, "at least 1"),
    "chunk": ({"chunk": 0}, "at least 1"),
    "precision": ({"common": MethodOptions(precision="bf16")}, "float32"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused(tmp_path, name):
    options, message = WRONG[name]
    with pytest.raises(UserError, match=message):
        repblend(tmp_path, **options)


def test_tiny_configs_can_be_constructed_and_say_what_they_are_named_for():
    names = ("tiny", "tiny_lors", "tiny_mtt", "tiny_random")
    found = {name: constructed(ROOT / f"configs/repblend/{name}.yaml") for name in names}
    facts = {name: (m.blending.kind, m.target, m.gradient) for name, m in found.items()}
    assert facts["tiny"] == ("blend", "identity", "tesla") and facts["tiny_lors"] == ("none", "factors", "tesla")
    assert facts["tiny_mtt"] == ("none", "identity", "unrolled")
    still = found["tiny_random"].options["images"].optimizer([torch.zeros(1, requires_grad=True)])
    assert still.defaults["lr"] == 0.0


def test_options_of_parts_are_checked(tmp_path):
    with pytest.raises(UserError, match="Beta"):
        Blending(concentration=0)
    with pytest.raises(UserError, match="temperature"):
        encoders(tmp_path, temperature=0.0)
    with pytest.raises(UserError, match="expert"):
        experts(tmp_path, count=0)
    for name in ("nets", "batch_size", "every"):
        with pytest.raises(UserError, match=f"protocol.{name}"):
            Protocol(**{name: 0})
    for name in ("count", "epochs", "batch_size"):
        with pytest.raises(UserError, match=f"recipe.{name}"):
            Recipe(**{name: 0})


@pytest.mark.parametrize(("options", "message"), [
    ({"pairs": 200}, "fewer real pairs"),
    ({"max_start": 3, "expert_epochs": 2}, "fewer epochs"),
    ({"size": 16}, "another size"),
    ({"experts": "nowhere"}, "no experts"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_before_the_first_step(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        trained(tmp_path, repblend(tmp_path, **options), 1)


def test_encoders_of_a_hub_are_read_at_their_revisions(tmp_path, monkeypatch):
    asked, given = [], encoders(tmp_path, image_revision="abc", text_revision="def")
    for kind in (FrozenImages, FrozenTexts):
        build = kind.build

        def recorded(source, *rest, build=build):
            asked.append((source, rest[-1]))
            return build(source)

        monkeypatch.setattr(kind, "build", recorded)
    repblend(tmp_path, encoders=given).configure_model()
    assert asked == [(given.image, "abc"), (given.text, "def")]


def test_experts_of_other_encoders_are_refused(tmp_path):
    fit(tmp_path, experts(tmp_path), 4, streams(), limit_val_batches=0)
    folder = str(tmp_path / FOLDER)
    trained(tmp_path / "a", repblend(tmp_path, experts=folder, max_start=1), 1)
    with pytest.raises(UserError, match="temperature"):
        other = repblend(tmp_path, experts=folder, encoders=encoders(tmp_path, temperature=0.2), max_start=1)
        trained(tmp_path / "b", other, 1)
    torch.manual_seed(4)
    ShapesClassifier(ClassifierConfig(widths=(8, 8, 8))).save_pretrained(tmp_path / "alike")  # but other weights
    with pytest.raises(UserError, match="another 'image'"):
        other = repblend(tmp_path, experts=folder, encoders=encoders(tmp_path, "alike"), max_start=1)
        trained(tmp_path / "c", other, 1)


def test_a_stream_without_all_captions_and_encoders_that_are_none_are_refused(tmp_path):
    with pytest.raises(UserError, match="all of their captions"):
        bare = Streams(PictureStream(4, SIDE), val=PictureStream(4, SIDE))
        fit(tmp_path, repblend(tmp_path), 1, bare, limit_val_batches=0)
    with pytest.raises(UserError, match="random weights"):
        repblend(tmp_path, encoders=replace(encoders(tmp_path), image="nfnet_l0")).configure_model()
    with pytest.raises(UserError, match="(?s)no weights here.*nfnet_l0.ra2_in1k"):
        found = replace(encoders(tmp_path), image="nfnet_l0", image_weights="nowhere.safetensors")
        repblend(tmp_path, encoders=found).configure_model()
    with pytest.raises(UserError, match="Not a text encoder"):
        repblend(tmp_path, encoders=replace(encoders(tmp_path), text="assets/tiny/vae")).configure_model()


# ---- paper scale -----------------------------------------------------------------------------------------------------

PAPER = {name: pairs for data in ("flickr30k", "coco") for name, pairs in
         ((f"{data}_100", 99), (f"{data}_200", 199), (f"{data}_500", 499))}  # fmt: skip


@pytest.mark.parametrize("name", PAPER)
def test_paper_scale_sets_have_their_published_sizes(name, capsys):
    given = merge([ROOT / f"configs/repblend/{name}.yaml"]).config["model"]["init_args"]
    m, rank = given.get("pairs", 99), given.get("rank", 10)
    assert m == PAPER[name]
    assert given["encoders"]["image"] == "nfnet_l0" and given["encoders"]["text"] == "google-bert/bert-base-uncased"
    floats = m * (3 * 224 * 224 + 768) + m * (2 * rank + 1) + 2
    assert m * (2 * rank + 1) < 151_296 or m > 199
    snapshots = 11 * 4 * (Head(2304, 2304).numel + Head(768, 2304).numel)
    assert snapshots / 2**30 == pytest.approx(0.726, abs=0.001)
    with capsys.disabled():
        print(f"\n{name}: {floats * 4 / 1e6:.0f} MB of set, {snapshots / 2**30:.2f} GiB for an expert")


def test_the_weights_of_an_nfnet_are_read_by_their_published_names(tmp_path):
    from safetensors.torch import save_file

    network = NFNet()
    save_file({**network.state_dict(), "head.fc.weight": torch.zeros(2, 2)}, tmp_path / "w.safetensors")
    assert "stages.2.5.conv2b.gain" in network.state_dict() and "stem.conv4.weight" in network.state_dict()
    found, _ = FrozenImages.build("nfnet_l0", str(tmp_path / "w.safetensors"))
    pixels = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(found(pixels), network(((pixels + 1) / 2 - found.mean) / found.deviation))
    save_file({"stem.conv1.weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="another network"):
        FrozenImages.build("nfnet_l0", str(tmp_path / "x.safetensors"))


def test_published_hyperparameters_are_the_defaults(tmp_path):
    module = RepBlend(encoders(tmp_path))
    facts = (module.pairs, module.rank, module.alpha, module.inner_steps, module.inner_batch, module.max_start)
    assert facts == (99, 10, 3.0, 8, 20, 2)
    assert module.recipe == Recipe(20, 10, 128, 0.1) and module.protocol.nets == 5
    optimizer = module.options["similarity"].optimizer([torch.zeros(1, requires_grad=True)])
    assert optimizer.defaults["momentum"] == 0.5 and optimizer.defaults["lr"] == 10.0
    assert json.dumps(module.blending.__dict__) == json.dumps(Blending().__dict__)


def test_a_plan_cuts_permutations_and_drops_what_is_left():
    plan = Plan.draw(Keys(0), "x", 10, 5, 4, Blending())
    for first in (0, 2):
        rows = plan.rows[first : first + 2].flatten().tolist()
        assert len(set(rows)) == 8
    assert torch.equal(plan.used[plan.place[plan.rows]], plan.rows)
    assert sorted(plan.orders[0].tolist()) == list(range(4))
