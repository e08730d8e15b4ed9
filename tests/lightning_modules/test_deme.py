"""DeMe: the numbered properties of its mathematics, what each option changes, experts in turn, the export."""

import json
from functools import partial
from itertools import pairwise
from pathlib import Path

import lightning as L
import pytest
import tiny_networks
import torch
from deme_parts import STEPS, Pictures, ProjectionOptions, built, deme, made_up, trained, update
from distilling import heard, same, states
from pictures import PictureStream, fit, records
from toy import trainer_for
from weights import weights_hash

from datamodules.streams import Streams
from lightning_modules.deme import DeMe, expert_loss, ranges
from lightning_modules.diffusion import Diffusion
from lightning_t2i.batch import Records
from lightning_t2i.cli.stock import read_stock
from lightning_t2i.errors import UserError
from lightning_t2i.expert_plots import cosines, gradient_cosines
from lightning_t2i.forward_units import counting_units, differences
from lightning_t2i.keys import Keys
from lightning_t2i.merging import merged, save_delta
from lightning_t2i.networks.denoiser import Denoiser
from lightning_t2i.networks.load import build_network
from lightning_t2i.networks.projections import add_projections, fold, fold_stock, projected, sites
from lightning_t2i.networks.switch import Switch
from lightning_t2i.options import EMAOptions, GroupOptions, MethodOptions
from lightning_t2i.processes import DDPM, Uniform, sample
from lightning_t2i.schedules import Warmup
from lightning_t2i.state_io import full_tensor
from lightning_t2i.streamed import read_header

pytestmark = pytest.mark.filterwarnings("ignore:The .* does not have many workers")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A stock text-to-image pipeline with random weights; its latents are 8 x 8 for pictures of 16 x 16."""
    return tiny_networks.pipeline_folder(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def done(base, tmp_path_factory):
    """A fit of both ranges."""
    return trained(tmp_path_factory.mktemp("done"), base, num_ranges=2)


def weights_of(network) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in network.named_parameters()}


# ---- P1: merging ---------------------------------------------------------------------------------------------------


def put(module, w) -> dict[str, torch.Tensor]:
    return weights_of(module.plain(w))


def test_P1_no_weights_are_the_base_and_unit_weights_an_expert(base, tmp_path):
    module = built(base, tmp_path, num_ranges=3)
    taus, theta = made_up(module), weights_of(module.plain())
    same(put(module, [0.0] * 3), theta)
    assert any(tau.any() for tau in taus[0].values())
    for i in range(3):
        expert = {name: t + taus[i][name.removeprefix("backbone.")] for name, t in theta.items()}
        same(put(module, [float(i == j) for j in range(3)]), expert, rtol=0, atol=1e-6)


def test_P1_merging_is_linear_and_merges_of_merges_agree(base, tmp_path):
    module = built(base, tmp_path, num_ranges=3)
    made_up(module)
    theta, a, b = weights_of(module.plain()), put(module, [0.1, 0.4, 0.0]), put(module, [0.2, -0.3, 0.5])
    assert any(not torch.equal(a[name], t) for name, t in theta.items())
    both = {name: a[name] + b[name] - t for name, t in theta.items()}
    same(put(module, [0.3, 0.1, 0.5]), both, rtol=0, atol=1e-6)
    half = {name: t + 0.5 * (a[name] - t) for name, t in theta.items()}
    same(put(module, [0.05, 0.2, 0.0]), half, rtol=0, atol=1e-6)


def test_P1_the_order_of_experts_does_not_matter_and_integers_stay():
    theta = Keys(0).normal("theta", torch.arange(8), (5,))
    taus = [Keys(0).normal(f"tau{i}", torch.arange(8), (5,)) for i in range(3)]
    one = merged(theta, zip([0.1, 0.2, 0.7], taus, strict=True))
    other = merged(theta, zip([0.7, 0.1, 0.2], [taus[2], taus[0], taus[1]], strict=True))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    count = torch.tensor([3, 4])
    assert torch.equal(merged(count, [(1.0, torch.tensor([1, 1]))]), count)


def of_shards(rank: int) -> list:
    """A merge of sharded tensors, gathered, and of the whole ones."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    theta, *taus = (Keys(i).normal("x", torch.arange(5), (3,)) for i in range(4))
    cut = [distribute_tensor(t, mesh, [Shard(0)]) for t in (theta, *taus)]
    w = [0.5, 0.0, -0.2]
    return [merged(cut[0], zip(w, cut[1:], strict=True)).full_tensor(), merged(theta, zip(w, taus, strict=True))]


def test_P1_a_sharded_state_merges_shard_by_shard(ranks):
    for cut, whole in ranks(of_shards):
        assert torch.equal(cut, whole)


