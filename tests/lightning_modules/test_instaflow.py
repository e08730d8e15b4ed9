"""InstaFlow: the numbered properties of its mathematics on closed forms, its two updates written out, its guards."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from closed_forms import Gaussian
from distilling import LR, edm_folder, heard, make_pairs, same, states, update
from pictures import fit
from safetensors.torch import save_file
from tiny_networks import pipeline_folder
from torch import Tensor, nn
from toy import trainer_for
from weights import weights_hash

from datamodules.pairs import Pairs
from datamodules.prompts import Prompts
from datamodules.streams import Streams
from lightning_modules.instaflow import InstaFlow, OneStep, Points, Reflow
from lightning_modules.rfpp import RFpp, pseudo_huber
from lightning_modules.teacher import Teacher
from lightning_t2i.batch import Records
from lightning_t2i.checkpoints.ranks import ALONE
from lightning_t2i.checkpoints.sharded import write_sharded
from lightning_t2i.claims.instaflow_toy import crossings, energy_distance, flows
from lightning_t2i.cli.configs import merge
from lightning_t2i.errors import UserError
from lightning_t2i.forward_units import counting_units, differences
from lightning_t2i.keys import Keys
from lightning_t2i.metrics.straightness import Straightness, trajectory
from lightning_t2i.networks.denoiser import Predictor, Reexpressed
from lightning_t2i.networks.load import build_network
from lightning_t2i.networks.perceptual import LPIPS, PerceptualNetwork
from lightning_t2i.networks.stacked_unet import StackedUNet
from lightning_t2i.options import EMAOptions, GroupOptions, MethodOptions
from lightning_t2i.pairs import noise
from lightning_t2i.processes import DDPM, EDM, Process, RectifiedFlow, UShaped, sample, solve
from lightning_t2i.processes.schedulers import to_scheduler
from lightning_t2i.processes.weights import squares
from lightning_t2i.protocols import Exports, Generates
from lightning_t2i.state_io import AtomicCheckpointIO, write_folder

# ---- closed forms; s is the paper's time, 0 for noise and 1 for data -------------------------------------------------


class Exact(Predictor):
    """The exact denoiser of Gaussian data that are independent of the noise."""

    def __init__(self, data: Gaussian, process: Process):
        super().__init__(process, "x0")
        self.data = data

    def predict(self, x_t, t, cond=None):
        return self.data.x0(self.process, x_t, torch.as_tensor(t).expand(len(x_t)))


class Straight(Predictor):
    """The velocity after reflow of Gaussian data: x = mean + std z."""

    def __init__(self, mean: float, std: float):
        super().__init__(RectifiedFlow(), "velocity")
        self.mean, self.std = mean, std

    def predict(self, x_t, t, cond=None):
        s = 1 - torch.as_tensor(t).expand(len(x_t)).view(-1, 1, 1, 1).to(x_t)
        return -(self.mean + (self.std - 1) * (x_t - s * self.mean) / ((1 - s) + s * self.std))


def gaussian_velocity(x: Tensor, s: Tensor, mean: float, std: float) -> Tensor:
    """v(x, s) of the paper for Gaussian data, written out."""
    gain = (s * std**2 - (1 - s)) / (s**2 * std**2 + (1 - s) ** 2)
    return mean + gain * (x - s * mean)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)


def straightness(points: Tensor) -> float:
    metric = Straightness()
    metric.update(points)
    return float(metric.compute())


Z = torch.linspace(-2, 2, 9).double().view(-1, 1, 1, 1)
PLUS_MINUS = column(1.0, -1.0)  # means over these two are exact for squares of what is linear in z


@pytest.mark.parametrize(("mean", "std"), [(0.3, 1.0), (-1.2, 0.5)])
def test_P1_the_flow_of_a_gaussian(mean, std) -> None:
    flow = Exact(Gaussian(mean, std), RectifiedFlow())
    s = torch.tensor([0.0, 0.1, 0.5, 0.9, 0.99], dtype=torch.float64)
    x = column(0.7, -0.2, 1.1, 0.4, -1.0)
    torch.testing.assert_close(-flow.velocity(x, 1 - s), gaussian_velocity(x, s.view(-1, 1, 1, 1), mean, std))
    end = solve(flow.x0, flow.process, Z, flow.process.timesteps(2000), "heun")
    torch.testing.assert_close(end, mean + std * Z, atol=1e-5, rtol=0)
    one = solve(flow.x0, flow.process, Z, flow.process.timesteps(1), "euler")
    torch.testing.assert_close(one, torch.full_like(Z, mean), atol=1e-12, rtol=0)  # every point is the mean


def test_P1_straightness_and_the_least_loss_of_a_gaussian() -> None:
    for mean in (0.0, 0.8):
        flow = Exact(Gaussian(mean, 1.0), RectifiedFlow())
        assert straightness(trajectory(flow, PLUS_MINUS, steps=2000)) == pytest.approx(0.4292, abs=5e-4)
        s = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
        spread = (s**2 + (1 - s) ** 2).sqrt()  # of X_s; the velocity is linear in it
        v = [-flow.velocity((s * mean + sign * spread).view(-1, 1, 1, 1), 1 - s) for sign in (1, -1)]
        explained = sum(squares(e, torch.zeros_like(e)) for e in v) / 2
        assert float((mean**2 + 2 - explained).mean()) == pytest.approx(torch.pi / 2, abs=1e-5)


def test_P2_after_reflow_the_gaussians_flow_is_straight_and_one_step_is_exact() -> None:
    mean, std = 0.3, 0.5
    flow, t = Straight(mean, std), torch.linspace(0, 1, 9, dtype=torch.float64)
    x = mean + std * Z
    at = Points(Z, x, flow.process.add_noise(x, Z, t), t, None)
    assert float(Reflow("none").errors(flow, at).max()) < 1e-28
    torch.testing.assert_close(flow.generate(Z), x, atol=1e-14, rtol=0)
    assert straightness(trajectory(flow, Z, steps=100)) < 1e-24


def test_P3_transport_costs_do_not_rise() -> None:
    for mean, std in ((0.3, 0.5), (-1.0, 2.0)):
        flow = Exact(Gaussian(mean, std), RectifiedFlow())
        end = solve(flow.x0, flow.process, PLUS_MINUS, flow.process.timesteps(2000), "heun")
        cost = float((end - PLUS_MINUS).square().mean())
        assert cost == pytest.approx(mean**2 + (std - 1) ** 2, abs=1e-4)
        assert cost < mean**2 + 1 + std**2


def test_P4_one_step_of_a_straight_field_is_a_hundred() -> None:
    flow, z = Straight(0.3, 0.5), Z.float()
    one, many = (solve(flow.x0, flow.process, z, flow.process.timesteps(n), "euler") for n in (1, 100))
    torch.testing.assert_close(one, many, atol=1e-5, rtol=0)


def test_P5_the_exact_conversion_of_an_eps_network() -> None:
    process, mean, std = DDPM(), 0.3, 0.5
    alpha, sigma = process.alpha_sigma(torch.arange(1000), torch.float64)
    known = alpha / (alpha + sigma)  # the paper's time of each integer time
    assert bool((known.diff() < 0).all())
    assert float(known[-1]) == pytest.approx(0.0640, abs=5e-5) and float(known[0]) == pytest.approx(0.972, abs=1e-3)
    s = torch.linspace(float(known[-1]), float(known[0]), 200, dtype=torch.float64)
    flow = RectifiedFlow()
    tau = process.time_of_log_snr(flow.log_snr(1 - s, torch.float64))
    assert bool((tau.diff() < 0).all())
    again = 1 - flow.time_of_log_snr(process.log_snr(tau, torch.float64))
    torch.testing.assert_close(again, s, atol=1e-6, rtol=0)
    network = Reexpressed(Exact(Gaussian(mean, std), process), "eps")
    x = torch.linspace(-2, 2, 200, dtype=torch.float64).view(-1, 1, 1, 1)
    found, shape = -Reexpressed(network, "velocity", flow).predict(x, 1 - s), s.view(-1, 1, 1, 1)
    torch.testing.assert_close(found, gaussian_velocity(x, shape, mean, std), atol=1e-5, rtol=0)
    z = x / (shape**2 + (1 - shape) ** 2).sqrt()
    torch.testing.assert_close(found, (x - network.predict(z, tau)) / shape, atol=1e-5, rtol=0)
    beyond = -Reexpressed(network, "velocity", flow).predict(x, torch.ones(200))  # s = 0, below what it knows
    assert bool(beyond.isfinite().all()) and float((beyond - (mean - x)).abs().max()) < 0.1


# ---- tiny networks ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd_pairs(tmp_path_factory, sd, prompts) -> str:
    return make_pairs(sd, prompts, tmp_path_factory.mktemp("sd-pairs") / "pairs", guidance=3.0, solver="dpmpp_2m")


@pytest.fixture(scope="module")
def edm_pairs(tmp_path_factory, edm, prompts) -> str:
    return make_pairs(edm, prompts, tmp_path_factory.mktemp("edm-pairs") / "pairs", solver="heun")


@pytest.fixture(scope="module")
def metrics(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("metrics")
    torch.manual_seed(3)
    PerceptualNetwork().save_pretrained(folder / "perceptual")
    for name, layout in (("lpips", "vgg16"), ("lpips_alex", "alex")):
        save_file(LPIPS(layout).state_dict(), str(folder / f"{name}.safetensors"))
    names = {name: str(folder / f"{name}.safetensors") for name in ("lpips", "lpips_alex")}
    return {"perceptual": str(folder / "perceptual"), **names}


def data(prompts: str, pairs: str | None, source: str, size: int = 4, val: str | None = None, **options) -> Streams:
    stream = Pairs(pairs, source, batch_size=size, **options) if pairs else Prompts(prompts, batch_size=size)
    held = Pairs(val, source, batch_size=8, limit=8) if val else Prompts(prompts, batch_size=8, limit=8)
    return Streams(main=stream, val=held)


def reflow(source: str, cls: type = Reflow, **options):
    guidance = {"guidance": 3.0} if "edm" not in Path(source).name else {"guidance": 1.0, "alpha": 1.0}
    return cls(source, **{"student": update(), "val_steps": 2, "steps": 2, "init_steps": 0, **guidance, **options})


def one_step(source: str, **options) -> OneStep:
    return OneStep(source, **{"student": update(), "val_steps": 2, "guidance": 3.0, "init_steps": 0, **options})


def trained(folder: Path, method: InstaFlow, streams: Streams, steps: int = 2, **options) -> InstaFlow:
    fit(folder, method, steps, streams, **{"limit_val_batches": 0, **options})
    return method


def batches(streams: Streams, steps: int, size: int = 4) -> list[Records]:
    streams.prepare_data()
    streams.setup("fit")
    return [streams.training["main"].load(range(size * k, size * k + size), k) for k in range(steps)]


def written_out(method: InstaFlow, pairs: list[Records], kind: str) -> dict[str, Tensor]:
    """The update of a stage with torch alone, on a copy of the student's network; the weights it ends with."""
    network, text = copy.deepcopy(method.student.backbone), method.text
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR)
    for step, rows in enumerate(pairs):
        keys, z, x, cond = Keys(0, step), noise(rows.noise_seed, (4, 8, 8)), rows.latent, text(rows.caption)
        if kind == "reflow":  # in the paper's time
            s = 1 - keys.uniform("t", rows.position, dtype=torch.float64).float()
            dropped = keys.bernoulli("null", rows.position, 0.1).view(-1, 1, 1)
            words = torch.where(dropped, cond.null_embeds, cond.embeds)
            shape = s.view(-1, 1, 1, 1)
            v = -network(shape * x + (1 - shape) * z, 1000 * (1 - s), words).sample
            loss = (v - (x - z)).square().mean()
        else:
            v = -network(z, torch.full((len(z),), 1000.0), cond.embeds).sample
            loss = (z + v - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 10.0)
        optimizer.step()
    return {f"student.backbone.{name}": p.detach() for name, p in network.named_parameters()}


