"""CLIP: InfoNCE in closed form, two towers that learn, the same gradient on two processes, a stock folder out."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from distilling import same, states
from pictures import Pictures, fit, records
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.nn.functional import normalize
from toy import adam, trainer_for

from lightning_modules.clip import CLIP, info_nce, with_dimension
from lightning_t2i.networks.towers import Towers
from lightning_t2i.options import EMAOptions, GroupOptions, MethodOptions
from lightning_t2i.protocols import Embeds
from lightning_t2i.state_io import AtomicCheckpointIO, Stored

pytestmark = pytest.mark.filterwarnings("ignore:The .* does not have many workers")


def architecture(folder: Path, **options) -> str:
    text = {
        "vocab_size": 2048, "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1,
        "pad_token_id": 1,
    }  # fmt: skip
    vision = {
        "image_size": 16, "patch_size": 8, "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }  # fmt: skip
    facts = {"_class_name": "CLIPModel", "projection_dim": 8, "text_config": text, "vision_config": vision, **options}
    file = folder / "clip.json"
    file.write_text(json.dumps(facts))
    return str(file)


def built(folder: Path, **options) -> CLIP:
    module = CLIP(architecture(folder), "assets/tiny/tokenizers/clip", **options)
    module.configure_model()
    return module


def test_equal_embeddings_cost_the_logarithm_of_the_batch():
    x = normalize(torch.ones(5, 3), dim=-1)
    assert float(info_nce(x, x, torch.tensor(7.0))) == pytest.approx(math.log(5), rel=1e-6)


def test_orthogonal_pairs_cost_what_the_scale_leaves():
    eye, scale = torch.eye(4, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)
    expected = math.log(math.exp(3) + 3) - 3
    assert float(info_nce(eye, eye, scale)) == pytest.approx(expected, rel=1e-12)


def test_both_directions_count():
    images, texts = torch.eye(2, dtype=torch.float64), torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    one = torch.tensor(1.0, dtype=torch.float64)
    rows, columns = math.log(2), (math.log(math.e + 1) - 1 + math.log(math.e + 1)) / 2
    assert float(info_nce(images, texts, one)) == pytest.approx((rows + columns) / 2, rel=1e-12)


def test_the_scale_of_the_logits_is_limited(tmp_path):
    module = built(tmp_path)
    with torch.no_grad():
        module.towers.clip.logit_scale.fill_(9.0)
    batch = records(0, 4)
    assert module.towers(batch.image, module.towers.tokenize(batch.caption))[2].item() == 100.0


def test_it_learns_which_text_belongs_to_which_picture(tmp_path):
    module = built(tmp_path)
    optimizer = torch.optim.Adam(module.towers.parameters(), 3e-3)
    batch, losses = {"main": records(0, 4)}, []
    for _ in range(60):
        loss, accuracy = module.contrast(batch, module.towers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert accuracy.item() == 1.0


def test_validation_reports_loss_and_accuracy(tmp_path):
    module = built(tmp_path, towers=GroupOptions(adam(1e-3)))
    trainer = fit(tmp_path, module, 2, val_check_interval=2)
    assert {"val/loss", "val/accuracy"} <= trainer.callback_metrics.keys()


def test_the_export_is_a_stock_folder_with_our_embeddings(tmp_path):
    from transformers import AutoProcessor, CLIPModel

    module = built(tmp_path).eval()
    assert isinstance(module, Embeds)
    module.export(tmp_path / "out", [])
    model = CLIPModel.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert load_file(tmp_path / "out" / "model.safetensors")["logit_scale"].shape == ()
    images = (records(0, 3).image.clamp(-1, 1) * 127.5 + 127.5).round()
    pixels = [np.asarray(image.permute(1, 2, 0).to(torch.uint8)) for image in images]
    texts = ["a red square", "blue", "two circle and a square"]
    processor = AutoProcessor.from_pretrained(tmp_path / "out", use_fast=False)
    with torch.no_grad():
        out = model(**processor(images=pixels, text=texts, return_tensors="pt", padding=True))
        torch.testing.assert_close(out.image_embeds, module.encode_image(images / 127.5 - 1), atol=3e-3, rtol=0)
        torch.testing.assert_close(out.text_embeds, module.encode_text(texts), atol=3e-3, rtol=0)
    again = Towers.build(str(tmp_path / "out"))
    torch.testing.assert_close(again.encode_text(again.tokenize(texts)), out.text_embeds, atol=1e-5, rtol=0)


def on_ranks(rank: int, folder: str, replicate: int) -> dict[str, torch.Tensor]:
    sys.path.append(str(Path(__file__).resolve().parents[1] / "helpers"))
    # Plain steps: Adam's would enlarge the rounding of gradients near 0.
    towers = GroupOptions(lambda p: torch.optim.SGD(p, lr=0.1), clip=None)
    Path(folder).mkdir(exist_ok=True)
    module = CLIP(architecture(Path(folder)), "assets/tiny/tokenizers/clip", towers)
    fit(Path(folder), module, 2, replicate=replicate, limit_val_batches=0)
    return states(module)


def test_negatives_come_from_all_processes(tmp_path, ranks):
    """And gradients go back to the process that a row came from."""
    one, before = on_ranks(0, str(tmp_path / "one"), 1), states(built(tmp_path))
    for tower in ("visual", "text"):
        assert float((one[name := f"towers.clip.{tower}_projection.weight"] - before[name]).abs().max()) > 1e-3
    for two in ranks(on_ranks, str(tmp_path / "two"), 2):
        same(two, one, rtol=1e-4, atol=1e-6)


def share_of_five(rank: int) -> list[torch.Tensor]:
    """What is gathered of five rows, three of them on the first process."""
    module = CLIP("x")
    module._trainer = SimpleNamespace(world_size=2, training=False)

    def stacked(x: torch.Tensor) -> torch.Tensor:
        found = [torch.empty_like(x) for _ in range(2)]
        torch.distributed.all_gather(found, x)
        return torch.stack(found)

    module.all_gather = stacked
    return [module.gathered(torch.arange(5.0)[:3] if rank == 0 else torch.arange(5.0)[3:])]


def test_shares_of_a_last_batch_may_differ_in_validation(ranks):
    for (found,) in ranks(share_of_five):
        assert found.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_cosines_of_half_precision_are_told_apart():
    images = torch.nn.functional.normalize(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    half = images.bfloat16()
    loss = info_nce(half, half, torch.tensor(20.0))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, info_nce(half.float(), half.float(), torch.tensor(20.0)))


def test_it_trains_sharded_in_bf16(tmp_path):
    """FSDP2 refuses a scale without dimensions, as transformers makes it."""
    common = MethodOptions(precision="bf16")
    module = CLIP(architecture(tmp_path), "assets/tiny/tokenizers/clip", GroupOptions(adam(1e-2)), common)
    fit(tmp_path, module, 2, val_check_interval=2, fsdp=True)
    scale = module.towers.clip.logit_scale
    assert isinstance(scale, DTensor) and scale.shape == (1,)
    assert scale.item() != built(tmp_path).towers.clip.logit_scale.item()


class InFiles(Stored):
    shape, dtype = torch.Size(()), torch.float32

    def into(self, target: torch.Tensor) -> None:
        target.fill_(3.0)


def test_a_checkpoint_whose_scale_has_no_dimension_goes_on(tmp_path):
    """As a training before wrote it, and any optimizer beside its count of steps."""

    def trained(steps: int, checkpoint: Path | None = None) -> tuple[CLIP, L.Trainer]:
        module = built(tmp_path, towers=GroupOptions(adam(1e-2), ema=EMAOptions([0.9, 0.5])))
        trainer = trainer_for(tmp_path, steps, max_epochs=-1, limit_val_batches=0)
        trainer.fit(module, Pictures(), ckpt_path=checkpoint, weights_only=True)
        return module, trainer

    trained(2)[1].save_checkpoint(tmp_path / "new", False)
    state = AtomicCheckpointIO().load_checkpoint(tmp_path / "new")
    states = state["t2i"]["groups"]["towers"]["states"]["clip.logit_scale"]
    for tensors in (state["state_dict"], states):
        scales = {k: v.reshape(()) for k, v in tensors.items() if tensors is states or k.endswith("logit_scale")}
        assert len(scales) == 3
        tensors.update(scales)
    AtomicCheckpointIO().save_checkpoint(state, tmp_path / "old")
    (module, _), (other, _) = (trained(4, tmp_path / name) for name in ("old", "new"))
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in module.state_dict().items())
    kept = module.groups["towers"].optimizer.state[module.towers.clip.logit_scale]
    assert {k: v.dim() for k, v in kept.items()} == {"step": 0, "exp_avg": 1, "exp_avg_sq": 1}
    assert torch.equal(with_dimension(InFiles()), torch.tensor([3.0]))  # of a checkpoint in the sharded form
