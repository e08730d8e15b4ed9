"""CLIP score against cosines worked out by hand, and the adapter on a small CLIP of transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from lightning_t2i.batch import Records
from lightning_t2i.errors import UserError
from lightning_t2i.metrics.clip_score import ClipScore, TransformersClip
from lightning_t2i.metrics.scorers import ScorerOptions, build_scorer


class Angles:
    """The mean of a picture and the number in a text are angles on the unit circle, in radians."""

    def encode_image(self, images: Tensor) -> Tensor:
        angle = images.mean((1, 2, 3))
        return torch.stack([angle.cos(), angle.sin()], 1)

    def encode_text(self, texts: list[str]) -> Tensor:
        angle = torch.tensor([float(text) for text in texts])
        return 7 * torch.stack([angle.cos(), angle.sin()], 1)  # the length must not count


def picture(*angles: float) -> Tensor:
    return torch.tensor(angles).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)


def test_score_is_the_mean_of_clipped_cosines() -> None:
    metric = ClipScore(Angles(), "angles")
    metric.update(picture(0.0, 0.5), ["0.0", "1.0"])
    metric.update(picture(0.0), [str(math.pi)])  # cosine -1 counts as 0
    assert float(metric.compute()) == pytest.approx(100 * (1 + math.cos(0.5) + 0) / 3, rel=1e-5)
    assert metric.name == "clip_score@n=3,model=angles"


def test_reset_forgets() -> None:
    metric = ClipScore(Angles(), "angles")
    metric.update(picture(0.0), ["1.5"])
    metric.compute()
    metric.reset()
    metric.update(picture(0.0), ["0.0"])
    assert float(metric.compute()) == pytest.approx(100) and "n=1" in metric.name


def test_numbers_of_pictures_and_texts_must_agree() -> None:
    with pytest.raises(ValueError, match="1 images, 2 texts"):
        ClipScore(Angles(), "angles").update(picture(0.0), ["0", "1"])


def score_of_a_rank(rank: int) -> tuple[float, str]:
    metric = ClipScore(Angles(), "angles")
    pairs = [(0.0, "0.2"), (0.1, "0.9"), (0.3, "0.3")][rank :: 1 + (rank == 0)]
    for angle, text in pairs:
        metric.update(picture(angle), [text])
    return float(metric.compute()), metric.name


def test_two_ranks_weigh_every_pair_equally(ranks) -> None:
    # Rank 0 has the first and the last pair, rank 1 the last two.
    first, second = ranks(score_of_a_rank)
    expected = 100 * (math.cos(0.2) + 1 + math.cos(0.8) + 1) / 4
    assert first == second
    assert first[0] == pytest.approx(expected, rel=1e-5) and first[1] == "clip_score@n=4,model=angles"


@pytest.fixture(scope="module")
def small_clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 50, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()


def tokenize(texts: list[str]) -> dict[str, Tensor]:
    rows = [[1, *(3 + ord(c) % 40 for c in text[:6])] for text in texts]
    ids = torch.tensor([row + [2] * (8 - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 2).long()}


def test_adapter_agrees_with_the_network_itself(small_clip: nn.Module) -> None:
    clip = TransformersClip(small_clip, tokenize, 16, ((0.5,) * 3, (0.25,) * 3))
    images, texts = torch.rand(2, 3, 16, 16) * 2 - 1, ["a red dot", "two"]
    with torch.no_grad():
        out = small_clip(pixel_values=images / 2 / 0.25, **tokenize(texts))
    cosine = (out.image_embeds * out.text_embeds).sum(-1)
    assert torch.allclose((clip.encode_image(images) * clip.encode_text(texts)).sum(-1), cosine, atol=1e-5)
    metric = ClipScore(clip, "small")
    metric.update(images, texts)
    assert float(metric.compute()) == pytest.approx(100 * float(cosine.clamp(min=0).mean()), abs=1e-3)


def test_features_may_be_a_tensor_or_an_output_object(small_clip: nn.Module) -> None:
    class Older(nn.Module):
        def get_image_features(self, pixel_values: Tensor) -> Tensor:
            out = small_clip.get_image_features(pixel_values=pixel_values)
            return getattr(out, "pooler_output", out)

    images = torch.rand(2, 3, 16, 16) * 2 - 1
    new = TransformersClip(small_clip, tokenize, 16).encode_image(images)
    assert torch.equal(TransformersClip(Older(), tokenize, 16).encode_image(images), new)
    assert torch.allclose(new.norm(dim=-1), torch.ones(2))


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (20, 20), (16, 16)])
def test_pictures_are_resized_and_cropped_as_pillow_does(small_clip: nn.Module, shape: tuple[int, int]) -> None:
    pixels = torch.randint(60, 190, (3, *shape)).float()  # so rough that smoothing while shrinking shows
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy().astype(np.uint8))
    scale = 16 / min(shape)
    image = image.resize((round(shape[1] * scale), round(shape[0] * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - 16) // 2, (image.height - 16) // 2
    expected = torch.from_numpy(np.asarray(image.crop((left, top, left + 16, top + 16))).copy()).permute(2, 0, 1) / 255
    clip = TransformersClip(small_clip, tokenize, 16, ((0.0,) * 3, (1.0,) * 3))
    prepared = clip.prepare(pixels[None] / 127.5 - 1)[0]
    assert prepared.shape == (3, 16, 16) and torch.allclose(prepared, expected, atol=2 / 255)


@pytest.fixture
def clip_folder(small_clip: nn.Module, tmp_path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    small_clip.save_pretrained(tmp_path / "clip")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<bos>": 1, "<eos>": 2, "red": 3, "dot": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [("<bos>", 1), ("<eos>", 2)]
    words.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=marks)
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(tmp_path / "clip")
    facts = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3], "size": {"shortest_edge": 16}}
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(facts))
    return tmp_path / "clip"


def test_folder_gives_network_tokenizer_and_picture_facts(small_clip: nn.Module, clip_folder: Path) -> None:
    clip = TransformersClip.from_pretrained(clip_folder)
    assert clip.size == 16 and clip.mean.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    ids = torch.tensor([[1, 3, 4, 2, 2, 2, 2, 2]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0]])
    expected = small_clip.get_text_features(input_ids=ids, attention_mask=mask)
    expected = nn.functional.normalize(getattr(expected, "pooler_output", expected), dim=-1)
    assert torch.allclose(clip.encode_text(["red dot"]), expected, atol=1e-5)
    (clip_folder / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 16}}))
    with pytest.raises(UserError, match="No mean of the pictures"):
        TransformersClip.from_pretrained(clip_folder)


def test_clip_score_is_built_by_name(clip_folder: Path) -> None:
    scorer = build_scorer("clip_score", ScorerOptions(clip=str(clip_folder)), "val")
    records = Records(id=torch.arange(2), position=torch.arange(2), caption=["red dot", "dot"])
    scorer.add(torch.rand(2, 3, 16, 16) * 2 - 1, records)
    assert list(scorer.results()) == ["clip_score@n=2,model=clip"]
