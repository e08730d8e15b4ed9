"""Samplers: closed forms on Gaussian data, orders of convergence, equality with diffusers' schedulers."""

from __future__ import annotations

import math

import diffusers
import pytest
import torch
from closed_forms import Gaussian, TwoModes
from tiny_networks import backbone, condition

from lightning_t2i.errors import UserError
from lightning_t2i.networks.denoiser import Denoiser
from lightning_t2i.processes import DDPM, EDM, RectifiedFlow, sample, solve
from lightning_t2i.processes.schedulers import to_scheduler

GAUSSIAN, MODES = Gaussian(), TwoModes()


def start(process, shape=(2, 50)) -> torch.Tensor:
    return process.initial(torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


def x0_of(data, process):
    return lambda x, t: data.x0(process, x, t)


@pytest.mark.parametrize("process", [DDPM(), EDM(), RectifiedFlow(2.0)], ids=repr)
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_ddim_on_a_gaussian_is_a_known_product(process, steps):
    """Steps scale x - alpha m by alpha_s k + sigma_s (1 - alpha_t k) / sigma_t with k = alpha_t std^2 / var(x_t)."""
    times, x = process.timesteps(steps), start(process)
    alpha, sigma = process.alpha_sigma(times, torch.float64)
    gain = alpha * GAUSSIAN.std**2 / GAUSSIAN.variance(process, times)
    factors = alpha[1:] * gain[:-1] + sigma[1:] * (1 - alpha[:-1] * gain[:-1]) / sigma[:-1]
    wanted = GAUSSIAN.mean + factors.prod() * (x - alpha[0] * GAUSSIAN.mean)
    torch.testing.assert_close(solve(x0_of(GAUSSIAN, process), process, x, times), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("process", "solver", "order"),
    [
        (EDM(), "euler", 1),
        (EDM(), "heun", 2),
        (EDM(), "dpmpp_2m", 2),
        (RectifiedFlow(), "euler", 1),
        (RectifiedFlow(), "heun", 2),
        (RectifiedFlow(), "dpmpp_2m", 2),
    ],
    ids=str,
)
def test_order_of_convergence_to_the_exact_flow(process, solver, order):
    """The exact flow of a Gaussian scales x - alpha m by the ratio of standard deviations of x_t."""
    first, last = (10.0, 0.05) if process.name == "edm" else (0.95, 0.05)
    times = torch.tensor([first, last], dtype=torch.float64)
    x = start(RectifiedFlow(), (1, 20)) * first
    a, b = process.alpha_sigma(times, torch.float64)[0]
    variance = GAUSSIAN.variance(process, times)
    wanted = b * GAUSSIAN.mean + (variance[1] / variance[0]).sqrt() * (x - a * GAUSSIAN.mean)
    errors = []
    for steps in (64, 128):
        fraction = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        grid = (last ** (1 / 7) + fraction * (first ** (1 / 7) - last ** (1 / 7))) ** 7
        errors.append((solve(x0_of(GAUSSIAN, process), process, x, grid, solver) - wanted).abs().max().item())
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.15
    assert errors[1] < {1: 0.02, 2: 0.0005}[order]


def test_heun_on_a_gaussian_is_a_known_product():
    """EDM's algorithm 1: factors 1 + h (p + p' (1 + h p)) / 2, slope p (x - m), p = sigma / (std^2 + sigma^2)."""
    process = EDM()
    times, x = process.timesteps(6), start(process)
    slope = times / (GAUSSIAN.std**2 + times**2)
    factor = torch.ones((), dtype=torch.float64)
    for i, h in enumerate(times[1:] - times[:-1]):
        euler = 1 + h * slope[i]
        factor = factor * (euler if times[i + 1] == 0 else 1 + h * (slope[i] + slope[i + 1] * euler) / 2)
    out = solve(x0_of(GAUSSIAN, process), process, x, times, "heun")
    torch.testing.assert_close(out, GAUSSIAN.mean + factor * (x - GAUSSIAN.mean), rtol=1e-9, atol=1e-9)


def test_calls_per_step():
    counts = {}
    for solver in ("euler", "heun", "dpmpp_2m"):
        calls = []

        def x0(x, t, calls=calls):
            calls.append(t[0].item())
            return MODES.x0(EDM(), x, t)

        solve(x0, EDM(), start(EDM()), EDM().timesteps(5), solver)
        counts[solver] = len(calls)
    assert counts == {"euler": 5, "heun": 9, "dpmpp_2m": 5}


@pytest.mark.parametrize("process", [DDPM(), EDM(), RectifiedFlow()], ids=repr)
def test_samples_of_two_modes_lie_at_the_modes(process):
    x = solve(x0_of(MODES, process), process, start(process, (1, 4000)), process.timesteps(100))
    assert abs(x.mean()) < 0.06 and abs((x > 0).double().mean() - 0.5) < 0.03
    assert abs(x.abs().mean() - MODES.mode) < 0.02 and abs((x.abs() - MODES.mode).std() - MODES.std) < 0.02


@pytest.mark.parametrize("process", [DDPM("linear", 1e-4, 0.02), EDM(), RectifiedFlow()], ids=repr)
def test_ancestral_sampling_draws_from_the_data(process):
    """eta = 1 with fresh noise gives samples with the mean and the spread of the data."""
    times, n = process.timesteps(200), 20_000
    generator = torch.Generator().manual_seed(1)
    noise = [torch.randn(1, n, generator=generator, dtype=torch.float64) for _ in range(200)]
    x = solve(x0_of(GAUSSIAN, process), process, start(process, (1, n)), times, eta=1.0, noise=lambda i: noise[i])
    assert abs(x.mean() - GAUSSIAN.mean) < 0.02 and abs(x.std() - GAUSSIAN.std) < 0.02


@pytest.mark.parametrize("steps", [1, 4, 25, 50])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddim_equals_diffusers(steps, prediction):
    kind = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}[prediction]
    process = DDPM()
    scheduler = to_scheduler(process, kind)
    assert scheduler.config.prediction_type == prediction
    scheduler.set_timesteps(steps)
    x = ours = start(process)
    for t in scheduler.timesteps:
        alpha, sigma = process.alpha_sigma(t, torch.float64)
        x0 = MODES.x0(process, x, t)
        eps = (x - alpha * x0) / sigma
        output = {"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[kind]
        x = scheduler.step(output, t, x).prev_sample
    ours = solve(x0_of(MODES, process), process, ours, process.timesteps(steps))
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-5)  # diffusers' coefficients are float32