@pytest.mark.parametrize("kind", ["reflow", "one step"])
def test_the_update_is_the_papers(tmp_path, sd, sd_pairs, prompts, kind) -> None:
    method = reflow(sd) if kind == "reflow" else one_step(sd)
    method.configure_model()
    before = states(method)
    expected = written_out(method, batches(data(prompts, sd_pairs, sd), 3), kind)
    found = states(trained(tmp_path, method, data(prompts, sd_pairs, sd), 3))
    same(found, expected, rtol=1e-4, atol=2e-5)
    assert (
        float((found["student.backbone.conv_in.weight"] - before["student.backbone.conv_in.weight"]).abs().max()) > 1e-3
    )


def test_P6_velocity_points_from_noise_to_data(tmp_path, sd, sd_pairs, prompts) -> None:
    fast = GroupOptions(lambda p: torch.optim.AdamW(p, lr=1e-2), clip=1.0)
    method = reflow(sd, student=fast, null_probability=0.0, init="negated", alpha=1.0, steps=8)
    streams = data(prompts, sd_pairs, sd, size=1, limit=1)
    trained(tmp_path, method, streams, 90).eval()
    (pair,) = batches(data(prompts, sd_pairs, sd, size=1, limit=1), 1, size=1)
    z, x, cond = noise(pair.noise_seed, (4, 8, 8)), pair.latent, method.condition(pair)
    for s in (0.0, 0.5, 0.9):
        v = method.velocity((1 - s) * z + s * x, torch.full((1,), s), cond).detach()
        assert float(torch.cosine_similarity(v.flatten(), (x - z).flatten(), dim=0)) > 0.9
    path = trajectory(method.student, z, cond, steps=8)
    away = (path - x).flatten(1).norm(dim=1)
    assert bool((away.diff() < 0).all()) and float(away[-1]) < 0.5 * float(away[0])
    torch.testing.assert_close(path[-1], method.couple(z, cond), rtol=1e-4, atol=1e-4)


