"""DMD2: two time scales, the discriminator, students of several steps, adapters; each against one written out."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from distilling import heard, noted, same, states, update
from kills import what_a_kill_changes
from pictures import PictureStream, fit
from tiny_networks import pipeline_folder
from torch import nn
from torch.nn.functional import softplus
from weights import weights_hash

from datamodules.prompts import Prompts
from datamodules.streams import Streams
from lightning_modules.dmd import DMD
from lightning_modules.dmd2 import DMD2
from lightning_t2i.batch import Batch, Records
from lightning_t2i.cli.configs import merge
from lightning_t2i.errors import UserError
from lightning_t2i.forward_units import counting_units, differences
from lightning_t2i.keys import Keys
from lightning_t2i.networks.adapters import roles
from lightning_t2i.networks.denoiser import Denoiser
from lightning_t2i.networks.discriminator import Discriminator, middle
from lightning_t2i.networks.load import build_network
from lightning_t2i.options import EMAOptions, GroupOptions, MethodOptions
from lightning_t2i.processes import DDPM, EDM, guided
from lightning_t2i.processes.schedulers import scheduler_config, to_scheduler
from lightning_t2i.protocols import Exports, Generates

SHAPE = (4, 8, 8)
LR = 0.05
TIMES = [999.0, 749.0, 499.0]


def data(prompts: str, real: PictureStream | None = None, size: int = 4) -> Streams:
    return Streams(main=Prompts(prompts, batch_size=size), real=real, val=Prompts(prompts, batch_size=8, limit=8))


def method_of(source: str, **options) -> DMD2:
    groups = {"student": update(), "fake": update(), "discriminator": update()}
    return DMD2(source, **{**groups, "val_steps": 2, **options})


def trained(folder: Path, method: DMD2, streams: Streams, steps: int = 2, **options) -> DMD2:
    fit(folder, method, steps, streams, **{"limit_val_batches": 0, **options})
    return method


def named(value) -> str:
    """An id that is the same in every process."""
    text = str(value) if not isinstance(value, dict) else "-".join(value)
    return text.replace(" ", "-")


def batches_of(streams: Streams, count: int, size: int = 4) -> list[Batch]:
    streams.prepare_data()
    streams.setup("fit")
    rows = [range(size * k, size * (k + 1)) for k in range(count)]
    return [{n: s.load(rows[k], k) for n, s in streams.training.items()} for k in range(count)]


# ---- two time scales -------------------------------------------------------------------------------------------------


def test_P9_every_fifth_step_updates_the_student_and_every_step_the_fake(tmp_path, sd, prompts) -> None:
    method = method_of(sd, student=update(every=5), gan_weight=0.1)
    hashes = []
    step = type(method).training_step

    def watched(self, batch, batch_idx):
        step(self, batch, batch_idx)
        hashes.append((weights_hash(self.student), weights_hash(self.fake)))

    method.training_step = watched.__get__(method)
    trained(tmp_path, method, data(prompts, PictureStream(2), size=2), 21)
    updates = {name: group.updates for name, group in method.groups.items()}
    assert updates == {"student": 5, "fake": 21, "discriminator": 21}
    students, fakes = zip(*hashes, strict=True)
    changed = [k for k in range(1, 21) if students[k] != students[k - 1]]
    assert changed == [5, 10, 15, 20] and len(set(students)) == 5  # the first update is within step 0
    assert len(set(fakes)) == 21


def test_steps_without_the_student_use_new_samples_and_no_teacher(tmp_path, sd, prompts) -> None:
    method = method_of(sd, student=update(every=4), guidance=3.0)
    method.configure_model()
    seen = []
    inner = method.fake_loss
    method.fake_loss = lambda x, cond, places: (seen.append((x.clone(), x.requires_grad)), inner(x, cond, places))[1]
    with counting_units(method) as units:
        trained(tmp_path, method, data(prompts), 8)
    assert not any(gradient for _, gradient in seen)
    assert len({float(x.sum()) for x, _ in seen}) == 8
    assert units.per_step()["teacher"] == 0.5  # guided, one step of four
    assert differences(method.forward_units(), units.per_step()) == {}


def test_without_its_additions_it_is_dmd_without_regression(tmp_path, sd, prompts) -> None:
    options = {"student": update(), "fake": update(), "val_steps": 2}
    plain = states(trained(tmp_path / "dmd", DMD(sd, regression_weight=0.0, **options), data(prompts), 3))
    found = states(trained(tmp_path / "dmd2", method_of(sd), data(prompts), 3))
    assert found.keys() == plain.keys() and all(torch.equal(found[name], plain[name]) for name in plain)


# ---- the discriminator -----------------------------------------------------------------------------------------------


def written_out(method: DMD2, batches: list[Batch], gan_weight: float) -> dict[str, torch.Tensor]:
    """The update with torch alone, on copies of the method's networks; the weights it ends with."""
    names = ("student", "fake", "discriminator")
    student, fake, head = networks = [copy.deepcopy(getattr(method, name)) for name in names]
    optimizers = [torch.optim.SGD(network.parameters(), lr=LR) for network in networks]
    process = method.process

    def logits(x, t, cond):
        features = []
        with fake.backbone.mid_block.register_forward_hook(lambda *args: features.append(args[2])):
            prediction = fake.eps(x, t, cond)
        return prediction, head(features[0])

    for step, batch in enumerate(batches):
        keys, main, real = Keys(0, step), batch["main"], batch["real"]
        places, cond = main.position, method.text(main.caption)

        def draw(name, where=places, keys=keys):
            return (keys.uniform(f"{name}_t", where, dtype=torch.float64) * 1000).floor().long(), keys.normal(
                f"{name}_eps", where, SHAPE
            )

        x = student.generate(keys.normal("z", places, SHAPE), cond)
        with torch.no_grad():
            t = (20 + (keys.uniform("matching_t", places, dtype=torch.float64) * 961)).floor().long()
            x_t = process.add_noise(x, keys.normal("matching_eps", places, SHAPE), t)
            estimate = guided(method.teacher.x0, x_t, t, cond, 3.0)
            g = (fake.x0(x_t, t, cond) - estimate) / (x - estimate).abs().mean((1, 2, 3), keepdim=True)
        t, eps = draw("gan")
        adversarial = softplus(-logits(process.add_noise(x, eps, t), t, cond)[1]).mean()
        losses = {"student": (x * g).sum() / g.numel() + gan_weight * adversarial}
        t, eps = draw("fake")
        prediction, ours = logits(process.add_noise(x.detach(), eps, t), t, cond)
        t_real, eps_real = draw("real", real.position)
        noisy = process.add_noise(method.codec.encode(real.image), eps_real, t_real)
        _, theirs = logits(noisy, t_real, method.text(real.caption))
        losses["fake"] = (prediction - eps).square().mean() + 0.01 * (softplus(ours).mean() + softplus(-theirs).mean())
        losses["discriminator"] = losses["fake"]
        gradients = [
            torch.autograd.grad(losses[name], list(network.parameters()), retain_graph=True, allow_unused=True)
            for name, network in zip(names, networks, strict=True)
        ]
        for network, optimizer, found in zip(networks, optimizers, gradients, strict=True):
            for parameter, gradient in zip(network.parameters(), found, strict=True):
                parameter.grad = gradient
            torch.nn.utils.clip_grad_norm_(network.parameters(), 10.0)
            optimizer.step()
    return {f"{n}.{k}": p.detach() for n, net in zip(names, networks, strict=True) for k, p in net.named_parameters()}