def test_ancestral_ddim_equals_diffusers():
    process, scheduler = DDPM(), to_scheduler(DDPM(), "eps")
    scheduler.set_timesteps(20)
    noise = torch.randn(20, 2, 50, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = start(process)
    for i, t in enumerate(scheduler.timesteps):
        alpha, sigma = process.alpha_sigma(t, torch.float64)
        eps = (x - alpha * MODES.x0(process, x, t)) / sigma
        x = scheduler.step(eps, t, x, eta=0.7, variance_noise=noise[i]).prev_sample
    ours = solve(
        x0_of(MODES, process), process, start(process), process.timesteps(20), eta=0.7, noise=lambda i: noise[i]
    )
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_euler_equals_diffusers(shift):
    process = RectifiedFlow(shift)
    scheduler = to_scheduler(process, "velocity")
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 10, 10).tolist())
    x = start(process)
    for t in scheduler.timesteps:
        x0 = MODES.x0(process, x, t / 1000)
        x = scheduler.step((x - x0) / (t / 1000), t, x).prev_sample.double()
    ours = solve(x0_of(MODES, process), process, start(process), process.timesteps(10), "euler")
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


def test_edm_euler_equals_diffusers():
    process = EDM()
    scheduler = to_scheduler(process, "edm")
    scheduler.set_timesteps(12)
    torch.testing.assert_close(scheduler.sigmas.double(), process.timesteps(12), rtol=1e-5, atol=1e-6)
    x = start(process)
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        scheduler.scale_model_input(x, t)
        variance = sigma**2 + 0.25
        x0 = MODES.x0(process, x, sigma.double())
        raw = (x0 - 0.25 / variance * x) / (sigma * 0.5 / variance.sqrt())
        x = scheduler.step(raw, t, x).prev_sample
    ours = solve(x0_of(MODES, process), process, start(process), process.timesteps(12), "euler")
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers
@pytest.mark.parametrize("steps", [1, 4, 10, 25, 50])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_dpmpp_2m_equals_diffusers(steps, prediction):
    process = DDPM()
    scheduler = to_scheduler(process, prediction, solver="dpmpp_2m")
    assert isinstance(scheduler, diffusers.DPMSolverMultistepScheduler)
    scheduler.set_timesteps(steps)
    assert torch.equal(scheduler.timesteps, process.timesteps(steps)[:-1])
    x = start(process)
    for t in scheduler.timesteps:
        alpha, sigma = process.alpha_sigma(t, torch.float64)
        x0 = MODES.x0(process, x, t)
        eps = (x - alpha * x0) / sigma
        x = scheduler.step({"eps": eps, "x0": x0, "v": alpha * eps - sigma * x0}[prediction], t, x).prev_sample
    ours = solve(x0_of(MODES, process), process, start(process), process.timesteps(steps), "dpmpp_2m")
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=2e-5)


def test_schedulers_that_would_sample_otherwise_are_not_given():
    for process in (DDPM(clip=1.0), DDPM(zero_terminal_snr=True)):
        assert isinstance(to_scheduler(process, "v", solver="dpmpp_2m"), diffusers.DDIMScheduler)
    flow = to_scheduler(RectifiedFlow(), "velocity", solver="dpmpp_2m")
    assert isinstance(flow, diffusers.FlowMatchEulerDiscreteScheduler)


def test_guided_sampling_of_a_network_equals_diffusers():
    denoiser = Denoiser(backbone("unet_text"), DDPM(), "eps")
    z, cond = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), condition()
    scheduler = to_scheduler(DDPM(), "eps")
    scheduler.set_timesteps(5)
    x = z
    with torch.no_grad():
        for t in scheduler.timesteps:
            c, u = (denoiser.predict(x, t, k) for k in (cond, cond.null()))
            x = scheduler.step(u + 3 * (c - u), t, x).prev_sample
    torch.testing.assert_close(sample(denoiser, z, cond, steps=5, scale=3.0), x, rtol=1e-3, atol=1e-3)


def test_one_sampling_step_is_one_step_generation():
    denoiser = Denoiser(backbone("unet_text"), DDPM(), "eps")
    z, cond = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), condition()
    with torch.no_grad():
        torch.testing.assert_close(sample(denoiser, z, cond, steps=1), denoiser.generate(z, cond))


def test_mistakes_are_told():
    process = DDPM()
    for options, match in (
        ({"solver": "huen"}, "did you mean heun"),
        ({"solver": "heun"}, "continuous"),
        ({"solver": "euler", "eta": 1.0}, "eta"),
    ):
        with pytest.raises(UserError, match=match):
            solve(x0_of(MODES, process), process, start(process), process.timesteps(2), **options)
