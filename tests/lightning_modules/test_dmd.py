"""DMD: the numbered properties of its mathematics on closed forms, its update against one written out, its guards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from closed_forms import Gaussian
from distilling import LR, edm_folder, heard, make_pairs, noted, same, states, update
from kills import what_a_kill_changes
from pictures import fit
from safetensors.torch import save_file
from tiny_networks import pipeline_folder
from torch import nn
from weights import weights_hash

from datamodules.pairs import Pairs
from datamodules.prompts import Prompts
from datamodules.streams import Streams
from lightning_modules.dmd import DMD, SMALLEST, denoising_loss, matching_gradient, matching_loss, residual
from lightning_modules.teacher import Teacher
from lightning_t2i.batch import Batch, Records
from lightning_t2i.cli.configs import merge
from lightning_t2i.errors import UserError
from lightning_t2i.forward_units import counting_units, differences
from lightning_t2i.keys import Keys
from lightning_t2i.networks.denoiser import Denoiser, Predictor, Reexpressed
from lightning_t2i.networks.load import build_network
from lightning_t2i.networks.perceptual import LPIPS, PerceptualNetwork
from lightning_t2i.options import EMAOptions, GroupOptions, MethodOptions
from lightning_t2i.pairs import noise
from lightning_t2i.processes import DDPM, EDM, RectifiedFlow, guided, sample
from lightning_t2i.processes.schedulers import to_scheduler
from lightning_t2i.proof.runs import MESHES
from lightning_t2i.protocols import Exports, Generates

FORMS = ("dmd", "dmd_eq8", "sigma_over_alpha", "sigma3_over_alpha", "none")
DIM = 192

# ---- closed forms ----------------------------------------------------------------------------------------------------


class Exact(Predictor):
    """The exact denoiser of Gaussian data, with a shift and a gain that make it inexact."""

    def __init__(self, data: Gaussian, process, shift: float = 0.0, gain: float = 1.0):
        super().__init__(process, "x0")
        self.data, self.gain = data, gain
        self.shift = nn.Parameter(torch.tensor(shift, dtype=torch.float64))

    def predict(self, x_t, t, cond=None):
        estimate = self.data.x0(self.process, x_t, torch.as_tensor(t).expand(len(x_t)))
        return self.gain * estimate + self.shift.to(estimate.dtype)


def world(real: Predictor, fake: Predictor, shape=(DIM, 1, 1), **options) -> DMD:
    """DMD with these denoisers in place of networks."""
    method = DMD("none", guidance=1.0, **options)
    method.process, method.shape, method.classes = real.process, shape, 0
    method.add_frozen("teacher", real, "closed form")
    method.add_group("fake", fake, GroupOptions())
    return method


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def levels(process, low: int, high: int) -> torch.Tensor:
    """The times of DMD's indices low ... high."""
    index = torch.arange(low, high + 1)
    return process.grid(index / 999) if isinstance(process, EDM) else index


@pytest.mark.parametrize("form", FORMS)
def test_P2_the_gradient_of_the_matching_loss_is_g(form) -> None:
    x, real, fake = (numbers(4, 3, 8, 8, seed=s) for s in range(3))
    alpha, sigma = DDPM().alpha_sigma(torch.tensor([20, 400, 700, 980]), torch.float64)
    estimates = [e.requires_grad_() for e in (real, fake)]
    g = matching_gradient(x, real.detach(), fake.detach(), alpha, sigma, form)
    x.requires_grad_()
    loss = matching_loss(x, g)
    loss.backward()
    torch.testing.assert_close(x.grad * x.numel(), g, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss, 0.5 * g.square().mean(), rtol=1e-12, atol=0)
    assert all(e.grad is None for e in estimates)
    # The forms written out, per sample.
    w, difference = (x.detach() - real).abs().mean((1, 2, 3)), (fake - real).detach()
    written = {
        "dmd": 1 / w,
        "dmd_eq8": alpha / w,
        "sigma_over_alpha": alpha / sigma,
        "sigma3_over_alpha": alpha * sigma,
        "none": torch.ones(4).double(),
    }[form]
    torch.testing.assert_close(g, written.view(-1, 1, 1, 1) * difference)
    if form.startswith("sigma"):  # alpha (s_fake - s_real) with the papers' weights sigma / alpha and sigma^3 / alpha
        score = alpha * (alpha / sigma**2)  # of a difference of estimates
        power = {"sigma_over_alpha": 1, "sigma3_over_alpha": 3}[form]
        torch.testing.assert_close(written, score * sigma**power / alpha)


@pytest.mark.parametrize("c", [1e-3, 7.0])
def test_P3_g_does_not_depend_on_the_scale(c) -> None:
    x, real, fake = (numbers(4, 3, 8, 8, seed=s) for s in range(3))
    alpha, sigma = EDM().alpha_sigma(torch.tensor([0.1, 1.0, 5.0, 70.0]), torch.float64)
    g = matching_gradient(x, real, fake, alpha, sigma, "dmd")
    torch.testing.assert_close(matching_gradient(c * x, c * real, c * fake, alpha, sigma, "dmd"), g)
    scaled = matching_gradient(c * x, c * real, c * fake, alpha, sigma, "none")
    torch.testing.assert_close(scaled, c * matching_gradient(x, real, fake, alpha, sigma, "none"))


