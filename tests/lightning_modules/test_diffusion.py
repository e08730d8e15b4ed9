"""Diffusion: its losses against hand computations, what each option changes, adapters, text, export."""

import json
from functools import partial

import lightning as L
import pytest
import tiny_networks
import torch
from pictures import Pictures, fit, records
from weights import weights_hash

from lightning_modules.diffusion import Diffusion, weighted_loss
from lightning_t2i.batch import Records
from lightning_t2i.errors import UserError
from lightning_t2i.keys import Keys
from lightning_t2i.networks.text_encoder import TextEncoder
from lightning_t2i.options import EMAOptions, GroupOptions, MethodOptions
from lightning_t2i.processes import DDPM, EDM, RectifiedFlow, Uniform
from lightning_t2i.processes.weights import loss_weight

pytestmark = pytest.mark.filterwarnings("ignore:The .* does not have many workers")
DDPM_ARGS = {"schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A stock text-to-image pipeline with random weights; its latents are 8 x 8 for pictures of 16 x 16."""
    return tiny_networks.pipeline_folder(tmp_path_factory.mktemp("pipeline"))


def adam(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


def built(folder, **options) -> Diffusion:
    module = Diffusion(str(folder), denoiser=GroupOptions(adam, ema=EMAOptions(0.5)), **options)
    module.configure_model()
    return module


def test_weighted_loss_is_the_weighted_mean_over_samples():
    prediction, target = torch.zeros(2, 1, 2, 2), torch.tensor([1.0, 3.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    assert float(weighted_loss(prediction, target, torch.tensor([2.0, 1.0]))) == pytest.approx((2 * 1 + 9) / 2)


@pytest.mark.parametrize("kind", ["min_snr", "truncated_snr", "snr_plus_one", "p2"])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_weight_weights_the_same_x0_error_in_every_prediction(prediction, kind):
    """The weighted loss of one denoiser is the same number whether it predicts x0, eps or v."""
    process = DDPM(**DDPM_ARGS)
    positions = torch.arange(64)
    x0, eps = (Keys(0).normal(n, positions, (4, 8, 8), torch.float64) for n in ("x", "e"))
    t = Keys(0).integers("t", positions, 0, 1000)
    error = Keys(0).normal("error", positions, (4, 8, 8), torch.float64) * 0.1
    alpha, sigma = (a.view(-1, 1, 1, 1) for a in process.alpha_sigma(t, torch.float64))
    snr = process.log_snr(t, torch.float64).exp()
    x0_loss = weighted_loss(x0 + error, x0, loss_weight(kind, snr, "x0"))
    shift = {"eps": -alpha / sigma * error, "v": -(sigma + alpha**2 / sigma) * error}[prediction]
    target = {"eps": eps, "v": alpha * eps - sigma * x0}[prediction]
    loss = weighted_loss(target + shift, target, loss_weight(kind, snr, prediction))
    assert float(loss) == pytest.approx(float(x0_loss), rel=1e-9)


def test_loss_of_the_zero_network_is_the_variance_of_the_noise(folder):
    """An eps network that says nothing scores 1 within sampling error: what the best constant predictor scores."""
    module = built(folder)
    for parameter in module.denoiser.parameters():
        parameter.data.zero_()
    losses = [
        float(module.loss(records(k * 64, 64), module.denoiser, module.text(["a"] * 64), Keys(0)).detach())
        for k in range(4)
    ]
    assert sum(losses) / 4 == pytest.approx(1, abs=4 * (2 / (4 * 64 * 256)) ** 0.5)


def test_the_loss_depends_on_positions_and_not_on_grouping(folder):
    module, whole = built(folder), records(0, 8)
    with torch.no_grad():
        cond = module.condition(whole)
        together = module.loss(whole, module.denoiser, cond, Keys(3))
        halves = [
            module.loss(whole.slice(a, b), module.denoiser, cond.index(slice(a, b)), Keys(3))
            for a, b in ((0, 4), (4, 8))
        ]
    assert float(together) == pytest.approx(float(sum(halves)) / 2, rel=1e-5)


def test_weights_of_the_eps_loss_at_known_ratios():
    snr = torch.tensor([0.5, 1.0, 10.0])
    known = {
        "min_snr": [1.0, 1, 0.5],
        "truncated_snr": [2.0, 1, 1],
        "snr_plus_one": [3, 2, 1.1],
        "p2": [2 / 3, 0.5, 1 / 11],
    }
    for kind, values in known.items():
        weight = torch.tensor(values)
        torch.testing.assert_close(loss_weight(kind, snr, "eps"), weight)
        for prediction, factor in (("x0", snr), ("v", snr / (1 + snr))):
            torch.testing.assert_close(loss_weight(kind, snr, prediction), weight * factor)


def test_weights_where_nothing_but_noise_is_left():
    """A zero terminal SNR: v and x0 are defined there, and so are their weights."""
    known = {"min_snr": [0.0, 0.0], "truncated_snr": [1.0, 1.0], "snr_plus_one": [1.0, 1.0], "p2": [0.0, 0.0]}
    for kind, values in known.items():
        assert [float(loss_weight(kind, torch.zeros(1), name)) for name in ("v", "x0")] == values


def test_learned_variances_end_at_the_losses_of_their_intervals(folder, tmp_path):
    """exp(-s) L + s is least at s = log L: where the network stays as it is, s_j goes to log L_j."""
    still, moving = (GroupOptions(partial(torch.optim.SGD, lr=lr), clip=None) for lr in (0.0, 0.5))
    module = Diffusion(str(folder), weighting="uncertainty", intervals=2, denoiser=still, uncertainty=moving)
    fit(tmp_path, module, 60, Pictures(batch_size=16))
    with torch.no_grad():
        cond, batch = module.condition(records(0, 64)), records(0, 64)
        module.weighting = "none"
        for j, s in enumerate(module.uncertainty.log_variance.tolist()):
            module.law = Uniform(low=500 * j, high=500 * (j + 1))
            assert s == pytest.approx(float(module.loss(batch, module.denoiser, cond, Keys(5)).log()), abs=0.1)


def test_learned_variances_have_a_rate_of_their_own(folder, tmp_path):
    """With that of a fine-tuned network they would stay at 0, and the weighting would be none."""
    module = Diffusion(str(folder), weighting="uncertainty", denoiser=GroupOptions(partial(torch.optim.SGD, lr=0.0)))
    fit(tmp_path, module, 5, Pictures(batch_size=4))
    assert float(module.uncertainty.log_variance.detach().abs().max()) > 0.01


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory):
    """The state after two training steps with the defaults."""
    module = Diffusion(str(folder))
    fit(tmp_path_factory.mktemp("plain"), module, 2, Pictures(batch_size=16))
    return module.state_dict()


@pytest.mark.parametrize(
    "options",
    [
        {"weighting": "min_snr"},
        {"weighting": "truncated_snr"},
        {"weighting": "snr_plus_one"},
        {"weighting": "p2"},
        {"null_probability": 0.9},
        {"law": Uniform(high=100)},
        {"law": Uniform(antithetic=True)},
        {"prediction": "v"},
        {"prediction": "x0"},
        {"process": DDPM("linear", 0.0001, 0.02)},
        {"process": RectifiedFlow(), "prediction": "velocity"},
        {"process": EDM(), "prediction": "edm"},
        {"common": MethodOptions(seed=1)},
        {"common": MethodOptions(accumulate=2)},
    ],
    ids=lambda o: "-".join(o),
)
def test_each_training_option_changes_the_result(folder, tmp_path, plain, options):
    module = Diffusion(str(folder), **options)
    fit(tmp_path, module, 2, Pictures(batch_size=16))
    found = module.state_dict()
    assert found.keys() == plain.keys() and any(not torch.equal(found[k], plain[k]) for k in plain)


@pytest.mark.parametrize("options", [{"weighting": "uncertainty"}, {"lora_rank": 2}, {"train_text": True}], ids=str)
def test_some_options_change_what_is_trained(folder, plain, options):
    module = Diffusion(str(folder), **options)
    module.configure_model()
    assert module.state_dict().keys() != plain.keys()


def test_min_snr_gamma_matters(folder):
    losses = []
    for gamma in (5.0, 1.0):
        module, batch = built(folder, weighting="min_snr", min_snr_gamma=gamma), records(0, 16)
        with torch.no_grad():
            losses.append(float(module.loss(batch, module.denoiser, module.condition(batch), Keys(0))))
    assert losses[1] < losses[0]


@pytest.mark.parametrize("change", [{"guidance": 7.0}, {"steps": 5}, {"solver": "dpmpp_2m"}])
def test_each_sampling_option_changes_the_pictures(folder, change):
    pictures = []
    for options in ({"guidance": 2.0, "steps": 4}, {"guidance": 2.0, "steps": 4, **change}):
        module = built(folder, **options)
        pictures.append(module.sample(module.condition(Records.of_prompts(["red", "blue"])), Keys(0), torch.arange(2)))
    assert pictures[0].shape == (2, 3, 16, 16)
    assert not torch.equal(*pictures)


def test_size_of_sampled_pictures(folder):
    module = built(folder, size=32, steps=2)
    assert module.sample(module.condition(Records.of_prompts(["red"])), Keys(0), torch.arange(1)).shape == (
        1,
        3,
        32,
        32,
    )


def test_gradient_checkpointing_keeps_the_gradients(folder):
    gradients = []
    for on in (False, True):
        module = built(folder, gradient_checkpointing=on)
        assert module.denoiser.backbone.is_gradient_checkpointing is on
        module.denoiser.train()
        module.backward(
            "denoiser", module.loss(records(0, 4), module.denoiser, module.condition(records(0, 4)), Keys(0))
        )
        gradients.append(module.denoiser.backbone.conv_in.weight.grad)
    torch.testing.assert_close(*gradients)


def test_sdxl_is_told_the_size_of_the_pictures(tmp_path):
    """By the autoencoder in use, also of a network from random weights; a square of 16 pixels here."""
    folder = tiny_networks.pipeline_folder(tmp_path, "unet_xl")
    config = dict(tiny_networks.backbone("unet_xl").config) | {"_class_name": "UNet2DConditionModel"}
    (tmp_path / "unet.json").write_text(json.dumps(config))
    new = {"network": str(tmp_path / "unet.json"), "process": DDPM(**DDPM_ARGS), "prediction": "eps"}
    for options in ({"network": str(folder)}, {**new, "codec": str(folder), "text": str(folder)}):
        module, seen = Diffusion(**options), []
        module.configure_model()
        module.denoiser.backbone.add_time_proj.register_forward_hook(lambda _m, args, _o, to=seen: to.append(args[0]))
        with torch.no_grad():
            module.sample(
                module.condition(Records.of_prompts(["red"])), Keys(0), torch.arange(1), guidance=1.0, steps=1
            )
        assert [ids.tolist() for ids in seen] == [[16, 16, 0, 0, 16, 16]]


def test_embedded_guidance_reaches_a_distilled_network(tmp_path):
    folder = tiny_networks.pipeline_folder(tmp_path, "flux")
    conds = [built(folder, embedded_guidance=g).condition(Records.of_prompts(["red"])).guidance for g in (1.0, 3.5)]
    assert [float(c) for c in conds] == [1.0, 3.5]


def test_adapters_are_all_that_trains_and_all_that_is_saved(folder, tmp_path):
    module = Diffusion(str(folder), lora_rank=2, denoiser=GroupOptions(adam))
    before = tiny_networks.backbone("unet_text").state_dict()
    fit(tmp_path, module, 3)
    names = list(module.state_dict())
    assert names
    assert all("lora_" in name for name in names)
    assert any(float(module.state_dict()[n].abs().sum()) > 0 for n in names if "lora_B" in n)
    after = {n.replace(".base_layer", ""): t for n, t in module.denoiser.backbone.state_dict().items()}
    assert all(torch.equal(after[n], t) for n, t in before.items())


@pytest.mark.parametrize("kind", ["unet_text", "unet_xl"])
def test_a_trained_text_encoder_gets_gradients_and_a_frozen_one_does_not(kind, tmp_path):
    folder = tiny_networks.pipeline_folder(tmp_path / "pipeline", kind)
    for train in (False, True):
        module = Diffusion(str(folder), train_text=train, denoiser=GroupOptions(adam), text_encoder=GroupOptions(adam))
        start = weights_hash(TextEncoder.from_pretrained(folder))
        fit(tmp_path, module, 2)
        assert (weights_hash(module.text) != start) is train
        assert any(n.startswith("text.") for n in module.state_dict()) is train
        assert module.text.training is train


def test_validation_loss_is_the_same_at_every_visit(folder, tmp_path):
    values = []

    class Record(L.Callback):
        def on_validation_end(self, trainer, module):
            values.append(float(trainer.callback_metrics["val/loss"]))

    still = GroupOptions(lambda p: torch.optim.SGD(p, lr=0.0))
    fit(tmp_path, Diffusion(str(folder), denoiser=still), 4, val_check_interval=1, callbacks=[Record()])
    assert len(values) == 4
    assert len(set(values)) == 1


def test_validation_before_the_first_step(folder, tmp_path):
    lines = []

    class Memory(L.pytorch.loggers.Logger):
        name, version = "memory", 0

        def log_metrics(self, metrics, step=None):
            lines.extend((step, k) for k in metrics if k.startswith("val/"))

        def log_hyperparams(self, *args, **kwargs):
            pass

    module = Diffusion(str(folder), common=MethodOptions(validate_first=True, accumulate=2))
    fit(tmp_path, module, 5, val_check_interval=2, logger=Memory())
    assert lines == [(0, "val/loss"), (2, "val/loss"), (4, "val/loss")]


def test_cached_latents_take_the_place_of_pictures(folder):
    module, batch = built(folder), records(0, 4)
    with torch.no_grad():
        cond = module.condition(batch)
        online = module.loss(batch, module.denoiser, cond, Keys(0))
        batch.latent, batch.image = module.codec.encode(batch.image), None
        assert torch.equal(module.loss(batch, module.denoiser, cond, Keys(0)), online)


def test_class_conditional_pixel_network(tmp_path):
    """No text, no autoencoder: labels condition, the last class is the null one."""
    folder = tmp_path / "pipeline"
    tiny_networks.backbone("unet_class").save_pretrained(folder / "unet")
    module = Diffusion(str(folder / "unet"), process=DDPM(**DDPM_ARGS), prediction="eps")
    module.codec_source = module.text_source = None
    module.configure_model()
    cond = module.condition(records(0, 4))
    assert cond.label.tolist() == [0, 1, 2, 3]
    assert cond.null().label.tolist() == [10] * 4


def test_export_is_a_stock_pipeline_that_gives_our_pictures(tmp_path):
    """StableDiffusionPipeline.from_pretrained(folder) and `sample` agree at equal noise."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

    from datamodules.vocabulary import clip_tokenizer

    clip_tokenizer(["a red square", "two blue circles"]).save_pretrained(tmp_path / "tokenizer")
    sizes = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": 2048, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = {"_class_name": "CLIPTextModel", **sizes, **ids}
    (tmp_path / "text.json").write_text(json.dumps(text))
    unet = dict(tiny_networks.backbone("unet_text").config) | {"_class_name": "UNet2DConditionModel"}
    (tmp_path / "unet.json").write_text(json.dumps({k: v for k, v in unet.items() if v is not None or k == "mid"}))
    tiny_networks.autoencoder(scaling_factor=0.7).save_pretrained(tmp_path / "vae")
    module = Diffusion(
        str(tmp_path / "unet.json"),
        process=DDPM(**DDPM_ARGS),
        prediction="eps",
        codec=str(tmp_path / "vae"),
        text=str(tmp_path / "text.json"),
        tokenizer=str(tmp_path / "tokenizer"),
        train_text=True,
        denoiser=GroupOptions(adam),
        text_encoder=GroupOptions(adam),
    )
    fit(tmp_path, module, 2)
    module.eval()
    module.export(tmp_path / "out", [])
    assert all(p.dtype == torch.float32 for p in module.parameters())  # the run itself is left as it was
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "out", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert isinstance(pipeline.tokenizer, CLIPTokenizer)
    prompts, positions = ["a red square", "two blue circles"], torch.arange(2)
    again = Diffusion(str(tmp_path / "out"), guidance=3.0, steps=10)
    again.configure_model()
    ours = again.sample(again.condition(Records.of_prompts(prompts)), Keys(0), positions)
    z = Keys(0).normal("z", positions, (4, 8, 8))
    theirs = pipeline(prompts, latents=z, guidance_scale=3.0, num_inference_steps=10, output_type="pt").images
    torch.testing.assert_close((ours + 1) / 2, theirs, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": "tiny.json"}, "process"),
        ({"null_probability": 1.5}, "null_probability"),
        ({"network": "no/such/folder"}, "No such model folder"),
        ({"weighting": "min_snr", "process": RectifiedFlow(), "prediction": "velocity"}, "min_snr"),
    ],
)
def test_impossible_options_are_refused_before_training(folder, tmp_path, options, message):
    if options.get("network") == "tiny.json":
        options = {"network": str(tmp_path / "tiny.json")}
        (tmp_path / "tiny.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(UserError, match=message):
        Diffusion(**{"network": str(folder), **options}).configure_model()


def test_data_that_does_not_fit_the_autoencoder_is_named(folder, tmp_path):
    with pytest.raises(UserError, match="does not fit the autoencoder"):
        built(folder, size=15).sample(built(folder).condition(Records.of_prompts(["red"])), Keys(0), torch.arange(1))


def test_same_data_order_with_and_without_validation(folder, tmp_path):
    plain, validated = Diffusion(str(folder)), Diffusion(str(folder))
    fit(tmp_path, plain, 3, limit_val_batches=0)
    fit(tmp_path, validated, 3, Pictures(), val_check_interval=1)
    assert all(torch.equal(t, validated.state_dict()[n]) for n, t in plain.state_dict().items())
