"""What the benchmarks of Fluid compare gives the same tokens and the same gradients, and their tables are whole."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks import fluid_sampling, fluid_step
from benchmarks.fluid_sampling import SAVINGS, Loop
from lightning_t2i.keys import Keys
from lightning_t2i.networks import token_head_network
from lightning_t2i.token_sampling import Sampling, sample_tokens


def column(rows: list, columns: list, name: str) -> list:
    return [row[[n for n, _ in columns].index(name)] for row in rows]


@pytest.fixture
def double(monkeypatch) -> Iterator[None]:
    """All in float64: the first step from pure noise enlarges rounding by 1 / sqrt(abar) = 2e4."""
    monkeypatch.setattr(token_head_network, "in_float32", lambda function, *inputs: function(*inputs))
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_every_saving_gives_the_tokens_of_mars_loop(double: None) -> None:
    contest = fluid_sampling.Contest(32, 2, 2, 3, Sampling(steps=5, head_steps=4))
    network, cond, places = contest.network(), contest.cond(), torch.arange(3)
    plain = Loop(network, frozenset())(cond, Keys(0), places, contest.sampling)
    assert plain.dtype == torch.float64 and plain.std() > 0.1
    for count in range(1, len(SAVINGS) + 1):
        found = Loop(network, frozenset(SAVINGS[:count]))(cond, Keys(0), places, contest.sampling)
        torch.testing.assert_close(found, plain, rtol=1e-7, atol=1e-7)
    ours = sample_tokens(network, cond, Keys(0), places, contest.sampling)
    torch.testing.assert_close(ours, plain, rtol=1e-7, atol=1e-7)
    other = sample_tokens(network, cond, Keys(0), places, Sampling(steps=5, head_steps=4, guidance=3.001))
    assert not torch.allclose(other, plain, atol=1e-4)


def test_the_sampler_saves_what_it_says() -> None:
    contest = fluid_sampling.Contest(32, 2, 2, 3, Sampling(steps=5, head_steps=4))
    network, cond, rows = contest.network(), contest.cond(), {}
    for name, way in (("mar", Loop(network, frozenset())), ("ours", lambda *a: sample_tokens(network, *a))):
        seen = {"text": 0, "condition": 0, "time": 0}
        modules = [network.blocks[0].cross.text, network.token_head.condition, network.token_head.time]
        handles = [
            module.register_forward_hook(lambda m, i, o, seen=seen, key=key: seen.update({key: seen[key] + len(i[0])}))
            for key, module in zip(seen, modules, strict=True)
        ]
        way(cond, Keys(0), torch.arange(3), contest.sampling)
        rows[name] = seen
        for handle in handles:
            handle.remove()
    assert rows["mar"] == {"text": 5 * 6, "condition": 2 * 3 * 64 * 4, "time": 2 * 3 * 64 * 4}
    assert rows["ours"] == {"text": 6, "condition": 2 * 3 * 64, "time": 5 * 4}


@pytest.mark.parametrize("transformer", ["one stack", "encoder-decoder"])
def test_the_head_on_masked_tokens_alone_teaches_the_same(transformer: str) -> None:
    contest, found = fluid_step.Contest(32, 2, 2, 4), []
    for layer in (contest.network.token_head.network.modulation, contest.network.token_head.network.final):
        torch.nn.init.normal_(layer.weight, std=0.02)
    for head in ("masked tokens", "all tokens"):
        loss, masked = contest.step(transformer, "truncnorm", head)
        found.append((loss, {n: p.grad for n, p in contest.halves.named_parameters() if p.grad is not None}))
        assert 0.7 * 4 * 64 <= masked <= 4 * 64
        contest.halves.zero_grad()
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)
    assert ("buffer_in" in found[0][1]) == (transformer == "encoder-decoder")


def test_the_encoder_sees_known_tokens_alone_and_the_decoder_puts_them_back() -> None:
    contest = fluid_step.Contest(32, 2, 2, 4)
    masked, bound = contest.masks("encoder-decoder", "truncnorm")
    text, known = contest.network.align(contest.text, contest.real), fluid_step.LENGTH - bound // 4
    lengths: list[int] = []
    for block in contest.network.blocks:
        block.register_forward_hook(lambda m, i, o: lengths.append(i[0].shape[1]))
    with torch.no_grad():
        z = contest.halves(contest.tokens, text, ~masked, known)
        other = torch.where(masked[:, :, None], 9.0, contest.tokens)
        torch.testing.assert_close(contest.halves(other, text, ~masked, known), z)
        changed = contest.halves(torch.where(masked[:, :, None], contest.tokens, 9.0), text, ~masked, known)
    assert (
        lengths[:2] == [fluid_step.BUFFER + known, fluid_step.BUFFER + fluid_step.LENGTH]
        and (~masked).sum() == 4 * known
    )
    assert not torch.allclose(changed, z, atol=1e-2)


def test_the_tables_are_whole() -> None:
    for module, name in ((fluid_sampling, "MAR's loop / this"), (fluid_step, "MAR's step / this")):
        (table,) = module.measure(quick=True)["tables"]
        assert all(len(row) == len(module.COLUMNS) for row in table["rows"])
        assert all(value > 0 for value in column(table["rows"], module.COLUMNS, name))
    gains = column(table["rows"], fluid_step.COLUMNS, "Gflop")
    assert gains[0] < gains[1] and gains[3] < gains[2] < gains[4] * 2 and gains[3] < gains[4]