def gaussian_gradient(mean: float, std: float, form: str = "dmd") -> tuple[torch.Tensor, torch.Tensor]:
    """(g, z) of x = mean + std z against data N(0.3, 0.5^2) with exact denoisers, on all times of the matching."""
    process, data, student = EDM(), Gaussian(0.3, 0.5), Gaussian(mean, std)
    t = levels(process, 20, 980).repeat(8)
    z, eps = numbers(len(t), DIM), numbers(len(t), DIM, seed=1)
    x = student.draw(z)
    x_t = process.add_noise(x, eps, t)
    real, fake = (d.x0(process, x_t, t) for d in (data, student))
    return matching_gradient(x, real, fake, *process.alpha_sigma(t, torch.float64), form), z


def test_P4_g_on_a_gaussian() -> None:
    assert not gaussian_gradient(0.3, 0.5)[0].any()
    g, z = gaussian_gradient(-0.2, 0.5)
    assert float(g.mean()) == pytest.approx(-0.658, rel=0.02)
    assert abs(float((g * z).mean())) < 0.01
    size = g.abs().mean(1)  # its ends are those of a sample of 7,688
    assert float(size.min()) == pytest.approx(0.008, abs=0.002)
    assert float(size.max()) == pytest.approx(1.005, rel=0.05)
    assert float(size.median()) == pytest.approx(0.82, rel=0.02)
    unweighted = gaussian_gradient(-0.2, 0.5, "none")[0].abs().mean(1)
    assert float(unweighted.min()) < 0.001 and float(unweighted.max()) == pytest.approx(0.5, rel=0.02)
    for std, slope in ((0.1, -0.137), (1.0, 0.176)):  # too narrow: it widens; too wide: it narrows
        g, z = gaussian_gradient(0.3, std)
        assert float((g * z).mean()) == pytest.approx(slope, rel=0.02)
        assert abs(float(g.mean())) < 0.01


@pytest.mark.parametrize("process", [EDM(), DDPM()], ids=lambda p: p.name)
def test_P5_the_fake_loss_is_least_at_the_exact_denoiser(process) -> None:
    data, t = Gaussian(0.3, 0.5), levels(process, 0, 999).repeat(20)
    x, eps = data.draw(numbers(len(t), 8)), numbers(len(t), 8, seed=1)

    def loss(**errors: float) -> float:
        network = Exact(data, process, **errors)
        x_t = process.add_noise(x, eps, t)
        return float(denoising_loss(network, network(x_t, t), x_t, x, eps, t).detach())

    exact = loss()
    assert all(loss(**e) > exact for e in ({"shift": 0.02}, {"shift": -0.02}, {"gain": 1.03}, {"gain": 0.97}))
    if isinstance(process, EDM):  # weight x posterior variance is 1 where the data have the assumed deviation
        assert exact == pytest.approx(1.0, rel=0.01)
    else:  # posterior variance of eps
        alpha, _ = process.alpha_sigma(t, torch.float64)
        assert exact == pytest.approx(float((alpha**2 * 0.25 / data.variance(process, t)).mean()), rel=0.01)


def test_P5_edms_weight_is_that_of_its_preconditioned_network() -> None:
    s, d = levels(EDM(), 0, 999), 0.5
    torch.testing.assert_close(s**-2 + d**-2, (s**2 + d**2) / (s * d) ** 2)

    class Preconditioned(Predictor):
        def predict(self, x_t, t, cond=None):
            return torch.sin(x_t / 80)

    network = Preconditioned(EDM(), "edm")
    x, eps = numbers(1000, 8), numbers(1000, 8, seed=1)
    x_t = network.process.add_noise(x, eps, s)
    prediction = network.predict(x_t, s)
    plain = (prediction - network.target(x, eps, s)).square().mean()
    torch.testing.assert_close(denoising_loss(network, prediction, x_t, x, eps, s), plain)


def test_P6_pairs_of_a_gaussian_teacher_are_on_its_trajectories() -> None:
    mean, v, z = 0.3, 0.25, torch.linspace(-1.36, 1.36, 41).double().view(-1, 1, 1, 1)
    expected = mean + (v / (v + 80**2)) ** 0.5 * (80 * z - mean)

    def pairs(steps: int) -> torch.Tensor:
        teacher = Teacher("none", steps=steps, solver="heun")
        teacher.add_frozen("denoiser", Exact(Gaussian(mean, v**0.5), EDM()), "closed form")
        return teacher.couple(z, None)

    def error(steps: int) -> float:
        return float((pairs(steps) - expected).abs().max())

    # The error is linear in z: these are its largest values for |z| up to 1.36.
    assert error(18) == pytest.approx(0.037, rel=0.05)
    assert error(256) == pytest.approx(1.4e-4, rel=0.05)
    assert 3.4 < error(64) / error(128) < 4.6  # second order
    assert torch.equal(pairs(18), pairs(18))


