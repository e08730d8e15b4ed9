"""TextEncoder: each pipeline family's conventions, the empty caption, trimming, joint training."""

from __future__ import annotations

import pytest
import torch
from tiny_networks import pipeline_folder, text_model, tokenizer

from lightning_t2i.errors import UserError
from lightning_t2i.networks.text_encoder import TextEncoder

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


@pytest.mark.parametrize("kind", ["unet_text", "pixart", "flux"])
def test_from_pretrained_float32_from_a_half_precision_folder(kind, tmp_path):
    folder = pipeline_folder(tmp_path, kind)
    name = "clip" if kind == "unet_text" else "t5"
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