# ---- P2, P7: projections -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unet_text", "pixart"])
def test_P2_before_training_the_student_is_the_base_in_every_bit(kind, tmp_path):
    module = built(tiny_networks.pipeline_folder(tmp_path, kind))
    assert len(projected(module.student.backbone)) == len(sites(module.student.backbone)) >= 2
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), tiny_networks.condition()
    with torch.no_grad():
        assert torch.equal(module.student(x, t, cond), module.teacher(x, t, cond))
    state = {n: p for n, p in module.student.backbone.state_dict().items() if not n.endswith("projection.delta")}
    same(state, module.teacher.backbone.state_dict())


def test_P7_folding_keeps_the_output_and_refuses_down_blocks():
    network = tiny_networks.backbone("unet").double()
    names = add_projections(network, "all")
    assert names == ["down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"]
    for name in names:
        network.get_submodule(name).projection.delta.data.normal_(std=0.3)
    x, t = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([3, 700])
    with torch.no_grad():
        before = network(x, t).sample
        for name in names[2:]:
            fold(network, name)
            torch.testing.assert_close(network(x, t).sample, before, atol=1e-5, rtol=0)
    assert projected(network) == names[:2]
    for name in names[:2]:
        with pytest.raises(UserError, match="cannot be folded"):
            fold(network, name)


# ---- P3: times -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "whole"), [(4, True), (7, True), (3, False)])
def test_P3_ranges_cover_all_times_once(count, whole):
    found = ranges(0, 1000 if whole else 1.0, count, whole)
    assert found[0][0] == 0 and found[-1][1] == (1000 if whole else 1.0)
    assert all(a[1] == b[0] for a, b in pairwise(found))
    widths = [b - a for a, b in found]
    assert max(widths) - min(widths) <= (1 if whole else 1e-9)


@pytest.mark.parametrize("draw", ["sample", "batch"])
@pytest.mark.parametrize(("p", "index"), [(0.3, 1), (0.0, 3), (1.0, 0)])
def test_P3_share_of_times_in_the_range(base, draw, p, index):
    module = built(base, num_ranges=4, range_index=index, p_global=p, draw=draw)
    low, high = module.ranges[index]
    batches = []
    for step in range(400):
        module.counters.step = step
        batches.append(module.times(torch.arange(32) + 32 * step))
    t = torch.stack(batches)
    inside = ((t >= low) & (t < high)).float().mean()
    share, draws = (1 - p) + p / 4, 400 * (16 if draw == "sample" else 1)
    assert float(inside) == pytest.approx(share, abs=3 * (p * (1 - p) / draws) ** 0.5 + 3 * (share / t.numel()) ** 0.5)
    if p == 0:
        assert (int(t.min()), int(t.max())) == (low, high - 1)
    if p == 1:
        assert torch.histc(t.float(), 4, 0, 1000).std() < 5 * (t.numel() / 4) ** 0.5
    sums = t[:, 0::2] + t[:, 1::2]
    assert set(sums.unique().tolist()) <= {int(low + high - 1), 999}
    mixed = ((t >= low) & (t < high)).float().mean(1).std()
    assert draw == "sample" or p != 0.3 or mixed > 0.2  # whole batches leave the range together


def test_P3_times_without_pairs_are_independent(base):
    module = built(base, num_ranges=1, antithetic=False)
    t = module.times(torch.arange(64))
    assert len((t[0::2] + t[1::2]).unique()) > 10


# ---- P4: the loss and the teacher ----------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_P4_one_error_has_the_value_and_the_gradient_of_two(weight):
    e, y, e0 = (torch.randn(6, 4, 3, 3, dtype=torch.float64) for _ in range(3))
    e.requires_grad_(True)
    ours = expert_loss(e, y, e0, weight)
    theirs = (e - y).square().mean() + weight * (e - e0).square().mean()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, e)[0] for loss in (ours, theirs)), rtol=1e-12, atol=1e-15)
    if weight == 1:
        halves = 2 * (e - (y + e0) / 2).square().mean() + (y - e0).square().mean() / 2
        torch.testing.assert_close(ours, halves)


def test_P4_the_teacher_is_the_same_in_every_bit_over_a_whole_fit(base, tmp_path):
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, *unused):
            seen.append(weights_hash(module.teacher))
            assert not module.teacher.training
            assert all(p.grad is None and not p.requires_grad for p in module.teacher.parameters())
            assert module.student.training

    module = deme(base, tmp_path / "deltas", num_ranges=2)
    fit(tmp_path, module, 2 * STEPS, Pictures(), callbacks=[Watch()], val_check_interval=1)
    assert len(seen) == 2 * STEPS and set(seen) == {weights_hash(Denoiser.from_pretrained(str(base)))}
    assert not any(name.startswith("teacher") for name in module.state_dict())
    assert set(module.frozen_identities) == {"teacher", "codec", "text"}