@pytest.mark.parametrize("process", [EDM(), DDPM()], ids=lambda p: p.name)
def test_P7_ranges_of_the_times(process) -> None:
    method, places = world(Exact(Gaussian(), process), Exact(Gaussian(), process)), torch.arange(40_000)
    for low, high, shares in ((20, 980, (method.t_min, method.t_max)), (0, 999, ())):
        t = method.times(*shares)(process, Keys(0), places).double()
        torch.testing.assert_close(t.unique(), levels(process, low, high).double(), rtol=1e-6, atol=0)
    if isinstance(process, EDM):
        grid = levels(process, 0, 999)
        assert float(grid[0]) == pytest.approx(0.002) and float(grid[-1]) == pytest.approx(80)
        assert bool((grid.diff() > 0).all())
        assert [float(grid[i]) for i in (20, 500, 980)] == pytest.approx([0.003232, 2.5265, 72.054], rel=1e-3)


def test_P8_g_does_not_depend_on_how_a_denoiser_is_expressed() -> None:
    x, places = numbers(256, 4, 4, 4).float(), torch.arange(256)

    def g(express) -> torch.Tensor:
        real, fake = (express(Exact(Gaussian(mean, 0.5), DDPM())) for mean in (0.3, -0.2))
        return world(real, fake, (4, 4, 4)).matching(x, None, places)

    plain = g(lambda network: network)
    assert float(plain.abs().mean()) > 0.3 and plain.dtype == torch.float32
    for prediction in ("eps", "v"):
        torch.testing.assert_close(g(lambda n, p=prediction: Reexpressed(n, p)), plain, atol=1e-4, rtol=1e-4)
    # An EDM denoiser of the same data, seen as a variance preserving one.
    edm = [Reexpressed(Exact(Gaussian(mean, 0.5), EDM(1e-4, 1e4)), "x0", DDPM()) for mean in (0.3, -0.2)]
    torch.testing.assert_close(world(*edm, (4, 4, 4)).matching(x, None, places), plain, atol=1e-4, rtol=1e-4)


def test_P10_a_zero_denominator_gives_a_finite_g_and_is_counted() -> None:
    x, fake = numbers(4, 3, 8, 8), numbers(4, 3, 8, 8, seed=1)
    real = x.clone()
    real[2:] += 1
    one = torch.ones(4).double()
    g = matching_gradient(x, real, fake, one, one, "dmd")
    assert bool(g.isfinite().all()) and int((residual(x, real) < SMALLEST).sum()) == 2
    torch.testing.assert_close(g[:2], (fake - real)[:2] / SMALLEST)
    assert not matching_gradient(x, x, x, one, one, "dmd").any()  # 0 / 0
    constant = Gaussian(0.3, 0.0)  # its denoiser answers 0.3 to everything
    method = world(Exact(constant, EDM()), Exact(constant, EDM(), shift=1.0))
    method.matching(torch.full((4, DIM, 1, 1), 0.3), None, torch.arange(4))
    assert int(*method._scalars["student/clamped"]) == 4


# ---- tiny networks ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd_pairs(tmp_path_factory, sd, prompts) -> str:
    return make_pairs(sd, prompts, tmp_path_factory.mktemp("sd-pairs") / "pairs", guidance=3.0)


@pytest.fixture(scope="module")
def edm_pairs(tmp_path_factory, edm, prompts) -> str:
    return make_pairs(edm, prompts, tmp_path_factory.mktemp("edm-pairs") / "pairs", solver="heun")


def data(prompts: str, pairs: str | None, source: str, size: int = 4, pair_size: int = 4) -> Streams:
    stream = Pairs(pairs, source, batch_size=pair_size) if pairs else None
    return Streams(main=Prompts(prompts, batch_size=size), pairs=stream, val=Prompts(prompts, batch_size=8, limit=8))


def method_of(source: str, **options) -> DMD:
    return DMD(source, **{"student": update(), "fake": update(), "val_steps": 2, **options})


def trained(folder: Path, method: DMD, streams: Streams, steps: int = 2, **options) -> DMD:
    fit(folder, method, steps, streams, **{"limit_val_batches": 0, **options})
    return method


# ---- the update ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd", "edm"])
def test_P1_without_guidance_nothing_is_to_be_matched_at_first(request, kind) -> None:
    source = request.getfixturevalue(kind)
    for guidance in (1.0, 3.0):
        method = method_of(source, guidance=guidance)
        method.configure_model()
        records = Records.of_prompts(["red square", "two"])
        z, cond, places = method.inputs(records)
        x = method.student.generate(z, cond)
        g = method.matching(x.detach(), cond, places)
        if guidance == 1:
            assert not g.any() and float(matching_loss(x.detach(), g)) == 0
        else:
            assert float(g.abs().mean()) > 1e-3
        assert all(p.grad is None for p in (*method.teacher.parameters(), *method.fake.parameters()))


