"""The three processes: schedules equal to diffusers', steps, time maps, minimal losses, configs."""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch
from closed_forms import PROCESSES, Gaussian, TwoModes, inner_times

from lightning_t2i.errors import UserError
from lightning_t2i.keys import Keys
from lightning_t2i.processes import DDPM, EDM, Process, RectifiedFlow
from lightning_t2i.processes.schedulers import from_scheduler, to_scheduler

SCHEDULES = [
    {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "rescale_betas_zero_snr": True},
    {"beta_schedule": "linear", "trained_betas": [0.1, 0.2, 0.3, 0.4], "num_train_timesteps": 4},
]


@pytest.mark.parametrize("options", SCHEDULES, ids=str)
def test_alphas_cumprod_equal_diffusers_to_the_last_bit(options):
    scheduler = diffusers.DDIMScheduler(**options)
    process = DDPM.from_scheduler(scheduler)
    assert torch.equal(process.alphas_cumprod, scheduler.alphas_cumprod)
    t = torch.arange(process.steps)
    alpha, sigma = process.alpha_sigma(t, torch.float64)
    torch.testing.assert_close(alpha**2, scheduler.alphas_cumprod.double(), rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(process.steps, dtype=torch.float64), rtol=0, atol=1e-15)
    again, _ = from_scheduler(to_scheduler(process, "v"))
    assert again == process and torch.equal(again.alphas_cumprod, process.alphas_cumprod)