# ---- P5: where an expert goes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("refreshed", "start"), [(False, 0.4), (False, 1.6), (True, 0.4)])
def test_P5_gaussian_data_half_of_the_way_or_all_of_it(refreshed, start):
    """Linear nets e = theta_t x_t: a frozen teacher keeps half of the error, one that is refreshed keeps none."""
    process, s, places = DDPM("linear", 0.0001, 0.02), 0.7, torch.arange(20_000)
    for t in (100, 600, 900):
        alpha, sigma = (float(v) for v in process.alpha_sigma(t, torch.float64))
        x0, eps = (Keys(t).normal(n, places, (1,), torch.float64) for n in ("x", "e"))
        x_t = alpha * s * x0 + sigma * eps
        best = float(
            (eps * x_t).mean() / x_t.square().mean()
        )  # of these samples; sigma / (alpha^2 s^2 + sigma^2) of all
        assert best == pytest.approx(sigma / (alpha**2 * s**2 + sigma**2), rel=0.02)
        theta = torch.tensor(start * best, dtype=torch.float64, requires_grad=True)
        teacher = theta.detach().clone()
        for _ in range(60):
            (slope,) = torch.autograd.grad(expert_loss(theta * x_t, eps, teacher * x_t, 1.0), theta)
            with torch.no_grad():
                theta -= 0.2 / float(x_t.square().mean()) * slope
            teacher = theta.detach().clone() if refreshed else teacher
        assert float(theta.detach()) == pytest.approx(best if refreshed else (1 + start) / 2 * best, rel=1e-4)


def test_P5_the_refreshed_target_is_the_average_of_the_last_refresh(base, tmp_path):
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, *unused):
            seen.append((weights_hash(module.target), weights_hash(module.student_ema)))

    module = deme(base, tmp_path / "deltas", num_ranges=1, steps_per_range=5, ema_refresh=2)
    fit(tmp_path, module, 5, callbacks=[Watch()])
    targets, averages = zip(*seen, strict=True)
    assert targets[0] == targets[1] and targets[2] == targets[3]
    assert targets[2] == averages[1] and targets[4] == averages[3]
    assert any(name.startswith("target.") for name in module.state_dict())


# ---- P6: the null result of 2.5 and its controls -------------------------------------------------------------------