def written_out(method: DMD, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """Algorithm 1 with torch alone, on copies of the method's networks; the weights it ends with."""
    student, fake = copy.deepcopy(method.student), copy.deepcopy(method.fake)
    optimizers = [torch.optim.AdamW(network.parameters(), lr=LR) for network in (student, fake)]
    process = method.process
    for step, batch in enumerate(batches):
        keys, main, pairs = Keys(0, step), batch["main"], batch["pairs"]
        z, n = keys.normal("z", main.position, (4, 8, 8)), len(main)
        cond = method.text(main.caption)
        x = student.generate(z, cond)
        with torch.no_grad():
            t = (20 + (keys.uniform("matching_t", main.position, dtype=torch.float64) * 961)).floor().long()
            x_t = process.add_noise(x, keys.normal("matching_eps", main.position, (4, 8, 8)), t)
            real = guided(method.teacher.x0, x_t, t, cond, 3.0)
            g = (fake.x0(x_t, t, cond) - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)
        z_ref, c_ref = noise(pairs.noise_seed, (4, 8, 8)), method.text(pairs.caption)
        x_ref = student.generate(z_ref, c_ref)
        loss = (x * g).sum() / g.numel() + 0.25 * (x_ref - pairs.latent).square().mean()
        losses = [loss]
        t = (keys.uniform("fake_t", main.position, dtype=torch.float64) * 1000).floor().long()
        eps = keys.normal("fake_eps", main.position, (4, 8, 8))
        losses.append((fake.eps(process.add_noise(x.detach(), eps, t), t, cond) - eps).square().mean())
        for network, optimizer, value in zip((student, fake), optimizers, losses, strict=True):
            gradients = torch.autograd.grad(value, list(network.parameters()), allow_unused=True)
            for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                parameter.grad = gradient
            torch.nn.utils.clip_grad_norm_(network.parameters(), 10.0)
            optimizer.step()
        assert n == len(x)
    return {
        f"{name}.{key}": p.detach()
        for name, network in (("student", student), ("fake", fake))
        for key, p in network.named_parameters()
    }


def test_the_update_is_algorithm_1(tmp_path, sd, sd_pairs, prompts) -> None:
    streams = data(prompts, sd_pairs, sd)
    method = method_of(sd)
    method.configure_model()
    before = states(method)
    streams.prepare_data()
    streams.setup("fit")
    batches = [{name: s.load(range(4 * k, 4 * k + 4), k) for name, s in streams.training.items()} for k in range(3)]
    expected = written_out(method, batches)
    found = states(trained(tmp_path, method, data(prompts, sd_pairs, sd), 3))
    same(found, expected, rtol=1e-4, atol=2e-5)
    assert all(float((found[n] - before[n]).abs().max()) > 1e-3 for n in found if n.endswith("conv_in.weight"))


def test_the_teacher_stays_as_it_was_and_out_of_the_checkpoint(tmp_path, sd, sd_pairs, prompts) -> None:
    method = method_of(sd)
    method.configure_model()
    before = {name: weights_hash(getattr(method, name)) for name in ("teacher", "text", "codec")}
    trained(tmp_path, method, data(prompts, sd_pairs, sd))
    assert {name: weights_hash(getattr(method, name)) for name in before} == before
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    assert {name.split(".")[0] for name in method.state_dict()} == {"student", "fake"}
    assert method.frozen_identities.keys() == before.keys()
    method.teacher.backbone.conv_in.weight.requires_grad_(True)
    with pytest.raises(AssertionError, match="frozen"):
        method.on_fit_start()


@pytest.mark.parametrize("match_pairs", [True, False])
def test_P13_pairs_are_matched_where_they_are_to_be(tmp_path, sd, sd_pairs, prompts, match_pairs) -> None:
    seen: dict[str, list] = {"generate": [], "matching": [], "fake_loss": []}
    method = method_of(sd, match_pairs=match_pairs)
    method.configure_model()

    def watch(owner, name):
        inner = getattr(owner, name)

        def watched(x, cond, *more):
            seen[name].append((len(x), len(cond), *(len(m) for m in more if m is not None)))
            return inner(x, cond, *more)

        setattr(owner, name, watched)

    watch(method.student, "generate")
    watch(method, "matching")
    watch(method, "fake_loss")
    trained(tmp_path, method, data(prompts, sd_pairs, sd, size=4, pair_size=2), 1)
    rows = 6 if match_pairs else 4
    assert seen == {"generate": [(6, 6)], "matching": [(rows,) * 3], "fake_loss": [(rows,) * 3]}


def test_numbers_may_change_on_the_way(tmp_path, sd, sd_pairs, prompts) -> None:
    def losses(**options) -> list[tuple[str, float]]:
        method = method_of(sd, **options)
        found = heard(method)
        trained(tmp_path, method, data(prompts, sd_pairs, sd))
        return found

    usual = losses()
    for options in ({"t_max": {0: 0.98, 1: 0.1}}, {"regression_weight": {0: 0.25, 1: 1.0}}):
        changed = losses(**options)
        assert changed[:2] == usual[:2] and changed[2] != usual[2]


def test_P14_without_regression_no_pairs_are_needed(tmp_path, sd, sd_pairs, prompts) -> None:
    with_pairs = trained(tmp_path, method_of(sd, regression_weight=0.0), data(prompts, sd_pairs, sd))
    method = method_of(sd, regression_weight=0.0)
    notes = noted(method)
    without = trained(tmp_path, method, data(prompts, None, sd))
    same(states(with_pairs), states(without))
    assert "student/gap" in notes and "student/regression" not in notes


def test_P14_without_matching_it_is_plain_regression(tmp_path, sd, sd_pairs, prompts) -> None:
    method = method_of(sd, matching_weight=0.0, regression_weight=0.5)
    method.configure_model()
    assert list(method.groups) == ["student"]
    student = copy.deepcopy(method.student)
    streams = data(prompts, sd_pairs, sd)
    streams.prepare_data()
    streams.setup("fit")
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR)
    expected = []
    for k in range(2):
        pairs = streams.training["pairs"].load(range(4 * k, 4 * k + 4), k)
        x = student.generate(noise(pairs.noise_seed, (4, 8, 8)), method.text(pairs.caption))
        optimizer.zero_grad()
        loss = 0.5 * (x - pairs.latent).square().mean()
        loss.backward()
        expected.append(("student", pytest.approx(float(loss.detach()), rel=1e-4)))
        torch.nn.utils.clip_grad_norm_(student.parameters(), 10.0)
        optimizer.step()
    losses = heard(method)
    with counting_units(method) as units:
        trained(tmp_path, method, data(prompts, sd_pairs, sd))
    assert losses == expected
    assert "teacher" not in units.per_step() and differences(method.forward_units(), units.per_step()) == {}
    same(states(method), {f"student.{name}": p for name, p in student.named_parameters()}, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("classes", [10, 0])
def test_pixel_teachers_with_and_without_classes_train(tmp_path, edm, edm_pairs, prompts, classes) -> None:
    source, pairs = edm, edm_pairs
    if not classes:
        source = edm_folder(tmp_path / "edm", 0)
        pairs = make_pairs(source, prompts, tmp_path / "pairs", solver="heun")
    method = method_of(source, guidance=1.0)
    method.configure_model()
    before = states(method)
    losses = heard(method)
    trained(tmp_path, method, data(prompts, pairs, source), 2)
    assert [name for name, _ in losses] == ["student", "fake"] * 2
    assert all(
        float((tensor - before[name]).abs().max()) > 0 for name, tensor in states(method).items() if "conv" in name
    )
    assert all(m.p == 0 for m in method.student.modules() if isinstance(m, nn.Dropout))
    assert method.student.backbone.augment_embedding is None
    records = Records.of_prompts(["", "", ""])
    cond = method.condition(records)
    if classes:
        assert cond.label.tolist() == [0, 1, 2]  # in turn
        drawn = method.inputs(Records.of_prompts([""] * 2000))[1].label
        assert torch.bincount(drawn, minlength=10).min() > 150  # uniform, whatever the records say
        assert not torch.equal(drawn[:100], method.keys.at(7).integers("label", torch.arange(100), 0, 10))
    else:
        assert cond is None
    assert method.sample(cond, Keys(0), records.position).shape == (3, 3, 8, 8)


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def metrics(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("metrics")
    torch.manual_seed(3)
    PerceptualNetwork().save_pretrained(folder / "perceptual")
    save_file(LPIPS("vgg16").state_dict(), str(folder / "lpips.safetensors"))
    return {"perceptual": str(folder / "perceptual"), "lpips": str(folder / "lpips.safetensors")}


@pytest.fixture(scope="module")
def first_losses(tmp_path_factory, sd, sd_pairs, prompts):
    """`first_losses(options)`: the losses of two training steps."""

    def losses(**options) -> list[tuple[str, float]]:
        method = method_of(sd, **options)
        found = heard(method)
        trained(tmp_path_factory.mktemp("run"), method, data(prompts, sd_pairs, sd))
        return found

    return losses


@pytest.fixture(scope="module")
def usual(first_losses) -> list[tuple[str, float]]:
    return first_losses()


@pytest.mark.parametrize(
    "options",
    [
        {"matching_weight": 0.5},
        {"regression_weight": 0.5},
        *({"dm_weight": form} for form in FORMS[1:]),
        {"t_min": 0.5},
        {"t_max": 0.5},
        {"match_pairs": True},
        {"student_t": 500.0},
        {"student": update(every=2)},
        {"student": update(clip=1e-3)},
        {"fake": update(clip=1e-3)},
        {"common": MethodOptions(seed=1)},
    ],
    ids="-".join,
)
def test_every_option_changes_the_training(first_losses, usual, options) -> None:
    assert first_losses(**options) != usual


def test_guidance_changes_the_training(first_losses) -> None:
    at_3, at_1 = (first_losses(guidance=g, regression_weight=0.0) for g in (3.0, 1.5))
    assert at_3 != at_1


def test_every_metric_of_the_regression(tmp_path, sd, sd_pairs, prompts, metrics) -> None:
    values = {}
    for metric in ("l2", "perceptual", "lpips"):
        method = method_of(sd, regression_metric=metric, metric_weights=metrics.get(metric))
        method.configure_model()
        streams = data(prompts, sd_pairs, sd)
        streams.prepare_data()
        streams.setup("fit")
        pairs = streams.training["pairs"].load(range(4), 0)
        x = pairs.latent.clone().requires_grad_()
        assert float(method.regression(x, pairs).detach()) == pytest.approx(0, abs=1e-6)
        z, cond, _ = method.inputs(pairs)
        x = method.student.generate(z, cond).detach().requires_grad_()
        loss = method.regression(x, pairs)
        loss.backward()
        values[metric] = float(loss.detach())
        assert float(x.grad.abs().sum()) > 0 and all(p.grad is None for p in method.codec.parameters())
        if metric != "l2":  # decoded pictures, not clamped
            pictures = method.codec.decode(x.detach()), method.codec.decode(pairs.latent)
            assert values[metric] == pytest.approx(float(method.metric(*pictures).mean()), rel=1e-5)
            assert method.frozen_identities["metric"].startswith("sha256:")
    assert len(set(values.values())) == 3


@pytest.mark.parametrize("t", [1000.0, 0.0, -5.0])
def test_times_that_a_student_cannot_have_are_refused(sd, t) -> None:
    with pytest.raises(UserError, match="Not a student's time"):
        method_of(sd, student_t=t).configure_model()


@pytest.mark.parametrize("options", [{"every": 2}, {"start": 3}])
def test_a_network_that_learns_in_every_step_may_not_rest(sd, options) -> None:
    with pytest.raises(UserError, match="in every training step"):
        method_of(sd, fake=update(**options)).configure_model()


def test_lpips_of_small_pictures_is_resized(edm, metrics) -> None:
    method = method_of(edm, guidance=1.0, regression_metric="lpips", metric_weights=metrics["lpips"])
    method.configure_model()
    assert method.metric.resize == 224
    assert isinstance(method.metric.features[4], nn.AvgPool2d)


def test_gradient_checkpointing_is_refused_where_a_network_has_none(edm) -> None:
    with pytest.raises(UserError, match="cannot recompute activations"):
        method_of(edm, guidance=1.0, gradient_checkpointing=True).configure_model()


def test_gradient_checkpointing_and_revision_are_passed_on(sd, monkeypatch) -> None:
    method = method_of(sd, gradient_checkpointing=True)
    method.configure_model()
    assert method.student.backbone.is_gradient_checkpointing and method.fake.backbone.is_gradient_checkpointing
    assert not method.teacher.backbone.is_gradient_checkpointing
    asked = []
    load = Denoiser.from_pretrained
    monkeypatch.setattr(
        Denoiser, "from_pretrained", lambda path, revision=None: asked.append(revision) or load(path, revision=revision)
    )
    method_of(sd, revision="abc").configure_model()
    assert asked == ["abc"]


def test_the_papers_values_are_the_defaults() -> None:
    method = DMD("x")
    assert (method.guidance, method.regression_weight, method.t_min, method.t_max) == (3.0, 0.25, 0.02, 0.98)
    parameter = nn.Parameter(torch.zeros(1))
    for options in method.options.values():
        optimizer = options.optimizer([parameter])
        settings = optimizer.param_groups[0]
        assert (settings["lr"], settings["betas"], settings["weight_decay"]) == (1e-5, (0.9, 0.999), 0.01)
        assert options.clip == 10 and options.every == 1 and options.ema is None
        assert options.schedule(optimizer).get_last_lr() == [pytest.approx(1e-5 / 500)]


# ---- cost, watching, results -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance": 1.0, "regression_weight": 0.0},
        {"match_pairs": True},
        {"regression_weight": 0.0},
        {"student": update(every=2)},
        {"student": update(every=2), "match_pairs": True},
        {"regression_metric": "perceptual"},
    ],
    ids="-".join,
)
def test_a_step_costs_what_it_says(tmp_path, sd, sd_pairs, prompts, metrics, options) -> None:
    method = method_of(sd, **options, metric_weights=metrics["perceptual"])
    method.configure_model()
    method.text(["red"])  # the empty caption is encoded once
    with counting_units(method) as units:
        trained(tmp_path, method, data(prompts, sd_pairs, sd, size=4, pair_size=2), 2)
    assert differences(method.forward_units(), units.per_step()) == {}
    if not options:  # 3 (B + B_ref) / B, a guided real estimate, and 1 + 3 of the fake
        assert {n: method.forward_units()[n] for n in ("student", "teacher", "fake")} == {
            "student": 4.5, "teacher": 2, "fake": 4,
        }  # fmt: skip