def test_the_update_with_a_discriminator_is_the_papers(tmp_path, sd, prompts) -> None:
    # Plain steps: Adam's would enlarge the rounding of gradients near 0.
    plain = GroupOptions(lambda p: torch.optim.SGD(p, lr=LR), clip=10.0)
    method = method_of(sd, gan_weight=0.3, **dict.fromkeys(("student", "fake", "discriminator"), plain))
    method.configure_model()
    before = states(method)
    streams = data(prompts, PictureStream())
    expected = written_out(method, batches_of(streams, 2), 0.3)
    found = states(trained(tmp_path, method, data(prompts, PictureStream()), 2))
    same(found, expected, rtol=1e-4, atol=1e-6)
    for name in ("student", "fake", "discriminator"):
        assert max(float((found[n] - before[n]).abs().max()) for n in found if n.startswith(f"{name}.")) > 1e-5


def test_P11_the_students_gradient_leaves_none_in_fake_and_head(sd, prompts) -> None:
    method = method_of(sd, gan_weight=0.3)
    method.configure_model()
    batch = batches_of(data(prompts, PictureStream()), 1)[0]
    z, cond, places = method.inputs(batch["main"])
    x = method.generate(method.student, z, cond, method.keys, places)
    towards = method.adversarial_gradient(x.detach(), cond, places)
    assert towards.shape == x.shape and float(towards.abs().max()) > 0
    (x * towards).sum().backward()
    assert all(p.grad is None for n in (method.fake, method.discriminator, method.teacher) for p in n.parameters())
    assert any(p.grad is not None for p in method.student.parameters())
    assert not x.detach().requires_grad