def quadratics(equal: bool, n: int = 4, d: int = 6) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Hessians, optima of the ranges, and the joint optimum theta_0, in float64."""
    roots = [torch.randn(d, d, dtype=torch.float64) for _ in range(n)]
    hessians = [r @ r.T + torch.eye(d, dtype=torch.float64) for r in roots]
    hessians = [hessians[0]] * n if equal else hessians
    optima = [torch.randn(d, dtype=torch.float64) for _ in range(n)]
    pull = sum(h @ o for h, o in zip(hessians, optima, strict=True))
    return hessians, optima, torch.linalg.solve(sum(hessians), pull)


def overall(hessians, optima, theta) -> float:
    return float(sum((theta - o) @ h @ (theta - o) for h, o in zip(hessians, optima, strict=True)) / 2)


@pytest.mark.parametrize("equal", [True, False])
def test_P6_at_the_joint_optimum_merges_of_quadratic_tasks_win_nothing(equal):
    hessians, optima, theta = quadratics(equal)
    taus = [o - theta for o in optima]  # fully trained experts
    weighted = sum(h @ tau for h, tau in zip(hessians, taus, strict=True))
    assert float(weighted.abs().max()) < 1e-10
    if equal:
        uniform = merged(theta, [(1.0, tau) for tau in taus], float32=False)
        torch.testing.assert_close(uniform, theta, atol=1e-12, rtol=0)
    for i in range(50):
        w = Keys(i).normal("w", torch.arange(4), dtype=torch.float64).tolist()
        model = merged(theta, zip(w, taus, strict=True), float32=False)
        assert overall(hessians, optima, model) >= overall(hessians, optima, theta)


@pytest.mark.parametrize("converged", [True, False])
def test_P6_one_small_step_of_each_expert_cancels_where_the_base_has_converged(converged):
    """tau_i = -eta g_i and sum g_i = 0; from elsewhere the uniform merge is a gradient step, and lowers the loss."""
    hessians, optima, theta = quadratics(equal=False)
    theta = theta if converged else theta + 0.5
    taus = [-1e-4 * (h @ (theta - o)) for h, o in zip(hessians, optima, strict=True)]
    model = merged(theta, [(1.0, tau) for tau in taus], float32=False)
    moved = float((model - theta).norm() / sum(tau.norm() for tau in taus))
    assert moved < 1e-10 if converged else moved > 0.05
    gain = overall(hessians, optima, theta) - overall(hessians, optima, model)
    assert abs(gain) < 1e-10 if converged else gain > 1e-4


def test_P6_signs_that_are_flipped_at_random_are_no_better_than_the_base():
    hessians, optima, theta = quadratics(equal=False)
    taus = [0.2 * (o - theta) for o in optima]
    for i in range(20):
        signs = (2 * Keys(i).bernoulli("signs", torch.arange(4), 0.5) - 1).tolist()
        model = merged(theta, [(0.25 * s, tau) for s, tau in zip(signs, taus, strict=True)], float32=False)
        assert overall(hessians, optima, model) >= overall(hessians, optima, theta)


# ---- P8: one range is ordinary fine-tuning -------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_P8_one_range_without_teacher_and_projections_is_diffusion(base, tmp_path, p):
    none = ProjectionOptions("none")
    ours = deme(base, tmp_path / "deltas", num_ranges=1, lambda_cons=0.0, projection=none, p_global=p)
    theirs = Diffusion(str(base), law=Uniform(antithetic=True), denoiser=update(), null_probability=0.1)
    losses = [heard(module) for module in (ours, theirs)]
    for module in (ours, theirs):
        fit(tmp_path, module, STEPS)
    assert [loss for _, loss in losses[0]] == [loss for _, loss in losses[1]]
    same(weights_of(ours.student), weights_of(theirs.denoiser))
    same(weights_of(ours.student_ema), weights_of(theirs.denoiser_ema))


# ---- P9: gradients over times --------------------------------------------------------------------------------------


def test_P9_cosines_of_gradients(base):
    module = built(base)
    with torch.no_grad():
        data = [(r, module.condition(r)) for r in (records(8 * k, 8) for k in range(4))]
    found = gradient_cosines(module, data, [10, 20, 900], Keys(0))
    one, split = torch.tensor(found["same"]), torch.tensor(found["split"])
    for matrix in (one, split):
        torch.testing.assert_close(matrix, matrix.T)
        assert matrix.abs().max() <= 1 + 1e-5
    torch.testing.assert_close(one.diag(), torch.ones(3))
    assert float(split.diag().max()) < 1
    assert float(one[0, 1]) > float(one[0, 2])


def test_P9_independent_halves_do_not_share_their_noise():
    """Gradients that are noise alone: on the same batch a cosine of one, on independent ones of about zero."""
    noise = torch.stack([Keys(0).normal(f"g{i}", torch.arange(4000)) for i in range(6)])
    assert float(cosines(noise[:3], noise[:3]).diag().min()) == pytest.approx(1)
    assert float(cosines(noise[:3], noise[3:]).abs().max()) < 5 / 4000**0.5


# ---- P10: experts in turn ------------------------------------------------------------------------------------------


def test_P10_equal_experts_in_turn_give_the_ordinary_trajectory(base):
    module = built(base, num_ranges=4)
    z, cond = torch.randn(2, 4, 8, 8), module.condition(Records.of_prompts(["red", "blue"]))
    switch = module.switch([module.teacher] * 4)
    assert torch.equal(sample(switch, z, cond, 10, 2.0), sample(module.teacher, z, cond, 10, 2.0))


def test_P10_each_step_asks_the_expert_of_its_range(base):
    module, asked = built(base, num_ranges=4), []

    class Told(Denoiser):
        def predict(self, x_t, t, cond=None):
            asked.append((self.number, t.unique().tolist()))
            return super().predict(x_t, t, cond)

    experts = []
    for i in range(4):
        expert = Told(module.teacher.backbone, module.process, "eps")
        expert.number = i
        experts.append(expert)
    switch = module.switch(experts)
    sample(switch, torch.randn(1, 4, 8, 8), module.condition(Records.of_prompts(["red"])), 8, 1.0)
    assert [number for number, _ in asked] == [3, 3, 2, 2, 1, 1, 0, 0]
    assert all(250 * number <= t < 250 * (number + 1) for number, (t,) in asked)
    assert switch.range_of(torch.tensor([0, 249, 250, 999])).tolist() == [0, 0, 1, 3]


def test_P10_a_batch_of_several_ranges_is_dealt_out(base, tmp_path):
    module = built(base, tmp_path, num_ranges=2)
    made_up(module, 0.1)
    experts, cond = module.experts(), module.condition(Records.of_prompts(["red", "blue", "square"]))
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([700, 20, 501])
    with torch.no_grad():
        out = module.switch(experts)(x, t, cond)
        for row, expert in enumerate((experts[1], experts[0], experts[1])):
            alone = expert(x[row : row + 1], t[row : row + 1], cond.index(slice(row, row + 1)))
            torch.testing.assert_close(out[row : row + 1], alone, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="need 2 ends"):
        Switch([module.teacher] * 3, [500.0])


# ---- one fit of all ranges -----------------------------------------------------------------------------------------


def test_a_range_in_one_fit_is_the_range_of_a_fit_of_its_own(base, tmp_path, done):
    """The second expert begins at theta_0 with a fresh optimizer and fresh averages; only its steps come later."""

    class Later(DeMe):
        @property
        def keys(self):
            return super().keys.at(self.counters.step + STEPS)

    few = {"num_ranges": 2, "steps_per_range": STEPS, "student": update()}
    second, data = Later(str(base), deltas=str(tmp_path / "deltas"), range_index=1, guidance=2.0, **few), Pictures()
    data.start = STEPS
    fit(tmp_path, second, STEPS, data)
    (alone,) = second.found_deltas()
    together = read_header(done.found_deltas()[1])[0]
    for name, entry in read_header(alone)[0].items():
        assert torch.equal(entry.read(), together[name].read()), name


def test_deltas_say_what_they_are_and_hold_the_average(base, done):
    files = done.found_deltas()
    assert [f.name for f in files] == ["range-0-of-2.safetensors", "range-1-of-2.safetensors"]
    header, about = read_header(files[1])
    assert about["base"] == done.identity and about["index"] == "1" and about["ranges"] == "2"
    theta = weights_of(done.plain())
    for name, entry in header.items():
        expected = done.student_ema.get_parameter(f"backbone.{name}").detach() - theta[f"backbone.{name}"]
        assert torch.equal(entry.read(), expected), name
    assert any(float(e.read().abs().max()) > 0 for n, e in header.items() if n.endswith("projection.delta"))


def test_deltas_in_bfloat16_are_half_as_large_and_nearly_the_same(base, tmp_path, done):
    module = trained(tmp_path, base, delta_precision="bfloat16")
    for rough, exact in zip(module.found_deltas(), done.found_deltas(), strict=True):
        assert rough.stat().st_size < 0.6 * exact.stat().st_size
        for name, entry in read_header(exact)[0].items():
            whole = entry.read()
            torch.testing.assert_close(read_header(rough)[0][name].read().float(), whole, rtol=2**-8, atol=1e-12)


@pytest.mark.parametrize("stop", [STEPS - 1, STEPS, STEPS + 2])
def test_resume_inside_any_range_is_exact(base, tmp_path, done, stop):
    first = deme(base, tmp_path / "deltas", ema_refresh=None)
    length = 2 * STEPS

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, module, *unused):
            if module.counters.step == stop:
                trainer.save_checkpoint(tmp_path / "checkpoint")
                trainer.should_stop = True
                trainer.fit_loop._max_steps_reached = True

    trainer = fit(tmp_path, first, length, callbacks=[Stop()], limit_val_batches=0)
    assert trainer.global_step == stop
    again = deme(base, tmp_path / "deltas")
    later = trainer_for(tmp_path, length, max_epochs=-1, check_val_every_n_epoch=None, num_sanity_val_steps=0)
    later.fit(again, Pictures(), ckpt_path=str(tmp_path / "checkpoint"), weights_only=True)
    same(states(again), states(done))
    for ours, whole in zip(again.found_deltas(), done.found_deltas(), strict=True):
        assert ours.read_bytes() == whole.read_bytes()


def test_a_run_that_was_killed_before_its_last_delta_writes_it_when_it_is_resumed(base, tmp_path, done):
    first = deme(base, tmp_path / "deltas")
    fit(tmp_path, first, 2 * STEPS, limit_val_batches=0).save_checkpoint(tmp_path / "checkpoint")
    first.found_deltas()[-1].unlink()
    again = deme(base, tmp_path / "deltas")
    later = trainer_for(tmp_path, 2 * STEPS, max_epochs=-1, check_val_every_n_epoch=None)
    later.fit(again, Pictures(), ckpt_path=str(tmp_path / "checkpoint"), weights_only=True)
    assert [f.read_bytes() for f in again.found_deltas()] == [f.read_bytes() for f in done.found_deltas()]


def on_ranks(rank: int, base: str, folder: str, replicate: int, shard: int) -> list:
    """What a fit by two processes leaves: its deltas, and a merge of them."""
    module = deme(base, f"{folder}/deltas", student=plain_update())
    fit(Path(folder), module, 2 * STEPS, replicate=replicate, shard=shard, limit_val_batches=0)
    with module.merged([0.5, 0.5]):
        inside = full_tensor(module.student_ema.backbone.conv_in.weight)
    merged_model = module.plain([0.5, 0.5]).backbone.conv_in.weight.detach()
    return [inside, merged_model, [{n: e.read() for n, e in read_header(f)[0].items()} for f in module.found_deltas()]]


def plain_update() -> GroupOptions:
    """Adam's steps would enlarge the rounding of gradients near 0."""
    return GroupOptions(lambda p: torch.optim.SGD(p, lr=0.05), ema=EMAOptions(0.5))


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    """A fit of both ranges by one process."""
    return trained(tmp_path_factory.mktemp("alone"), base, student=plain_update())


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(2, 1), (1, 2)], ids=str)
def test_one_and_two_processes_agree(base, tmp_path, ranks, alone, mesh):
    for inside, merged_model, deltas in ranks(on_ranks, str(base), str(tmp_path / "both"), *mesh):
        assert torch.equal(inside, merged_model)
        for ours, file in zip(deltas, alone.found_deltas(), strict=True):
            whole = {name: entry.read() for name, entry in read_header(file)[0].items()}
            same(ours, whole, rtol=1e-3, atol=1e-6)