def test_signals_are_noted_and_validation_measures_the_distance_to_the_teacher(tmp_path, sd, sd_pairs, prompts) -> None:
    method = method_of(sd, common=MethodOptions(log_every=1))
    notes = noted(method)
    trainer = fit(tmp_path, method, 1, data(prompts, sd_pairs, sd), val_check_interval=1)
    names = {"gap", "w", "clamped", "regression", "brightness", "contrast", "loss"}
    assert notes.keys() == {f"student/{name}" for name in names} | {"fake/loss"}
    records = Prompts(prompts, batch_size=8, limit=8)
    records.setup()
    records.begin(0, "val", shuffle=False)
    main = records.load(range(8), 0)
    z, cond = Keys(0).fork("validation").normal("z", main.position, (4, 8, 8)), method.condition(main)
    with torch.no_grad():
        at_2, at_3 = (
            float((method.student.generate(z, cond) - sample(method.teacher, z, cond, steps, 3.0)).abs().mean())
            for steps in (2, 3)
        )
    assert at_2 != pytest.approx(at_3, rel=1e-3)
    assert float(trainer.callback_metrics["val/distance"]) == pytest.approx(at_2, rel=1e-5)
    other = method_of(sd, val_steps=3)
    trainer = fit(tmp_path, other, 1, data(prompts, sd_pairs, sd), val_check_interval=1)
    assert float(trainer.callback_metrics["val/distance"]) == pytest.approx(at_3, rel=1e-5)


