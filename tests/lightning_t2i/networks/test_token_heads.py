"""The heads: what they are at the start, where their gradients go, guidance, and which work they save."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from lightning_t2i.errors import UserError
from lightning_t2i.networks.token_head_network import HeadNetwork, NoiseHead, time_features
from lightning_t2i.networks.token_heads import (
    CategoricalHead,
    DiffusionHead,
    FlowHead,
    RegressionHead,
    Terms,
    masked_rows,
)

WIDTH, CHANNELS = 24, 3


def head(kind: type[NoiseHead] = DiffusionHead, start: bool = False, **options: Any) -> Any:
    """A small head; its zero layers are filled unless it is one at the start."""
    built = kind(WIDTH, CHANNELS, 2, 16, **options)
    for layer in () if start else (built.network.modulation, built.network.final):
        nn.init.normal_(layer.weight, std=0.1)
        nn.init.normal_(layer.bias, std=0.1)
    return built


def draws(rows: int, copies: int = 2) -> dict[str, Tensor]:
    return {
        "z": torch.randn(rows, WIDTH),
        "target": torch.randn(rows, CHANNELS),
        "u": torch.rand(rows, copies),
        "noise": torch.randn(rows, copies, CHANNELS),
    }


@contextmanager
def calls(module: nn.Module) -> Iterator[list[int]]:
    """The rows of each call of a module."""
    seen: list[int] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    yield seen
    handle.remove()


# ---- the start ----


@pytest.mark.parametrize("scale", [0.3, 1.0, 7.0])
def test_P1_the_start_predicts_nothing(scale: float) -> None:
    found = draws(400, 100)
    terms = head(start=True).loss(found["z"], scale * found["target"], found["u"], found["noise"])
    assert float(terms.parts["eps_mse"].mean()) == pytest.approx(1.0, abs=0.01)
    assert torch.equal(terms.total, terms.parts["eps_mse"] + terms.parts["vb_bits"])
    assert not head(start=True).predict(found["noise"], torch.ones(400, 100), found["z"]).any()


def test_P1_bits_at_the_start_come_from_the_last_time() -> None:
    u, rows = (torch.arange(1000) + 0.5) / 1000, 400
    z, noise = torch.randn(1, WIDTH).expand(rows, -1), torch.randn(rows, 1000, 1)
    built = DiffusionHead(WIDTH, 1, 1, 8)
    bits = built.loss(z, torch.randn(rows, 1), u.expand(rows, -1), noise).parts["vb_bits"].mean(0)
    assert float(bits.mean()) == pytest.approx(0.79, abs=0.1)
    assert float(bits[999]) == pytest.approx(719, rel=0.15) and float(bits[999]) > 0.85 * float(bits.sum())
    assert float(bits[0]) == pytest.approx(1.5, abs=0.3) and float(bits[1]) == pytest.approx(0.6, abs=0.12)
    assert float(bits[500]) == pytest.approx(0.0045, abs=0.001)


def test_parameters_are_as_counted_in_the_spec() -> None:
    width, channels, depth = 32, 4, 6
    built = DiffusionHead(width, channels, depth, width)
    weights = sum(p.numel() for p in built.parameters() if p.dim() == 2)
    assert weights == 5 * depth * width**2 + 4 * width**2 + 256 * width + channels * width + 2 * channels * width


# ---- gradients ----


def test_P11_the_bits_teach_the_variance_and_not_the_mean() -> None:
    built, found = head(), draws(5)
    t, z = built.times(found["u"]), found["z"].requires_grad_()
    x, weights = found["target"][:, None], built.network.final
    x_t = built.diffusion.add_noise(x, found["noise"], t)
    eps, v = built.predict(x_t, t, z).chunk(2, -1)
    bits = built.diffusion.bits(x, x_t, t, eps, v)
    gradients = torch.autograd.grad(bits.sum(), [weights.weight, weights.bias, z], retain_graph=True)
    assert not gradients[0][:CHANNELS].any() and not gradients[1][:CHANNELS].any()
    assert gradients[0][CHANNELS:].any(1).all() and gradients[1][CHANNELS:].all() and gradients[2].any(1).all()
    terms = built.loss(**found)  # and the loss adds these bits, not others
    torch.testing.assert_close(terms.parts["vb_bits"], bits.detach())
    (total,) = torch.autograd.grad(terms.total.sum(), weights.weight)
    (apart,) = torch.autograd.grad((eps - found["noise"]).square().mean(-1).sum(), weights.weight)
    torch.testing.assert_close(total[:CHANNELS], apart[:CHANNELS])


@pytest.mark.parametrize("kind", [DiffusionHead, FlowHead])
def test_P9_the_rows_of_known_tokens_can_be_left_out(kind: type[NoiseHead]) -> None:
    built, batch, length = head(kind), 3, 8
    known = torch.rand(batch, length) < 0.4
    every, count = draws(batch * length), int((~known).sum())
    whole = built.loss(**every).total * (~known).flatten()[:, None]
    for surplus in (0, 2):
        rows, weight = masked_rows(known, count + surplus)
        z = every["z"].clone().requires_grad_()
        some = built.loss(z[rows], *(every[name][rows] for name in ("target", "u", "noise"))).total * weight[:, None]
        torch.testing.assert_close(some.sum(), whole.sum())
        some.sum().backward()
        gradient = z.grad.view(batch, length, -1)
        assert not gradient[known].any() and gradient[~known].any(-1).all()


def test_rows_of_unknown_tokens_come_first_and_each_once() -> None:
    known = torch.tensor([[True, False, False], [False, True, True]])
    rows, weight = masked_rows(known, 5)
    assert rows.tolist() == [1, 2, 3, 0, 4] and weight.tolist() == [1, 1, 1, 0, 0]


# ---- the network ----


def test_z_is_projected_once_for_all_copies_and_all_steps() -> None:
    built, found = head(), draws(6, 5)
    with calls(built.condition) as conditions, calls(built.network) as passes:
        built.loss(**found)
        assert conditions == [6] and passes == [6]
        built.sample(found["z"], torch.randn(9, 6, CHANNELS))
    assert conditions == [6, 6] and passes == [6] + [6] * 9


def test_copies_are_independent_losses() -> None:
    for kind in (DiffusionHead, FlowHead):
        built, found = head(kind), draws(4, 3)
        together = built.loss(**found).total
        for j in range(3):
            alone = built.loss(found["z"], found["target"], found["u"][:, [j]], found["noise"][:, [j]]).total
            torch.testing.assert_close(alone[:, 0], together[:, j])


def test_the_modulation_written_out() -> None:
    network, x, y = HeadNetwork(CHANNELS, 2, 16, 2), torch.randn(4, CHANNELS), torch.randn(4, 16)
    parts = network.modulation(nn.functional.silu(y)).view(4, 8, 16)
    h = network.inside(x)
    for i in range(2):
        shift, scale, gate = parts[:, 3 * i], parts[:, 3 * i + 1], parts[:, 3 * i + 2]
        h = h + gate * network.mlps[i](network.norms[i](h) * (1 + scale) + shift)
    h = nn.functional.layer_norm(h, (16,), eps=1e-6) * (1 + parts[:, 7]) + parts[:, 6]
    torch.testing.assert_close(network(x, y), network.final(h))


def test_time_features_are_cosines_then_sines() -> None:
    found = time_features(torch.tensor([0, 3]))
    assert found.shape == (2, 256) and found[0].tolist() == [1.0] * 128 + [0.0] * 128
    assert found[1, 5].item() == pytest.approx(math.cos(3 * math.exp(-math.log(1e4) * 5 / 128)), abs=1e-6)
    assert found[1, 128].item() == pytest.approx(math.sin(3), abs=1e-6)


def test_the_last_layer_is_float32_whatever_surrounds_it() -> None:
    built, found = head().bfloat16(), draws(4)
    terms = built.loss(found["z"].bfloat16(), found["target"], found["u"], found["noise"])
    assert terms.total.dtype == torch.float32
    built = head()
    with torch.autocast("cpu", torch.bfloat16):
        assert built.loss(**found).total.dtype == torch.float32
        out = built.network(found["noise"], torch.randn(4, 2, 16))
    assert out.dtype == torch.float32 and not torch.equal(out, out.bfloat16().float())


# ---- guidance ----


class Unit(nn.Module):
    """Says the optimal eps for a token that is N(1, I) with the text (y > 0) and N(0, I) without."""

    def __init__(self, times: list[int], abar: list[float]):
        super().__init__()
        self.abar = dict(zip(times, abar, strict=True))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        t, mean = y[:, :1], y[:, 1:2]
        abar = torch.tensor([self.abar[int(i)] for i in t.flatten()], dtype=x.dtype)[:, None]
        return (1 - abar).sqrt() * (x - abar.sqrt() * mean)


def guided_head(rows: int) -> tuple[DiffusionHead, Tensor, Tensor]:
    """A head whose condition is (0, mean) and whose time is (t, 0), and z with and without the text."""
    built = DiffusionHead(2, 1, 1, 2, variance="large")
    built.network = Unit(built.diffusion.times, built.diffusion.abar)
    built.embed = lambda t: torch.stack([t.float(), torch.zeros(len(t))], -1)  # type: ignore[method-assign]
    nn.init.eye_(built.condition.weight)
    z = torch.tensor([0.0, 1.0]).expand(rows, -1)
    return built, z, torch.zeros(rows, 2)


@pytest.mark.parametrize("w", [0.0, 1.0, 3.0])
def test_P4_guidance_moves_the_mean_and_keeps_the_variance(w: float) -> None:
    rows = 10_000
    built, z, null = guided_head(rows)
    noise = torch.randn(10, rows, 1, dtype=torch.float64)
    both = z if w == 1 else torch.cat([z, null])
    with torch.no_grad():
        x = built.sample(both, noise, guidance=w).tokens
    assert float(x.mean()) == pytest.approx(w, abs=0.03) and float(x.var()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("kind", [DiffusionHead, FlowHead])
def test_P4_both_halves_meet_one_state(kind: type[NoiseHead]) -> None:
    built, z, null = head(kind), torch.randn(4, WIDTH), torch.randn(4, WIDTH)
    noise = torch.randn(6, 4, CHANNELS)
    with torch.no_grad():
        plain = built.sample(z, noise).tokens
        same = built.sample(torch.cat([z, z]), noise, guidance=3.0).tokens
        torch.testing.assert_close(same, plain, rtol=1e-4, atol=1e-4)
        with calls(built.network) as passes:
            guided = built.sample(torch.cat([z, null]), noise, guidance=3.0).tokens
    assert passes == [8] * 6 and not torch.allclose(guided, plain, atol=1e-2)


def test_the_variance_is_the_one_with_the_text() -> None:
    built, z, null, x = head(), torch.randn(4, WIDTH), torch.randn(4, WIDTH), torch.randn(4, CHANNELS)
    times = torch.tensor([10, 600])
    with torch.no_grad():
        guided = built.stepwise(torch.cat([z, null]), times, 2.5)(x, 1)
        told, other = (built.stepwise(which, times, 1.0)(x, 1) for which in (z, null))
    torch.testing.assert_close(guided[:, CHANNELS:], told[:, CHANNELS:])
    eps = other[:, :CHANNELS] + 2.5 * (told - other)[:, :CHANNELS]
    torch.testing.assert_close(guided[:, :CHANNELS], eps)


# ---- learning ----


def test_P2_a_trained_head_comes_down_to_the_floor() -> None:
    built = DiffusionHead(4, 1, 2, 32)
    optimizer, z = torch.optim.AdamW(built.parameters(), lr=3e-3), torch.zeros(512, 4)
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 150)
        u, noise = torch.rand(512, 1), torch.randn(512, 1, 1)
        built.loss(z, torch.randn(512, 1), u, noise).total.mean().backward()
        nn.utils.clip_grad_norm_(built.parameters(), 3.0)
        optimizer.step()
        optimizer.zero_grad()
    u = ((torch.arange(1000) + 0.5) / 1000).expand(200, -1)
    with torch.no_grad():
        terms = built.loss(z[:200], torch.randn(200, 1), u, torch.randn(200, 1000, 1))
    assert 0.485 < float(terms.parts["eps_mse"].mean()) < 0.53


# ---- flow ----


def test_the_flow_is_at_its_floor_with_the_optimal_velocity() -> None:
    built, u = head(FlowHead, std=1.5, mean=0.4), torch.rand(300, 200)
    t, x, noise = built.times(u), torch.randn(300, CHANNELS), torch.randn(300, 200, CHANNELS)
    assert float(t.min()) > 0 and float(t.max()) < 1 == built.t_end
    assert float(t.logit().mean()) == pytest.approx(0.4, abs=0.03)
    assert float(t.logit().std()) == pytest.approx(1.5, abs=0.03)
    best = (2 * t - 1) / ((1 - t) ** 2 + t**2)  # E[eps - x | x_t] / x_t for unit Gaussian data
    built.predict = lambda x_t, scaled, z: best[..., None] * x_t  # type: ignore[method-assign]
    error = built.loss(torch.zeros(300, WIDTH), x, u, noise).total.mean()
    assert float(error) == pytest.approx(float((1 / ((1 - t) ** 2 + t**2)).mean()), rel=0.02)


@pytest.mark.parametrize(("eta", "temperature", "expected"), [(1.0, 1.0, 1.0), (0.0, 1.0, 1.0), (1.0, 0.0, 0.0)])
def test_the_flow_samples_unit_gaussians(eta: float, temperature: float, expected: float) -> None:
    steps = 400
    built = FlowHead(WIDTH, 1, 1, 4, eta=eta)
    times = built.flow.timesteps(steps)

    def say(x: Tensor, j: int) -> Tensor:
        t = times[j]
        return (2 * t - 1) / ((1 - t) ** 2 + t**2) * x

    built.stepwise = lambda *_: say  # type: ignore[method-assign]
    basis = torch.eye(steps, dtype=torch.float64)[:, :, None]
    variance = float(built.sample(torch.zeros(1, WIDTH), basis, temperature).tokens.square().sum())
    assert variance == pytest.approx(expected, abs=0.02)


# ---- discrete tokens ----


def test_cross_entropy_with_and_without_smoothing() -> None:
    logits, target = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    plain = CategoricalHead(WIDTH, 0).loss(logits, target)
    assert isinstance(plain, Terms) and torch.equal(plain.total, plain.parts["ce"])
    torch.testing.assert_close(plain.total[:, 0], -logits.log_softmax(1)[torch.arange(6), target])
    smooth = CategoricalHead(WIDTH, 0, label_smoothing=0.1).loss(logits, target)
    expected = cross_entropy(logits, 0.9 * one_hot(target, 5) + 0.02, reduction="none")
    torch.testing.assert_close(smooth.total[:, 0], expected)
    assert torch.equal(smooth.parts["ce"], plain.parts["ce"])


def frequencies(logits: Tensor, count: int = 20_000, **options: Any) -> Tensor:
    """Shares of sampled tokens; the normals are at equal quantiles, so there is no error of sampling."""
    quantiles = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    many = logits.expand(count, -1) if "guidance" not in options else logits.repeat_interleave(count, 0)
    found = CategoricalHead(WIDTH, 0).sample(many, quantiles[None, :, None], **options)
    shares = torch.bincount(found.tokens, minlength=logits.shape[-1]) / count
    seen = shares[found.tokens]
    if options.get("temperature", 1):
        torch.testing.assert_close(found.confidence.exp(), seen, rtol=0.01, atol=1e-3)
    return shares


def test_tokens_have_the_probabilities_of_the_logits() -> None:
    logits = torch.tensor([[0.5, 2.0, -1.0, 1.0]])
    for temperature in (1.0, 0.6):
        torch.testing.assert_close(
            frequencies(logits, temperature=temperature), (logits[0] / temperature).softmax(0), rtol=0, atol=2e-4
        )
    assert frequencies(logits, temperature=0.0).tolist() == [0, 1, 0, 0]


def test_few_of_the_likeliest_tokens() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    torch.testing.assert_close(frequencies(logits, top_k=2), torch.tensor([0, 2 / 3, 0, 1 / 3]), rtol=0, atol=2e-4)
    torch.testing.assert_close(frequencies(logits, top_p=0.8), torch.tensor([0, 5, 1.5, 2.5]) / 9, rtol=0, atol=2e-4)
    assert frequencies(logits, top_p=0.4).tolist() == [0, 1, 0, 0]


def test_P4_guidance_of_logits() -> None:
    told, null = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 0.0, 2.0])
    shares = frequencies(torch.stack([told, null]), guidance=2.0)
    torch.testing.assert_close(shares, (null + 2 * (told - null)).softmax(0), rtol=0, atol=2e-4)


# ---- regression, mistakes ----


def test_regression_has_one_answer() -> None:
    built, found = RegressionHead(WIDTH, CHANNELS, 2, 16), draws(4)
    x = built.sample(found["z"], torch.zeros(0, 4, CHANNELS)).tokens
    terms = built.loss(found["z"], found["target"])
    torch.testing.assert_close(terms.total[:, 0], (x - found["target"]).square().mean(1))
    guided = built.sample(torch.cat([found["z"], -found["z"]]), found["noise"], guidance=2.0).tokens
    torch.testing.assert_close(guided, 2 * x - built.predict(-found["z"]))


@pytest.mark.parametrize("options", [{"variance": "none"}, {"first": "laplace"}])
def test_an_unknown_choice_is_named(options: dict[str, str]) -> None:
    with pytest.raises(UserError, match=next(iter(options.values()))):
        head(**options)


@pytest.mark.parametrize("variance", ["large", "small"])
def test_a_fixed_variance_has_no_bits(variance: str) -> None:
    built, found = head(variance=variance), draws(4)
    terms = built.loss(**found)
    assert terms.parts.keys() == {"eps_mse"} and built.network.final.out_features == CHANNELS
    noise = torch.randn(5, 4, CHANNELS)
    with torch.no_grad():
        wild, bounded = (head(variance=variance, clip=clip).sample(found["z"], noise).tokens for clip in (None, 0.5))
    assert float(bounded.abs().max()) <= 0.5 < float(wild.abs().max())


def test_a_draw_that_rounds_up_to_one_is_the_last_time():
    head = DiffusionHead(4, 2)
    u = (torch.arange(4) + torch.tensor(1 - 2**-24)) / 4  # the strata of validation
    assert float(u[-1]) == 1.0 and int(head.times(u)[-1]) == 999