# ---- options -------------------------------------------------------------------------------------------------------


FEW = {"steps_per_range": 2, "range_index": 0}


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    """The state after a short fit with the defaults."""
    return states(trained(tmp_path_factory.mktemp("plain"), base, Pictures(batch_size=16), **FEW))


@pytest.mark.parametrize(
    "options",
    [
        {"num_ranges": 3},
        {"range_index": 1},
        {"p_global": 0.9},
        {"draw": "batch"},
        {"antithetic": False},
        {"lambda_cons": 0.2},
        {"ema_refresh": 1},
        {"projection": ProjectionOptions("none")},
        {"projection": ProjectionOptions("foldable")},
        {"null_probability": 0.9},
        {"common": MethodOptions(seed=1)},
        {"common": MethodOptions(accumulate=2)},
        {"student": update(ema=EMAOptions(0.9, power=0.75))},
    ],
    ids=lambda o: "-".join(o),
)
def test_each_training_option_changes_the_result(base, tmp_path, plain, options):
    found = states(trained(tmp_path, base, Pictures(batch_size=16), **{**FEW, **options}))
    assert found.keys() != plain.keys() or any(not torch.equal(t, plain[name]) for name, t in found.items())


@pytest.mark.parametrize("change", [{"guidance": 7.0}, {"steps": 5}, {"solver": "dpmpp_2m"}])
def test_each_sampling_option_changes_the_pictures(base, change):
    pictures = []
    for options in ({}, change):
        module = built(base, **options)
        pictures.append(module.sample(module.condition(Records.of_prompts(["red", "blue"])), Keys(0), torch.arange(2)))
    assert pictures[0].shape == (2, 3, 16, 16)
    assert not torch.equal(*pictures)