def test_samples_are_those_of_the_averaged_student_in_one_step(tmp_path, sd, sd_pairs, prompts) -> None:
    method = method_of(sd, student=update(ema=EMAOptions(decay=0.9, warmup=False)))
    trained(tmp_path, method, data(prompts, sd_pairs, sd)).eval()
    assert isinstance(method, Generates) and isinstance(method, Exports)
    cond, places = method.condition(Records.of_prompts(["red square", "two"])), torch.arange(2)
    z = Keys(5).normal("z", places, (4, 8, 8))
    with torch.no_grad():
        expected = method.codec.decode(method.groups["student"].ema.generate(z, cond)).clamp(-1, 1)
        other = method.codec.decode(method.student.generate(z, cond)).clamp(-1, 1)
    found = method.sample(cond, Keys(5), places)
    assert torch.equal(found, expected) and not torch.equal(found, other)


def test_export_is_a_stock_pipeline_that_draws_our_pictures_in_one_step(tmp_path, sd, sd_pairs, prompts) -> None:
    from diffusers import DDIMScheduler, UNet2DConditionModel

    method = trained(tmp_path, method_of(sd), data(prompts, sd_pairs, sd)).eval()
    method.pipeline.text = None  # its word-level tokenizer is no stock one
    method.export(tmp_path / "out", [])
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "out/scheduler")
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [999]
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "out/unet", torch_dtype=torch.float32)
    z, cond = numbers(2, 4, 8, 8).float(), method.text(["red square", "two"])
    with torch.no_grad():
        theirs = scheduler.step(unet(z, 999, cond.embeds).sample, 999, z).prev_sample
        ours = method.student.generate(z, cond)
    torch.testing.assert_close(theirs, ours, atol=0.05, rtol=0.02)  # the weights are written in fp16


