"""TextEncoder: each pipeline family's conventions, the empty caption, trimming, joint training."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch
import torch.distributed as dist
from tiny_networks import pipeline_folder, text_model, tokenizer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lightning_t2i.errors import UserError
from lightning_t2i.group import Group
from lightning_t2i.networks.text_encoder import TextEncoder
from lightning_t2i.options import EMAOptions, GroupOptions
from lightning_t2i.strategies.sharding import shard_network

CAPTIONS = ["a red square and a blue circle", "", "two"]


@pytest.fixture
def clip(tmp_path):
    return TextEncoder(clip=text_model("clip"), clip_tokenizer=tokenizer(tmp_path, "clip")).requires_grad_(False)


def t5(tmp_path, **options) -> TextEncoder:
    model = text_model("t5")
    return TextEncoder(t5=model, t5_tokenizer=tokenizer(tmp_path, "t5"), t5_length=8, **options).requires_grad_(False)


@torch.no_grad()
def test_stable_diffusion_attends_all_padded_positions(clip):
    cond = clip(CAPTIONS)
    ids = clip._clip_tokenizer(CAPTIONS, padding="max_length", max_length=8, truncation=True, return_tensors="pt")
    torch.testing.assert_close(cond.embeds, clip.clip(ids["input_ids"]).last_hidden_state)
    assert cond.embeds.shape == (3, 8, 12) and cond.mask is None and cond.pooled is None
    torch.testing.assert_close(cond.null().embeds[0], cond.embeds[1])


@pytest.mark.parametrize("kind", ["unet_text", "unet_xl", "pixart", "flux"])
@torch.no_grad()
def test_the_width_of_the_embeddings_is_known_beforehand(kind, tmp_path):
    encoder = TextEncoder.from_pretrained(str(pipeline_folder(tmp_path, kind)))
    assert encoder.width == encoder(CAPTIONS).embeds.shape[-1]


@torch.no_grad()
def test_t5_has_a_mask_and_trimming_changes_nothing_that_counts(tmp_path):
    full, trimmed = t5(tmp_path), t5(tmp_path, trim=True)
    captions = ["a red square", "", "two"]
    a, b = full(captions), trimmed(captions)
    assert a.embeds.shape[1] == 8 and b.embeds.shape[1] == b.null_embeds.shape[0] == 4
    assert a.mask.sum(1).tolist() == b.mask.sum(1).tolist() == [4, 1, 2]
    torch.testing.assert_close(a.embeds[a.mask], b.embeds[b.mask])
    torch.testing.assert_close(b.null().embeds[b.null().mask], a.null().embeds[a.null().mask])
    torch.testing.assert_close(b.null().embeds[0][:1], b.embeds[1][:1])
    with pytest.raises(UserError, match="trim"):
        TextEncoder(clip=text_model("clip"), clip_tokenizer=None, trim=True)


@torch.no_grad()
def test_flux_takes_pooled_clip_and_unmasked_t5(tmp_path):
    encoder = TextEncoder.from_pretrained(str(pipeline_folder(tmp_path, "flux")), t5_length=8)
    cond = encoder(CAPTIONS)
    assert cond.embeds.shape == (3, 8, 12) and cond.pooled.shape == (3, 6) and cond.mask is None
    ids = encoder.tokenize(CAPTIONS)
    torch.testing.assert_close(cond.pooled, encoder.clip(ids["clip"]).pooler_output)
    torch.testing.assert_close(cond.embeds, encoder.t5(ids["t5"]).last_hidden_state)
    torch.testing.assert_close(cond.null().pooled[0], cond.pooled[1])


def sdxl(folder: Path, **index) -> TextEncoder:
    """The encoders of a tiny SDXL pipeline; `index` goes into its model_index.json."""
    facts = json.loads((pipeline_folder(folder, "unet_xl") / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(facts | index))
    return TextEncoder.from_pretrained(str(folder))


@pytest.mark.parametrize("zeros", [True, False, None])
@pytest.mark.parametrize("trained", [True, False])
def test_sdxl_equals_the_stock_pipeline(zeros, trained, tmp_path):
    """Both captions and the unconditional condition, which is zeros where the pipeline does not say."""
    encoder = sdxl(tmp_path, **({} if zeros is None else {"force_zeros_for_empty_prompt": zeros}))
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    assert pipeline.config.force_zeros_for_empty_prompt == encoder.zero_null == (zeros is not False)
    with torch.no_grad():
        embeds, null_embeds, pooled, null_pooled = pipeline.encode_prompt(CAPTIONS, device=torch.device("cpu"))
    cond = encoder.requires_grad_(trained)(CAPTIONS)
    assert cond.embeds.shape == (3, 8, 4 + 8) and cond.pooled.shape == (3, 6) and cond.mask is None
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(cond.embeds, embeds, **close)
    torch.testing.assert_close(cond.pooled, pooled, **close)
    torch.testing.assert_close(cond.null().embeds, null_embeds, **close)
    torch.testing.assert_close(cond.null().pooled, null_pooled, **close)
    assert (float(cond.null_embeds.abs().sum().detach()) == 0) == encoder.zero_null


@pytest.mark.parametrize("zeros", [True, False])
def test_trained_sdxl_encoders_get_gradients(zeros, tmp_path):
    encoder = sdxl(tmp_path, force_zeros_for_empty_prompt=zeros).requires_grad_(True)
    cond = encoder(["two"])
    assert cond.embeds.requires_grad and cond.null_embeds.requires_grad is cond.null_pooled.requires_grad is not zeros
    ((cond.embeds**2).sum() + (cond.pooled**2).sum()).backward()
    idle = {name for name, p in encoder.named_parameters() if p.grad is None}
    # The first encoder's last layer is behind what is read of it; the second's makes the pooled text.
    assert idle and all(n.startswith(("clip.encoder.layers.1.", "clip.final_layer_norm.")) for n in idle)
    assert encoder.clip_2.text_projection.weight.grad.abs().sum() > 0


def test_a_second_clip_needs_a_first_one_and_no_t5(tmp_path):
    for others in ({}, {"clip": text_model("clip"), "t5": text_model("t5")}, {"t5": text_model("t5")}):
        with pytest.raises(UserError):
            TextEncoder(**others, clip_2=text_model("clip_2"))
    with pytest.raises(UserError, match="zero_null"):
        TextEncoder(clip=text_model("clip"), zero_null=True)


@pytest.mark.parametrize(
    "classes",
    [
        ("CLIPTextModelWithProjection", "CLIPTextModelWithProjection", "T5EncoderModel"),  # SD3
        (None, "CLIPTextModelWithProjection"),  # the refiner of SDXL
    ],
)
def test_pipelines_that_are_not_served_are_told_before_anything_is_read(classes, tmp_path):
    entries = {
        f"text_encoder{suffix}": [kind and "transformers", kind]
        for suffix, kind in zip(("", "_2", "_3"), classes, strict=False)
    }
    (tmp_path / "model_index.json").write_text(json.dumps(entries))
    with pytest.raises(UserError, match="not served") as error:
        TextEncoder.from_pretrained(str(tmp_path))
    assert " + ".join(kind for kind in classes if kind) in str(error.value)
    assert "CLIPTextModel + CLIPTextModelWithProjection" in str(error.value)


@pytest.mark.parametrize("kind", ["unet_text", "unet_xl", "pixart", "flux"])
def test_from_pretrained_float32_from_a_half_precision_folder(kind, tmp_path):
    folder = pipeline_folder(tmp_path, kind)
    name = "clip" if kind.startswith("unet") else "t5"
    place = folder / ("text_encoder_2" if kind == "flux" else "text_encoder")
    text_model(name).half().save_pretrained(place)
    encoder = TextEncoder.from_pretrained(str(folder))
    assert {p.dtype for p in encoder.parameters()} == {torch.float32} and not encoder.training
    assert TextEncoder.from_pretrained(str(folder), torch_dtype=torch.bfloat16)(["two"]).embeds.dtype == torch.bfloat16


def test_a_frozen_encoder_encodes_the_empty_caption_once(clip, monkeypatch):
    sizes = []
    monkeypatch.setattr(clip.clip, "forward", _counted(clip.clip.forward, sizes))
    clip(["two"])
    clip(["a", "two"])
    assert sorted(sizes) == [1, 1, 2]
    old = clip(["two"]).null_embeds
    clip.clip.load_state_dict({k: v * 1.5 for k, v in clip.clip.state_dict().items()})
    assert not torch.allclose(clip(["two"]).null_embeds, old)


def test_a_sharded_average_encodes_the_empty_caption_again_after_an_update(tmp_path):
    """A run that goes on would else see another one than a run that was not stopped."""
    clip = TextEncoder(clip=text_model("clip"), clip_tokenizer=tokenizer(tmp_path, "clip"))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))
    group = Group("text", clip, GroupOptions(ema=EMAOptions(decay=0.5, warmup=False)))
    for member in (group.network, group.ema):
        shard_network(member, mesh, "bf16")
    group.build()
    assert isinstance(next(group.ema.parameters()), DTensor)
    old = group.ema(["two"]).null_embeds
    with torch.no_grad():
        for parameter in group.parameters:
            parameter.mul_(1.5)
    group.average(0)
    assert not torch.allclose(group.ema(["two"]).null_embeds, old)


def test_a_trained_encoder_gives_gradients_to_the_empty_caption(clip, monkeypatch):
    sizes = []
    monkeypatch.setattr(clip.clip, "forward", _counted(clip.clip.forward, sizes))
    clip.requires_grad_(True)
    cond = clip(["two", "a red circle"])
    assert sizes == [3] and len(cond) == 2
    cond.null_embeds.sum().backward()
    assert clip.clip.get_input_embeddings().weight.grad.abs().sum() > 0
    with torch.no_grad():
        torch.testing.assert_close(clip([""]).embeds[0], clip([""]).null_embeds)


def test_long_captions_are_cut(clip):
    assert clip.tokenize(["red " * 50])["clip"].shape == (1, 8)


def test_unknown_encoders_are_refused(tmp_path):
    folder = pipeline_folder(tmp_path)
    index = (folder / "model_index.json").read_text()
    (folder / "model_index.json").write_text(index.replace("CLIPTextModel", "BertModel"))
    with pytest.raises(UserError, match="BertModel"):
        TextEncoder.from_pretrained(str(folder))
    with pytest.raises(UserError):
        TextEncoder()


def _counted(forward, sizes: list[int]):
    def call(*args, input_ids, **kwargs):
        sizes.append(len(input_ids))
        return forward(*args, input_ids=input_ids, **kwargs)

    return call