def test_P7_guidance_of_the_velocity(sd) -> None:
    method = reflow(sd).eval()
    method.configure_model()
    cond, x, s = method.condition(Records.of_prompts(["red square", "two"])), noise(torch.arange(2), (4, 8, 8)), 0.4
    rows: list[int] = []
    handle = method.student.backbone.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    with torch.no_grad():
        v = {alpha: method.velocity(x, s, cond, alpha) for alpha in (1.0, 0.0, 1.5, 3.0)}
        assert rows == [2, 2, 4, 4]  # 1 asks for no null branch, 0 for that alone
        conditional, null = (-method.student.velocity(x, torch.full((2,), 0.6), c) for c in (cond, cond.null()))
    handle.remove()
    torch.testing.assert_close(v[1.0], conditional)
    torch.testing.assert_close(v[0.0], null)
    for alpha in (1.5, 3.0):
        torch.testing.assert_close(v[alpha], alpha * conditional + (1 - alpha) * null, atol=1e-5, rtol=1e-5)


def test_P8_the_input_of_the_distillation_and_where_gradients_go(sd, sd_pairs, prompts, metrics) -> None:
    method = one_step(sd, perceptual_from=0, metric="perceptual", metric_weights=metrics["perceptual"])
    method.configure_model()
    (pairs,) = batches(data(prompts, sd_pairs, sd), 1)
    seen = []
    method.student.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    at = method.points(pairs, Keys(0))
    method.errors(method.student, at).mean().backward()
    ((x, t),) = seen
    assert torch.equal(x, noise(pairs.noise_seed, (4, 8, 8))) and t.tolist() == [1000.0] * 4
    assert pairs.latent.grad is None and not at.x.requires_grad
    frozen = [*method.codec.parameters(), *method.metric.parameters(), *method.teacher.parameters()]
    assert all(p.grad is None for p in frozen)
    assert float(sum(p.grad.abs().sum() for p in method.student.parameters() if p.grad is not None)) > 0


def test_P9_pairs_of_a_flow_are_equal_in_any_batch_and_come_from_the_averaged_weights(
    tmp_path, sd, sd_pairs, prompts
) -> None:
    method = reflow(sd, student=update(ema=EMAOptions(decay=0.9, warmup=False)))
    trained(tmp_path, method, data(prompts, sd_pairs, sd)).eval()
    method.export(tmp_path / "flow", [])
    made = [make_pairs(str(tmp_path / "flow"), prompts, tmp_path / f"pairs-{n}", n, guidance=1.5, solver="euler")
            for n in (8, 5)]  # fmt: skip
    a, b = (batches(data(prompts, pairs, str(tmp_path / "flow")), 1, 32)[0] for pairs in made)
    orders = [rows.noise_seed.argsort() for rows in (a, b)]  # how pairs were made counts for the order of reading them
    assert torch.equal(a.noise_seed[orders[0]], b.noise_seed[orders[1]])
    torch.testing.assert_close(a.latent[orders[0]], b.latent[orders[1]], atol=2e-3, rtol=2e-3)  # stored in fp16
    teacher = Teacher(str(tmp_path / "flow"), guidance=1.5, steps=2, solver="euler")
    teacher.configure_model()
    assert not teacher.denoiser.training and not any(p.requires_grad for p in teacher.denoiser.parameters())
    z, cond = noise(a.noise_seed, (4, 8, 8)), method.condition(a)
    torch.testing.assert_close(a.latent, method.couple(z, cond, steps=2, guidance=1.5), atol=0.05, rtol=0.02)
    averaged = dict(method.groups["student"].ema.named_parameters())
    raw = dict(method.student.named_parameters())
    for name, weight in teacher.denoiser.named_parameters():
        assert torch.equal(weight, averaged[name].half().float())
    assert any(not torch.equal(raw[name].half(), averaged[name].half()) for name in raw)