def test_export_of_an_edm_student_is_read_again(tmp_path, edm, edm_pairs, prompts) -> None:
    method = trained(tmp_path, method_of(edm, guidance=1.0), data(prompts, edm_pairs, edm)).eval()
    method.export(tmp_path / "out", [])
    again = DMD(str(tmp_path / "out"), guidance=1.0)
    again.configure_model()
    records = Records.of_prompts(["", ""])
    found = again.sample(again.condition(records), Keys(0), records.position)
    expected = method.sample(method.condition(records), Keys(0), records.position)
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)  # the weights are written in fp16


@pytest.mark.parametrize(
    ("config", "network", "parameters"),
    [
        ("cifar10_cond", "edm_cifar10", 55_735_299),
        ("imagenet64", "edm_imagenet64", 295_899_267),
        ("sd15_laion625", "sd15_unet", 859_520_964),
    ],
)
def test_paper_scale_networks_and_their_memory(repo, capsys, config, network, parameters) -> None:
    with torch.device("meta"):
        built = build_network(f"configs/networks/{network}.json")
    assert sum(p.numel() for p in built.parameters()) == parameters
    merged = merge([repo / f"configs/dmd/{config}.yaml"], []).config["model"]["init_args"]
    bf16 = merged["common"]["precision"] == "bf16"
    gigabytes = parameters * (2 * 4 * 4 + (2 if bf16 else 4)) / 1e9  # both trained: weights, gradient, two moments
    with capsys.disabled():
        print(f"\ndmd/{config}: {gigabytes:.1f} GB of weights, gradients and states on each device")
    assert gigabytes < 80
    if network == "sd15_unet":
        assert gigabytes == pytest.approx(29, rel=0.02)


# ---- processes and kills ---------------------------------------------------------------------------------------------


def on_ranks(rank: int, source: str, pairs: str, prompts: str, folder: str, replicate: int, shard: int) -> dict:
    options = {"guidance": 1.0} if "edm" in Path(source).name else {"match_pairs": True}
    # Plain steps: Adam's would enlarge the rounding of gradients near 0.
    plain = GroupOptions(lambda p: torch.optim.SGD(p, lr=0.01), clip=10.0)
    method = method_of(source, student=plain, fake=plain, **options, common=MethodOptions(accumulate=2))
    streams = data(prompts, pairs, source)
    fit(Path(folder), method, 2, streams, replicate=replicate, shard=shard, limit_val_batches=0)
    return states(method)


