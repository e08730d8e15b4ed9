"""Teachers of every kind sample as the functions do, from frozen networks, and say what their pairs depend on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_networks import pipeline_folder

from lightning_modules.teacher import Teacher
from lightning_t2i.batch import Cond, Records
from lightning_t2i.errors import UserError
from lightning_t2i.keys import Keys
from lightning_t2i.networks.edm_unets import SongUNet
from lightning_t2i.options import MethodOptions
from lightning_t2i.pairs import noise
from lightning_t2i.processes import EDM, sample
from lightning_t2i.processes.sampling import solve
from lightning_t2i.protocols import Couples, Generates

CAPTIONS = ["red circle", "the two blue"]


def built(network: Path, **options) -> Teacher:
    method = Teacher(str(network), steps=2, **options)
    method.configure_model()
    return method


def records() -> Records:
    found = Records.of_prompts(CAPTIONS)
    found.label, found.noise_seed = torch.tensor([3, 7]), torch.tensor([5, 6])
    return found


@pytest.mark.parametrize("kind", ["unet", "unet_class", "unet_text", "unet_xl", "pixart", "flux"])
def test_x0_is_what_the_sampler_gives(tmp_path, kind) -> None:
    guidance = 1.0 if kind == "unet" else 2.0
    method = built(pipeline_folder(tmp_path, kind), guidance=guidance, embedded_guidance=3.5, size=16)
    found, shape = records(), method.latent_shape()
    assert shape == (4, 8, 8) and isinstance(method, Couples) and isinstance(method, Generates)
    cond = method.condition(found)
    if kind == "unet":
        assert cond is None
    elif kind == "unet_class":
        assert cond.label.tolist() == [3, 7] and cond.null_label == 10
    else:
        torch.testing.assert_close(cond.embeds, method.text(CAPTIONS).embeds)
    if kind == "flux":
        assert cond.guidance.tolist() == [3.5, 3.5]
    z = noise(found.noise_seed, shape)
    x0 = method.predict_step({"main": found}, 0)
    assert torch.equal(x0, sample(method.denoiser, z, cond, 2, guidance, "ddim"))
    assert not any(p.requires_grad for p in method.parameters()) and not method.denoiser.training


def test_records_without_a_seed_become_pictures(tmp_path) -> None:
    method = built(pipeline_folder(tmp_path), guidance=2.0)
    found = Records.of_prompts(CAPTIONS)
    pictures = method.predict_step({"main": found}, 0)
    z = Keys(0).fork("predict").normal("z", found.position, (4, 8, 8))
    expected = method.codec.decode(method.couple(z, method.condition(found))).clamp(-1, 1)
    assert pictures.shape == (2, 3, 16, 16) and torch.equal(pictures, expected)


def test_cached_conditions_are_used(tmp_path) -> None:
    method = built(pipeline_folder(tmp_path))
    found = records()
    found.cond = Cond(label=found.label)
    assert method.condition(found) is found.cond


def edm_folder(folder: Path) -> Path:
    torch.manual_seed(0)
    network = SongUNet(sample_size=8, num_classes=10, channels=8, channel_mult=(1, 1), blocks=1)
    network.save_pretrained(folder)
    return folder


def test_a_class_conditional_pixel_teacher_starts_at_80_z(tmp_path) -> None:
    method = built(edm_folder(tmp_path), process=EDM(), prediction="edm", solver="heun")
    assert method.recipe()["x0"] == "image" and method.latent_shape() == (3, 8, 8)
    found = records()
    cond, z = method.condition(found), noise(found.noise_seed, (3, 8, 8))
    assert cond.label.tolist() == [3, 7] and cond.null_label == 10
    with torch.no_grad():
        expected = solve(
            lambda x, t: method.denoiser.x0(x, t, cond), EDM(), 80 * z, EDM().timesteps(2), "heun"
        )  # fmt: skip
    assert torch.equal(method.couple(z, cond), expected)


def test_the_recipe_changes_with_what_x0_depends_on(tmp_path) -> None:
    folder = pipeline_folder(tmp_path / "a")
    first = Teacher(str(folder), guidance=2.0).recipe()
    assert json.loads(json.dumps(first)) == first and first["x0"] == "latent"
    changes = {"guidance": 3.0, "steps": 5, "solver": "dpmpp_2m", "embedded_guidance": 2.0, "size": 32}
    changes |= {"process": EDM(), "prediction": "v", "common": MethodOptions(precision="bf16")}
    for name, value in changes.items():
        assert Teacher(str(folder), **{"guidance": 2.0, name: value}).recipe() != first, name
    other = Path(shutil.copytree(folder, tmp_path / "b"))
    assert Teacher(str(other), guidance=2.0).recipe() == first  # a moved folder is the same teacher


def test_bf16_weights_and_a_float32_state(tmp_path) -> None:
    method = built(pipeline_folder(tmp_path), common=MethodOptions(precision="bf16"))
    found = records()
    assert next(method.denoiser.parameters()).dtype == torch.bfloat16
    assert method.couple(noise(found.noise_seed, (4, 8, 8)), method.condition(found)).dtype == torch.float32


def test_what_cannot_be_sampled_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="at least one step"):
        Teacher("x", steps=0)
    with pytest.raises(UserError, match="cannot be guided"):
        built(pipeline_folder(tmp_path, "unet"), guidance=2.0)