def test_another_backbone_takes_the_place_of_the_pipelines(base, tmp_path):
    module = built(base)
    other = tiny_networks.backbone("unet_text")
    other.conv_in.weight.data += 0.1
    other.save_pretrained(tmp_path / "other")
    changed = built(base, backbone=str(tmp_path / "other"))
    assert torch.equal(changed.teacher.backbone.conv_in.weight, other.conv_in.weight)
    assert torch.equal(changed.student.backbone.conv_in.weight, other.conv_in.weight)
    assert torch.equal(changed.read().conv_in.weight, other.conv_in.weight)
    assert changed.identity != module.identity


def test_gradient_checkpointing_keeps_the_gradients(base):
    gradients = []
    for on in (False, True):
        module = built(base, gradient_checkpointing=on)
        assert module.student.backbone.is_gradient_checkpointing is on
        module.student.train()
        made = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        out = module.student(made, torch.tensor([3, 700]), module.condition(Records.of_prompts(["red", "blue"])))
        out.square().mean().backward()
        gradients.append(module.student.backbone.up_blocks[0].projection.delta.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("options", [{}, {"lambda_cons": 0.0}, {"ema_refresh": 1}], ids=str)
def test_a_step_costs_what_the_method_says(base, tmp_path, options):
    module = deme(base, tmp_path / "deltas", num_ranges=1, steps_per_range=2, **options)
    module.configure_model()
    module.text(["red"])  # the empty caption is encoded once
    with counting_units(module) as units:
        fit(tmp_path, module, 2, limit_val_batches=0)
    assert differences(module.forward_units(), units.per_step()) == {}


def test_validation_tells_the_loss_of_each_range(base, tmp_path):
    seen = []

    class Record(L.Callback):
        def on_validation_end(self, trainer, module):
            seen.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")})

    still = GroupOptions(lambda p: torch.optim.SGD(p, lr=0.0), ema=EMAOptions(0.5))
    module = deme(base, tmp_path / "deltas", num_ranges=2, student=still)
    fit(tmp_path, module, 2 * STEPS, val_check_interval=2, callbacks=[Record()])
    assert seen[0].keys() == {"val/range_0", "val/range_1", "val/loss"}
    assert seen[0]["val/loss"] == pytest.approx((seen[0]["val/range_0"] + seen[0]["val/range_1"]) / 2)
    assert seen[0]["val/range_0"] != seen[0]["val/range_1"]
    assert all(s == seen[0] for s in seen)


# ---- out -----------------------------------------------------------------------------------------------------------


def shaken(module):
    """Projections of the averaged student away from the identity."""
    for name in projected(module.student_ema.backbone):
        delta = module.student_ema.backbone.get_submodule(name).projection.delta
        delta.data.normal_(std=0.05)
    return module


def test_foldable_projections_export_a_stock_pipeline_with_our_pictures(base, tmp_path):
    from diffusers import StableDiffusionPipeline

    module = shaken(built(base, projection=ProjectionOptions("foldable")))
    assert projected(module.student.backbone) == ["up_blocks.0"]  # the last one ends in an attention
    module.export(tmp_path / "out", [])
    theirs = StableDiffusionPipeline.from_pretrained(tmp_path / "out", dtype=torch.float32).unet
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), module.condition(Records.of_prompts(["red", "blue"]))
    with torch.no_grad():
        ours = module.student_ema(x, t, cond)
        torch.testing.assert_close(theirs(x, t, cond.embeds).sample, ours, atol=5e-3, rtol=0)
    assert projected(module.student_ema.backbone) == ["up_blocks.0"]  # the run itself is left as it was


