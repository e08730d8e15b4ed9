"""Wukong: the properties of its spec, P1 to P10, what is locked, cached accumulation, exports, wrong input."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pictures import Pictures, fit
from toy import adam
from weights import weights_hash
from wukong_parts import (
    CAPTIONS,
    IMAGE,
    SWIN,
    chinese,
    image_folder,
    plain_loss,
    plain_similarity,
    ragged,
    text_file,
    unit,
    wukong,
)

from lightning_modules.clip import info_nce
from lightning_modules.wukong import Wukong
from lightning_t2i.cli.configs import merge
from lightning_t2i.dual_encoder_pipeline import DualEncoderPipeline
from lightning_t2i.errors import UserError
from lightning_t2i.forward_units import counting_units, differences
from lightning_t2i.networks.dual_encoder import DualEncoder
from lightning_t2i.networks.image_tower import ImageTower
from lightning_t2i.networks.load import build_network
from lightning_t2i.networks.token_reduction import GroupedLinear, TokenReduction
from lightning_t2i.options import EMAOptions, GroupOptions, MethodOptions
from lightning_t2i.paths import ROOT
from lightning_t2i.preflight.rehearsal import kinds_of_steps
from lightning_t2i.processes.similarity import contrastive_loss, strips, token_similarity
from lightning_t2i.protocols import Embeds, Exports
from lightning_t2i.state_io import AtomicCheckpointIO

pytestmark = pytest.mark.filterwarnings("ignore:The .* does not have many workers")
A = torch.tensor(10.0, dtype=torch.float64)
STYLES = ("g", "f", "r")


def plain(rate: float = 0.1, **options: Any) -> GroupOptions:
    return GroupOptions(lambda p: torch.optim.SGD(p, lr=rate), clip=None, **options)


class Chinese(Pictures):
    """Noise pictures with Chinese captions."""

    def _batches(self, stop):
        loader = super()._batches(stop)

        class Spoken(torch.utils.data.IterableDataset):
            def __iter__(self):
                for batch in loader.dataset:
                    first, size = int(batch["main"].position[0]), len(batch["main"])
                    yield {"main": chinese(first, size)}

        return torch.utils.data.DataLoader(Spoken(), batch_size=None)


def trained(folder: Path, module: Wukong, steps: int, batch_size: int = 4, **options: Any) -> Any:
    return fit(folder, module, steps, Chinese(batch_size), limit_val_batches=options.pop("val", 0), **options)


# ---- P1: the loss in closed form -------------------------------------------------------------------------------------


def test_P1_one_token_each_is_clip_in_value_and_gradient():
    images, texts = unit(6, 1, 8, seed=1), unit(6, 1, 8, seed=2)
    found = []
    for make in (lambda x, y: contrastive_loss(*strips(x, y, ragged([1] * 6, 1)), A),
                 lambda x, y: info_nce(x[:, 0], y[:, 0], A)):  # fmt: skip
        x, y = images.clone().requires_grad_(), texts.clone().requires_grad_()
        make(x, y).backward()
        found.append([make(x, y).detach(), x.grad, y.grad])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_P1_cosines_of_half_precision_are_float32():
    x = unit(6, 1, 16, dtype=torch.float32).bfloat16()
    found, back = token_similarity(x, x, back=True)
    assert found.dtype == back.dtype == torch.float32
    torch.testing.assert_close(found, x[:, 0].float() @ x[:, 0].float().T)


def test_P1_no_scale_costs_the_logarithm_of_the_batch():
    there, back = token_similarity(unit(7, 3, 4), unit(7, 5, 4, seed=1), back=True)
    assert float(contrastive_loss(there, back, torch.zeros(1, dtype=torch.float64))) == math.log(7)


def test_P1_orthonormal_pairs_cost_what_the_scale_leaves():
    eye = torch.eye(5, dtype=torch.float64)[:, None]
    loss = contrastive_loss(*strips(eye, eye, ragged([1] * 5, 1)), A)
    assert float(loss) == pytest.approx(math.log(1 + 4 * math.exp(-10)), rel=1e-9)


# ---- P2, P3, P4, P5: the similarity ----------------------------------------------------------------------------------


def test_P2_equal_tokens_give_the_global_cosine():
    images, texts = unit(3, 1, 4), unit(5, 1, 4, seed=1)
    there, back = token_similarity(images.expand(-1, 6, -1), texts.expand(-1, 2, -1), back=True)
    torch.testing.assert_close(there, images[:, 0] @ texts[:, 0].T)
    torch.testing.assert_close(back, texts[:, 0] @ images[:, 0].T)


def test_P2_the_same_set_of_tokens_has_similarity_one_and_none_has_more():
    tokens = unit(3, 6, 4)
    there, back = token_similarity(tokens, tokens[:, torch.randperm(6)], back=True)
    torch.testing.assert_close(there.diagonal(), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(back.diagonal(), torch.ones(3, dtype=torch.float64))
    there, back = token_similarity(unit(9, 4, 2), unit(9, 3, 2, seed=1), back=True)
    assert float(torch.cat([there, back]).abs().max()) <= 1 + 1e-12


def test_P3_order_and_copies_of_tokens_do_not_count():
    images, texts, mask = unit(3, 4, 5), unit(3, 6, 5, seed=1), ragged([6, 2, 1], 6)
    whole = token_similarity(images, texts, None, mask, back=True)
    order, many = torch.randperm(4), torch.randperm(6)
    changed = token_similarity(images[:, order], texts[:, many], None, mask[:, many], back=True)
    doubled = token_similarity(images.repeat(1, 2, 1), texts, None, mask, back=True)
    for found in (changed, doubled):
        for a, b in zip(found, whole, strict=True):
            torch.testing.assert_close(a, b)


def test_P3_more_padding_changes_nothing_but_with_the_floor():
    images, texts = -unit(2, 3, 4).abs(), unit(2, 2, 4, seed=1).abs()  # all cosines are negative
    full, longer = ragged([2, 2], 2), ragged([2, 2], 5)
    padded = torch.cat([texts, unit(2, 3, 4, seed=3)], 1)
    whole = token_similarity(images, texts, None, full, back=True)
    for a, b in zip(token_similarity(images, padded, None, longer, back=True), whole, strict=True):
        torch.testing.assert_close(a, b)
    floor, back = token_similarity(images, padded, None, longer, "zero_floor", back=True)
    assert float(whole[0].max()) < 0 and bool((floor == 0).all())
    torch.testing.assert_close(back, whole[1])
    reference, _ = plain_similarity(images, padded, longer, floor=True)
    torch.testing.assert_close(floor, reference)


def test_P3_the_padding_case():
    images = torch.tensor([[[1.0, 0.0]]])
    texts, mask = torch.tensor([[[-0.6, 0.8], [-0.8, 0.6], [0.0, 0.0]]]), ragged([2], 3)
    for pad, there in (("exact", -0.6), ("zero_floor", 0.0)):
        found = token_similarity(images, texts, None, mask, pad, back=True)
        assert [x.item() for x in found] == pytest.approx([there, -0.7])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_P3_one_valid_token_works_in_half_precision(dtype):
    images, texts, mask = unit(2, 3, 4, dtype=dtype), unit(2, 6, 4, seed=1, dtype=dtype), ragged([1, 1], 6)
    x = images.clone().requires_grad_()
    there, back = token_similarity(x, texts, None, mask, back=True)
    torch.testing.assert_close(there, (images @ texts[:, 0].T).mean(1).float(), atol=1e-2, rtol=0)
    contrastive_loss(there, back, torch.tensor(100.0)).backward()
    assert bool(x.grad.isfinite().all())


def test_P4_text_to_image_is_another_matrix_with_its_own_lengths():
    images, texts, mask = unit(4, 3, 5), unit(4, 6, 5, seed=1), ragged([6, 2, 1, 4], 6)
    there, back = token_similarity(images, texts, None, mask, back=True)
    assert float((there - back.T).abs().max()) > 0.05
    sums = (texts @ images.flatten(0, 1).T).view(4, 6, 4, 3).amax(3) * mask[..., None]
    torch.testing.assert_close(back, sums.sum(1) / mask.sum(1, keepdim=True))


@pytest.mark.parametrize("tile", [1, 4 * 3 * 6 * 3, 10**9], ids=["1", "3", "all"])
def test_P4_loops_in_double_precision_agree_at_every_tile(tile):
    images, texts, mask = unit(4, 3, 5), unit(4, 6, 5, seed=1), ragged([6, 2, 1, 4], 6)
    found = []
    for ours in (True, False):
        x, y = images.clone().requires_grad_(), texts.clone().requires_grad_()
        sims = token_similarity(x, y, None, mask, back=True, tile=tile) if ours else plain_similarity(x, y, mask)
        (contrastive_loss if ours else plain_loss)(*sims, A).backward()
        found.append([*(s.detach() for s in sims), x.grad, y.grad])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_P5_gradients_are_those_of_differences():
    images, texts, mask = unit(2, 3, 4), unit(3, 4, 4, seed=1), ragged([4, 2, 1], 4)
    x, y = images.requires_grad_(), texts.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: token_similarity(a, b, None, mask, back=True, tile=30), (x, y))
    assert torch.autograd.gradcheck(lambda a, b: token_similarity(b, a, mask)[0], (x, y))


def test_P5_the_first_of_equal_tokens_is_chosen():
    token = torch.tensor([0.6, 0.8], dtype=torch.float64)
    y = token.expand(1, 3, 2).clone().requires_grad_()
    token_similarity(unit(1, 2, 2), y)[0].sum().backward()
    assert bool((y.grad[0, 0] != 0).any()) and bool((y.grad[0, 1:] == 0).all())


# ---- P6: token reduction ---------------------------------------------------------------------------------------------


def test_P6_weights_are_a_mean_over_positions_and_order_does_not_count():
    layer, x = TokenReduction(16, 4, groups=4).double(), torch.randn(3, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(layer.weights(x).sum(2), torch.ones(3, 4, dtype=torch.float64))
    torch.testing.assert_close(layer(x[:, torch.randperm(9)]), layer(x))


def test_P6_no_selection_is_the_mean_of_the_values():
    layer, x = TokenReduction(16, 4, groups=4), torch.randn(3, 9, 16)
    with torch.no_grad():
        layer.select.weight.zero_()
    torch.testing.assert_close(layer(x), layer.values(x).mean(1, keepdim=True).expand(-1, 4, -1))


@pytest.mark.parametrize(("count", "size"), [(12, 19_968), (24, 23_040)])
def test_P6_parameters_are_counted(count, size):
    layer = TokenReduction(256, count)
    assert sum(p.numel() for p in layer.parameters()) == size == 65536 // 8 * 2 + 256 * count + 512
    assert layer.mix.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=0.05)
    assert layer.select.weight.std().item() == pytest.approx((2 / count) ** 0.5, rel=0.05)


def test_P6_grouped_linear_is_the_grouped_convolution():
    layer, x = GroupedLinear(16, 4), torch.randn(2, 16, 3, 3)
    weight = layer.weight.reshape(16, 4, 1, 1)
    wanted = torch.nn.functional.conv2d(x, weight, groups=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(layer(x.flatten(2).transpose(1, 2)), wanted)


def test_P6_the_class_token_takes_no_part(tmp_path):
    module = wukong(tmp_path, style="r")
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in module.image.normalise)
    states = module.image.backbone(((images + 1) / 2 - mean) / deviation).last_hidden_state
    assert states.shape == (2, 5, 12)
    torch.testing.assert_close(module.image(images), module.image.backbone.post_layernorm(states[:, 1:]))
    assert module.encode_image(torch.zeros(2, 3, 16, 16)).shape == (2, 3, 8)


# ---- P7: texts -------------------------------------------------------------------------------------------------------


def test_P7_later_tokens_and_pads_do_not_change_earlier_ones(tmp_path):
    module = wukong(tmp_path).eval()
    ids = module.tokenize(["红色的圆形", "一只猫"], full=True)
    changed = ids.clone()
    changed[0, 4:] = 4344
    a, b = module.towers.encode_text(ids)[0], module.towers.encode_text(changed)[0]
    assert torch.equal(a[0, :4], b[0, :4]) and not torch.allclose(a[0, 4], b[0, 4])
    short = module.tokenize(["一只猫"])
    torch.testing.assert_close(module.towers.encode_text(short)[0][0], a[1, : short.shape[1]])


def test_P7_style_g_takes_the_end_of_the_text(tmp_path):
    module = wukong(tmp_path, style="g").eval()
    ids = module.tokenize(["红色的圆形", "猫" * 50], full=True)
    tokens, mask = module.towers.encode_text(ids)
    assert [ids[row, last].item() for row, last in ((0, 6), (1, 31))] == [102, 102]
    states = module.towers.text(input_ids=ids).last_hidden_state
    wanted = module.towers.text_projection(torch.stack([states[0, 6], states[1, 31]]))
    torch.testing.assert_close(tokens[:, 0], wanted / wanted.norm(dim=1, keepdim=True))
    assert mask.tolist() == [[True], [True]]


def test_P7_weights_begin_as_clips(tmp_path):
    text = wukong(tmp_path, text={"hidden_size": 64, "num_hidden_layers": 2}).towers.text
    layer = text.encoder.layers[0]
    deviations = {
        text.embeddings.token_embedding: 0.02, text.embeddings.position_embedding: 0.01,
        layer.self_attn.q_proj: 64**-0.5, layer.self_attn.out_proj: 64**-0.5 * 4**-0.5,
        layer.mlp.fc1: 128**-0.5, layer.mlp.fc2: 64**-0.5 * 4**-0.5,
    }  # fmt: skip
    assert {m: m.weight.std().item() for m in deviations} == pytest.approx(deviations, rel=0.1)


def test_P7_an_image_tower_from_scratch_begins_as_clips(tmp_path):
    facts = {**IMAGE, "hidden_size": 64, "num_attention_heads": 4}
    (tmp_path / "image.json").write_text(json.dumps(facts))
    module = wukong(tmp_path, image=str(tmp_path / "image.json"), tower=GroupOptions())
    embeddings, layer = module.image.backbone.embeddings, module.image.backbone.encoder.layers[0]
    deviations = {
        embeddings.class_embedding: 64**-0.5, embeddings.position_embedding.weight: 64**-0.5,
        embeddings.patch_embedding.weight: (2 / (64 * IMAGE["patch_size"] ** 2)) ** 0.5,
        layer.self_attn.q_proj.weight: 64**-0.5, layer.self_attn.out_proj.weight: 64**-0.5 * 4**-0.5,
        layer.mlp.fc2.weight: 64**-0.5 * 4**-0.5,
    }  # fmt: skip
    assert {w: w.std().item() for w in deviations} == pytest.approx(deviations, rel=0.25)


# ---- P8: processes and micro-batches ---------------------------------------------------------------------------------


def gradients_of(module: Wukong) -> list[torch.Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in module.groups["towers"].parameters]


def half(rank: int, image: str, style: str, objective: str) -> list[torch.Tensor]:
    return shared(rank, 2, image, style, objective)


def shared(rank: int, world: int, image: str, style: str, objective: str) -> list[torch.Tensor]:
    """Loss and gradients for eight pairs, each process with its share, averaged over processes."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        module = wukong(Path(folder), image=image, style=style, objective=objective).double()
    main = chinese(8 // world * rank, 8 // world)
    Wukong.global_rank = property(lambda self: rank)
    ids = module.tokenize(main.caption, full=True)
    loss, _ = module.loss(module.encode(module.vectors(main), ids))
    loss.backward()
    found = [loss.detach(), *gradients_of(module)]
    if world > 1:
        for tensor in found:
            torch.distributed.all_reduce(tensor)
            tensor /= world
    return found


@pytest.mark.parametrize(
    ("style", "objective"), [("g", "softmax"), ("f", "softmax"), ("r", "softmax"), ("f", "sigmoid")]
)
def test_P8_two_processes_have_the_loss_and_gradients_of_one(ranks, tmp_path, monkeypatch, style, objective):
    monkeypatch.setattr(Wukong, "global_rank", 0)
    image = image_folder(tmp_path)
    whole = shared(0, 1, image, style, objective)
    assert any(float(g.abs().max()) > 0 for g in whole[1:])
    for found in ranks(half, image, style, objective):
        for a, b in zip(whole, found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("style", STYLES)
def test_P8_micro_batches_make_one_batch_of_contrast(tmp_path, style):
    weights = []
    for count, size in ((1, 8), (4, 2)):
        module = wukong(tmp_path, style=style, towers=plain(), common=MethodOptions(accumulate=count))
        trained(tmp_path, module, 2, size)
        weights.append([p.detach().clone() for p in module.towers.parameters()])
    before = list(wukong(tmp_path, style=style).towers.parameters())
    assert any(not torch.allclose(a, b) for a, b in zip(before, weights[0], strict=True))
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_P8_the_unlocked_tower_takes_part_in_the_larger_batch(tmp_path):
    weights = []
    for count, size in ((1, 8), (4, 2)):
        groups = {"towers": plain(), "tower": plain()}
        module = wukong(tmp_path, **groups, common=MethodOptions(accumulate=count))
        trained(tmp_path, module, 2, size)
        weights.append([p.detach().clone() for p in module.image.parameters()])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_P8_the_second_pass_repeats_the_draws_of_the_first(tmp_path):
    module = wukong(tmp_path, text={"attention_dropout": 0.5}, common=MethodOptions(accumulate=2), towers=plain())
    found: list[torch.Tensor] = []
    encode = module.cached.encode

    def heard(*inputs):
        features = encode(*inputs)
        found.append(features[1].detach())
        return features

    module.cached.encode = heard
    trained(tmp_path, module, 1, 4)
    assert len(found) == 4
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    module.keys.seed_globals(1, 0)
    other = module.towers.encode_text(module.tokenize(chinese(0, 4).caption, full=True))[0]
    assert not torch.equal(other, found[0])


def test_P8_the_logged_loss_is_that_of_the_large_batch(tmp_path):
    module = wukong(tmp_path, common=MethodOptions(accumulate=2), towers=plain(0.0))
    losses = []
    backward = module.backward
    module.backward = lambda names, loss, **more: (losses.append(loss.item()), backward(names, loss, **more))
    trained(tmp_path, module, 1, 4)
    main = chinese(0, 8)
    with torch.no_grad():
        whole, _ = module.loss(module.encode(module.vectors(main), module.tokenize(main.caption, full=True)))
    assert losses == pytest.approx([whole.item()] * 2, rel=1e-5)


def test_P8_the_scale_stays_in_its_range(tmp_path):
    for start, sign, end in ((99.0, -1.0, math.log(100)), (1.1, 1.0, 0.0)):
        module = wukong(tmp_path, scale=start, towers=plain(50.0))
        module.cached.loss = lambda features, sign=sign: (sign * features[3].mean(), {})
        trained(tmp_path, module, 1)
        assert module.towers.logits.log_scale.item() == pytest.approx(end)


# ---- P9: locked ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("facts", [IMAGE, SWIN], ids=["vit", "swin"])
def test_P9_a_locked_tower_never_changes(tmp_path, facts):
    module = wukong(tmp_path, facts, towers=GroupOptions(adam(1e-2)))
    before = weights_hash(module.image)
    module.train()
    assert not any(m.training for m in module.image.modules())
    trainer = trained(tmp_path, module, 3)
    assert weights_hash(module.image) == before
    assert all(p.grad is None and not p.requires_grad for p in module.image.parameters())
    trainer.save_checkpoint(tmp_path / "c.ckpt", False)
    state = AtomicCheckpointIO().load_checkpoint(tmp_path / "c.ckpt")
    names = [*state["state_dict"], *state["t2i"]["groups"]["towers"]["states"]]
    assert names and not any("backbone" in name for name in names)
    assert not module.vectors(chinese(0, 2)).requires_grad


def test_P9_activations_do_not_depend_on_the_depth_of_a_locked_tower(tmp_path):
    saved = []
    for depth in (1, 6):
        module = wukong(tmp_path, image=image_folder(tmp_path, {**IMAGE, "num_hidden_layers": depth}, f"deep{depth}"))
        main, kept = chinese(0, 4), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, k=kept: (k.append(t.numel()), t)[1], lambda t: t):
            module.loss(module.encode(module.vectors(main), module.tokenize(main.caption)))
        saved.append(sum(kept))
    assert saved[0] == saved[1] > 0


def test_P9_a_checkpoint_without_the_tower_loads_on_the_same_one_and_on_no_other(tmp_path):
    module = wukong(tmp_path, towers=GroupOptions(adam(1e-2)))
    trained(tmp_path, module, 2).save_checkpoint(tmp_path / "c.ckpt", False)
    state = AtomicCheckpointIO().load_checkpoint(tmp_path / "c.ckpt")
    again = wukong(tmp_path)
    again.on_load_checkpoint(state)
    again.load_state_dict(state["state_dict"])
    torch.testing.assert_close(again.towers.logits.log_scale, module.towers.logits.log_scale)
    torch.testing.assert_close(again.encode_text(["猫"]), module.encode_text(["猫"]))
    other = wukong(tmp_path, image=image_folder(tmp_path, {**IMAGE, "num_hidden_layers": 1}, "other"))
    with pytest.raises(UserError, match="another frozen network"):
        other.on_load_checkpoint(state)


def test_P9_the_stage_switch_unlocks_the_tower(tmp_path):
    hashes, modes = [], []

    class Watch(Wukong):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            modes.append(self.image.training)

    options = {"image": image_folder(tmp_path), "text": text_file(tmp_path), "style": "f", "width": 8}
    for steps in (2, 4):
        modes.clear()
        module = Watch(**options, towers=plain(), tower=plain(start=2))
        trained(tmp_path, module, steps)
        hashes.append(weights_hash(module.image))
    assert modes == [False, False, True, True]
    start = wukong(tmp_path)
    assert hashes[0] == weights_hash(start.image) != hashes[1]
    assert module.groups["image"].updates == 2
    assert kinds_of_steps(module, 4) == [(0, 0.5), (2, 0.5)]  # what `check` rehearses
    with pytest.raises(UserError, match="begin at 0"):
        plain(start=-1)


# ---- P10 -------------------------------------------------------------------------------------------------------------


def test_P10_the_gradient_of_the_scale_is_that_of_the_softmax(tmp_path):
    there, back = token_similarity(unit(5, 3, 4), unit(5, 6, 4, seed=1), back=True)
    log = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    contrastive_loss(there, back, log.exp()).backward()
    a = log.detach().exp()
    terms = [((a * s).softmax(1) * s).sum(1).mean() - s.diagonal().mean() for s in (there, back)]
    torch.testing.assert_close(log.grad, a * sum(terms) / 2)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("tower", [None, plain()], ids=["locked", "open"])
def test_forward_units(tmp_path, count, tower):
    module = wukong(tmp_path, tower=tower, towers=plain(), common=MethodOptions(accumulate=count))
    with counting_units(module) as units:
        trained(tmp_path, module, 2)
    assert differences(module.forward_units(), units.per_step()) == {}


def test_a_tower_costs_a_locked_one_before_it_is_unlocked(tmp_path):
    module = wukong(tmp_path, tower=replace(plain(), start=2), towers=plain())
    found = []
    for step in (1, 2):
        module.counters.step = step
        found.append(module.forward_units()["image"])
    assert found == [1.0, 3.0]


# ---- options, data, exports, errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_it_learns_which_text_belongs_to_which_picture(tmp_path, style):
    module = wukong(tmp_path, style=style)
    main = chinese(0, 4)
    vectors, ids = module.vectors(main), module.tokenize(main.caption)
    optimizer, losses = torch.optim.Adam(module.towers.parameters(), 1e-2), []
    for _ in range(60):
        loss, scalars = module.loss(module.encode(vectors, ids))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert scalars["accuracy"].item() == 1.0 and scalars["own"] > scalars["other"]


@pytest.mark.parametrize(
    "option",
    [
        {"pad": "zero_floor"}, {"objective": "sigmoid"}, {"top_image": 0.5}, {"top_text": 0.125}, {"smoothing": 0.2},
        {"scale": 50.0}, {"objective": "sigmoid", "bias": 0.0},
    ],
    ids=str,
)  # fmt: skip
def test_every_option_of_the_loss_changes_it(tmp_path, option):
    base = {"objective": "sigmoid"} if "bias" in option else {}
    losses = []
    for given in (base, option):
        module = wukong(tmp_path, **given).double()
        main = chinese(0, 6)
        ids = module.tokenize(main.caption, full=True)
        losses.append(module.loss(module.encode(module.vectors(main), ids))[0].item())
    assert losses[0] != pytest.approx(losses[1], rel=1e-6)


def test_tokens_that_stay_are_those_of_the_shares(tmp_path):
    module, main = wukong(tmp_path, top_image=0.5, top_text=0.25), chinese(0, 5)
    images, texts, mask, _, _ = module.encode(module.vectors(main), module.tokenize(main.caption, full=True))
    assert images.shape == (5, 2, 8) and texts.shape == (5, 8, 8) and mask.shape == (5, 8)
    assert mask.any(1).all()


def test_the_projection_comes_from_the_tower_and_may_be_locked(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    facts = {k: v for k, v in IMAGE.items() if k != "_class_name"}
    CLIPModel(CLIPConfig(vision_config=facts, text_config={"hidden_size": 16, "num_hidden_layers": 1,
                         "num_attention_heads": 2, "intermediate_size": 16}, projection_dim=8)).save_pretrained(
        tmp_path / "clip")  # fmt: skip
    options = {"image": str(tmp_path / "clip"), "style": "g", "towers": plain()}
    module = wukong(tmp_path, **options, lock_projection=True)
    before = module.towers.image_projection.weight.detach().clone()
    torch.testing.assert_close(before, CLIPModel.from_pretrained(tmp_path / "clip").visual_projection.weight)
    trained(tmp_path, module, 2)
    assert torch.equal(before, module.towers.image_projection.weight)
    other = wukong(tmp_path, **options)
    trained(tmp_path, other, 2)
    assert not torch.equal(before, other.towers.image_projection.weight)
    assert not torch.allclose(wukong(tmp_path, style="g").towers.image_projection.weight, before)


def test_kept_vectors_are_the_towers_and_are_computed_once(tmp_path, monkeypatch):
    module = wukong(tmp_path, keep_vectors=True)
    main = chinese(0, 4)
    torch.testing.assert_close(module.vectors(main), module.image(main.image))
    found = module.vectors(main)
    monkeypatch.setattr(module, "image", None)
    assert torch.equal(module.vectors(main.slice(1, 3)), found[1:3])


def test_streams_of_a_batch_are_contrasted_together(tmp_path, monkeypatch):
    module, seen = wukong(tmp_path, keep_vectors=True), []
    monkeypatch.setattr(module, "_trainer", SimpleNamespace(world_size=1))
    monkeypatch.setattr(module.cached, "backward", lambda names, *given: seen.append(given))
    first, second = chinese(0, 3), chinese(3, 2)
    second.id = first.id[:2]  # of another data set
    Wukong.training_step.__wrapped__(module, {"main": first, "real": second}, 0)
    (start, ids), texts = seen[0], [*first.caption, *second.caption]
    torch.testing.assert_close(start, module.image(torch.cat([first.image, second.image])))
    assert torch.equal(ids, module.tokenize(texts))


def test_validation_reports_recalls_of_all_captions(tmp_path):
    module = wukong(tmp_path, towers=GroupOptions(adam(1e-3), ema=EMAOptions(0.9)))
    trainer = trained(tmp_path, module, 2, val=2, val_check_interval=2)
    names = {"val/i2t/r1", "val/t2i/r10", "val/mean"}
    assert names <= trainer.callback_metrics.keys()
    assert 0 <= trainer.callback_metrics["val/mean"] <= 1


def test_equal_captions_are_one_query_where_told(tmp_path):
    """Four captions go round: eight pictures have four queries, each with two pictures."""
    found = {}
    for merge_queries in (False, True):
        module = wukong(tmp_path, merge_queries=merge_queries)
        for first in (0, 4):
            records = chinese(first, 4)
            records.id, records.caption = torch.arange(first, first + 4), CAPTIONS
            module.validation_step({"main": records}, 0)
        to_image = module.recall.compute(module.pipeline.similarity)["t2i/r1"]
        found[merge_queries] = to_image
    assert found[True] * 4 == pytest.approx(round(found[True] * 4)) and found[True] > 0
    assert found[True] == pytest.approx(2 * found[False])  # an equal text finds the picture of one of both


def test_style_g_exports_a_stock_clip(tmp_path):
    from transformers import AutoTokenizer, CLIPModel

    module = wukong(tmp_path, style="g").eval()
    assert isinstance(module, Embeds) and isinstance(module, Exports)
    module.export(tmp_path / "out", [])
    model, tokenizer = CLIPModel.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    text = model.config.text_config
    assert (text.vocab_size, text.eos_token_id, text.max_position_embeddings) == (21128, 102, 32)
    assert text.hidden_act == model.config.vision_config.hidden_act == "quick_gelu"
    texts, images = ["红色的圆形", "一只猫", "大" * 40], chinese(0, 3).image.clamp(-1, 1)
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(tmp_path / "out", use_fast=False)
    levels = (images * 127.5 + 127.5).round()
    pictures = [x.permute(1, 2, 0).to(torch.uint8).numpy() for x in levels]
    pixels = processor(images=pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        found = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels)
    torch.testing.assert_close(found.text_embeds, module.encode_text(texts), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.image_embeds, module.encode_image(levels / 127.5 - 1), atol=1e-6, rtol=0)
    probabilities = module.pipeline.probabilities(module.encode_image(levels / 127.5 - 1), module.encode_text(texts))
    torch.testing.assert_close(found.logits_per_image.softmax(1), probabilities, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("style", "facts"), [("g", IMAGE), ("f", IMAGE), ("r", IMAGE), ("g", SWIN), ("f", SWIN), ("r", SWIN)],
    ids=["vit-g", "vit-f", "vit-r", "swin-g", "swin-f", "swin-r"],
)  # fmt: skip
def test_an_export_comes_back_as_it_was(tmp_path, style, facts):
    module = wukong(tmp_path, facts, style=style, objective="sigmoid", pad="zero_floor").eval()
    module.export(tmp_path / "out", [])
    again = DualEncoderPipeline.from_pretrained(tmp_path / "out")
    images, texts = chinese(0, 3).image, ["红色的圆形", "一只猫"]
    assert torch.equal(again.encode_text(texts), module.encode_text(texts))
    torch.testing.assert_close(again.encode_image(images), module.encode_image(images), atol=1e-6, rtol=0)
    features = again.encode_image(images), again.encode_text(texts)
    probabilities = again.probabilities(*features)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(3))
    scale = module.towers.logits.log_scale.exp()
    torch.testing.assert_close(probabilities, (scale * module.pipeline.similarity(*features)[0]).softmax(1))
    assert again.pad == "zero_floor" and again.towers.logits.bias is not None


def test_an_export_has_a_card(tmp_path):
    from lightning_t2i.cli.stock import read_stock

    for name, facts, style, library in (("a", IMAGE, "g", "transformers"), ("b", SWIN, "r", "lightning-t2i")):
        wukong(tmp_path, facts, style=style).export(tmp_path / name, [])
        stock = read_stock(tmp_path / name)
        assert (stock.library, stock.task) == (library, "zero-shot-image-classification")
        assert "DualEncoderPipeline" in stock.snippet and stock.networks[0].parameters > 0


def test_the_image_tower_of_an_export_with_swin_is_one_to_begin_with(tmp_path):
    module = wukong(tmp_path, SWIN, style="r")
    module.image.normalise = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    module.export(tmp_path / "out", [])
    again = Wukong(image=str(tmp_path / "out"), text=str(tmp_path / "out"), style="r", width=8, reduced=3)
    again.configure_model()
    assert again.image.normalise == module.image.normalise
    images = chinese(0, 2).image
    assert torch.equal(again.encode_image(images), module.eval().encode_image(images))


def test_a_training_goes_on_from_an_export(tmp_path):
    module = wukong(tmp_path, style="r")
    with torch.no_grad():
        module.towers.logits.log_scale.fill_(1.5)
    module.export(tmp_path / "out", [])
    options = {"image": str(tmp_path / "out"), "text": str(tmp_path / "out"), "style": "r", "width": 8}
    again = Wukong(**options, reduced=3, tower=plain())
    again.configure_model()
    assert again.towers.logits.log_scale.item() == 1.5
    torch.testing.assert_close(again.encode_text(["猫"]), module.encode_text(["猫"]))
    torch.testing.assert_close(again.encode_image(chinese(0, 2).image), module.encode_image(chinese(0, 2).image))
    trained(tmp_path, again, 1)
    sigmoid = Wukong(**options, reduced=3, objective="sigmoid", bias=-7.0)
    sigmoid.configure_model()
    assert sigmoid.towers.logits.bias.item() == -7.0 and sigmoid.towers.logits.bias.requires_grad
    sigmoid.export(tmp_path / "sigmoid", [])
    back = Wukong(**{**options, "text": str(tmp_path / "sigmoid")}, reduced=3)
    back.configure_model()
    assert back.towers.logits.bias is None  # and no parameter without a gradient
    other = Wukong(**options, reduced=4)
    with pytest.raises(UserError, match="another one"):
        other.configure_model()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no share": ({"top_image": 0.0}, "share"),
    "one token": ({"style": "g", "top_text": 0.5}, "share"),
    "scale": ({"scale": 200.0}, "scale"),
    "random tower": ({"image": "configs/networks/tiny_wukong_image.json"}, "random weights"),
    "smoothing": ({"objective": "sigmoid", "smoothing": 0.1}, "smooths no labels"),
    "kept": ({"keep_vectors": True, "tower": GroupOptions()}, "new outputs"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused(tmp_path, name):
    options, message = WRONG[name]
    with pytest.raises(UserError, match=message):
        Wukong(**{"image": image_folder(tmp_path), "text": text_file(tmp_path), **options})


def test_networks_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match="vocabulary"):
        wukong(tmp_path, text={"vocab_size": 30522})
    with pytest.raises(UserError, match="vocabulary"):
        wukong(tmp_path, text={"eos_token_id": 2})
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n猫\n")
    with pytest.raises(UserError, match="vocabulary") as error:
        wukong(tmp_path, tokenizer=str(tmp_path / "words"))
    assert "model.tokenizer" in str(error.value)
    with pytest.raises(UserError, match="Not an image tower"):
        wukong(tmp_path, image="assets/tiny/vae")
    with pytest.raises(UserError, match="dual encoder"):
        module = Wukong(image=image_folder(tmp_path), text="assets/tiny/clip")
        module.configure_model()
    for options in ({}, {"style": "g"}):  # the tower of a vision model has none
        with pytest.raises(UserError, match="no projection to lock"):
            wukong(tmp_path, lock_projection=True, **options)
    module = wukong(tmp_path)
    with pytest.raises(UserError, match="tower's size"):
        module.encode_image(torch.zeros(1, 3, 32, 32))


# ---- paper scale -----------------------------------------------------------------------------------------------------

# Parameters in millions of image and text side, each with its projection; Swin-L's is a count of ours.
SIZES = {
    "vit_b32_g": ("clip_vit_b32", "wukong_text_512", 87.85, 48.93),
    "vit_b32_f": ("clip_vit_b32", "wukong_text_512", 87.65, 48.79),
    "vit_b32": ("clip_vit_b32", "wukong_text_512", 87.67, 48.79),
    "vit_l14_g": ("clip_vit_l14", "wukong_text_768", 303.97, 101.90),
    "vit_l14_f": ("clip_vit_l14", "wukong_text_768", 303.44, 101.50),
    "vit_l14": ("clip_vit_l14", "wukong_text_768", 303.46, 101.50),
    "swin_l_g": ("swin_l", "wukong_text_768", 196.18, 101.90),
    "swin_l_f": ("swin_l", "wukong_text_768", 195.39, 101.50),
    "swin_l": ("swin_l", "wukong_text_768", 195.41, 101.50),
}


@pytest.mark.parametrize("name", SIZES)
def test_paper_scale_networks_have_their_published_sizes(name, capsys):
    image_facts, text_facts, image_size, text_size = SIZES[name]
    given = merge([ROOT / f"configs/wukong/{name}.yaml"]).config["model"]["init_args"]
    assert given["text"] == f"configs/networks/{text_facts}.json"
    style = given.get("style", "r")
    with torch.device("meta"):
        image = ImageTower(build_network(f"configs/networks/{image_facts}.json"), style != "g")
        reduced = given.get("reduced", 12) if style == "r" else None
        text = build_network(given["text"])
        towers = DualEncoder(text, image.width, given.get("width", 256), style != "g", reduced)
        tokens = towers.encode_image(image(torch.zeros(1, 3, 224, 224)))
    counts = {"g": 1, "f": 256 if "l14" in name else 49, "r": reduced}
    assert tokens.shape == (1, counts[style], given.get("width", 256))
    counted = [
        sum(p.numel() for module in modules if module is not None for p in module.parameters())
        for modules in ((image, towers.image_projection, towers.reduction), (text, towers.text_projection))
    ]
    assert [c / 1e6 for c in counted] == pytest.approx([image_size, text_size], abs=0.006)
    trained_here = sum(p.numel() for p in towers.parameters())
    state = (16 * trained_here + 2 * sum(p.numel() for p in image.parameters())) / 2**30
    with capsys.disabled():
        print(f"\n{name}: {sum(counted) / 1e6:.2f} M, {state:.1f} GiB of weights and AdamW states on each process")
    assert state < 10