def test_a_discriminator_may_begin_later(tmp_path, sd, prompts) -> None:
    method = method_of(sd, gan_weight={0: 0.0, 2: 0.1})
    losses = heard(method)
    trained(tmp_path, method, data(prompts, PictureStream()), 3)
    assert [name for name, _ in losses[1::2]] == ["fake", "fake", ("fake", "discriminator")]
    untouched = method_of(sd, gan_weight=0.1)
    untouched.configure_model()
    assert weights_hash(method.discriminator) != weights_hash(untouched.discriminator)


def test_a_student_may_begin_elsewhere(tmp_path, edm) -> None:
    method = method_of(edm, guidance=1.0)
    method.configure_model()
    method.student.backbone.out_conv.bias.data.fill_(7.0)
    method.export(tmp_path / "begun", [])
    begun = method_of(edm, guidance=1.0, student_from=str(tmp_path / "begun"))
    begun.configure_model()
    student, fake = (network.backbone.out_conv.bias.detach() for network in (begun.student, begun.fake))
    assert bool((student == 7).all()) and not (fake == 7).any()
    assert weights_hash(begun.teacher) == weights_hash(method.teacher)


def test_a_student_that_begins_elsewhere_has_its_teachers_times(tmp_path) -> None:
    """The shipped student's own schedule ends at 649; another prediction has no common start."""
    method = method_of("assets/tiny/sd", student_from="assets/tiny/dmd", student_times=[999.0, 649.0])
    method.configure_model()
    assert method.student.process == method.teacher.process
    with pytest.raises(UserError, match="another architecture"):
        method_of("assets/tiny/sd", student_from="assets/tiny/pixart").configure_model()


def test_real_pictures_in_place_of_samples_are_as_many(tmp_path, sd, prompts) -> None:
    method = method_of(sd, student_times=TIMES, backward_simulation=False)
    with pytest.raises(UserError, match="stand in for samples"):
        trained(tmp_path, method, data(prompts, PictureStream(batch_size=2)), 1)
    assert method.counters.step == 0


def test_a_student_of_edm_begins_at_its_own_noise_level(edm) -> None:
    """SiD's sigma of 2.5: what the network sees then has unit deviation, as when it was trained."""
    method = method_of(edm, guidance=1.0, student_times=[2.5])
    method.configure_model()
    z = torch.randn(2, 3, 8, 8)
    x, t, _ = method.student_input(z, None, torch.arange(2), None)
    assert t == 2.5 and torch.equal(x, 2.5 * z)
    torch.testing.assert_close(method.student.generate(z, None, 2.5), method.student.x0(2.5 * z, 2.5))


def test_pixel_teachers_have_a_discriminator_too(tmp_path, edm, prompts) -> None:
    method = method_of(edm, guidance=1.0, gan_weight=0.1)
    method.configure_model()
    before = states(method)
    assert method.layer == "encoder.4x4_block0"
    found = states(trained(tmp_path, method, data(prompts, PictureStream(side=8)), 2))
    for name in ("student", "fake", "discriminator"):
        assert any(float((found[n] - before[n]).abs().max()) > 0 for n in found if n.startswith(f"{name}."))


@pytest.mark.parametrize("real_size", [4, 8])
def test_forward_units_with_a_discriminator(tmp_path, sd, prompts, real_size) -> None:
    method = method_of(sd, student=update(every=2), gan_weight=0.1)
    method.configure_model()
    with counting_units(method) as units:
        trained(tmp_path, method, data(prompts, PictureStream(real_size)), 8)
    assert differences(method.forward_units(), units.per_step()) == {}


