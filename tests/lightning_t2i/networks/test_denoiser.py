"""Denoiser over every kind of backbone: what the network is called with, conversions around it, features, loading."""

from __future__ import annotations

import math

import diffusers
import pytest
import torch
from tiny_networks import KINDS, backbone, condition, pipeline_folder

from lightning_t2i.batch import Cond
from lightning_t2i.errors import UserError
from lightning_t2i.networks.denoiser import Denoiser, Reexpressed
from lightning_t2i.processes import DDPM, EDM, RectifiedFlow, guided

PROCESS = {"sd3": RectifiedFlow(), "flux": RectifiedFlow()}


def build(kind: str) -> Denoiser:
    process = PROCESS.get(kind, DDPM())
    return Denoiser(backbone(kind), process, "velocity" if kind in PROCESS else "eps")


def times(process) -> torch.Tensor:
    return torch.tensor([100, 900]) if process.discrete else torch.tensor([0.1, 0.9])


def noisy(seed: int = 3) -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_predict_equals_the_backbone_called_by_hand(kind):
    denoiser, x, cond = build(kind), noisy(), condition()
    t = times(denoiser.process)
    net = denoiser.backbone
    with torch.no_grad():
        if kind == "unet":
            expected = net(x, t).sample
        elif kind == "unet_class":
            expected = net(x, t, class_labels=cond.label).sample
        elif kind == "unet_text":
            expected = net(x, t, encoder_hidden_states=cond.embeds).sample
        elif kind == "unet_xl":
            added = {"text_embeds": cond.pooled, "time_ids": torch.tensor([[64, 64, 0, 0, 64, 64]] * 2)}
            expected = net(x, t, encoder_hidden_states=cond.embeds, added_cond_kwargs=added).sample
        elif kind == "pixart":
            added = {"resolution": None, "aspect_ratio": None}
            expected = net(x, encoder_hidden_states=cond.embeds, timestep=t, added_cond_kwargs=added).sample[:, :4]
        elif kind == "sd3":
            expected = net(
                x, encoder_hidden_states=cond.embeds, pooled_projections=cond.pooled, timestep=1000 * t
            ).sample
        else:
            pack, unpack = diffusers.FluxPipeline._pack_latents, diffusers.FluxPipeline._unpack_latents
            ids = diffusers.FluxPipeline._prepare_latent_image_ids(2, 4, 4, "cpu", torch.float32)
            expected = net(
                pack(x, 2, 4, 8, 8),
                encoder_hidden_states=cond.embeds,
                pooled_projections=cond.pooled,
                timestep=t,
                img_ids=ids,
                txt_ids=torch.zeros(5, 3),
                guidance=cond.guidance,
            ).sample
            expected = unpack(expected, 64, 64, 8)
        torch.testing.assert_close(denoiser.predict(x, t, cond), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_condition_and_the_time_matter(kind):
    denoiser, x = build(kind), noisy()
    t = times(denoiser.process)
    with torch.no_grad():
        base = denoiser.predict(x, t, condition())
        assert not torch.allclose(base, denoiser.predict(x, t.flip(0), condition()), atol=1e-5)
        if kind != "unet":
            assert not torch.allclose(base, denoiser.predict(x, t, condition(seed=1)), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_all_predictions_describe_the_same_pair(kind):
    denoiser, x, cond = build(kind), noisy(), condition()
    t = times(denoiser.process)
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in denoiser.process.alpha_sigma(t))
    with torch.no_grad():
        x0, eps = denoiser.x0(x, t, cond), denoiser.eps(x, t, cond)
        close = {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(alpha * x0 + sigma * eps, x, **close)
        torch.testing.assert_close(denoiser.v(x, t, cond), alpha * eps - sigma * x0, **close)
        torch.testing.assert_close(denoiser.velocity(x, t, cond), eps - x0, **close)
        torch.testing.assert_close(denoiser.score(x, t, cond), -eps / sigma, **close)


@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_guidance_equals_two_calls(kind):
    denoiser, x, cond = build(kind), noisy(), condition()
    t = times(denoiser.process)
    with torch.no_grad():
        c, u = denoiser.x0(x, t, cond), denoiser.x0(x, t, cond.null())
        torch.testing.assert_close(guided(denoiser.x0, x, t, cond, 3.0), u + 3 * (c - u), rtol=1e-4, atol=1e-4)


def test_masked_text_positions_do_not_matter():
    denoiser, x, cond = build("pixart"), noisy(), condition()
    cond.mask = torch.tensor([[True, True, False, False, False]] * 2)
    t = times(denoiser.process)
    with torch.no_grad():
        base = denoiser.predict(x, t, cond)
        cond.embeds[:, 2:] += 1
        torch.testing.assert_close(denoiser.predict(x, t, cond), base)
        cond.embeds[:, :2] += 1
        assert not torch.allclose(denoiser.predict(x, t, cond), base, atol=1e-5)


def test_edm_preconditioning():
    """Equations of arXiv 2206.00364, table 1: with F = 0 the estimate is c_skip x; inputs have unit variance."""
    seen = {}

    class Zero(torch.nn.Module):
        def forward(self, x, t, cond):
            seen.update(x=x, t=t)
            return torch.zeros_like(x)

    denoiser = Denoiser(Zero(), EDM(), "edm", sigma_data=0.5)
    sigma = torch.tensor([0.5, 80.0])
    x = noisy()
    x0 = denoiser.x0(x, sigma)
    torch.testing.assert_close(x0[0], 0.5 * x[0])
    torch.testing.assert_close(x0[1], 0.25 / (6400 + 0.25) * x[1])
    torch.testing.assert_close(seen["x"], x / (sigma**2 + 0.25).sqrt().view(-1, 1, 1, 1))
    torch.testing.assert_close(seen["t"], sigma.log() / 4)
    assert seen["t"].dtype == torch.float32
    data, eps = noisy(1), noisy(2)
    target = denoiser.target(data, eps, sigma)
    x_t = denoiser.process.add_noise(data, eps, sigma)
    torch.testing.assert_close(denoiser.convert(target, x_t, sigma, "x0"), data, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("process", "prediction"),
    [(DDPM(), "eps"), (DDPM(), "v"), (DDPM(), "x0"), (RectifiedFlow(), "velocity"), (EDM(), "edm"), (EDM(), "x0")],
)
def test_a_perfect_prediction_gives_back_x0(process, prediction):
    """`target` and the conversions agree: a network that returns its target reports the true x0 and eps."""
    data, eps = noisy(1).double(), noisy(2).double()
    t = torch.tensor([3, 900]) if process.discrete else torch.tensor([0.2, 0.9], dtype=torch.float64)

    class Oracle(torch.nn.Module):
        def forward(self, x, t_, cond):
            return denoiser.target(data, eps, t)

    denoiser = Denoiser(Oracle(), process, prediction)
    x_t = process.add_noise(data, eps, t)
    torch.testing.assert_close(denoiser.x0(x_t, t), data, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(denoiser.eps(x_t, t), eps, rtol=1e-11, atol=1e-11)


def test_one_step_generation_is_the_estimate_at_the_last_time():
    denoiser, z, cond = build("unet_text"), noisy(), condition()
    with torch.no_grad():
        raw = denoiser.predict(z, 999, cond)
        alpha, sigma = denoiser.process.alpha_sigma(999)
        torch.testing.assert_close(denoiser.generate(z, cond), (z - sigma * raw) / alpha, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(denoiser.generate(z, cond, t=399), denoiser.x0(z, 399, cond))


def test_one_step_generation_of_edm_starts_at_sigma_max():
    denoiser = Denoiser(backbone("unet"), EDM(), "edm")
    with torch.no_grad():
        torch.testing.assert_close(denoiser.generate(noisy()), denoiser.x0(80 * noisy(), 80.0))


def test_features_are_inner_outputs_and_hooks_are_removed():
    denoiser, x, cond = build("unet_text"), noisy(), condition()
    with torch.no_grad():
        prediction, features = denoiser.features(x, 500, cond, ["mid_block", "down_blocks.0"])
        assert torch.equal(prediction, denoiser(x, 500, cond))
    assert features["mid_block"].shape == (2, 16, 4, 4) and features["down_blocks.0"].shape == (2, 8, 4, 4)
    assert not any(m._forward_hooks for m in denoiser.backbone.modules())
    grad = torch.autograd.grad(denoiser.features(x.requires_grad_(), 500, cond)[1]["mid_block"].sum(), x)[0]
    assert grad.abs().sum() > 0
    with pytest.raises(UserError, match="mid_block"):
        denoiser.features(x, 500, cond, ["middle_block"])


def test_conversions_stay_wide_and_times_exact_in_half_precision():
    seen = {}

    class Half(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones((), dtype=torch.bfloat16))

        def forward(self, x, t, cond):
            seen.update(x=x.dtype, t=t, embeds=cond.embeds.dtype)
            return x * self.weight

    denoiser = Denoiser(Half(), RectifiedFlow(), "velocity")
    out = denoiser.x0(noisy(), torch.tensor([0.9987, 0.5]), condition())
    assert out.dtype == torch.float32
    assert seen["x"] == seen["embeds"] == torch.bfloat16
    assert seen["t"].dtype == torch.float32 and abs(seen["t"][0].item() - 998.7) < 1e-3
    denoiser.compute_dtype = torch.float32
    denoiser.x0(noisy(), 0.5, condition())
    assert seen["x"] == torch.float32


def test_only_the_backbone_has_parameters():
    denoiser = build("unet_text")
    assert all(name.startswith("backbone.") for name in denoiser.state_dict())
    assert len(denoiser.state_dict()) == len(denoiser.backbone.state_dict())


def test_a_v_teacher_from_an_eps_teacher():
    """The same denoiser in another prediction: equal x0, and v = (alpha x_t - x0) / sigma."""
    teacher, x, cond = build("unet_text"), noisy(), condition()
    other = Reexpressed(teacher, "v")
    t = torch.tensor([20, 980])
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in teacher.process.alpha_sigma(t))
    with torch.no_grad():
        x0 = teacher.x0(x, t, cond)
        torch.testing.assert_close(other.predict(x, t, cond), (alpha * x - x0) / sigma, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other.x0(x, t, cond), x0, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other.eps(x, t, cond), teacher.eps(x, t, cond), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other.generate(x, cond), teacher.generate(x, cond), rtol=1e-4, atol=1e-3)


def test_a_flow_from_a_ddpm_teacher_keeps_its_estimates():
    """At equal signal-to-noise ratio both see the same picture: x0 is the teacher's at the rescaled input."""
    teacher, cond = build("unet_text"), condition()
    flow = Reexpressed(teacher, "velocity", RectifiedFlow())
    t = torch.tensor([0.3, 0.8])
    x = noisy()
    inner_t = teacher.process.time_of_log_snr(flow.process.log_snr(t, torch.float64))
    norm = ((1 - t) ** 2 + t**2).sqrt().view(-1, 1, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(flow.x0(x, t, cond), teacher.x0(x / norm, inner_t, cond), rtol=1e-3, atol=1e-3)
        # At pure noise and at clean data the inner network's range ends; the pair still explains x_t and is finite.
        for end in (0.0, 1e-4, 0.9999, 1.0):
            velocity = flow.predict(x, end, cond)
            assert velocity.isfinite().all()
            alpha, sigma = 1 - end, end
            torch.testing.assert_close(
                alpha * flow.x0(x, end, cond) + sigma * (velocity + flow.x0(x, end, cond)), x, rtol=1e-3, atol=1e-3
            )
        torch.testing.assert_close(flow.predict(x, 1.0, cond), x - teacher.x0(x, 999, cond), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_from_pretrained_reads_a_stock_folder(kind, tmp_path):
    schedulers = {
        "sd3": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "flux": diffusers.FlowMatchEulerDiscreteScheduler(),
        "pixart": diffusers.DPMSolverMultistepScheduler(),
    }
    folder = pipeline_folder(tmp_path, kind, schedulers.get(kind))
    denoiser = Denoiser.from_pretrained(str(folder))
    expected = {"sd3": RectifiedFlow(3.0), "flux": RectifiedFlow(), "pixart": DDPM("linear", 0.0001, 0.02)}
    assert denoiser.process == expected.get(kind, DDPM())
    assert denoiser.prediction == ("velocity" if kind in ("sd3", "flux") else "eps")
    for name, value in backbone(kind).state_dict().items():
        assert torch.equal(denoiser.backbone.state_dict()[name], value)


def test_half_precision_folders_load_as_asked(tmp_path):
    folder = pipeline_folder(tmp_path)
    net = backbone("unet_text")
    net.half().save_pretrained(folder / "unet")
    net.save_pretrained(folder / "unet_early")
    assert Denoiser.from_pretrained(str(folder)).backbone.dtype == torch.float32
    early = Denoiser.from_pretrained(str(folder), subfolder="unet_early", torch_dtype=torch.bfloat16)
    assert early.backbone.dtype == torch.bfloat16


def test_mistakes_in_loading_are_told(tmp_path):
    folder = pipeline_folder(tmp_path / "sd")
    with pytest.raises(UserError, match="did you mean unet"):
        Denoiser.from_pretrained(str(folder), subfolder="unett")
    with pytest.raises(UserError, match="did you mean sd"):
        Denoiser.from_pretrained(str(tmp_path / "sdd"))
    (folder / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(UserError, match="scheduler"):
        Denoiser.from_pretrained(str(folder))
    assert Denoiser.from_pretrained(str(folder), process=DDPM(), prediction="v").prediction == "v"
    with pytest.raises(UserError, match="velocity"):
        Denoiser(backbone("unet"), DDPM(), "velocty")
    with pytest.raises(UserError, match="EDM"):
        Denoiser(backbone("unet"), DDPM(), "edm")


def test_a_missing_condition_is_named():
    with pytest.raises(ValueError, match="pooled"):
        build("sd3").predict(noisy(), 0.5, Cond(embeds=torch.zeros(2, 5, 12)))


def test_the_exported_scheduler_calls_a_one_step_student_at_the_last_time():
    """Stable Diffusion's default (leading spacing, offset 1) would call it at t = 1, almost clean data."""
    from lightning_t2i.processes.schedulers import to_scheduler

    default = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, set_alpha_to_one=False
    )
    default.set_timesteps(1)
    assert default.timesteps.tolist() == [1]
    ours = to_scheduler(DDPM(), "eps")
    ours.set_timesteps(1)
    assert ours.timesteps.tolist() == [999]
    denoiser, z, cond = build("unet_text"), noisy(), condition()
    with torch.no_grad():
        out = ours.step(denoiser.predict(z, 999, cond), 999, z).prev_sample
        torch.testing.assert_close(out, denoiser.generate(z, cond), rtol=1e-4, atol=1e-4)


def test_terminal_constants_of_stable_diffusion():
    alpha, sigma = DDPM().alpha_sigma(999, torch.float64)
    assert math.isclose(alpha.item() ** 2, 0.0046601, rel_tol=1e-4)
    assert math.isclose((sigma / alpha).item(), 14.615, rel_tol=1e-4)
