"""Tokenizer: KL term in closed form, both kinds of autoencoder learn, latents come out with unit deviation."""

import json
import math
from pathlib import Path

import diffusers
import pytest
import torch
from pictures import Pictures, fit, records
from toy import adam

from lightning_modules.tokenizer import Tokenizer, kl_loss, psnr, reconstruction_loss
from lightning_t2i.errors import UserError
from lightning_t2i.networks.codec import LatentCodec
from lightning_t2i.networks.perceptual import PerceptualConfig, PerceptualNetwork
from lightning_t2i.options import EMAOptions, GroupOptions, MethodOptions

pytestmark = pytest.mark.filterwarnings("ignore:The .* does not have many workers")


def architecture(folder, kind: str) -> str:
    facts = {
        "_class_name": kind,
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [8, 16],
        "latent_channels": 4,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
    }
    facts |= {"num_vq_embeddings": 16, "vq_embed_dim": 4} if kind == "VQModel" else {}
    file = folder / f"{kind}.json"
    file.write_text(json.dumps(facts))
    return str(file)


@pytest.fixture
def options():
    return GroupOptions(adam(1e-2), ema=EMAOptions(0.9))


def test_kl_is_that_of_two_gaussians():
    mean, std = torch.tensor([0.7, -1.2], dtype=torch.float64), torch.tensor([0.5, 2.0], dtype=torch.float64)
    p, q = torch.distributions.Normal(mean, std), torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(p, q).mean()
    torch.testing.assert_close(kl_loss(mean, 2 * std.log()), expected)
    assert float(kl_loss(torch.zeros(3), torch.zeros(3))) == 0


def test_reconstruction_and_psnr_by_hand():
    x, y = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5)
    assert float(reconstruction_loss(x, y)) == pytest.approx(0.75)
    assert float(psnr(x, y)) == pytest.approx(10 * math.log10(4 / 0.25), rel=1e-6)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "VQModel"])
