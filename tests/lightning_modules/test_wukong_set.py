"""Wukong with one vector on a distilled set: the loss by hand, what is trained, real captions, refusals."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import fit
from repblend_parts import TwoCaptions
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPModel
from weights import weights_hash
from wukong_parts import IMAGE, image_folder

from datamodules.streams import Streams
from datamodules.synthetic import SyntheticPairs
from lightning_modules.wukong_set import WukongOfSet
from lightning_t2i.errors import UserError
from lightning_t2i.keys import Keys
from lightning_t2i.networks.frozen_pair import FrozenTexts
from lightning_t2i.networks.image_tower import ImageTower
from lightning_t2i.options import EMAOptions, GroupOptions, MethodOptions
from lightning_t2i.paths import ROOT
from lightning_t2i.synthetic_set import SyntheticSet

TEXT, PAIRS = "assets/tiny/pixart", 12


def write(folder: Path, soft: bool, **facts: Any) -> str:
    """A set of noise pictures, each with the vector of a caption of its own."""
    texts, identity = FrozenTexts.build(TEXT)
    with torch.no_grad():
        vectors = texts([f"a picture with the number {i}" for i in range(PAIRS)])
    pictures = Keys(1).normal("pictures", torch.arange(PAIRS), (3, 8, 8))
    draw = partial(Keys(2).normal, positions=torch.arange(PAIRS))
    factors = (torch.ones(PAIRS), draw("left", shape=(2,)) / 4, draw("right", shape=(2,)) / 4) if soft else ()
    given = {"image": "another", "text": identity, "alpha": 1.0, **facts}
    SyntheticSet(pictures, vectors, factors, torch.full((2,), 0.1), given).save(folder)
    return str(folder)


def method(tmp_path: Path, soft: bool = False, **options: Any) -> WukongOfSet:
    targets = options.pop("targets", None) or write(tmp_path / "set", soft)
    update = GroupOptions(partial(torch.optim.AdamW, lr=0.01), ema=EMAOptions(0.9))
    image = image_folder(tmp_path, {**IMAGE, "image_size": 8, "patch_size": 4})
    return WukongOfSet(image, TEXT, targets, **{"width": 8, "towers": update, **options})


def streams(targets: str, batch_size: int = 6) -> Streams:
    return Streams(SyntheticPairs(targets, batch_size), val=TwoCaptions(4, 8), test=TwoCaptions(4, 8))


@pytest.mark.parametrize("contrast", ["wbce", "cwcl", "infonce"])
def test_the_loss_is_that_of_logits_and_the_similarity_of_the_pairs_of_the_batch(tmp_path, contrast) -> None:
    module = method(tmp_path, soft=True, contrast=contrast)
    module.configure_model()
    stream = SyntheticPairs(module.targets, 6)
    stream.setup()
    stream.begin(0, "main")
    main = stream.load(range(6), 0)
    loss, _ = module.set_loss(main)
    found = SyntheticSet.load(Path(module.targets))
    x = normalize(module.towers.image_projection(module.image(main.image))[:, 0], dim=-1)
    y = normalize(module.towers.text_projection(found.texts[main.label]), dim=-1)
    logits, target = x @ y.T / 0.07, found.similarity[main.label][:, main.label]
    if contrast == "wbce":
        p = logits.sigmoid()
        e = -target * p.log() - (1 - target) * (1 - p).log()
        wanted = (e[target > 0.5].mean() + e[target <= 0.5].mean()) / 2
    elif contrast == "cwcl":
        wanted = torch.tensor(0.0)
        for way, s in ((logits, target), (logits.T, target.T)):
            wanted = wanted - (s / (s.sum(1, keepdim=True) + 1e-6) * way.log_softmax(1)).sum(1).mean() / 2
    else:
        wanted = -(logits.log_softmax(1).diagonal().mean() + logits.log_softmax(0).diagonal().mean()) / 2
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.equal(target, torch.eye(6)) and main.caption is None


def test_it_learns_the_pairs_and_nothing_but_projections_and_the_scale_moves(tmp_path) -> None:
    module = method(tmp_path, contrast="infonce")
    data = streams(module.targets, PAIRS)
    module.configure_model()
    trained = {name for name, weight in module.groups["towers"].network.named_parameters() if weight.requires_grad}
    assert trained == {"image_projection.weight", "text_projection.weight", "logits.log_scale"}
    frozen = [weights_hash(network) for network in (module.image, module.text)]
    before = module.towers.text_projection.weight.detach().clone()
    fit(tmp_path, module, 60, data)
    assert [weights_hash(network) for network in (module.image, module.text)] == frozen
    assert not torch.equal(before, module.towers.text_projection.weight)
    found = SyntheticSet.load(Path(module.targets))
    pipeline = module.pipeline
    x = pipeline.encode_image(found.images)
    y = pipeline.encode_text([f"a picture with the number {i}" for i in range(PAIRS)])
    assert x.shape == y.shape == (PAIRS, 8)
    assert (pipeline.similarity(x, y)[0].argmax(1) == torch.arange(PAIRS)).float().mean() > 0.7


def test_logits_begin_at_the_scale(tmp_path) -> None:
    found = []
    for scale in (2.0, 20.0):
        module = method(tmp_path, scale=scale)
        module.configure_model()
        stream = SyntheticPairs(module.targets, 6)
        stream.setup()
        stream.begin(0, "main")
        loss, noted = module.set_loss(stream.load(range(6), 0))
        assert float(noted["scale"]) == pytest.approx(scale)
        found.append(float(loss.detach()))
    assert found[0] != pytest.approx(found[1], rel=0.05)


@pytest.mark.parametrize("lock", [False, True])
def test_a_locked_projection_is_the_towers_own_and_stays(tmp_path, lock) -> None:
    torch.manual_seed(5)
    vision = {name: value for name, value in IMAGE.items() if name != "_class_name"}
    vision |= {"image_size": 8, "patch_size": 4}
    text = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=8))
    clip.save_pretrained(tmp_path / "image")
    module = method(tmp_path, lock_projection=lock)
    fit(tmp_path, module, 2, streams(module.targets), limit_val_batches=0)
    weight = module.towers.image_projection.weight
    assert weight.requires_grad is not lock
    assert torch.equal(weight.detach(), clip.visual_projection.weight) is lock


def test_real_captions_are_retrieved_in_validation(tmp_path) -> None:
    module = method(tmp_path)
    trainer = fit(tmp_path, module, 2, streams(module.targets))
    found = trainer.validate(module, streams(module.targets), verbose=False)[0]
    assert 0 <= found["val/mean"] <= 100 and "val/i2t/r1" in found


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"style": "f"}, "vectors without tokens"),
        ({"style": "r"}, "vectors without tokens"),
        ({"common": MethodOptions(accumulate=2)}, "one batch of contrast"),
    ],
)
def test_what_a_set_cannot_serve_is_refused(tmp_path, options, said) -> None:
    with pytest.raises(UserError, match=said):
        method(tmp_path, **options)


def test_another_text_encoder_and_another_folder_are_refused(tmp_path) -> None:
    targets = write(tmp_path / "other", False, text="sha256:another")
    with pytest.raises(UserError, match="another text encoder") as error:
        method(tmp_path, targets=targets).configure_model()
    assert "sha256:another" in str(error.value)
    stream = SyntheticPairs(str(tmp_path))
    with pytest.raises(UserError, match="Not the folder of a synthetic set"):
        stream.setup()


def test_both_encoders_are_read_at_their_revisions(tmp_path, monkeypatch) -> None:
    asked, tower, texts = [], ImageTower.build, FrozenTexts.build

    def recorded_tower(source, tokens, revision=None):
        asked.append(revision)
        return tower(source, tokens)

    def recorded_texts(source, revision=None):
        asked.append(revision)
        return texts(source)

    module = method(tmp_path, revision="abc", text_revision="def")
    monkeypatch.setattr(ImageTower, "build", recorded_tower)
    monkeypatch.setattr(FrozenTexts, "build", recorded_texts)
    module.configure_model()
    assert asked == ["abc", "def"]


def test_an_export_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="no model of their own"):
        method(tmp_path).export(tmp_path / "out", [])


def test_the_stream_tells_sets_apart(tmp_path) -> None:
    found = []
    for name, soft in (("a", False), ("b", True)):
        stream = SyntheticPairs(write(tmp_path / name, soft), 4)
        stream.setup()
        stream.begin(0, "main")
        records = stream.load(range(4), 0)
        assert records.image.shape == (4, 3, 8, 8) and records.cond.embeds.shape[:2] == (4, 1)
        found.append((json.dumps(stream.identity), records.id.tolist()))
    assert found[0][0] != found[1][0] and not set(found[0][1]) & set(found[1][1])


def test_the_tiny_config_reads_the_set_that_it_is_matched_to() -> None:
    text = (ROOT / "configs" / "wukong" / "tiny_set.yaml").read_text(encoding="utf-8")
    assert "targets: &set" in text and "source: *set" in text