def test_other_projections_export_a_folder_for_our_loader_alone(base, tmp_path):
    import diffusers

    module = shaken(built(base))
    module.export(tmp_path / "out", [])
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["unet"] == ["lightning_t2i.networks.projections", "ProjectedUNet2DConditionModel"]
    with pytest.raises(ValueError, match="has no class `ProjectedUNet2DConditionModel`"):
        diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    again = Denoiser.from_pretrained(str(tmp_path / "out"))
    assert projected(again.backbone) == projected(module.student.backbone)
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), module.condition(Records.of_prompts(["red", "blue"]))
    with torch.no_grad():
        torch.testing.assert_close(again(x, t, cond), module.student_ema(x, t, cond), atol=5e-3, rtol=0)
    onward = built(tmp_path / "out", projection=ProjectionOptions("none"))  # a result is a base again
    assert projected(onward.student.backbone) == projected(module.student.backbone)


def test_the_card_of_such_a_folder_says_why_and_its_lines_make_a_picture(base, tmp_path, monkeypatch):
    module = shaken(built(base))
    module.export(tmp_path / "out", [])
    stock = read_stock(tmp_path / "out", {"guidance": 2.0, "steps": 4, "prompt": "red"})
    assert stock.library == "lightning-t2i" and "No stock pipeline holds this network" in stock.snippet
    monkeypatch.chdir(tmp_path / "out")
    found: dict = {}
    exec(stock.snippet, found)
    z = Keys(0).normal("z", torch.arange(1), (4, 8, 8))
    cond = module.condition(Records.of_prompts(["red"]))
    ours = module.codec.decode(sample(module.student_ema, z, cond, 4, 2.0)).clamp(-1, 1)[0]
    torch.testing.assert_close(found["image"], ours, atol=2e-2, rtol=0)


def test_folding_needs_blocks_that_end_in_stock_layers():
    network = tiny_networks.backbone("unet")
    assert add_projections(network, "foldable") == ["up_blocks.0", "up_blocks.1"]
    assert fold_stock(network) and not projected(network)
    with pytest.raises(UserError, match="No block of this network"):
        add_projections(tiny_networks.backbone("pixart"), "foldable")


# ---- paper scale ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "network", "size", "gigabytes"),
    [
        ("cifar10", "ddpm_cifar10", 35_746_307, 0.9),
        ("church", "ddpm_church", 113_673_219, 2.8),
        ("sd14", "sd15_unet", 859_520_964, 20.9),  # the U-Nets of 1.4 and 1.5 are the same
    ],
)
def test_paper_scale_memory(config, network, size, gigabytes, capsys):
    """Weights, gradients, two moments, EMA and the teacher in float32, whole, with the paper's projections."""
    with torch.device("meta"):
        found = build_network(f"configs/networks/{network}.json")
    assert sum(p.numel() for p in found.parameters()) == size
    projections = sum(site.channels**2 for site in sites(found))
    memory = 4 * (6 * size + 5 * projections) / 1e9
    with capsys.disabled():
        print(f"\ndeme/{config}: {size:,} and {projections:,} of projections, {memory:.1f} GB of state in float32")
    assert memory == pytest.approx(gigabytes, rel=0.05)


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_ranges": 0}, "num_ranges"),
        ({"steps_per_range": 0}, "steps_per_range"),
        ({"range_index": 2}, "no such range"),
        ({"range_index": -1}, "no such range"),
        ({"p_global": 1.5}, "p_global"),
        ({"null_probability": -0.1}, "null_probability"),
        ({"lambda_cons": -1.0}, "lambda_cons"),
        ({"lambda_cons": 0.0, "ema_refresh": 3}, "ema_refresh"),
        ({"ema_refresh": 0}, "ema_refresh"),
        ({"student": update(ema=None)}, "average"),
        ({"student": update(ema=EMAOptions(0.9, start=5))}, "average"),
        ({"student": update(every=2)}, "average"),
        ({"num_ranges": 2000}, "holds no time"),
        ({"backbone": "no/such/folder"}, "No such model folder"),
    ],
)
def test_impossible_options_are_refused_before_training(base, options, message):
    with pytest.raises(UserError, match=message):
        deme(base, **options).configure_model()