def test_signals_of_the_discriminator(tmp_path, sd, prompts) -> None:
    method = method_of(sd, gan_weight=0.1, common=MethodOptions(log_every=1))
    notes = noted(method)
    fit(tmp_path, method, 1, data(prompts, PictureStream()), val_check_interval=1)
    names = {"student/adversarial", "discriminator/fake", "discriminator/real", "student/gap", "fake/loss"}
    assert names <= notes.keys() and all(0 <= float(notes[f"discriminator/{n}"]) <= 1 for n in ("fake", "real"))


# ---- several steps ---------------------------------------------------------------------------------------------------


def test_a_student_of_several_steps_samples_by_noising_again(sd) -> None:
    method = method_of(sd, student_times=TIMES)
    method.configure_model()
    cond, places = method.condition(Records.of_prompts(["red square", "two"])), torch.arange(2)
    keys = Keys(5)
    with torch.no_grad():
        x = method.student.x0(keys.normal("z", places, SHAPE), 999, cond)
        for i, t in ((1, 749), (2, 499)):
            x = method.student.x0(method.process.add_noise(x, keys.normal(f"between_{i}", places, SHAPE), t), t, cond)
        expected = method.codec.decode(x).clamp(-1, 1)
    assert torch.equal(method.sample(cond, keys, places), expected)
    one = method_of(sd)
    one.configure_model()
    assert not torch.equal(one.sample(cond, keys, places), expected)
    assert isinstance(method, Generates) and isinstance(method, Exports)


@pytest.mark.parametrize("simulated", [True, False])
def test_inputs_of_later_steps(sd, prompts, simulated) -> None:
    method = method_of(sd, student_times=TIMES, backward_simulation=simulated)
    method.configure_model()
    batch = batches_of(data(prompts, PictureStream()), 1)[0]
    z, cond, places = method.inputs(batch["main"])
    seen: dict[float, torch.Tensor] = {}
    for step in range(20):
        method.counters.step = step
        x, t, own = method.student_input(z, cond, places, batch["real"])
        assert not x.requires_grad
        seen[float(t)] = x
        eps = method.keys.normal("student_eps", places, SHAPE)
        if t == 999:
            assert torch.equal(x, z)
            continue
        if simulated:
            other = method.keys.normal("simulated_z", places, SHAPE)
            with torch.no_grad():
                clean = method.student.x0(other, 999, cond)
                if t == 499:
                    between = method.keys.normal("between_1", places, SHAPE)
                    clean = method.student.x0(method.process.add_noise(clean, between, 749), 749, cond)
        else:
            clean = method.codec.encode(batch["real"].image)
            assert torch.equal(own.embeds, method.condition(batch["real"]).embeds)  # the caption of that picture
            assert not torch.equal(own.embeds, cond.embeds)
        torch.testing.assert_close(x, method.process.add_noise(clean, eps, t))
    assert seen.keys() == set(TIMES)


def test_all_processes_train_the_same_step_of_the_student(sd) -> None:
    method = method_of(sd, student_times=TIMES)
    method.configure_model()
    cond = method.condition(Records.of_prompts(["red", "two"]))
    for step in range(8):
        method.counters.step = step
        times = {
            float(method.student_input(torch.zeros(2, *SHAPE), cond, torch.arange(2) + r, None)[1]) for r in (0, 7)
        }
        assert len(times) == 1


def test_forward_units_of_several_steps(tmp_path, sd, prompts) -> None:
    method = method_of(sd, student_times=TIMES)
    method.configure_model()
    drawn = [int(Keys(0, step).integers("step", torch.zeros(1).long(), 0, 3)) for step in range(6)]
    with counting_units(method) as units:
        trained(tmp_path, method, data(prompts), 6)
    assert units.per_step()["student"] == pytest.approx(3 + sum(drawn) / 6)
    assert method.forward_units()["student"] == 4  # the mean of 0, 1 and 2 more


# ---- adapters --------------------------------------------------------------------------------------------------------


def adapted(source: str, **options) -> DMD2:
    ema = update(ema=EMAOptions(decay=0.5, warmup=False))
    method = method_of(source, lora_rank=2, gan_weight=0.1, **{"student": ema, **options})
    method.configure_model()
    return method


def randomize(method: DMD2) -> None:
    """Adapters begin as zero; these have something to say."""
    for name in ("student", "fake"):
        for p in method.groups[name].parameters:
            nn.init.normal_(p, std=0.2)