def test_P10_two_modes_in_the_plane() -> None:
    found, keys = flows(0, steps=500, batch=128), Keys(5)
    z, real = keys.normal("z", torch.arange(500), (2, 1, 1)), found.teacher.draw(keys, 500)
    before, after = (trajectory(flow, z, steps=50) for flow in (found.teacher, found.reflowed))
    assert straightness(after) < 0.2 * straightness(before)
    assert crossings(z, real) > 0.4 and crossings(z, after[-1]) < 0.03  # independent pairs, and those of the flow
    with torch.no_grad():
        ends = {name: getattr(found, name).generate(z) for name in ("teacher", "reflowed", "distilled", "direct")}
    assert float(ends["teacher"][:, 0].abs().max()) < 0.05  # the mean of both
    left = float((ends["reflowed"][:, 0] < -0.75).double().mean())
    right = float((ends["reflowed"][:, 0] > 0.75).double().mean())
    assert 0.3 < left < 0.7 and 0.3 < right < 0.7
    distance = {name: energy_distance(end, real) for name, end in ends.items()}
    assert distance["distilled"] < 0.1 * distance["teacher"]


@pytest.mark.parametrize("junction", ["full", "features", "drop_top"])
def test_P11_parameters_of_stacked_unets(junction) -> None:
    facts = json.loads(Path("configs/networks/sd15_unet.json").read_text())
    with torch.device("meta"):
        one = build_network(facts)
        two = build_network({**facts, "_class_name": "StackedUNet", "junction": junction})

    def count(*modules: nn.Module) -> int:
        return sum(p.numel() for m in modules for p in m.parameters())

    removed = {
        "full": 0,
        "features": count(one.conv_norm_out, one.conv_out, one.conv_in),
        "drop_top": count(one.conv_norm_out, one.conv_out, one.conv_in, one.up_blocks[-1], one.down_blocks[0])
        + count(one.up_blocks[-2].upsamplers) - (640 * 320 + 320),
    }[junction]  # fmt: skip
    assert count(one) == 859_520_964 and count(two) == 2 * count(one) - removed
    assert 1.6e9 < count(two) < 1.73e9


@pytest.mark.parametrize("junction", ["full", "features"])
def test_P11_a_residual_stack_begins_as_the_single_network(sd, junction) -> None:
    method, plain = one_step(sd, junction=junction, residual=True), one_step(sd)
    for m in (method, plain):
        m.configure_model()
    z, cond = noise(torch.arange(2), (4, 8, 8)), method.condition(Records.of_prompts(["red square", "two"]))
    with torch.no_grad():
        torch.testing.assert_close(method.student.generate(z, cond), plain.student.generate(z, cond))
    method.student.generate(z, cond).square().mean().backward()
    assert float(method.student.backbone.gate.grad.abs()) > 0


@pytest.mark.parametrize("junction", [None, "full"])
def test_gradient_checkpointing_keeps_the_gradients(sd, junction) -> None:
    gradients, z = [], noise(torch.arange(2), (4, 8, 8))
    for on in (False, True):
        method = one_step(sd, junction=junction, gradient_checkpointing=on)
        method.configure_model()
        assert method.student.backbone.is_gradient_checkpointing is on
        assert not method.teacher.backbone.is_gradient_checkpointing
        cond = method.condition(Records.of_prompts(["red square", "two"]))
        method.student.train().generate(z, cond).square().mean().backward()
        gradients.append({name: p.grad for name, p in method.student.named_parameters() if p.grad is not None})
    assert isinstance(method.student.backbone, StackedUNet) is (junction is not None)
    same(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("junction", ["full", "features", "drop_top"])
def test_stacks_train_and_are_read_again(tmp_path, sd, sd_pairs, prompts, junction) -> None:
    method = one_step(sd, junction=junction)
    method.configure_model()
    before = states(method)
    trained(tmp_path, method, data(prompts, sd_pairs, sd)).eval()
    after = states(method)
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert still == [] and any("second" in name for name in before)
    method.export(tmp_path / "out", [])
    again = Teacher(str(tmp_path / "out"), steps=1, solver="euler")
    again.configure_model()
    assert isinstance(again.denoiser.backbone, StackedUNet)
    z, cond = noise(torch.arange(2), (4, 8, 8)), method.condition(Records.of_prompts(["red square", "two"]))
    torch.testing.assert_close(again.couple(z, cond), method.couple(z, cond), atol=0.05, rtol=0.02)  # fp16 weights
    another = "full" if junction != "full" else "features"
    kept, same_again, other = (one_step(tmp_path / "out", junction=j) for j in (None, junction, another))
    for student in (kept, same_again):
        student.configure_model()
        assert student.student.backbone.config.junction == junction
    with pytest.raises(UserError, match="a stack already"):
        other.configure_model()


def test_a_stack_drops_nothing(tmp_path) -> None:
    """As other students, whatever its teacher dropped when it was trained."""
    file = pipeline_folder(tmp_path / "made") / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "dropout": 0.2}))
    method = one_step(tmp_path / "made", junction="full")
    method.configure_model()
    assert {m.p for m in method.student.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}


def checkpoint_of(folder: Path, method: InstaFlow, streams: Streams) -> Path:
    trainer = fit(folder, method, 3, streams, limit_val_batches=0)
    trainer.save_checkpoint(folder / "checkpoint")
    return folder / "checkpoint"


def test_P12_a_run_goes_on_in_larger_batches_with_its_optimizer_or_without(tmp_path, sd, sd_pairs, prompts) -> None:
    options = {"student": update(ema=EMAOptions(decay=0.9))}
    saved = checkpoint_of(tmp_path / "a", reflow(sd, **options), data(prompts, sd_pairs, sd))
    state = AtomicCheckpointIO().load_checkpoint(saved)
    write_folder(tmp_path / "cut", 3, "sharded", lambda into: write_sharded(state, into, ALONE))  # the other form
    found = {}
    for kept, place in ((True, tmp_path / "cut"), (False, saved)):
        method = reflow(sd, **options, start=str(place), start_optimizer=kept)
        method.on_train_start = _noting(method, found, kept)
        trained(tmp_path / str(kept), method, data(prompts, sd_pairs, sd, size=8), 1)
        assert method.counters.samples == 8 and method.counters.step == 1
    for weights, updates, _ in found.values():
        same(weights, state["state_dict"])
        assert updates in (3, 0)
    assert (found[True][1], found[False][1]) == (3, 0)
    assert found[True][2] > 0 and found[False][2] == 0


