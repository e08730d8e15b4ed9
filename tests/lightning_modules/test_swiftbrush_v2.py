"""SwiftBrush v2: where the student begins, the clamped CLIP loss, the average of two students."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distilling import heard, same, states, update
from pictures import fit
from tiny_networks import autoencoder, pipeline_folder
from torch import nn
from weights import weights_hash

from datamodules.prompts import Prompts
from datamodules.streams import Streams
from lightning_modules.swiftbrush import SwiftBrush
from lightning_modules.swiftbrush_v2 import SwiftBrushV2, average_students, clamped
from lightning_t2i.batch import Records
from lightning_t2i.cli.configs import merge
from lightning_t2i.errors import UserError
from lightning_t2i.forward_units import counting_units, differences
from lightning_t2i.keys import Keys
from lightning_t2i.metrics.clip_score import TransformersClip
from lightning_t2i.networks.codec import LatentCodec
from lightning_t2i.networks.denoiser import Denoiser
from lightning_t2i.options import EMAOptions, GroupOptions, MethodOptions
from lightning_t2i.processes import DDPM
from lightning_t2i.processes.schedulers import to_scheduler

CLIP = "assets/tiny/clip"
SHAPE = (4, 8, 8)


def data(prompts: str, size: int = 4) -> Streams:
    return Streams(main=Prompts(prompts, batch_size=size), val=Prompts(prompts, batch_size=8, limit=8))


def method_of(source: str, **options) -> SwiftBrushV2:
    groups = {"student": update(clip=1.0), "lora": update(clip=1.0)}
    return SwiftBrushV2(source, **{**groups, "lora_rank": 2, "lora_alpha": 4.0, "val_steps": 2, **options})


def built(source: str, **options) -> SwiftBrushV2:
    method = method_of(source, **options)
    method.configure_model()
    return method


def trained(folder: Path, method: SwiftBrush, prompts: str, steps: int = 2, **options) -> SwiftBrush:
    fit(folder, method, steps, data(prompts), **{"limit_val_batches": 0, **options})
    return method


@pytest.fixture(scope="module")
def turbo(tmp_path_factory) -> str:
    """A pipeline of the same kind as `sd` with other weights."""
    folder = pipeline_folder(tmp_path_factory.mktemp("turbo"))
    network = Denoiser.from_pretrained(str(folder)).backbone
    with torch.no_grad():
        for i, parameter in enumerate(network.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    network.save_pretrained(folder / "unet")
    return str(folder)


# ---- the CLIP loss ---------------------------------------------------------------------------------------------------


def test_the_maximum_is_taken_for_each_sample() -> None:
    fits = torch.tensor([0.5, 0.1, -0.2], requires_grad=True)
    loss = clamped(fits, 0.35)
    assert float(loss.detach()) == pytest.approx((0 + 0.25 + 0.55) / 3)
    loss.backward()
    assert fits.grad.tolist() == pytest.approx([0, -1 / 3, -1 / 3])  # a sample that fits is left alone
    assert float(clamped(fits.detach(), 1.0)) == pytest.approx(1 - float(fits.detach().mean()))  # never clamped
    together = (0.35 - fits.detach().mean()).clamp_min(0)
    assert float(together) < float(loss.detach())


def test_the_clip_loss_is_that_of_decoded_pictures_and_has_a_gradient(sd) -> None:
    method = built("assets/tiny/sd", clip=CLIP, clip_weight=0.3)
    records = Records.of_prompts(["a red circle", "two blue squares", "a green star"])
    x = Keys(0).normal("x", records.position, SHAPE).requires_grad_()
    g = torch.zeros_like(x)
    loss = method.student_loss(x, g, records)
    (found,) = torch.autograd.grad(loss, x)
    pictures = method.codec.decode(x)
    shown = method.clip.encode_image(pictures, clamp=False)
    fits = torch.cosine_similarity(shown, method.clip.encode_text(records.caption))
    expected = 0.3 * (0.35 - fits).clamp_min(0).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, x)[0])
    assert float(found.abs().max()) > 0
    assert all(p.grad is None and not p.requires_grad for p in (*method.clip.parameters(), *method.codec.parameters()))
    notes = {n: float(*v) for n, v in method._scalars.items()}
    assert notes["student/fits"] == pytest.approx(float(fits.detach().mean()), rel=1e-5)
    assert notes["student/clip"] == pytest.approx(float(expected.detach()) / 0.3, rel=1e-5)


def test_its_weight_falls_to_zero_in_a_straight_line(sd) -> None:
    method = built("assets/tiny/sd", clip=CLIP, clip_weight=0.4, clip_until=10, clip_threshold=1.0)
    records = Records.of_prompts(["a red circle", "two"])
    x = Keys(0).normal("x", records.position, SHAPE)
    values = []
    for step in (0, 5, 10, 20):
        method.counters.step = step
        values.append(float(method.student_loss(x, torch.zeros_like(x), records)))
    assert values == pytest.approx([values[0], values[0] / 2, 0, 0]) and values[0] > 0
    method.clip_until, method.counters.step = None, 20
    assert float(method.student_loss(x, torch.zeros_like(x), records)) == pytest.approx(values[0])


def test_without_its_additions_it_is_swiftbrush(tmp_path, sd, prompts) -> None:
    options = {"student": update(clip=1.0), "lora": update(clip=1.0), "lora_rank": 2, "lora_alpha": 4.0}
    plain = states(trained(tmp_path / "v1", SwiftBrush(sd, **options), prompts, 3))
    found = states(trained(tmp_path / "v2", method_of(sd), prompts, 3))
    assert found.keys() == plain.keys() and all(torch.equal(found[name], plain[name]) for name in plain)


def test_another_decoder_may_make_the_pictures(tmp_path, sd) -> None:
    small = autoencoder()  # that of the pipeline, but for the decoder's weights
    with torch.no_grad():
        for i, parameter in enumerate(small.decoder.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    small.save_pretrained(tmp_path / "small")
    records = Records.of_prompts(["red", "two"])
    x, found = Keys(0).normal("x", records.position, SHAPE), []
    for options in ({}, {"decoder": str(tmp_path / "small")}):
        method = built(sd, clip=CLIP, clip_threshold=1.0, **options)
        found.append(float(method.student_loss(x, torch.zeros_like(x), records)))
        decoder = LatentCodec(small) if options else method.codec
        shown = method.clip.encode_image(decoder.decode(x), clamp=False)
        fits = torch.cosine_similarity(shown, method.clip.encode_text(records.caption))
        assert found[-1] == pytest.approx(0.1 * float((1 - fits.detach()).mean()), rel=1e-5)
        assert method.frozen_identities.keys() - {"decoder"} == {"teacher", "codec", "text", "clip"}
    assert found[0] != pytest.approx(found[1], rel=1e-3) and "decoder" in method.frozen_identities
    with pytest.raises(UserError, match="other latents"):
        built(sd, clip=CLIP, decoder="assets/tiny/vae")


@pytest.mark.parametrize("options", [{}, {"clip": CLIP}, {"clip": CLIP, "student": update(every=2)}], ids="-".join)
def test_a_step_costs_what_it_says(tmp_path, sd, prompts, options) -> None:
    method = built(sd, **options)
    method.text(["red"])  # the empty caption is encoded once
    with counting_units(method) as units:
        trained(tmp_path, method, prompts)
    assert differences(method.forward_units(), units.per_step()) == {}


# ---- where the student begins ----------------------------------------------------------------------------------------


def test_a_student_may_begin_elsewhere(sd, turbo) -> None:
    method, plain, theirs = built(sd, student_from=turbo), built(sd), built(turbo)
    assert weights_hash(method.student) == weights_hash(theirs.student) != weights_hash(plain.student)
    assert weights_hash(method.text) == weights_hash(plain.text)
    cond = method.condition(Records.of_prompts(["red", "two"]))
    z = torch.ones(2, *SHAPE)
    with torch.no_grad():
        assert torch.equal(method.teacher(z, 500, cond), plain.teacher(z, 500, cond))


def test_a_student_that_ends_earlier_gives_its_weights_alone() -> None:
    """assets/tiny/dmd is asked at 649, and its schedule ends there."""
    method = built("assets/tiny/sd", student_from="assets/tiny/dmd", student_t=649)
    assert method.student.process == method.teacher.process
    assert not torch.equal(method.student.backbone.conv_in.weight, method.teacher.backbone.conv_in.weight)


@pytest.mark.parametrize("start", [None, "turbo"])
def test_a_student_may_be_an_adapter_of_where_it_begins(tmp_path, sd, turbo, prompts, start) -> None:
    source = turbo if start else None
    ema = update(clip=1.0, ema=EMAOptions(decay=0.5, warmup=False))
    method = built(sd, student_from=source, student_rank=3, student=ema)
    whole = built(source or sd)
    records = Records.of_prompts(["red square", "two"])
    z, cond, places = method.inputs(records)
    with torch.no_grad():
        expected = whole.generate(whole.student, z, cond, method.keys, places)
        assert torch.equal(method.generate(method.student, z, cond, method.keys, places), expected)
    assert method.student.backbone is not method.teacher.backbone
    assert all(".student." in n for n in method.groups["student"].names)
    layer = next(m for m in method.student.backbone.modules() if hasattr(m, "scaling"))
    assert layer.scaling == {"student": 2.0} and layer.r == {"student": 3}
    base = {n: p.clone() for n, p in method.student.backbone.named_parameters() if "lora" not in n}
    before = states(method)
    after = states(trained(tmp_path / "run", method, prompts, 3))
    now = dict(method.student.backbone.named_parameters())
    assert all(torch.equal(p, now[n]) for n, p in base.items())
    assert any(float((after[n] - before[n]).abs().max()) > 0 for n in after if n.startswith("student."))
    assert all("lora_" in n for n in after)
    assert method.frozen_identities["student_base"] and "student_base" in method.frozen_identities
    # Exported, the adapter is in the weights.
    from diffusers import UNet2DConditionModel

    for parameter in method.groups["student"].ema.parameters():
        if parameter.shape[0] in (3,) or parameter.shape[-1] == 3:
            nn.init.normal_(parameter, std=0.2)
    method.pipeline.text = None  # its word-level tokenizer is no stock one
    method.export(tmp_path / "out", [])
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "out/unet", torch_dtype=torch.float32)
    assert not any("lora" in name for name in unet.state_dict())
    with torch.no_grad():
        ours = method.groups["student"].ema(z, 999, cond)
        torch.testing.assert_close(unet(z, 999, cond.embeds).sample, ours, atol=0.05, rtol=0.02)


@pytest.mark.parametrize(
    "options",
    [
        {"student_from": "turbo"},
        {"student_rank": 2},
        {"student_rank": 2, "student_targets": ("to_q",)},
        {"clip": CLIP},
        {"clip": CLIP, "clip_weight": 0.5},
        {"clip": CLIP, "clip_threshold": 1.0},
        {"clip": CLIP, "clip_until": 2},
    ],
    ids="-".join,
)
def test_every_option_changes_the_training(tmp_path, sd, turbo, prompts, options) -> None:
    def losses(name: str, **given) -> list[tuple]:
        if "student_from" in given:
            given["student_from"] = turbo
        method = built(sd, **given)
        found = heard(method)
        trained(tmp_path / name, method, prompts, 3)
        return found

    found = losses("with", **options)
    assert found != losses("without", **dict(list(options.items())[:-1]))


def test_the_authors_values_are_the_defaults() -> None:
    method = SwiftBrushV2("x", clip=CLIP)
    assert (method.clip_weight, method.clip_threshold) == (0.1, 0.35)


def test_the_clip_loss_reaches_pixels_beyond_the_range() -> None:
    """Where a decoder overshoots, a clamped picture would have no gradient."""
    clip, images = TransformersClip.from_pretrained(CLIP), torch.full((1, 3, 32, 32), 1.5, requires_grad=True)
    for clamp, reached in ((True, False), (False, True)):
        (gradient,) = torch.autograd.grad(clip.encode_image(images, clamp=clamp)[0, 0], images)
        assert bool(gradient.abs().sum() > 0) == reached


# ---- the average of two students -------------------------------------------------------------------------------------


def exported(folder: Path, seed: int, **options) -> Path:
    method = built("assets/tiny/sd", student_t=649, **options)
    with torch.no_grad():
        for i, p in enumerate(method.student.parameters()):
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * seed + i)))
    method.export(folder, [])
    return folder


def test_the_average_of_two_students(tmp_path) -> None:
    import diffusers

    a, b = (exported(tmp_path / str(seed), seed) for seed in (1, 2))
    for share in (0.5, 1.0, 0.25):
        average_students(str(a), str(b), tmp_path / f"out-{share}", share)
        ours = Denoiser.from_pretrained(str(tmp_path / f"out-{share}"))
        one, two = (dict(Denoiser.from_pretrained(str(f)).named_parameters()) for f in (a, b))
        for name, parameter in ours.named_parameters():
            expected = share * one[name] + (1 - share) * two[name]
            torch.testing.assert_close(parameter, expected, atol=2e-3, rtol=2e-3)  # fp16
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out-0.5", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    drawn = pipe("a red circle", num_inference_steps=1, guidance_scale=1.0, output_type="pt").images
    assert drawn.shape == (1, 3, 32, 32) and pipe.scheduler.timesteps.tolist() == [649]


def test_students_of_two_kinds_have_no_average(tmp_path, sd) -> None:
    a = exported(tmp_path / "a", 1)
    late = built("assets/tiny/sd")
    late.export(tmp_path / "late", [])
    for other in (sd, str(tmp_path / "late")):
        with pytest.raises(UserError, match="two kinds"):
            average_students(str(a), other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- processes, memory, bad input ------------------------------------------------------------------------------------


def on_ranks(rank: int, source: str, prompts: str, folder: str, shard: int) -> dict:
    plain = GroupOptions(lambda p: torch.optim.SGD(p, lr=0.05), clip=10.0)
    common = MethodOptions(accumulate=2)
    method = SwiftBrushV2(
        source, student_rank=2, clip=CLIP, student=plain, lora=plain, lora_rank=2, common=common, val_steps=2
    )
    fit(Path(folder), method, 3, data(prompts), shard=shard, limit_val_batches=0)
    return states(method)


@pytest.mark.slow
def test_one_and_two_processes_agree(tmp_path, sd, prompts, ranks) -> None:
    """Student and lora are adapters of two backbones, both cut."""
    one = on_ranks(0, sd, prompts, str(tmp_path / "one"), 1)
    assert any(float(t.abs().max()) > 1e-4 for n, t in one.items() if n.startswith("student.") and "lora_B" in n)
    for two in ranks(on_ranks, sd, prompts, str(tmp_path / "two"), 2):
        same(two, one, rtol=1e-4, atol=1e-5)


def test_the_config_of_the_paper(repo) -> None:
    options = merge([repo / "configs/swiftbrush_v2/sd21.yaml"], []).config["model"]["init_args"]
    assert (options["student_rank"], options["lora_alpha"]) == (256, 128) and options["clip_until"]
    assert options["student"].get("ema") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_weight": -1.0}, "CLIP loss"),
        ({"clip_threshold": 2.0}, "CLIP loss"),
        ({"clip_until": 0}, "has no steps"),
        ({"student_rank": 0}, "has a rank"),
    ],
    ids=str,
)
def test_impossible_options_are_refused_at_once(options, message) -> None:
    with pytest.raises(UserError, match=message):
        SwiftBrushV2("none", **options)


def test_starts_and_clips_of_another_kind_are_refused(tmp_path, sd, prompts) -> None:
    v = str(pipeline_folder(tmp_path / "v", scheduler=to_scheduler(DDPM(), "v")))
    with pytest.raises(UserError, match="another prediction"):
        built(sd, student_from=v)
    with pytest.raises(UserError, match="another architecture"):
        built(sd, student_from="assets/tiny/sd")
    for options in ({"clip": "no/such/clip"}, {"student_from": "no/such/student"}):
        with pytest.raises(UserError, match="No such model folder"):
            built(sd, **options)
    method = built(sd, clip=CLIP)
    records = Records.of_prompts(["red"])
    x = torch.zeros(1, *SHAPE)
    records.caption = None
    with pytest.raises(UserError, match="needs captions"):
        method.student_loss(x, x, records)