def test_student_and_fake_are_adapters_of_the_teacher(sd, prompts) -> None:
    method, whole = adapted(sd), method_of(sd)
    whole.configure_model()
    z, cond, _ = method.inputs(batches_of(data(prompts), 1)[0]["main"])
    with torch.no_grad():
        expected = whole.teacher.x0(z, 999, cond)
        assert all(torch.equal(getattr(method, n).x0(z, 999, cond), expected) for n in ("teacher", "student", "fake"))
        randomize(method)
        found = {n: getattr(method, n).x0(z, 999, cond) for n in ("teacher", "student", "fake")}
    assert torch.equal(found["teacher"], expected)
    assert not torch.equal(found["student"], expected) and not torch.equal(found["student"], found["fake"])
    assert method.student.backbone is method.fake.backbone is method.teacher.backbone
    trained_names = {n: g.names for n, g in method.groups.items()}
    assert all(".student." in n for n in trained_names["student"]) and all(".fake." in n for n in trained_names["fake"])


def test_training_adapters_leaves_the_teacher_and_averages_the_adapter(tmp_path, sd, prompts) -> None:
    method = adapted(sd)
    base = {n: p.clone() for n, p in method.student.backbone.named_parameters() if "lora" not in n}
    requires = [p.requires_grad for p in method.student.parameters()]
    before = states(method)
    after = states(trained(tmp_path, method, data(prompts, PictureStream()), 3))
    now = dict(method.student.backbone.named_parameters())
    assert all(torch.equal(p, now[n]) for n, p in base.items())
    assert [p.requires_grad for p in method.student.parameters()] == requires
    assert all("lora" in n or n.startswith("discriminator.") for n in after)
    for prefix in ("student.", "fake.", "student_ema."):
        assert any(float((after[n] - before[n]).abs().max()) > 0 for n in after if n.startswith(prefix))
    name = next(n for n in after if n.startswith("student.") and "lora_B" in n)
    assert not torch.equal(after[name], after[name.replace("student.", "student_ema.", 1)])


@pytest.mark.parametrize("role", ["student", "fake"])
def test_recomputed_blocks_use_their_own_adapter(sd, prompts, role) -> None:
    gradients = {}
    for checkpointed in (False, True):
        method = adapted(sd, gradient_checkpointing=checkpointed)
        torch.manual_seed(0)
        randomize(method)
        z, cond, _ = method.inputs(batches_of(data(prompts), 1)[0]["main"])
        value = getattr(method, role).x0(z, 999, cond).square().mean()
        with torch.no_grad():  # others answer before the backward pass
            method.teacher.x0(z, 999, cond)
            getattr(method, "fake" if role == "student" else "student").x0(z, 999, cond)
        value.backward()
        gradients[checkpointed] = [p.grad.clone() for p in method.groups[role].parameters]
        other = method.groups["fake" if role == "student" else "student"]
        assert all(p.grad is None for p in other.parameters)
    assert any(float(g.abs().max()) > 0 for g in gradients[False])
    for plain, recomputed in zip(gradients[False], gradients[True], strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_adapters_have_the_factor_and_the_layers_that_are_asked_for(sd) -> None:
    targets = ["to_q", "to_v", "proj_in", "conv1", "time_emb_proj"]  # layers of SDXL's recipe: linear and convolutions
    plain, method = adapted(sd), adapted(sd, lora_alpha=0.5, lora_targets=targets)
    layers = [
        name.split(".lora_A")[0].rsplit(".", 1)[1] for name in method.groups["student"].names if ".lora_A" in name
    ]
    assert set(layers) == set(targets)
    assert not {"proj_in", "conv1"} & {part for name in plain.groups["student"].names for part in name.split(".")}
    scale = {m.scaling["fake"] for m in method.fake.backbone.modules() if hasattr(m, "scaling")}
    assert scale == {0.25}  # alpha / rank


def test_the_backbone_under_adapters_may_be_bf16(tmp_path, sd, prompts) -> None:
    method = adapted(sd, base_precision="bf16")
    kinds = {("lora" in n): p.dtype for n, p in method.student.backbone.named_parameters()}
    assert kinds == {False: torch.bfloat16, True: torch.float32}
    before = states(method)
    after = states(trained(tmp_path, method, data(prompts, PictureStream()), 2))
    assert all(t.dtype == torch.float32 for t in after.values())
    assert any(float((after[n] - before[n]).abs().max()) > 0 for n in after if n.startswith("student."))


def test_an_adapter_is_exported_within_its_weights(tmp_path, sd, prompts) -> None:
    from diffusers import UNet2DConditionModel

    method = adapted(sd, student=update())
    randomize(method)
    z, cond, _ = method.inputs(batches_of(data(prompts), 1)[0]["main"])
    method.pipeline.text = None  # its word-level tokenizer is no stock one
    method.export(tmp_path / "out", [])
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "out/unet", torch_dtype=torch.float32)
    assert not any("lora" in name for name, _ in unet.named_parameters())
    with torch.no_grad():
        theirs, ours = unet(z, 999, cond.embeds).sample, method.student(z, 999, cond)
        assert float((ours - method.teacher(z, 999, cond)).abs().mean()) > 0.01
    torch.testing.assert_close(theirs, ours, atol=0.05, rtol=0.02)  # the weights are written in fp16