def test_add_noise_equals_diffusers():
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    x0, eps, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 500, 999])
    torch.testing.assert_close(DDPM().add_noise(x0, eps, t), scheduler.add_noise(x0, eps, t))
    torch.testing.assert_close(
        RectifiedFlow().add_noise(x0, eps, torch.tensor([0.0, 0.25, 1.0]))[1], 0.75 * x0[1] + 0.25 * eps[1]
    )


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_clean_data_is_a_time(process):
    for t in (process.data_time, torch.tensor([process.data_time] * 2)):
        alpha, sigma = process.alpha_sigma(t)
        assert bool((alpha == 1).all()) and bool((sigma == 0).all())
        assert bool(process.log_snr(t).isposinf().all())
    x0 = torch.randn(2, 3)
    assert torch.equal(process.add_noise(x0, torch.randn(2, 3), process.data_time), x0)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_log_snr_and_its_inverse(process):
    t = inner_times(process)
    t = torch.cat([t, t[:-1] + 0.37 * (t[1:] - t[:-1])])  # fractional times too
    alpha, sigma = process.alpha_sigma(t, torch.float64)
    log_snr = process.log_snr(t, torch.float64)
    torch.testing.assert_close(log_snr, torch.log(alpha**2 / sigma**2), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(process.time_of_log_snr(log_snr), t.double(), rtol=1e-9, atol=1e-9)


def test_fractional_ddpm_times_interpolate_log_snr():
    process = DDPM()
    a, b = process.log_snr(torch.tensor([10, 11]), torch.float64)
    assert torch.isclose(process.log_snr(10.25, torch.float64), 0.75 * a + 0.25 * b)
    assert torch.equal(process.alpha_sigma(10.0)[0], process.alpha_sigma(10)[0])
    ends = process.time_of_log_snr(torch.tensor([100.0, -100.0]))
    assert ends.tolist() == [0.0, 999.0]
    zero = DDPM(zero_terminal_snr=True)
    assert zero.time_of_log_snr(torch.tensor(-torch.inf)).item() == 999
    assert torch.equal(torch.stack(zero.alpha_sigma(999.0)), torch.tensor([0.0, 1.0]))


def test_known_grids():
    assert DDPM().timesteps(4).tolist() == [999, 749, 499, 249, -1]
    assert DDPM().timesteps(1).tolist() == [999, -1]
    torch.testing.assert_close(RectifiedFlow(3.0).timesteps(4), torch.tensor([1, 0.9, 0.75, 0.5, 0]).double())
    # DMD's grid of 1000 Karras levels (arXiv 2311.18828).
    grid = EDM().grid(torch.tensor([0, 20, 500, 980, 999]) / 999)
    torch.testing.assert_close(grid, torch.tensor([0.002, 0.0032316, 2.5265, 72.054, 80]).double(), rtol=1e-4, atol=0)
    straight = EDM(1.0, 5.0, rho=1.0).grid(torch.linspace(0, 1, 5, dtype=torch.float64))
    torch.testing.assert_close(straight, torch.tensor([1, 2, 3, 4, 5]).double())
    with pytest.raises(UserError, match="1 to 1000"):
        DDPM().timesteps(1001)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_a_step_keeps_the_marginal(process, eta):
    """Given the true x0, x_s has mean alpha_s x0 and variance sigma_s^2, whatever eta."""
    times = inner_times(process)
    for t, s in zip(times[1:], times[:-1], strict=True):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (
            process.alpha_sigma(t, torch.float64),
            process.alpha_sigma(s, torch.float64),
        )
        one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
        mean = process.step(alpha_t * one, t, s, one, eta, zero)
        torch.testing.assert_close(mean[0, 0], alpha_s, rtol=1e-12, atol=1e-12)
        from_x = process.step(sigma_t * one, t, s, zero, eta, zero)
        from_noise = process.step(zero, t, s, zero, eta, one)
        torch.testing.assert_close((from_x**2 + from_noise**2)[0, 0], sigma_s**2, rtol=1e-12, atol=1e-12)
        assert bool((from_noise > 0).all()) == (eta > 0)


def test_ancestral_variance_is_the_ddpm_posterior():
    """beta-tilde = (1 - abar_{t-1}) / (1 - abar_t) beta_t (arXiv 2006.11239, eq. 7)."""
    process = DDPM("linear", 1e-4, 0.02)
    abar = process.alphas_cumprod.double()
    t = 500
    wanted = (1 - abar[t - 1]) / (1 - abar[t]) * (1 - abar[t] / abar[t - 1])
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    torch.testing.assert_close(process.step(zero, t, t - 1, zero, 1.0, one)[0, 0] ** 2, wanted, rtol=1e-10, atol=0)
    with pytest.raises(ValueError, match="noise"):
        process.step(zero, t, t - 1, zero, eta=1.0)


@pytest.mark.parametrize("process", [EDM(), RectifiedFlow()], ids=repr)
def test_a_step_of_a_continuous_process_is_eulers(process):
    x, x0 = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    t, s = torch.tensor([0.9, 0.5]).double(), torch.tensor([0.6, 0.1]).double()
    slope = process.slope(x, t, x0)
    torch.testing.assert_close(process.step(x, t, s, x0), x + (s - t).view(2, 1) * slope, rtol=1e-12, atol=1e-12)
    if isinstance(process, RectifiedFlow):  # from data to noise
        eps = (x - (1 - t).view(2, 1) * x0) / t.view(2, 1)
        torch.testing.assert_close(slope, eps - x0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_the_minimal_denoising_loss_is_reached(process):
    """Gaussian: std^2 sigma^2 / var(x_t); two modes: by quadrature. Monte Carlo, four standard errors."""
    draws, keys, positions = 40_000, Keys(0), torch.arange(5)
    t = inner_times(process)
    z, eps = (keys.normal(name, positions, (draws,), torch.float64) for name in ("z", "eps"))
    sign = keys.integers("sign", positions, 0, 2, (draws,)).double() * 2 - 1
    _, sigma = process.alpha_sigma(t, torch.float64)
    gaussian, modes = Gaussian(), TwoModes()
    minimal = {
        "gaussian": gaussian.std**2 * sigma**2 / gaussian.variance(process, t),
        "modes": modes.minimal_loss(process, t),
    }
    for name, data, x0 in (("gaussian", gaussian, gaussian.draw(z)), ("modes", modes, modes.draw(z, sign))):
        x_t = process.add_noise(x0, eps, t)
        residual = data.x0(process, x_t, t) - x0

        def zero(values: torch.Tensor) -> bool:
            return bool((values.mean(1).abs() < 4 * values.std(1) / draws**0.5 + 1e-9).all())

        assert zero(residual**2 - minimal[name][:, None])
        # What is left of x0 is uncorrelated with every function of x_t: no other estimate can do better.
        for function in (torch.ones_like(x_t), x_t, x_t**3, torch.tanh(3 * x_t)):
            assert zero(residual * function)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_configs_and_copies_are_equal(process):
    again = Process.from_config(process.to_config())
    assert again == process and hash(again) == hash(process)
    assert copy.deepcopy(process) == process
    assert again != RectifiedFlow(shift=1.5)
    t = inner_times(process)
    assert torch.equal(torch.stack(again.alpha_sigma(t)), torch.stack(process.alpha_sigma(t)))


def test_mistakes_are_told():
    with pytest.raises(UserError, match="did you mean edm"):
        Process.from_config({"name": "edn"})
    with pytest.raises(UserError, match="did you mean scaled_linear"):
        DDPM("scaled-linear")
    with pytest.raises(UserError, match="No scheduler config"):
        from_scheduler("/nowhere")
    with pytest.raises(UserError, match="DDPM process"):
        DDPM.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(UserError, match="velocity on flow"):
        to_scheduler(RectifiedFlow(), "eps")
    with pytest.raises(UserError, match="Unknown scheduler"):
        from_scheduler({"_class_name": "VQDiffusionScheduler"})
    with pytest.raises(UserError, match="prediction_type"):
        from_scheduler({"beta_schedule": "linear", "prediction_type": "noise"})


@pytest.mark.parametrize("place", ["scheduler_config.json", "scheduler/scheduler_config.json"])
def test_scheduler_configs_are_found_in_folders(place, tmp_path):
    diffusers.PNDMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction").save_pretrained(
        (tmp_path / place).parent
    )
    process, prediction = from_scheduler(str(tmp_path))
    assert process == DDPM("scaled_linear", 0.0001, 0.02) and prediction == "v"


def test_other_schedulers():
    assert from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)) == (RectifiedFlow(3.0), "velocity")
    assert from_scheduler(diffusers.EDMEulerScheduler()) == (EDM(), "edm")
    assert from_scheduler(to_scheduler(RectifiedFlow(3.0), "velocity")) == (RectifiedFlow(3.0), "velocity")
    assert from_scheduler(to_scheduler(EDM(0.01, 50.0), "edm")) == (EDM(0.01, 50.0), "edm")


def test_a_process_made_in_a_meta_build_is_real():
    with torch.device("meta"):
        process = DDPM()
    assert process.alphas_cumprod.device.type == "cpu"
    assert torch.equal(process.alpha_sigma(torch.tensor([7]))[0], DDPM().alpha_sigma(torch.tensor([7]))[0])