def test_a_fit_that_is_longer_than_its_ranges_is_refused_and_a_shorter_one_told(base, tmp_path, caplog):
    for given in (7, -1):  # without a number a fit would begin an expert that there is not
        with pytest.raises(UserError, match="max_steps 6"):
            fit(tmp_path, deme(base, tmp_path / "deltas"), given, max_time={"seconds": 60})
    module = deme(base, tmp_path / "deltas")
    fit(tmp_path, module, 4)
    assert "4 of 6 training steps" in caplog.text
    assert [f.name for f in module.found_deltas()] == ["range-0-of-2.safetensors"]


def test_deltas_of_another_base_or_division_are_refused_before_training(base, tmp_path):
    made_up(built(base, tmp_path, num_ranges=3))
    for options, what in (
        ({}, "ranges"),
        ({"num_ranges": 3, "projection": ProjectionOptions("none")}, "projected"),
    ):
        with pytest.raises(UserError, match=f"different {what}"):
            fit(tmp_path, deme(base, tmp_path, **options), STEPS)


@pytest.mark.parametrize(
    "options",
    [
        {"steps_per_range": 4},
        {"p_global": 0.9},
        {"draw": "batch"},
        {"antithetic": False},
        {"lambda_cons": 0.5},
        {"ema_refresh": 1},
        {"null_probability": 0.0},
        {"student": update(lr=1e-2)},
        {"student": update(clip=None)},
        {"student": update(ema=EMAOptions(0.9))},
        {"student": update(schedule=partial(Warmup, steps=2))},
    ],
    ids=lambda o: "-".join(o),
)
def test_deltas_of_another_recipe_are_not_merged(base, tmp_path, options):
    made_up(built(base, tmp_path))
    with pytest.raises(UserError, match="different recipe"):
        built(base, tmp_path, **options).all_deltas()


def test_deltas_of_one_recipe_are_merged_whatever_else_differs(base, tmp_path):
    """The jobs of an array differ in index and may in seed and precision; older files do not tell their recipe."""
    made_up(built(base, tmp_path))
    for options in ({"range_index": 1}, {"common": MethodOptions(seed=1)}, {"delta_precision": "bfloat16"}):
        module = built(base, tmp_path, **options)
        assert len(module.all_deltas()) == 2
    older = tmp_path / "range-0-of-2.safetensors"
    tensors, about = read_header(older)
    del about["recipe"]
    save_delta(older, [(name, entry.read()) for name, entry in tensors.items()], about)
    assert len(module.all_deltas()) == 2 and "recipe" not in read_header(older)[1]


def test_a_rerun_with_other_options_is_refused_before_training(base, tmp_path):
    made_up(built(base, tmp_path))
    with pytest.raises(UserError, match="different recipe"):
        fit(tmp_path, deme(base, tmp_path, lambda_cons=0.5), STEPS)


class Sized(PictureStream):
    """Pictures of 16 x 16 that say to have another size."""

    size, buckets = 32, None


def test_pictures_of_another_size_than_the_networks_are_refused_before_training(base, tmp_path):
    with pytest.raises(UserError, match="another size than the network's"):
        fit(tmp_path, deme(base, tmp_path), 1, Streams(Sized(), val=PictureStream()))
    stream = Sized()
    stream.size = 16
    module = deme(base, tmp_path)
    fit(tmp_path, module, 1, Streams(stream, val=PictureStream()), limit_val_batches=0)
    assert module.counters.step == 1


def test_edm_and_networks_without_a_rule_are_refused(edm):
    with pytest.raises(UserError, match="no sense in sigma"):
        deme(edm, guidance=1.0).configure_model()


def test_a_checkpoint_of_another_base_is_refused(base, tmp_path, done):
    other = tiny_networks.backbone("unet_text")
    other.conv_in.weight.data += 0.1
    other.save_pretrained(tmp_path / "other")
    module = built(base, backbone=str(tmp_path / "other"))
    saved = {}
    done.on_save_checkpoint(saved)
    with pytest.raises(UserError, match="another frozen network"):
        module.on_load_checkpoint(saved)