@pytest.mark.parametrize("times", [[999.0, 749.0, 499.0, 249.0], [399.0], [799.0, 399.0], [999.0, 300.0]])
def test_the_exported_scheduler_takes_the_students_steps(tmp_path, sd, monkeypatch, times) -> None:
    import diffusers

    method = method_of(sd, student_times=times)
    method.configure_model()
    places, keys = torch.arange(2), Keys(5)
    z, cond = keys.normal("z", places, SHAPE), method.condition(Records.of_prompts(["red square", "two"]))
    with torch.no_grad():
        expected = method.generate(method.student, z, cond, keys, places)
        one_step = method.student.generate(z, cond)
    method.pipeline.text = None  # its word-level tokenizer is no stock one
    method.export(tmp_path / "out", [])
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out/unet", torch_dtype=torch.float32)
    kind = diffusers.LCMScheduler if len(times) > 1 else diffusers.DDIMScheduler
    assert scheduler_config(tmp_path / "out")["_class_name"] == kind.__name__
    scheduler = kind.from_pretrained(tmp_path / "out/scheduler")
    if times == [999.0, 300.0]:  # not evenly spaced: the pipeline is told
        scheduler.set_timesteps(timesteps=[999, 300])
    else:
        scheduler.set_timesteps(len(times))
    assert scheduler.timesteps.tolist() == times
    between = iter([keys.normal(f"between_{i}", places, SHAPE) for i in range(1, len(times))])
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *a, **k: next(between))
    x = z
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t, cond.embeds).sample, t, x).prev_sample
    torch.testing.assert_close(x, expected, atol=0.05, rtol=0.02)  # the weights are written in fp16
    assert next(between, None) is None and float((x - one_step).abs().mean()) > 0.1


def test_adapters_are_refused_where_networks_are_sharded(sd, monkeypatch) -> None:
    monkeypatch.setattr("lightning_modules.dmd2.mesh_of", lambda method: "a mesh")
    with pytest.raises(UserError, match="not sharded"):
        method_of(sd, lora_rank=2).configure_model()


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def losses(tmp_path_factory, sd, prompts):
    """`losses(**options)`: those of four training steps of a small mixture of everything."""

    def of(**options) -> list[tuple]:
        method = method_of(sd, **{"student_times": TIMES, "gan_weight": 0.1, **options})
        found = heard(method)
        trained(tmp_path_factory.mktemp("run"), method, data(prompts, PictureStream()), 4)
        return found

    return of


@pytest.fixture(scope="module")
def usual(losses) -> list[tuple]:
    return losses()