@pytest.fixture(scope="module")
def alone(request, tmp_path_factory, prompts) -> Callable[[str], dict]:
    """What one process trains of a kind of teacher."""

    @cache
    def of(kind: str) -> dict:
        source, pairs = request.getfixturevalue(kind), request.getfixturevalue(f"{kind}_pairs")
        return on_ranks(0, source, pairs, prompts, str(tmp_path_factory.mktemp("one")), 1, 1)

    return of


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "mesh"), [("sd", (2, 1)), ("sd", (1, 2)), ("edm", (1, 2))], ids=str)
def test_P12_one_and_two_processes_agree(request, tmp_path, prompts, ranks, alone, kind, mesh) -> None:
    source, pairs = request.getfixturevalue(kind), request.getfixturevalue(f"{kind}_pairs")
    one = alone(kind)
    before = method_of(source, guidance=1.0)
    before.configure_model()
    assert max(float((one[name] - tensor).abs().max()) for name, tensor in states(before).items()) > 1e-3
    for two in ranks(on_ranks, source, pairs, prompts, str(tmp_path / "two"), *mesh):
        same(two, one, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_P12_a_killed_run_ends_with_the_bits_of_a_whole_one(tmp_path, mesh) -> None:
    assert what_a_kill_changes(tmp_path, "dmd", mesh) == []


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matching_weight": -1.0}, "negative"),
        ({"regression_weight": -1.0}, "negative"),
        ({"matching_weight": 0.0, "regression_weight": 0.0}, "Nothing is left"),
        ({"matching_weight": 0.0, "match_pairs": True}, "Nothing is left"),
        ({"t_min": 0.5, "t_max": 0.5}, "range of times"),
        ({"t_max": 1.5}, "range of times"),
        ({"t_max": {0: 0.98, 10: 0.01}}, "range of times"),
        ({"t_max": {5: 0.98}}, "begins at training step 0"),
        ({"regression_weight": {0: 0.25, 10: -1.0}}, "negative"),
    ],
    ids=str,
)
def test_impossible_options_are_refused_at_once(options, message) -> None:
    with pytest.raises(UserError, match=message):
        DMD("none", **options)


def test_teachers_of_another_kind_are_refused(tmp_path, sd, edm) -> None:
    flow = str(pipeline_folder(tmp_path / "flow", scheduler=to_scheduler(RectifiedFlow(), "velocity")))
    with pytest.raises(UserError, match="no times and weights of this process"):
        method_of(flow).configure_model()
    with pytest.raises(UserError, match="cannot be guided"):
        method_of(edm_folder(tmp_path / "uncond", 0), guidance=2.0).configure_model()
    with pytest.raises(UserError, match="No such model folder"):
        method_of("no/such/folder").configure_model()
    with pytest.raises(UserError, match="metric has no weights"):
        method_of(sd, regression_metric="lpips").configure_model()
    for metric, message in (("perceptual", "no perceptual network"), ("lpips", "no LPIPS weights")):
        with pytest.raises(UserError, match=message):
            method_of(sd, regression_metric=metric, metric_weights=str(tmp_path / "none")).configure_model()


def refused(folder: Path, method: DMD, streams: Streams, message: str) -> None:
    with pytest.raises(UserError, match=message):
        trained(folder, method, streams, 1)
    assert method.counters.step == 0 and method.counters.batches == 0


def test_pairs_that_are_missing_or_foreign_are_refused_before_training(tmp_path, sd, sd_pairs, edm, prompts) -> None:
    refused(tmp_path, method_of(sd), data(prompts, None, sd), "needs the teacher's pairs")
    refused(
        tmp_path, method_of(sd, regression_weight=0.0, match_pairs=True), data(prompts, None, sd), "needs the teacher"
    )
    streams = Streams(main=Prompts(prompts), pairs=Prompts(prompts), val=Prompts(prompts))
    refused(tmp_path, method_of(sd), streams, "Prompts")
    refused(tmp_path, method_of(edm, guidance=1.0), data(prompts, sd_pairs, sd), "'x0' differs")
    scheduler = to_scheduler(DDPM(), "v")
    other = str(pipeline_folder(tmp_path / "v", scheduler=scheduler))  # another prediction
    refused(tmp_path, method_of(other), data(prompts, sd_pairs, sd), "'teacher' differs")


def test_pairs_of_another_guidance_are_refused_where_x_is_drawn_to_them(tmp_path, sd, sd_pairs, prompts) -> None:
    refused(tmp_path, method_of(sd, guidance=1.5), data(prompts, sd_pairs, sd), "another guidance")
    noise_alone = method_of(sd, guidance=1.5, regression_weight=0.0, match_pairs=True)
    assert trained(tmp_path, noise_alone, data(prompts, sd_pairs, sd), 1).counters.step == 1


def test_pairs_of_another_resolution_or_of_an_overridden_teacher_are_refused(tmp_path, sd, prompts) -> None:
    wide = make_pairs(sd, prompts, tmp_path / "wide", size=32)
    refused(tmp_path, method_of(sd), data(prompts, wide, sd), "'shape' differs")
    overridden = make_pairs(sd, prompts, tmp_path / "v", prediction="v")
    refused(tmp_path, method_of(sd), data(prompts, overridden, sd), "'prediction' differs")


def test_pairs_without_classes_are_refused_for_a_class_conditional_teacher(tmp_path, edm) -> None:
    plain = tmp_path / "plain.txt"
    plain.write_text("\n".join(["red", "blue"] * 8))
    method = method_of(edm, guidance=1.0)
    method.configure_model()
    records = Records.of_prompts(["red"])
    records.noise_seed = torch.tensor([3])
    with pytest.raises(UserError, match="need labels"):
        method.inputs(records)