def test_both_kinds_learn_and_export_stock_folders(tmp_path, options, kind):
    module = Tokenizer(architecture(tmp_path, kind), autoencoder=options)
    module.configure_model()
    x = records(0, 16).image
    before = float(reconstruction_loss(x, module.reconstruct(x)))
    fit(tmp_path, module, 40, Pictures(batch_size=8))
    module.eval()
    assert float(reconstruction_loss(x, module.reconstruct(x))) < 0.9 * before
    module.export(tmp_path / "out", [{"main": records(0, 32)}])
    stock = getattr(diffusers, kind).from_pretrained(tmp_path / "out")
    codec = LatentCodec(stock.float().eval())
    with torch.no_grad():
        torch.testing.assert_close(codec.decode(codec.encode(x)), module.reconstruct(x), atol=0.02, rtol=0.02)
        if kind == "AutoencoderKL":
            assert float(codec.encode(records(0, 32).image).std()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("change", ["kl_weight", "perceptual", "perceptual_weight"])
def test_each_option_changes_the_result(tmp_path, options, change):
    PerceptualNetwork(PerceptualConfig(widths=(8, 8, 8))).save_pretrained(tmp_path / "features")
    phi = {"perceptual": str(tmp_path / "features")}
    base, changed = {
        "kl_weight": ({}, {"kl_weight": 1.0}),
        "perceptual": ({}, phi),
        "perceptual_weight": (phi, phi | {"perceptual_weight": 50.0}),
    }[change]
    states = []
    for arguments in (base, changed):
        module = Tokenizer(architecture(tmp_path, "AutoencoderKL"), autoencoder=options, **arguments)
        fit(tmp_path, module, 2, Pictures(batch_size=2, side=32))
        states.append(module.state_dict())
    assert any(not torch.equal(states[0][n], t) for n, t in states[1].items())
    assert not any("distance" in n for n in states[1])


def test_the_weights_of_both_terms_of_the_codebook_are_those_of_the_equation(tmp_path, options):
    """0.25 |sg(E(x)) - e|^2 + |E(x) - sg(e)|^2, and nothing else has a gradient here."""
    module = Tokenizer(architecture(tmp_path, "VQModel"), autoencoder=options)
    module.configure_model()
    network, x = module.autoencoder, records(0, 4).image
    module.counters.step = 1
    codebook, last = network.quantize.embedding.weight, network.quant_conv.weight
    found = torch.autograd.grad(module.discrete_pass(x)[1], (codebook, last))
    z = network.encode(x).latents.permute(0, 2, 3, 1).flatten(0, 2)
    e = codebook[torch.cdist(z, codebook).argmin(1)]
    (moved,) = torch.autograd.grad(0.25 * (z.detach() - e).square().mean(), codebook, retain_graph=True)
    (pulled,) = torch.autograd.grad((z - e.detach()).square().mean(), last)
    torch.testing.assert_close(found, (moved, pulled))
    assert moved.abs().max() > 0 and pulled.abs().max() > 0


def test_a_frozen_encoder_keeps_the_codes(tmp_path, options):
    module = Tokenizer(architecture(tmp_path, "VQModel"), train_encoder=False, autoencoder=options)
    module.configure_model()
    x = records(0, 4).image
    codebook = module.autoencoder.quantize.embedding.weight.detach().clone()
    codes, picture = LatentCodec(module.autoencoder).encode_tokens(x), module.reconstruct(x)
    fit(tmp_path, module, 5)
    for network in (module.autoencoder, module.autoencoder_ema):
        assert torch.equal(network.quantize.embedding.weight, codebook)
        assert torch.equal(LatentCodec(network).encode_tokens(x), codes)
    assert not torch.equal(module.reconstruct(x), picture)
    with pytest.raises(UserError, match="restart_until"):
        Tokenizer("none", train_encoder=False, restart_until=1)


def test_a_frozen_encoder_keeps_the_latents(tmp_path, options):
    """The second stage improves the decoder; models trained on the latents stay valid."""
    module = Tokenizer(architecture(tmp_path, "AutoencoderKL"), train_encoder=False, autoencoder=options)
    module.configure_model()
    x = records(0, 4).image
    with torch.no_grad():
        before = module.autoencoder.encode(x).latent_dist.mean
    picture = module.reconstruct(x)
    fit(tmp_path, module, 5)
    with torch.no_grad():
        assert torch.equal(module.autoencoder.encode(x).latent_dist.mean, before)
    assert not torch.equal(module.reconstruct(x), picture)
    module.autoencoder.register_to_config(scaling_factor=0.5)
    module.groups["autoencoder"].ema.register_to_config(scaling_factor=0.5)
    module.export(tmp_path / "out", [{"main": records(0, 32)}])
    assert json.loads((tmp_path / "out/config.json").read_text())["scaling_factor"] == 0.5


def test_pictures_of_every_stream_are_used(tmp_path, options):
    module = Tokenizer(architecture(tmp_path, "AutoencoderKL"), autoencoder=options)
    module.configure_model()
    seen = []
    original = module.gaussian_pass
    module.gaussian_pass = lambda x, positions: (seen.append(len(x)), original(x, positions))[1]
    type(module).training_step.__wrapped__(module, {"main": records(0, 2), "real": records(50, 3)}, 0)
    assert seen == [5]


def test_codes_that_died_start_again_as_encoder_outputs(tmp_path, options):
    module = Tokenizer(architecture(tmp_path, "VQModel"), restart_until=1, autoencoder=options)
    module.configure_model()
    weight = module.autoencoder.quantize.embedding.weight
    features, before = torch.randn(6, 4), weight.detach().clone()
    module.restart_codes(features, torch.tensor([2, 2, 5, 5, 5, 5]))
    kept = [2, 5]
    assert torch.equal(weight[kept], before[kept])
    others = [i for i in range(len(weight)) if i not in kept]
    assert all(any(torch.equal(weight[i], f) for f in features) for i in others)


def test_restarts_stop_where_the_option_says(tmp_path, options):
    codebooks = []
    for until in (0, 1):
        module = Tokenizer(architecture(tmp_path, "VQModel"), restart_until=until, autoencoder=options)
        fit(tmp_path, module, 1)
        codebooks.append(module.autoencoder.quantize.embedding.weight.detach().clone())
    assert (codebooks[0] - codebooks[1]).abs().max() > 0.1


def test_validation_reports_the_share_of_the_codebook_in_use(tmp_path, options):
    module = Tokenizer(architecture(tmp_path, "VQModel"), autoencoder=options)
    trainer = fit(tmp_path, module, 1, val_check_interval=1)
    codes = set()
    for k in range(2):
        codes |= set(LatentCodec(module.autoencoder_ema).encode_tokens(records(4 * k, 4).image).flatten().tolist())
    assert float(trainer.callback_metrics["val/usage"]) == pytest.approx(len(codes) / 16)


def on_ranks(rank: int, network: str, folder: str, replicate: int, shard: int, precision: str) -> dict:
    """The weights after two updates whose size does not depend on that of a gradient near 0."""
    plain = GroupOptions(lambda p: torch.optim.SGD(p, lr=0.05))
    module = Tokenizer(network, autoencoder=plain, common=MethodOptions(precision=precision))
    mesh = {"fsdp": True} if precision == "bf16" else {"replicate": replicate, "shard": shard}
    fit(Path(folder), module, 2, limit_val_batches=0, **mesh)
    return module.state_dict()


@pytest.mark.parametrize("kind", ["AutoencoderKL", "VQModel"])
def test_two_processes_train_an_autoencoder_that_is_cut_as_one_does(tmp_path, ranks, kind):
    """Its halves are called one after the other: each gathers its weights for its own backward pass."""
    network = architecture(tmp_path, kind)
    one = on_ranks(0, network, str(tmp_path), 1, 1, "fp32")
    for two in ranks(on_ranks, network, str(tmp_path), 1, 2, "fp32"):
        for name, weight in one.items():
            torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-6)
    rough = on_ranks(0, network, str(tmp_path), 1, 1, "bf16")
    moved = max(float((rough[name] - weight).abs().max()) for name, weight in one.items())
    assert 0 < moved < 0.01