@pytest.mark.parametrize(
    "options",
    [
        {"student_times": [999.0, 249.0]},
        {"student_times": None},
        {"backward_simulation": False},
        {"gan_weight": 0.0},
        {"gan_weight": 5.0},
        {"gan_weight": {0: 0.0, 2: 0.1}},
        {"discriminator_weight": 0.5},
        {"discriminator": update(clip=1e-4)},
        {"lora_rank": 2},
        {"lora_rank": 2, "lora_alpha": 8.0},
        {"lora_rank": 2, "lora_targets": ["to_q", "conv1"]},
        {"lora_rank": 2, "base_precision": "bf16"},
        {"guidance": 1.5},
        {"student": update(every=2)},
    ],
    ids=named,
)
def test_every_option_changes_the_training(losses, usual, options) -> None:
    found = losses(**options)
    assert found != usual
    if len(options) > 1:
        assert found != losses(lora_rank=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student_times": [499.0, 999.0]}, "student's times"),
        ({"student_times": [499.0, -1.0]}, "student's times"),
        ({"gan_weight": -1.0}, "negative"),
        ({"gan_weight": {0: 0.0, 5: -1.0}}, "negative"),
        ({"gan_weight": {5: 0.1}}, "begins at training step 0"),
        ({"student_from": "here", "lora_rank": 2}, "begin as the teacher"),
        ({"discriminator_weight": -1.0}, "negative"),
        ({"matching_weight": 0.0, "gan_weight": 0.1}, "without matching"),
        ({"fake": update(every=2)}, "every training step"),
    ],
    ids=named,
)
def test_impossible_options_are_refused_at_once(options, message) -> None:
    with pytest.raises(UserError, match=message):
        DMD2("none", **options)


def test_missing_real_pictures_are_refused_before_training(tmp_path, sd, edm, prompts) -> None:
    for options in ({"gan_weight": 0.1}, {"student_times": TIMES, "backward_simulation": False}):
        method = method_of(sd, **options)
        with pytest.raises(UserError, match="needs real pictures"):
            trained(tmp_path, method, data(prompts), 1)
        assert method.counters.step == 0


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        ("edm", {"label": False}, "need labels"),
        ("edm", {"side": 16}, "another size than samples"),
        ("sd", {"side": 8}, "another size than samples"),
        ("sd", {"caption": False}, "need captions"),
    ],
    ids=named,
)
@pytest.mark.parametrize("later", [{"gan_weight": {0: 0.0, 2: 0.1}}, {"backward_simulation": False}], ids=named)
def test_unusable_real_pictures_are_told_in_the_first_step(
    request, tmp_path, prompts, kind, wrong, message, later
) -> None:
    times = {"edm": [80.0, 2.0], "sd": TIMES}[kind] if "backward_simulation" in later else None
    method = method_of(request.getfixturevalue(kind), guidance=1.0, student_times=times, **later)
    with pytest.raises(UserError, match=message) as error:
        trained(tmp_path, method, data(prompts, PictureStream(**{"side": {"edm": 8, "sd": 16}[kind], **wrong})), 1)
    assert "data.real" in str(error.value) and method.counters.step == 0


def test_times_at_which_there_is_only_data_are_refused(sd, edm) -> None:
    for source, times in ((edm, [80.0, 0.0]), (edm, [90.0, 2.0]), (sd, [999.5, 0.0])):
        with pytest.raises(UserError, match="Not a student's time"):
            method_of(source, guidance=1.0, student_times=times).configure_model()
    method = method_of(sd, student_times=[999.0, 0.0])  # with DDPM there is noise at its first time
    method.configure_model()
    assert float(method.process.alpha_sigma(torch.tensor(0), torch.float64)[1]) > 0


def test_a_discriminator_needs_a_unet(tmp_path) -> None:
    pixart = str(pipeline_folder(tmp_path / "pixart", "pixart", scheduler=to_scheduler(DDPM(), "eps")))
    method_of(pixart).configure_model()
    with pytest.raises(UserError, match="needs a U-Net"):
        method_of(pixart, gan_weight=0.1).configure_model()


# ---- paper scale -----------------------------------------------------------------------------------------------------


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def built_on_meta(name: str, process) -> Denoiser:
    with torch.device("meta"):
        return Denoiser(build_network(f"configs/networks/{name}.json"), process, "eps")