def test_P12_a_resumed_run_does_not_begin_again_where_it_started(tmp_path, sd, sd_pairs, prompts) -> None:
    def stage() -> Reflow:
        return reflow(sd, start=str(saved), student=update(ema=EMAOptions(decay=0.9)))

    streams = data(prompts, sd_pairs, sd)
    saved = checkpoint_of(tmp_path / "a", reflow(sd, student=update(ema=EMAOptions(decay=0.9))), streams)
    whole = trained(tmp_path / "whole", stage(), data(prompts, sd_pairs, sd), 4)
    half = fit(tmp_path / "half", stage(), 2, data(prompts, sd_pairs, sd), limit_val_batches=0)
    half.save_checkpoint(tmp_path / "half.ckpt")
    again = stage()
    trainer = trainer_for(
        tmp_path, 4, max_epochs=-1, check_val_every_n_epoch=None, num_sanity_val_steps=0, limit_val_batches=0
    )
    trainer.fit(again, data(prompts, sd_pairs, sd), ckpt_path=str(tmp_path / "half.ckpt"), weights_only=True)
    assert again.counters.step == 4
    same(states(again), states(whole))


def _noting(method: InstaFlow, found: dict, kept: bool):
    begin = method.on_train_start

    def started() -> None:
        begin()
        group = method.groups["student"]
        found[kept] = states(method), group.updates, len(group.optimizer.state)

    return started


def test_P12_pictures_are_compared_from_a_step_on_and_the_optimizer_goes_on(
    tmp_path, sd, sd_pairs, prompts, metrics
) -> None:
    def losses(**options) -> list[tuple[str, float]]:
        method = one_step(sd, metric="perceptual", metric_weights=metrics["perceptual"], **options)
        found = heard(method)
        trained(tmp_path, method, data(prompts, sd_pairs, sd), 3)
        assert method.groups["student"].updates == 3
        return found

    plain, changed = losses(), losses(perceptual_from=2)
    assert changed[:2] == plain[:2] and changed[2] != plain[2]


# ---- options ---------------------------------------------------------------------------------------------------------


def test_the_three_starts_of_a_diffusion_teacher(tmp_path, sd, sd_pairs, prompts) -> None:
    x, cond_of = noise(torch.arange(2), (4, 8, 8)), Records.of_prompts(["red square", "two"])
    outputs = {}
    for init in ("raw", "negated", "converted"):
        method = reflow(sd, init=init)
        method.configure_model()
        with torch.no_grad():
            outputs[init] = method.velocity(x, 0.2, method.condition(cond_of))
            eps = method.teacher.backbone(x, 800.0, method.condition(cond_of).embeds).sample
    torch.testing.assert_close(outputs["raw"], eps)  # the paper's: the output is v
    torch.testing.assert_close(outputs["negated"], -eps)
    assert torch.equal(outputs["converted"], outputs["negated"])  # before its own steps
    begun = reflow(sd, init_steps=2, start="a run's checkpoint")
    begun.configure_model()
    assert not begun.converting  # what it begins with is a flow already
    method = reflow(sd, init_steps=2, init="converted")
    method.configure_model()
    assert method.converting
    (pairs,) = batches(data(prompts, sd_pairs, sd), 1)
    at = method.points(pairs, Keys(0, 0))
    expected = squares(method.student(at.x_t, at.t, at.cond), method.teacher_velocity(at.x_t, at.t, at.cond)).mean()
    found = heard(method)
    with counting_units(method) as units:
        trained(tmp_path, method, data(prompts, sd_pairs, sd), 2)
    assert found[0][1] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert units.per_step()["teacher"] == 1
    method.counters.step = 0
    assert differences(method.forward_units(), units.per_step()) == {}
    for init in ("raw", "negated"):
        method = reflow(sd, init=init, init_steps=5)
        method.configure_model()
        assert not method.converting and "teacher" not in method.forward_units()


def test_conversion_brings_the_student_to_the_teachers_flow(tmp_path, sd, sd_pairs, prompts) -> None:
    fast = GroupOptions(lambda p: torch.optim.AdamW(p, lr=5e-3), clip=1.0)
    method = reflow(sd, student=fast, init_steps=30, null_probability=0.0)
    method.configure_model()
    (pairs,) = batches(data(prompts, sd_pairs, sd), 1)
    at = method.points(pairs, Keys(3))

    def distance() -> float:
        with torch.no_grad():
            student = method.student(at.x_t, at.t, at.cond)
        return float(squares(student, method.teacher_velocity(at.x_t, at.t, at.cond)).mean())

    before = distance()
    trained(tmp_path, method, data(prompts, sd_pairs, sd), 30)
    assert distance() < 0.9 * before and not method.converting


@pytest.fixture(scope="module")
def first_losses(tmp_path_factory, sd, sd_pairs, prompts, metrics):
    """`first_losses(method, options)`: the losses of two training steps."""

    def losses(cls, **options) -> list[tuple[str, float]]:
        if cls is not Reflow:
            options = {"metric": "perceptual", "metric_weights": metrics["perceptual"], **options}
        method = one_step(sd, **options) if cls is OneStep else reflow(sd, cls, **options)
        found = heard(method)
        trained(tmp_path_factory.mktemp("run"), method, data(prompts, sd_pairs, sd))
        return found

    return losses


@pytest.fixture(scope="module")
def usual(first_losses):
    return {cls: first_losses(cls) for cls in (Reflow, OneStep, RFpp)}


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (Reflow, {"init": "raw"}),
        (Reflow, {"init_steps": 1}),
        (Reflow, {"law": UShaped()}),
        (Reflow, {"null_probability": 0.9}),
        (Reflow, {"student": update(clip=1e-3)}),
        (Reflow, {"common": MethodOptions(seed=1)}),
        (OneStep, {"init": "raw"}),
        (OneStep, {"init_steps": 1}),
        (OneStep, {"perceptual_from": 1}),
        (OneStep, {"junction": "full"}),
        (OneStep, {"junction": "full", "residual": True}),
        (RFpp, {"huber": None}),
        (RFpp, {"huber": 0.1}),
        (RFpp, {"perceptual": "plain"}),
        (RFpp, {"perceptual": "none"}),
        (RFpp, {"law": UShaped(a=1.0)}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or "-".join(value),
)
def test_every_option_changes_the_training(first_losses, usual, cls, options) -> None:
    assert first_losses(cls, **options) != usual[cls]


