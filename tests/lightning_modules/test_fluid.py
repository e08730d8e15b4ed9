"""Fluid: its loss against one written out, what each option changes, processes, validation, folders, mistakes.

The numbered properties of the spec: P5 and P10 in tests/lightning_t2i/test_token_orders.py, P14 and P15 in
test_token_sampling.py beside it, P1 to P4, P6 to P9, P11 and P12 in tests/lightning_t2i/networks/test_token_*.py,
P13 and P16 here.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from fluid_parts import CODES, LENGTH, SIDE, built, fluid, parts
from pictures import Pictures, fit, records
from torch import Tensor
from weights import weights_hash

from lightning_modules.fluid import Fluid, masked_mean
from lightning_t2i.batch import Records
from lightning_t2i.errors import UserError
from lightning_t2i.forward_units import counting_units, differences
from lightning_t2i.keys import Keys
from lightning_t2i.networks.token_heads import masked_rows
from lightning_t2i.networks.token_transformer import TokenTransformer
from lightning_t2i.options import EMAOptions, GroupOptions, MethodOptions
from lightning_t2i.protocols import Exports, Generates, Reconstructs
from lightning_t2i.token_orders import MaskLaw
from lightning_t2i.token_pipeline import TokenPipeline, patches, unpatched
from lightning_t2i.token_sampling import Sampling

pytestmark = pytest.mark.filterwarnings("ignore:The .* does not have many workers")
VARIANTS = [(order, head) for order in ("random", "raster") for head in ("diffusion", "categorical")]
still = GroupOptions(lambda p: torch.optim.SGD(p, lr=0.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return parts(tmp_path_factory.mktemp("parts"))


def states(method: Fluid) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in method.state_dict().items()}


# ---- the loss ------------------------------------------------------------------------------------------------------


def test_the_masked_mean_weighs_tokens_and_not_pictures() -> None:
    values, weight = torch.tensor([[1.0, 3.0], [5.0, 5.0], [9.0, 9.0]]), torch.tensor([1.0, 1.0, 0.0])
    assert float(masked_mean(values, weight, weight.sum())) == pytest.approx((2 + 5) / 2)


@pytest.mark.parametrize(("order", "head"), VARIANTS)
def test_P9_the_loss_of_a_step_is_the_mean_over_all_masked_tokens(folder, order, head) -> None:
    """The head on every token, then the mask: what the step computes on a fixed number of rows."""
    method, batch, keys = built(folder, order=order, head=head), records(0, 8), Keys(0)
    with torch.no_grad():
        terms, weight, masked, _ = method.terms(method.transformer, batch, keys, 2)
        network, x = method.transformer, method.pipeline.tokens(batch)
        cond = method.condition(batch)
        z = network(x, network.align(cond.embeds, cond.mask), ~masked if order == "random" else None).flatten(0, 1)
        u = keys.uniform("t", batch.position, (LENGTH, 2)).flatten(0, 1)
        eps = keys.normal("eps", batch.position, (LENGTH, 2, 4)).flatten(0, 1)
        every = network.loss(z, x.flatten(0, 1), u, eps).total.mean(1)
    assert len(weight) < 8 * LENGTH or order == "raster"
    assert float(weight.sum()) == float(masked.sum())
    expected = float(every[masked.flatten()].mean())
    assert float(masked_mean(terms.total, weight, weight.sum())) == pytest.approx(expected, rel=1e-5)
    assert bool(masked.all()) is (order == "raster")


def test_gradients_come_from_masked_tokens_alone(folder) -> None:
    method, batch = built(folder), records(0, 8)
    terms, weight, _, _ = method.terms(method.transformer, batch, Keys(0), 2)
    (gradient,) = torch.autograd.grad(masked_mean(terms.total, weight, weight.sum()), terms.total)
    assert torch.equal(gradient.abs().sum(1) > 0, weight > 0)
    assert bool((weight == 0).any())


def test_the_loss_depends_on_positions_and_not_on_grouping(folder) -> None:
    method, whole = built(folder), records(0, 8)
    sums = []
    with torch.no_grad():
        for batch in ([whole], [whole.slice(0, 4), whole.slice(4, 8)]):
            found = [method.terms(method.transformer, part, Keys(3), 2) for part in batch]
            sums.append(float(sum((weight * terms.total.mean(1)).sum() for terms, weight, _, _ in found)))
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)


def test_dropped_captions_are_the_null_text(folder) -> None:
    method, batch = built(folder), records(0, 4)
    with torch.no_grad():
        rows = [
            method.terms(method.transformer, batch, Keys(0), 2, torch.tensor([drop] * 4))[0].total
            for drop in (False, True)
        ]
        batch.caption = ["blue"] * 4
        other = method.terms(method.transformer, batch, Keys(0), 2, torch.tensor([True] * 4))[0].total
    assert not torch.equal(rows[0], rows[1])
    assert torch.equal(rows[1], other)


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"order": "raster"}, {"order": "raster"}),
        ({"head": "flow"}, {"head": "flow"}),
        ({"head": "regression"}, {"head": "regression"}),
        ({"head": "categorical"}, {"head": "categorical", "vocabulary": CODES}),
        ({"head_options": {"variance": "large"}}, {"head_options": {"variance": "large"}}),
        ({"patch": 2}, {"channels": 16, "length": 16}),
    ],
    ids=str,
)
def test_each_option_of_the_network_is_built_into_it(folder, options, facts) -> None:
    networks = []
    for given in ({}, options):
        method = fluid(folder, **given)
        method.configure_model()
        networks.append(method.transformer)
    base, network = networks
    assert {name: network.config[name] for name in facts} == facts
    assert all(base.config[name] != value for name, value in facts.items())
    shapes = [{name: tensor.shape for name, tensor in n.state_dict().items()} for n in networks]
    assert (shapes[0] == shapes[1]) == ("order" in options)  # which is in no weight: the next test is for it


@pytest.fixture(scope="module")
def usual(folder, tmp_path_factory) -> dict[str, Tensor]:
    """Weights after three training steps."""
    method = fluid(folder)
    fit(tmp_path_factory.mktemp("usual"), method, 3, Pictures(batch_size=8), limit_val_batches=0)
    return states(method)


@pytest.mark.parametrize(
    "options",
    [
        {"order": "raster"},
        {"copies": 1},
        {"null_probability": 0.9},
        {"mask": MaskLaw("truncnorm", 4)},
        {"mask": MaskLaw("cosine", 1)},
        {"text_length": 2},
        {"common": MethodOptions(seed=1)},
        {"common": MethodOptions(accumulate=2)},
    ],
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items())[:30],
)
def test_each_training_option_changes_the_result(folder, tmp_path, usual, options) -> None:
    method = fluid(folder, **options)
    fit(tmp_path, method, 3, Pictures(batch_size=8), limit_val_batches=0)
    changed = states(method)
    assert changed.keys() == usual.keys()
    assert any(not torch.equal(changed[name], tensor) for name, tensor in usual.items())


def test_the_usual_training_is_the_same_again(folder, tmp_path, usual) -> None:
    method = fluid(folder)
    fit(tmp_path, method, 3, Pictures(batch_size=8), limit_val_batches=0)
    assert all(torch.equal(tensor, usual[name]) for name, tensor in states(method).items())


def test_trimmed_captions_and_recomputed_activations_change_nothing(folder) -> None:
    gradients = []
    for options in ({}, {"trim": True}, {"gradient_checkpointing": True}):
        method = built(folder, **options).train()
        terms, weight, _, _ = method.terms(method.transformer, records(0, 4), Keys(0), 2)
        masked_mean(terms.total, weight, weight.sum()).backward()
        gradients.append([p.grad for p in method.transformer.parameters() if p.grad is not None])
    assert built(folder, gradient_checkpointing=True).transformer.gradient_checkpointing
    whole, trimmed = (built(folder, trim=trim).condition(records(0, 4)).embeds for trim in (False, True))
    assert trimmed.shape[1] < whole.shape[1]
    for others in gradients[1:]:
        for a, b in zip(gradients[0], others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("order", "head"), VARIANTS)
def test_every_variant_learns(folder, order, head) -> None:
    method, batch = fluid(folder, order=order, head=head), records(0, 8)
    method.configure_model()
    optimizer = torch.optim.Adam(method.transformer.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        terms, weight, _, _ = method.terms(method.transformer, batch, Keys(0), 2)
        loss = masked_mean(terms.total, weight, weight.sum())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_cached_latents_take_the_place_of_pictures(folder) -> None:
    for head in ("diffusion", "categorical"):
        method, batch = built(folder, head=head), records(0, 4)
        online = method.pipeline.tokens(batch)
        batch.latent, batch.image = method.codec.encode(batch.image), None
        assert torch.equal(method.pipeline.tokens(batch), online)


def test_patches_are_rows_of_tokens_with_their_channels_first() -> None:
    latents = torch.arange(2 * 4 * 4).view(1, 2, 4, 4).float()
    tokens = patches(latents, 2)
    assert tokens[0, 1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]
    assert torch.equal(unpatched(tokens, 2), latents)


# ---- averages (P13) and validation -----------------------------------------------------------------------------------


def test_P13_the_average_is_the_closed_form_and_the_one_that_is_used(folder, tmp_path) -> None:
    """Plain steps of a constant gradient: w_k = w_0 - k d, m_k = w_0 - d sum_(j<=k) (1 - b_j) j prod_(i>j) b_i."""
    method = fluid(folder, transformer=GroupOptions(lambda p: torch.optim.SGD(p, lr=0.1), ema=EMAOptions(0.9)))
    method.configure_model()
    group = method.groups["transformer"]
    group.build()
    assert group.optimizer is not None and group.averages is not None
    start = [p.detach().clone() for p in group.parameters]
    expected = 0.0
    for k in range(1, 8):
        for parameter in group.parameters:
            parameter.grad = torch.ones_like(parameter)
        group.optimizer.step()
        group.average(k)
        b = min(0.9, k / (9 + k))  # (1 + n) / (10 + n) after n = k - 1 averages
        expected = b * expected + (1 - b) * k
    for first, average, weight in zip(start, group.averages.first, group.parameters, strict=True):
        torch.testing.assert_close(weight, first - 0.7, rtol=0, atol=1e-5)
        torch.testing.assert_close(average, first - 0.1 * expected, rtol=0, atol=1e-5)
    assert method.pipeline.network is group.ema


def test_validation_uses_the_average_and_leaves_the_weights(folder, tmp_path) -> None:
    fast = GroupOptions(lambda p: torch.optim.AdamW(p, lr=1e-2), ema=EMAOptions(0.99, start=100))
    seen, raw = [], []

    class Watch(L.Callback):
        def on_validation_start(self, trainer, module):
            raw.append(weights_hash(module.transformer))
            module.transformer_ema.register_forward_hook(lambda *_: seen.append("average"))
            module.transformer.register_forward_hook(lambda *_: seen.append("weights"))

        def on_validation_end(self, trainer, module):
            raw.append(weights_hash(module.transformer))
            assert not module.transformer_ema.training

    fit(tmp_path, fluid(folder, transformer=fast), 2, val_check_interval=2, callbacks=[Watch()])
    assert set(seen) == {"average"}
    assert raw[0] == raw[1]


NAMES = {"diffusion": {"eps_mse", "vb_bits"}, "flow": {"velocity_mse"}, "categorical": {"ce"}, "regression": {"mse"}}


@pytest.mark.parametrize("head", NAMES)
def test_validation_is_the_same_at_every_visit_and_reports_its_parts_and_bins(folder, tmp_path, head) -> None:
    values: list[dict[str, float]] = []

    class Record(L.Callback):
        def on_validation_end(self, trainer, module):
            values.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(("val", "bins"))})

    method = fluid(folder, head=head, transformer=still, mask=MaskLaw(strata=1))
    fit(tmp_path, method, 2, Pictures(batch_size=32), val_check_interval=1, callbacks=[Record()])
    assert len(values) == 2
    assert values[0] == values[1]
    assert {k.removeprefix("val/") for k in values[0] if k.startswith("val/")} == NAMES[head]
    main = "eps_mse" if head == "diffusion" else min(NAMES[head])
    bins = {k.removeprefix("bins/"): v for k, v in values[0].items() if k.startswith(f"bins/{main}/")}
    assert len(bins) == sum(k.startswith("bins/") for k in values[0])
    assert {k[-2:] for k in bins} >= {"r1", "r5", "r9"}
    assert {f"{main}/t{i}" in bins for i in range(10)} == {head in ("diffusion", "flow")}
    if head in ("diffusion", "flow"):  # as many times in each bin
        times = [bins[f"{main}/t{i}"] for i in range(10)]
        assert sum(times) / 10 == pytest.approx(values[0][f"val/{main}"], rel=0.02)
        assert min(times) < values[0][f"val/{main}"] < max(times)


@pytest.mark.parametrize("copies", [1, 3])
def test_val_copies_are_times_of_each_token_in_validation(folder, tmp_path, monkeypatch, copies) -> None:
    seen: set[int] = set()
    terms = Fluid.terms

    def watched(*args, stratified=False, **options):
        found = terms(*args, stratified=stratified, **options)
        seen.update([found[3].shape[1] - 1] if stratified else [])
        return found

    monkeypatch.setattr(Fluid, "terms", watched)
    fit(tmp_path, fluid(folder, val_copies=copies), 1, val_check_interval=1)
    assert seen == {copies}


def test_validation_draws_depend_on_seed_and_picture_alone(folder) -> None:
    """Sizes, orders of batches and training steps do not enter; times of a token lie in equal parts of their law."""
    method, batch = built(folder), records(0, 8)
    keys = method.keys.fork("validation")
    with torch.no_grad():
        _, weight, masked, where = method.terms(method.transformer, batch, keys, 4, stratified=True)
        half = method.terms(method.transformer, batch.slice(4, 8), keys, 4, stratified=True)
    assert torch.equal(masked[4:], half[2])
    other = built(folder, mask=MaskLaw(strata=1))  # a size with smaller batches
    with torch.no_grad():
        assert torch.equal(other.terms(other.transformer, batch, keys, 4, stratified=True)[2], masked)
        assert not torch.equal(*(m.terms(m.transformer, batch, keys, 1)[2] for m in (method, other)))
        odd = batch.slice(3, 8)  # begins within a stratum: no masked token is left out
        _, weight_odd, masked_odd, _ = method.terms(method.transformer, odd, keys, 4, stratified=True)
    assert int(weight_odd.sum()) == int(masked_odd.sum())
    assert (where[:, 1:] * 4).long().tolist() == [[0, 1, 2, 3]] * len(where)
    method.counters.step = 7
    assert method.keys.fork("validation") == keys
    ratio = masked.float().mean(1)
    rows, _ = masked_rows(~masked, len(weight))
    assert torch.equal(where[:, 0], ratio[rows // LENGTH])


# ---- sampling ------------------------------------------------------------------------------------------------------


def drawn(method: Fluid, count: int = 2, **changes: Any) -> Tensor:
    captions = ["red", "blue circle", "a square", "two"][:count]
    return method.sample(method.condition(Records.of_prompts(captions)), Keys(0), torch.arange(count), **changes)


@pytest.mark.parametrize(("order", "head"), [*VARIANTS, ("random", "flow"), ("raster", "regression")])
def test_pictures_of_every_variant(folder, order, head) -> None:
    method = built(folder, order=order, head=head)
    images = drawn(method)
    assert images.shape == (2, 3, SIDE, SIDE)
    assert float(images.abs().max()) <= 1
    assert torch.equal(images, drawn(method))
    torch.testing.assert_close(images[:1], drawn(method, 1), rtol=0, atol=1e-4)  # not on who else is drawn


@pytest.mark.parametrize(
    ("head", "change"),
    [
        ("diffusion", {"guidance": 1.0}),
        ("diffusion", {"guidance": 5.0}),
        ("diffusion", {"schedule": "constant"}),
        ("diffusion", {"steps": 9}),
        ("diffusion", {"head_steps": 6}),
        ("diffusion", {"temperature": 0.5}),
        ("diffusion", {"skip": 0.6}),
        ("categorical", {"policy": "confidence"}),
        ("categorical", {"policy": "confidence", "choice_noise": 0.0}),
        ("categorical", {"temperature": 0.2}),
        ("categorical", {"top_k": 2}),
        ("categorical", {"top_p": 0.3}),
    ],
    ids=str,
)
def test_each_sampling_option_changes_the_pictures(folder, head, change) -> None:
    method = built(folder, head=head)
    base = {"policy": "confidence"} if "choice_noise" in change else {}
    assert not torch.equal(drawn(method, **base), drawn(method, **change))


def test_unguided_sampling_never_looks_at_the_null_text(folder) -> None:
    for order, steps in (("random", 4), ("raster", LENGTH)):
        method, calls = built(folder, order=order), []
        method.pipeline.network.register_forward_hook(lambda *_, to=calls: to.append(1))
        drawn(method, guidance=1.0)
        assert len(calls) == steps
        calls.clear()
        drawn(method, guidance=2.0)
        assert len(calls) == 2 * steps


def test_steps_near_scale_one_may_go_unguided(folder) -> None:
    """Linear guidance of 4 steps at scale 2 is 1.08, 1.30, 1.63 and 1.98 on 64 tokens."""
    method, calls = built(folder), []
    method.pipeline.network.register_forward_hook(lambda *_: calls.append(1))
    drawn(method, guidance=2.0, skip=0.31)
    assert len(calls) == 8 - 2


def test_the_head_runs_on_the_tokens_of_a_step_alone(folder) -> None:
    method, rows = built(folder, sampling=Sampling(steps=8, head_steps=2, guidance=1.0)), []
    head = method.pipeline.network.token_head
    sample = head.sample
    head.sample = lambda z, *rest: rows.append(len(z)) or sample(z, *rest)
    drawn(method)
    assert [n // 2 for n in rows] == [2, 3, 6, 8, 10, 11, 12, 12]


def test_the_text_is_aligned_once_for_a_picture(folder) -> None:
    method, calls = built(folder), []
    method.pipeline.network.aligner[0].register_forward_hook(lambda *_: calls.append(1))
    drawn(method)
    assert len(calls) == 1


def test_it_generates_reconstructs_and_exports(folder) -> None:
    for head in ("diffusion", "categorical"):
        method = built(folder, head=head)
        assert isinstance(method, Generates) and isinstance(method, Reconstructs) and isinstance(method, Exports)
        image = records(0, 2).image
        found = method.reconstruct(image)
        codec = method.codec
        expected = (
            codec.decode_tokens(codec.encode_tokens(image))
            if head == "categorical"
            else codec.decode(codec.encode(image))
        )
        torch.testing.assert_close(found, expected.clamp(-1, 1))


# ---- folders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("order", "head"), [("random", "diffusion"), ("raster", "categorical")])
def test_the_export_gives_our_pictures_and_can_be_trained_on(folder, tmp_path, order, head) -> None:
    from lightning_t2i.cli.stock import read_stock

    method = built(folder, order=order, head=head)
    method.export(tmp_path / "out", [])
    assert all(p.dtype == torch.float32 for p in method.parameters())  # the run itself is left as it was
    assert not list((tmp_path / "out").rglob("*.bin"))
    pipeline = TokenPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.sampling == method.sampling
    (ours,), (theirs,) = method.pipeline(["a red square"], seed=3), pipeline(["a red square"], seed=3)
    assert np.abs(np.asarray(ours, float) - np.asarray(theirs, float)).mean() < 3  # of 255, by weights in fp16
    stock = read_stock(tmp_path / "out", {"prompt": "a red square"})
    assert {n.component for n in stock.networks} == {
        "transformer", "text_encoder", "vqvae" if head == "categorical" else "vae",
    }  # fmt: skip
    assert stock.library == "lightning-t2i"
    namespace: dict[str, Any] = {}
    exec(stock.snippet.replace('"."', repr(str(tmp_path / "out"))), namespace)
    assert namespace["image"].size == (SIDE, SIDE)
    again = fluid(folder, network=str(tmp_path / "out"), order=order, head=head)
    fit(tmp_path, again, 1, limit_val_batches=0)
    assert isinstance(again.transformer, TokenTransformer)


def test_frozen_networks_stay_as_they_are(folder, tmp_path) -> None:
    method = fluid(folder)
    before = {}

    class Watch(L.Callback):
        def on_train_start(self, trainer, module):
            before.update({name: weights_hash(getattr(module, name)) for name in ("codec", "text")})

    fit(tmp_path, method, 3, callbacks=[Watch()], limit_val_batches=0)
    for name in ("codec", "text"):
        network = getattr(method, name)
        assert weights_hash(network) == before[name]
        assert not network.training
        assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    assert {name.split(".")[0] for name in method.state_dict()} == {"transformer"}


def test_forward_units(folder, tmp_path) -> None:
    method = fluid(folder)
    method.configure_model()
    method.text(["red"])  # the empty caption is encoded once, before
    with counting_units(method) as units:
        fit(tmp_path, method, 2, limit_val_batches=0)
    assert differences(method.forward_units(), units.per_step()) == {}


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"null_probability": 1.5}, "null_probability"),
        ({"copies": 0}, "begin at 1"),
        ({"codec": "vq"}, "autoencoder has no such tokens"),
        ({"head": "categorical", "codec": "pipeline"}, "autoencoder has no such tokens"),
        ({"patch": 3}, "such patches"),
        ({"head": "categorical", "patch": 2}, "such patches"),
        ({"text": "vq"}, "no text encoder"),
        ({"size": 15}, "does not fit the autoencoder"),
        ({"head_options": {"variance": "none"}}, "variance"),
        ({"network": "pipeline"}, "TokenTransformer|token transformer|no such component"),
        ({"sampling": Sampling(steps=65)}, "so many steps"),
        ({"sampling": Sampling(policy="confidence")}, "no probabilities"),
        ({"sampling": Sampling(top_k=3)}, "no probabilities"),
        ({"sampling": Sampling(head_steps=1001)}, "fewer times"),
        ({"order": "raster", "sampling": Sampling(skip=0.1)}, "one order"),
        ({"order": "raster", "head": "categorical", "sampling": Sampling(policy="confidence")}, "one order"),
    ],
    ids=str,
)
def test_impossible_options_are_refused_before_training(folder, options, message) -> None:
    for name in ("codec", "text", "network"):
        if name in options:
            options = {**options, name: str(folder / options[name])}
    with pytest.raises(UserError, match=message):
        fluid(folder, **options).configure_model()


@pytest.mark.parametrize(
    "options",
    [{"steps": 0}, {"temperature": -1.0}, {"guidance": -0.5}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}],
)
def test_impossible_sampling_is_refused(options) -> None:
    with pytest.raises(UserError, match="at least|No token would be left|Not a probability"):
        Sampling(**options)


def test_another_trained_network_is_refused(folder, tmp_path) -> None:
    built(folder).export(tmp_path / "out", [])
    with pytest.raises(UserError, match="another one"):
        fluid(folder, network=str(tmp_path / "out"), order="raster").configure_model()


def test_pictures_of_another_size_are_named(folder) -> None:
    with pytest.raises(UserError, match="as many tokens"):
        built(folder).pipeline.tokens(records(0, 2, side=32))


def test_no_token_is_the_null_text_and_an_empty_caption_a_text_of_its_own(folder) -> None:
    method, places = built(folder), torch.arange(2)
    null = drawn(method, guidance=0.0, schedule="constant")
    cond, empty = (method.condition(Records.of_prompts(captions)) for captions in (["red", "two"], ["", ""]))
    without = replace(cond, mask=torch.zeros_like(cond.mask))
    torch.testing.assert_close(method.sample(without, Keys(0), places, guidance=1.0), null)
    for other in (cond, empty):
        assert not torch.allclose(method.sample(other, Keys(0), places, guidance=1.0), null, atol=1e-2)


# ---- processes (P16) -----------------------------------------------------------------------------------------------


def on_ranks(rank: int, source: str, folder: str, replicate: int, shard: int, precision: str) -> dict[str, Tensor]:
    sys.path.append(str(Path(__file__).resolve().parents[1] / "helpers"))
    # Plain steps: Adam's would enlarge the rounding of gradients near 0.
    plain = GroupOptions(lambda p: torch.optim.SGD(p, lr=0.05), clip=None, ema=EMAOptions(0.9))
    common = MethodOptions(accumulate=2, precision=precision)
    method = fluid(Path(source), transformer=plain, common=common, mask=MaskLaw(strata=1))
    trainer = fit(
        Path(folder), method, 3, Pictures(batch_size=8), replicate=replicate, shard=shard, val_check_interval=3
    )
    values = {k: v.detach().float() for k, v in trainer.callback_metrics.items() if k == "val/eps_mse"}
    return {**states(method), **values}


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory) -> dict[str, Tensor]:
    """What one process trained."""
    return on_ranks(0, str(folder), str(tmp_path_factory.mktemp("one")), 1, 1, "fp32")


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "precision"), [((2, 1), "fp32"), ((1, 2), "fp32"), ((1, 2), "bf16")])
def test_P16_one_and_two_processes_agree(tmp_path, folder, ranks, alone, mesh, precision) -> None:
    """Masked tokens are counted over both: with strata of 1 their halves of a batch have different numbers of them."""
    one = alone
    assert "val/eps_mse" in one
    for two in ranks(on_ranks, str(folder), str(tmp_path / "two"), *mesh, precision):
        close = {"rtol": 1e-4, "atol": 1e-5} if precision == "fp32" else {"rtol": 0.05, "atol": 0.01}
        assert two.keys() == one.keys()
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, **close, msg=name)


def in_bf16(rank: int, source: str) -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh

    from lightning_t2i.strategies.sharding import shard_network

    sys.path.append(str(Path(__file__).resolve().parents[1] / "helpers"))
    method = built(Path(source))
    network, seen = method.transformer, []
    network.token_head.network.final.register_forward_hook(lambda m, _, out: seen.append((m.weight.dtype, out.dtype)))
    network.blocks[0].mlp[0].register_forward_hook(lambda m, _, out: seen.append((m.weight.dtype, out.dtype)))
    shard_network(network, init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard")), "bf16")
    terms, weight, _, _ = method.terms(network, records(0, 4), Keys(0), 2)
    masked_mean(terms.total, weight, weight.sum()).backward()
    return [str(kind) for pair in seen[:2] for kind in pair]


@pytest.mark.slow
def test_the_last_layer_of_the_head_stays_float32_under_bf16(folder, ranks) -> None:
    (found,) = ranks(in_bf16, str(folder), world=1)
    assert found == ["torch.bfloat16", "torch.bfloat16", "torch.float32", "torch.float32"]


# ---- paper scale -----------------------------------------------------------------------------------------------------

T5_XXL = 4_762_310_656  # parameters of the encoder, kept in bf16 and cut like the trained weights
CONFIGS = {  # config -> millions of the spec's fit (without biases, norms and tables); devices that share weights
    "166m": (164.8, 1),
    "369m": (358.6, 1),
    "665m": (663.9, 1),
    "1b": (1105.7, 8),
    "3b": (3162.6, 8),
    "10b": (10519.0, 8),
    "166m_raster": (164.8, 1),
    "166m_vq": (151.0, 1),
    "166m_vq_raster": (151.0, 1),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_memory_of_the_paper_configs(repo, capsys, name) -> None:
    """Networks as the method builds them, on meta; weights, gradients, moments and EMA on each process."""
    from types import SimpleNamespace

    from lightning_t2i.cli.configs import merge
    from lightning_t2i.preflight.known import KNOWN

    merged = merge([repo / f"configs/fluid/{name}.yaml"], []).config
    given = dict(merged["model"]["init_args"])
    assert given["common"]["precision"] == "bf16"
    update = given.pop("transformer")
    for unused in ("common", "mask"):
        given.pop(unused, None)
    method, discrete = Fluid(**given), given.get("head") == "categorical"
    files = KNOWN[given["codec"]]()
    facts = SimpleNamespace(**next(f for place, f in files.items() if place.startswith(("vae/", "vqvae/"))))
    vae = SimpleNamespace(config=facts, **({"quantize": None} if discrete else {}))
    side = 256 // 2 ** (len(facts.block_out_channels) - 1)
    codec = SimpleNamespace(vae=vae, latent_shape=lambda size: (facts.latent_channels, side, side))
    with torch.device("meta"):
        network = method.built(codec, 4096)
    assert network.config.length == 256
    assert (network.config.channels == 16) or discrete
    weights, (expected, shards) = sum(p.numel() for p in network.parameters()), CONFIGS[name]
    assert weights / 1e6 == pytest.approx(expected, rel=0.02)  # with what the fit leaves out
    moments = 2 if "8bit" in update["optimizer"]["class_path"] else 8
    state, nodes = (4 + 4 + moments + 4) * weights, merged["trainer"]["num_nodes"]
    one = (state + 2 * T5_XXL) / 1e9
    assert merged["data"]["init_args"]["main"]["init_args"]["batch_size"] == 2048 and 2048 % (8 * nodes) == 0
    with capsys.disabled():
        cut = ", ".join(f"{one / ranks:.1f} over {ranks}" for ranks in (8, 64, 512))
        print(f"\nfluid/{name}: {weights / 1e6:.0f} M, {one / shards:.1f} GB a process, cut over {shards}; or {cut}")
    assert one / shards < 40