@pytest.mark.parametrize(
    ("config", "network", "shards", "precision", "limit"),
    [
        ("imagenet64", "edm_imagenet64", 1, "bf16", 40),
        ("sd15", "sd15_unet", 1, "bf16", 40),
        ("sdxl_4step", "sdxl_unet", 8, "bf16", 20),
        ("sdxl_1step", "sdxl_unet", 8, "bf16", 20),
    ],
)
def test_memory_on_each_process(repo, capsys, config, network, shards, precision, limit) -> None:
    """Student, fake and head: float32 weights, gradients and two moments; the teacher in bf16."""
    merged = merge([repo / f"configs/dmd2/{config}.yaml"], []).config
    options = merged["model"]["init_args"]
    assert options["common"]["precision"] == precision and options["gan_weight"]
    denoiser = built_on_meta(network, EDM() if "edm" in network else DDPM())
    with torch.device("meta"):
        head = count(Discriminator(*middle(denoiser)[1:]))
    weights = count(denoiser)
    ema = 4 * weights if options["student"].get("ema") else 0
    gigabytes = (16 * (2 * weights + head) + ema + 2 * weights) / shards / 1e9
    processes = merged["trainer"].get("num_nodes", 1) * 8
    mesh = merged["trainer"]["strategy"]["init_args"]
    assert mesh == {"replicate": None, "shard": 1 if shards == 1 else None}  # null: the 8 devices of a node
    with capsys.disabled():
        print(f"\ndmd2/{config}: {weights / 1e6:.0f} M weights, head {head / 1e6:.0f} M, {gigabytes:.1f} GB", end=" ")
        print(f"of weights, gradients and states on each of {processes} processes")
    assert gigabytes < limit
    if network == "sdxl_unet":
        assert processes == 128


def test_one_card_of_24_gb(repo, capsys) -> None:
    """Weights, gradients and states; activations of one sample under checkpointing come on top."""
    options = merge([repo / "configs/dmd2/sd15_24gb.yaml"], []).config["model"]["init_args"]
    assert options["base_precision"] == "bf16" and options["gradient_checkpointing"]
    denoiser = built_on_meta("sd15_unet", DDPM())
    base = count(denoiser)
    _, student, _ = roles(denoiser, ("student", "fake"), options["lora_rank"], torch.bfloat16)
    adapter = sum(p.numel() for n, p in student.named_parameters() if student.owns(n))
    with torch.device("meta"):
        head = count(Discriminator(*middle(denoiser)[1:]))
    text_and_vae = 123_060_480 + 83_653_863  # float32
    gigabytes = (2 * base + 16 * (2 * adapter + head) + 4 * adapter + 4 * text_and_vae) / 1e9
    with capsys.disabled():
        print(f"\ndmd2/sd15_24gb: adapters of {adapter / 1e6:.1f} M, {gigabytes:.1f} GB without activations")
    assert count(denoiser) == base + 2 * adapter and gigabytes < 6


# ---- processes and kills ---------------------------------------------------------------------------------------------


def on_ranks(rank: int, source: str, prompts: str, folder: str, shard: int, precision: str) -> dict:
    # Plain steps: Adam's would enlarge the rounding of gradients near 0.
    plain = GroupOptions(lambda p: torch.optim.SGD(p, lr=0.01), clip=10.0)
    groups = {"student": GroupOptions(plain.optimizer, clip=10.0, every=2), "fake": plain, "discriminator": plain}
    common = MethodOptions(accumulate=2, precision=precision)
    method = DMD2(source, gan_weight=0.3, student_times=TIMES, common=common, **groups)
    fit(Path(folder), method, 3, data(prompts, PictureStream()), shard=shard, limit_val_batches=0)
    return states(method)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, sd, prompts) -> dict:
    return on_ranks(0, sd, prompts, str(tmp_path_factory.mktemp("one")), 1, "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_and_two_processes_agree(tmp_path, sd, prompts, ranks, alone, precision) -> None:
    """Accumulation included: the student's term passes through the fake network and leaves no sums there."""
    one = alone
    start = DMD2(sd, gan_weight=0.3)
    start.configure_model()
    before = states(start)
    for two in ranks(on_ranks, sd, prompts, str(tmp_path / "two"), 2, precision):
        if precision == "fp32":
            same(two, one, rtol=1e-4, atol=1e-5)
            continue
        for group in ("student", "fake", "discriminator"):  # the directions agree, to bf16's precision
            names = [n for n in one if n.startswith(f"{group}.")]
            ours, theirs = (torch.cat([(s[n] - before[n]).flatten() for n in names]) for s in (two, one))
            assert float(torch.cosine_similarity(ours, theirs, dim=0)) > 0.99
            assert float(ours.norm() / theirs.norm()) == pytest.approx(1, abs=0.05)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_bits_of_a_whole_one(tmp_path) -> None:
    """On one process; what it derives from, DMD, is killed on all three meshes."""
    assert what_a_kill_changes(tmp_path, "dmd2", "1x1") == []