def test_steps_and_guidance_of_the_students_sampling(sd) -> None:
    cond_of, places = Records.of_prompts(["red square", "two"]), torch.arange(2)
    found = []
    for options in ({}, {"steps": 3}, {"alpha": 2.0}):
        method = reflow(sd, **options).eval()
        method.configure_model()
        cond = method.condition(cond_of)
        found.append(method.sample(cond, Keys(0), places))
        assert torch.equal(found[-1], method.sample(cond, Keys(0), places, method.alpha, method.steps))
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert torch.equal(found[1], method.sample(cond, Keys(0), places, 1.5, 3))


@pytest.mark.parametrize("metric", ["perceptual", "lpips", "lpips_alex"])
def test_every_metric_compares_decoded_pictures(sd, sd_pairs, prompts, metrics, metric) -> None:
    method = one_step(sd, perceptual_from=0, metric=metric, metric_weights=metrics[metric])
    method.configure_model()
    if metric != "perceptual":  # AlexNet has no output for the 16 pixels of these pictures
        method.metric.resize = 64
        assert len(method.metric.features) == {"lpips": 30, "lpips_alex": 12}[metric]
    (pairs,) = batches(data(prompts, sd_pairs, sd), 1)
    at = method.points(pairs, Keys(0))
    with torch.no_grad():
        found = method.errors(method.student, at)
        x = method.student.generate(at.z, at.cond)
        expected = method.metric(method.codec.decode(x), method.codec.decode(at.x))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert method.frozen_identities["metric"].startswith("sha256:")


def test_the_papers_values_are_the_defaults() -> None:
    method, student = Reflow("x"), OneStep("x")
    assert (method.guidance, method.alpha, method.steps, method.null_probability) == (5.0, 1.5, 25, 0.1)
    assert (student.guidance, student.steps, student.alpha, student.metric_kind) == (1.5, 1, 1.0, "lpips_alex")
    optimizer = method.options.optimizer([nn.Parameter(torch.zeros(1))])
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (1e-6, 1e-2)
    assert method.options.clip == 1 and method.options.ema.decay == 0.9999
    assert method.options.schedule(optimizer).get_last_lr() == [pytest.approx(1e-9)]


# ---- rfpp ------------------------------------------------------------------------------------------------------------


def test_the_loss_of_improved_reflow(sd, sd_pairs, prompts, metrics) -> None:
    method = reflow(sd, RFpp, metric="perceptual", metric_weights=metrics["perceptual"])
    method.configure_model()
    (pairs,) = batches(data(prompts, sd_pairs, sd), 1)
    at = method.points(pairs, Keys(0))
    assert bool(((at.t >= 1e-5) & (at.t <= 1 - 1e-5)).all())
    with torch.no_grad():
        v, t = method.student(at.x_t, at.t, at.cond), at.t.view(-1, 1, 1, 1)
        e, c, d = (v - (at.z - at.x)).flatten(1), 0.00054 * 256, 256
        expected = (1 - at.t) * ((e.square().sum(1) + c**2).sqrt() - c) / d
        pictures = method.codec.decode(at.x_t - t * v), method.codec.decode(at.x)
        expected = expected + method.metric(*pictures) / at.t
        torch.testing.assert_close(method.errors(method.student, at), expected, rtol=1e-4, atol=1e-5)
    assert float(pseudo_huber(torch.zeros(1, 4), 0.1)) == 0
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    drawn = torch.histc(UShaped().quantile(RectifiedFlow(), u), 10, 0, 1) / 10_000
    middle = (torch.arange(10, dtype=torch.float64) + 0.5) / 10
    density = torch.exp(4 * middle) + torch.exp(4 * (1 - middle))
    torch.testing.assert_close(drawn, density / density.mean(), rtol=0.03, atol=0)


def test_the_sampler_of_improved_reflow_takes_the_first_noise_again(sd, metrics) -> None:
    options = {"metric": "perceptual", "metric_weights": metrics["perceptual"]}
    method = reflow(sd, RFpp, **options).eval()
    method.configure_model()
    z, cond = noise(torch.arange(2), (4, 8, 8)), method.condition(Records.of_prompts(["red square", "two"]))
    with torch.no_grad():
        expected = method.student.x0(z, torch.ones(2), cond)
        for t in (2 / 3, 1 / 3):
            expected = method.student.x0((1 - t) * expected + t * z, torch.full((2,), t), cond)
    torch.testing.assert_close(method.couple(z, cond, 3, 1.0), expected, rtol=1e-4, atol=1e-3)
    other = reflow(sd, RFpp, sampler="euler", **options).eval()
    other.configure_model()
    torch.testing.assert_close(other.couple(z, cond, 3, 1.0), sample(method.student, z, cond, 3, 1.0, "euler"))
    assert not torch.allclose(other.couple(z, cond, 3, 1.0), expected, atol=1e-2)


# ---- cost, watching, results -----------------------------------------------------------------------------------------


def test_the_teacher_stays_as_it_was_and_out_of_the_checkpoint(tmp_path, sd, sd_pairs, prompts, metrics) -> None:
    method = one_step(sd, perceptual_from=1, metric="perceptual", metric_weights=metrics["perceptual"], init_steps=1)
    method.configure_model()
    before = {name: weights_hash(getattr(method, name)) for name in ("teacher", "text", "codec", "metric")}
    trained(tmp_path, method, data(prompts, sd_pairs, sd))
    assert {name: weights_hash(getattr(method, name)) for name in before} == before
    assert all(not p.requires_grad and p.grad is None for name in before for p in getattr(method, name).parameters())
    assert all(not getattr(method, name).training for name in before)
    assert {name.split(".")[0] for name in method.state_dict()} == {"student"}
    assert method.frozen_identities.keys() == before.keys()


@pytest.mark.parametrize(
    ("cls", "options"),
    [(Reflow, {}), (OneStep, {}), (OneStep, {"perceptual_from": 0}), (OneStep, {"junction": "features"}), (RFpp, {})],
    ids=lambda value: getattr(value, "__name__", None) or "-".join(value),
)
def test_a_step_costs_what_it_says(tmp_path, sd, sd_pairs, prompts, metrics, cls, options) -> None:
    more = {} if cls is Reflow else {"metric": "perceptual", "metric_weights": metrics["perceptual"]}
    method = one_step(sd, **options, **more) if cls is OneStep else reflow(sd, cls, **options, **more)
    method.configure_model()
    method.text(["red"])  # the empty caption is encoded once
    with counting_units(method) as units:
        trained(tmp_path, method, data(prompts, sd_pairs, sd), 2)
    assert differences(method.forward_units(), units.per_step()) == {}


def test_signals_and_what_validation_measures(tmp_path, sd, sd_pairs, prompts) -> None:
    method = reflow(sd, common=MethodOptions(log_every=1))
    notes: dict[str, Tensor] = {}
    note = method.note
    method.note = lambda **scalars: (notes.update(scalars), note(**scalars))[1]
    trainer = fit(tmp_path, method, 1, data(prompts, sd_pairs, sd, val=sd_pairs), val_check_interval=1)
    quarters = [float(notes[f"student/loss_{q}"].detach()) for q in (1, 2, 3, 4)]
    assert sum(quarters) == pytest.approx(float(notes["student/loss"].detach()), rel=1e-5)
    held = Pairs(sd_pairs, sd, batch_size=8, limit=8)
    held.setup()
    held.begin(0, "val", shuffle=False)
    main = held.load(range(8), 0)
    cond = method.condition(main)
    z = Keys(0).fork("validation").normal("z", main.position, (4, 8, 8))
    with torch.no_grad():
        distance = (method.couple(z, cond) - sample(method.teacher, z, cond, 2, 3.0)).abs().mean()
    assert float(trainer.callback_metrics["val/distance"]) == pytest.approx(float(distance), rel=1e-5)
    assert float(trainer.callback_metrics["val/loss"]) > 0


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' flow sigmas
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_export_is_a_stock_pipeline_that_draws_our_latents(tmp_path, sd, sd_pairs, prompts, steps) -> None:
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    method = trained(tmp_path, reflow(sd, steps=steps), data(prompts, sd_pairs, sd)).eval()
    assert isinstance(method, Generates) and isinstance(method, Exports)
    cond = method.condition(Records.of_prompts(["red square", "two"]))
    method.export(tmp_path / "out", [])
    z = noise(torch.arange(2), (4, 8, 8))
    ours = method.couple(z, cond)
    shared = {"prompt_embeds": cond.embeds, "latents": z, "num_inference_steps": steps, "output_type": "latent"}
    shared |= {"negative_prompt_embeds": cond.null().embeds, "guidance_scale": 1.5}

    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out", dtype=torch.float32, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    exact = pipeline(**shared).images
    torch.testing.assert_close(exact, ours, atol=0.05, rtol=0.02)  # fp16 weights
    facts = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": 1}
    pipeline.scheduler = DPMSolverMultistepScheduler(**facts)
    error = (pipeline(**shared).images - exact).square().mean().sqrt() / exact.std()
    print(f"{steps} steps, a stock scheduler: {float(error):.2%} of the deviation of latents")
    assert float(error) < 0.02
    assert len((tmp_path / "out/scheduler/flow_scheduler.py").read_text().splitlines()) <= 60


def test_the_card_says_what_the_folder_brings_along(tmp_path, sd, sd_pairs, prompts) -> None:
    from lightning_t2i.cli.card import use_section
    from lightning_t2i.cli.stock import read_stock

    method = trained(tmp_path, reflow(sd), data(prompts, sd_pairs, sd), 1).eval()
    method.export(tmp_path / "out", [])
    said = use_section(read_stock(tmp_path / "out", {"steps": 25, "guidance": 1.5}))
    assert "`scheduler/flow_scheduler.py`" in said and "trust_remote_code=True" in said
    assert "guidance_scale=1.5" in said and "use_flow_sigmas" in said
    compile(said.split("```python")[2].split("```")[0], "card", "exec")


def test_export_of_a_flow_on_pixels_is_the_teacher_of_the_next_stage(tmp_path, edm, edm_pairs, prompts) -> None:
    method = trained(tmp_path, reflow(edm, init_steps=1), data(prompts, edm_pairs, edm)).eval()
    assert all(m.p == 0 for m in method.student.modules() if isinstance(m, nn.Dropout))
    method.export(tmp_path / "flow", [])
    pairs = make_pairs(str(tmp_path / "flow"), prompts, tmp_path / "pairs", solver="euler")
    student = one_step(str(tmp_path / "flow"), guidance=1.0)
    found = heard(student)
    trained(tmp_path, student, data(prompts, pairs, str(tmp_path / "flow")))
    assert not student.converting and [name for name, _ in found] == ["student"] * 2
    records = Records.of_prompts(["", ""])
    assert student.sample(student.condition(records), Keys(0), records.position).shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("config", "network", "parameters"),
    [
        ("instaflow/sd15_reflow", "sd15_unet", 859_520_964),
        ("instaflow/sd15_distill", "sd15_unet", 859_520_964),
        ("instaflow/sd14_reflow", "sd15_unet", 859_520_964),  # 1.4 and 1.5 have one architecture
        ("instaflow/sd15_stacked", "sd15_stacked", 1_719_017_924),
        ("instaflow/cifar10_reflow", "edm_cifar10", 55_735_299),
    ],
)
def test_paper_scale_networks_and_their_memory(repo, capsys, config, network, parameters) -> None:
    with torch.device("meta"):
        built = build_network(f"configs/networks/{network}.json")
    assert sum(p.numel() for p in built.parameters()) == parameters
    options = merge([repo / f"configs/{config}.yaml"], []).config["model"]["init_args"]
    half = 2 if options["common"]["precision"] == "bf16" else 4
    teacher = parameters / (2 if "stacked" in config else 1)
    gigabytes = (parameters * 5 * 4 + teacher * half) / 1e9  # weights, gradient, two moments, average; teacher
    with capsys.disabled():
        print(f"\n{config}: {gigabytes:.1f} GB of weights, gradients and states on each device")
    assert gigabytes < 80
    assert (options.get("junction") is not None) == ("stacked" in config)


# ---- processes -------------------------------------------------------------------------------------------------------


def on_ranks(rank: int, source: str, pairs: str, prompts: str, folder: str, replicate: int, shard: int) -> dict:
    plain = GroupOptions(lambda p: torch.optim.SGD(p, lr=0.01), clip=10.0)
    options = {"student": plain, "init_steps": 1, "common": MethodOptions(accumulate=2)}
    stacked = "stacked" in folder
    method = (
        one_step(source, junction="features", **options) if stacked else reflow(source, init="converted", **options)
    )
    fit(Path(folder), method, 2, data(prompts, pairs, source), replicate=replicate, shard=shard, limit_val_batches=0)
    return states(method)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, sd, sd_pairs, prompts) -> Callable[[str], dict]:
    """What one process trains of a kind of student."""
    return cache(lambda kind: on_ranks(0, sd, sd_pairs, prompts, str(tmp_path_factory.mktemp(f"{kind}-one")), 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "mesh"), [("reflow", (2, 1)), ("reflow", (1, 2)), ("stacked", (1, 2))], ids=str)
def test_one_and_two_processes_agree(tmp_path, sd, sd_pairs, prompts, ranks, alone, kind, mesh) -> None:
    one = alone(kind)
    for two in ranks(on_ranks, sd, sd_pairs, prompts, str(tmp_path / f"{kind}-two"), *mesh):
        same(two, one, rtol=1e-4, atol=1e-5)
    assert len(one) > 10


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Reflow("none", init_steps=-1), "negative"),
        (lambda: Reflow("none", null_probability=1.0), "probability"),
        (lambda: Reflow("none", steps=0), "at least one step"),
        (lambda: OneStep("none", residual=True), "No such residual"),
        (lambda: OneStep("none", junction="drop_top", residual=True), "No such residual"),
    ],
    ids=range(5),
)
def test_impossible_options_are_refused_at_once(make, message) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_teachers_that_do_not_fit_are_refused(tmp_path, sd, edm, metrics) -> None:
    flow = str(pipeline_folder(tmp_path / "flow", scheduler=to_scheduler(RectifiedFlow(), "velocity")))
    reflow(flow).configure_model()
    with pytest.raises(UserError, match="flow already"):
        reflow(flow, init="raw").configure_model()
    with pytest.raises(UserError, match="cannot be guided"):
        reflow(edm_folder(tmp_path / "uncond", 0), guidance=2.0).configure_model()
    with pytest.raises(UserError, match="No such model folder"):
        reflow("no/such/folder").configure_model()
    with pytest.raises(UserError, match="Only U-Nets"):
        one_step(edm, guidance=1.0, junction="full").configure_model()
    with pytest.raises(UserError, match="metric has no weights"):
        one_step(sd, perceptual_from=0).configure_model()
    with pytest.raises(UserError, match="layout alex"):
        one_step(sd, perceptual_from=0, metric_weights=metrics["lpips"]).configure_model()


def refused(folder: Path, method: InstaFlow, streams: Streams, message: str) -> None:
    with pytest.raises(UserError, match=message):
        trained(folder, method, streams, 1)
    assert method.counters.step == 0 and method.counters.batches == 0


def test_pairs_that_are_missing_or_foreign_are_refused_before_training(tmp_path, sd, sd_pairs, edm, prompts) -> None:
    refused(tmp_path, reflow(sd), data(prompts, None, sd), "needs the teacher's pairs")
    refused(tmp_path, reflow(sd, guidance=2.0), data(prompts, sd_pairs, sd), "another guidance")
    refused(tmp_path, reflow(edm), data(prompts, sd_pairs, sd), "'x0' differs")
    other = str(pipeline_folder(tmp_path / "v", scheduler=to_scheduler(DDPM(), "v")))
    refused(tmp_path, reflow(other), data(prompts, sd_pairs, sd), "'teacher' differs")
    wide = make_pairs(sd, prompts, tmp_path / "wide", guidance=3.0)
    about = json.loads(Path(wide, "dataset.json").read_text())
    Path(wide, "dataset.json").write_text(json.dumps({**about, "shape": [4, 16, 16]}))
    with pytest.raises(UserError, match="noise of a shard|'shape' differs"):
        trained(tmp_path, reflow(sd), data(prompts, wide, sd), 1)


def test_a_foreign_checkpoint_is_refused_as_a_start(tmp_path, sd, sd_pairs, prompts) -> None:
    saved = checkpoint_of(tmp_path / "a", one_step(sd, junction="full"), data(prompts, sd_pairs, sd))
    refused(tmp_path, reflow(sd, start=str(saved)), data(prompts, sd_pairs, sd), "does not fit")
    refused(tmp_path, reflow(sd, start=str(tmp_path / "none")), data(prompts, sd_pairs, sd), "complete checkpoint")


def test_a_reflow_of_flux_begins_as_its_teacher() -> None:
    method = Reflow("assets/tiny/flux", guidance=3.0, size=32).eval()
    method.configure_model()
    assert method.shape == (4, 8, 8) and not method.converting
    cond, z = method.condition(Records.of_prompts(["a red square"])), noise(torch.arange(1), method.shape)
    with torch.no_grad():
        expected = sample(method.teacher, z, cond, 3, 2.0, "euler")
    torch.testing.assert_close(method.couple(z, cond, 3, 2.0), expected)
    with pytest.raises(UserError, match="size"):
        Reflow("assets/tiny/flux", guidance=3.0).configure_model()


def test_an_edm_teacher_is_converted_exactly(edm) -> None:
    method = reflow(edm)
    method.configure_model()
    assert isinstance(method.teacher.process, EDM) and method.student.prediction == "velocity"
    x, t = noise(torch.arange(3), (3, 8, 8)), torch.tensor([0.2, 0.5, 0.8])
    cond = method.condition(Records.of_prompts(["", "", ""]))
    sigma, scaled = (t / (1 - t)).double(), x / (1 - t).view(-1, 1, 1, 1)
    expected = (x - method.teacher.x0(scaled, sigma, cond)) / t.view(-1, 1, 1, 1)
    torch.testing.assert_close(method.teacher_velocity(x, t, cond), expected.detach(), rtol=1e-4, atol=1e-4)
