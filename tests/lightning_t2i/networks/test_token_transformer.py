"""The token transformer: what a token sees, how text enters, what is computed once, and its folders."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from lightning_t2i.errors import UserError
from lightning_t2i.networks.load import build_network, load_model, read_architecture
from lightning_t2i.networks.token_blocks import rotary_table, turn
from lightning_t2i.networks.token_heads import masked_rows
from lightning_t2i.networks.token_transformer import Text, TokenTransformer

B, L, C, V, WORDS, TEXT = 3, 16, 3, 11, 5, 10
# millions, continuous and discrete, of the spec's section 3.1
FIT = {
    "166m": (164.8, 151.0),
    "369m": (358.6, 331.4),
    "665m": (663.9, 618.7),
    "1b": (1105.7, 1038.1),
    "3b": (3162.6, 3001.0),
    "10b": (10519.0, None),
}
KINDS = [(order, head) for order in ("random", "raster") for head in ("diffusion", "categorical")]


def network(**options: Any) -> TokenTransformer:
    facts = {"length": L, "channels": C, "vocabulary": V, "width": 32, "depth": 2, "heads": 2, "text_width": TEXT}
    torch.manual_seed(0)
    net = TokenTransformer(**{**facts, "aligner_depth": 1, "head_depth": 2, **options})
    for parameter in net.parameters():  # nothing is zero or one, as after training
        nn.init.normal_(parameter, std=0.2)
    return net.eval()


def tokens_of(net: TokenTransformer) -> Tensor:
    return torch.randint(V, (B, L)) if net.discrete else torch.randn(B, L, C)


def words() -> tuple[Tensor, Tensor]:
    mask = torch.arange(WORDS) < torch.tensor([5, 2, 3])[:, None]
    return torch.randn(B, WORDS, TEXT), mask


def run(net: TokenTransformer, tokens: Tensor, known: Tensor | None, text: Text | None = None) -> Tensor:
    torch.manual_seed(1)
    random = net.config.order == "random"
    return net(tokens, text if text is not None else net.align(*words()), known if random else None)


# ---- sizes ----


def test_widths_of_perceptrons_and_head_are_those_asked_for() -> None:
    def size(**options: Any) -> int:
        return sum(p.numel() for p in network(**options).parameters())

    more = 2 * 32 * 32 + 32  # of a perceptron that is one width wider: two matrices and a bias
    assert size(mlp_ratio=5.0) - size(mlp_ratio=4.0) == 2 * more
    assert size(aligner_mlp_ratio=3.0) - size(aligner_mlp_ratio=2.0) == more
    assert size(head_width=32) == size() > size(head_width=16)


# ---- what a token sees ----


@pytest.mark.parametrize("head", ["diffusion", "categorical"])
@pytest.mark.parametrize("positions", ["learned", "rope"])
@torch.no_grad()
def test_tokens_are_at_least_as_large_as_their_positions(positions: str, head: str) -> None:
    """Else the network hardly sees what is known. Learned tables begin at .02, sines have .71."""
    torch.manual_seed(0)
    net = TokenTransformer(length=L, channels=C, vocabulary=V, width=32, heads=2, positions=positions, head=head)
    tokens = tokens_of(net)
    size = 0.02 if positions == "learned" else 0.71
    assert float(net._embed(tokens).square().mean().sqrt()) > 0.8 * size


@pytest.mark.parametrize("head", ["diffusion", "categorical"])
@pytest.mark.parametrize("positions", ["learned", "rope"])
@torch.no_grad()
def test_P6_raster_tokens_see_those_before_them(head: str, positions: str) -> None:
    net = network(order="raster", head=head, positions=positions)
    tokens = tokens_of(net)
    before, j = run(net, tokens, None), 6
    tokens[:, j] = (tokens[:, j] + 1) % V
    after = run(net, tokens, None)
    assert torch.equal(after[:, : j + 1], before[:, : j + 1])
    assert (after[:, j + 1 :] - before[:, j + 1 :]).abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("head", ["diffusion", "categorical"])
@pytest.mark.parametrize("positions", ["learned", "rope"])
@torch.no_grad()
def test_P6_cached_and_whole_passes_agree(head: str, positions: str) -> None:
    net = network(order="raster", head=head, positions=positions)
    tokens, text = tokens_of(net), net.align(*words(), keep=True)
    whole, cache = net(tokens, text), net.cache(text)
    steps = [net(tokens[:, i - 1 : i] if i else None, text, cache=cache) for i in range(L)]
    assert steps[0].shape == (B, 1, 32)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("head", ["diffusion", "categorical"])
def test_P7_values_of_unknown_tokens_have_no_effect(head: str) -> None:
    net = network(head=head)
    tokens, known = tokens_of(net), torch.rand(B, L) < 0.5
    changed = torch.where(known if net.discrete else known[:, :, None], tokens, 7 if net.discrete else float("nan"))
    assert torch.equal(run(net, changed, known), run(net, tokens, known))
    other = tokens.clone()
    other[known] = other[known].flip(0)
    assert not torch.allclose(run(net, other, known), run(net, tokens, known), atol=1e-3)


def test_P7_unknown_tokens_get_no_gradient() -> None:
    net, known = network(), torch.rand(B, L) < 0.5
    tokens = torch.where(known[:, :, None], torch.randn(B, L, C), torch.nan).requires_grad_()
    run(net, tokens, known).square().sum().backward()
    assert not tokens.grad[~known].any() and tokens.grad[known].any(-1).all()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


@torch.no_grad()
def test_P7_an_order_of_the_places_commutes() -> None:
    net, known, order = network(), torch.rand(B, L) < 0.5, torch.randperm(L)
    tokens = tokens_of(net)
    plain = run(net, tokens, known)
    for table in (net.places_in, net.places_out):
        table.copy_(table[order].clone())
    torch.testing.assert_close(run(net, tokens[:, order], known[:, order]), plain[:, order], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_unknown_tokens_differ_by_their_place() -> None:
    for positions in ("learned", "rope"):
        net = network(positions=positions)
        z = run(net, torch.zeros(B, L, C), torch.zeros(B, L, dtype=torch.bool))
        apart = (z[:, :, None] - z[:, None]).abs().amax(-1) + torch.eye(L)
        assert apart.min() > 0.01
    longer = torch.zeros(B, 25, dtype=torch.bool)  # rope has no table that ends
    assert net(torch.zeros(B, 25, C), net.null(B), longer).shape == (B, 25, 32)


@torch.no_grad()
def test_rope_sees_distances() -> None:
    attention, x = network().blocks[0].attention, torch.randn(1, 4, 32).repeat(1, 4, 1)
    table, q = rotary_table(16, 16, x.device), torch.randn(1, 2, 1, 16).expand(1, 2, 16, 16)
    turned = turn(q, table)
    scores = (turned @ turned.transpose(-1, -2)).view(1, 2, 4, 4, 4, 4)
    torch.testing.assert_close(scores[:, :, 0, 1, 2, 3], scores[:, :, 1, 0, 3, 2])
    assert not torch.allclose(scores[:, :, 0, 0, 0, 1], scores[:, :, 0, 0, 1, 0], atol=1e-4)
    assert not torch.allclose(attention(x, rotary=table), attention(x), atol=1e-4)


# ---- text ----


@torch.no_grad()
def test_P8_padding_is_not_seen() -> None:
    net, known = network(), torch.rand(B, L) < 0.5
    tokens, (embeds, mask) = tokens_of(net), words()
    plain = net(tokens, net.align(embeds, mask), known)
    padded = torch.cat([torch.where(mask[:, :, None], embeds, 99.0), torch.full((B, 4, TEXT), -50.0)], 1)
    longer = torch.cat([mask, torch.zeros(B, 4, dtype=torch.bool)], 1)
    torch.testing.assert_close(net(tokens, net.align(padded, longer), known), plain, rtol=1e-5, atol=1e-5)
    alone = net(tokens[1:2], net.align(embeds[1:2, :2]), known[1:2])
    torch.testing.assert_close(alone, plain[1:2], rtol=1e-5, atol=1e-5)
    embeds[1, 1] += 1
    found = net(tokens, net.align(embeds, mask), known)
    changed = (found - plain).abs().amax((1, 2))
    assert changed[1] > 1e-3 and changed[0] == changed[2] == 0


@torch.no_grad()
def test_dropped_and_empty_texts_are_the_null_token() -> None:
    net, known = network(), torch.rand(B, L) < 0.5
    tokens, (embeds, mask) = tokens_of(net), words()
    mask[2] = False
    z = net(tokens, net.align(embeds, mask, drop=torch.tensor([False, True, False])), known)
    null = net(tokens, net.null(B), known)
    torch.testing.assert_close(z[1:], null[1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z[0], net(tokens, net.align(embeds, mask), known)[0], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(z[0], null[0], atol=1e-2) and z.isfinite().all()


@torch.no_grad()
def test_kept_text_is_computed_once_and_changes_nothing() -> None:
    net, known, tokens = network(), torch.rand(B, L) < 0.5, torch.randn(B, L, C)
    passes: list[int] = []
    net.blocks[1].cross.text.register_forward_hook(lambda *_: passes.append(1))
    for kept, plain in ((net.align(*words(), keep=True), None), (net.null(B, keep=True), net.null(B))):
        count = len(passes)
        first, second = net(tokens, kept, known), net(tokens, kept, known)
        assert len(passes) == count and torch.equal(first, second)
        torch.testing.assert_close(first, net(tokens, plain or kept._replace(kv=None), known))
        assert len(passes) == count + 1


# ---- head ----


@pytest.mark.parametrize(("order", "head"), KINDS)
def test_P9_only_the_rows_that_are_scored_are_taught(order: str, head: str) -> None:
    net = network(order=order, head=head)
    tokens, known = tokens_of(net), torch.rand(B, L) < 0.5
    z = run(net, tokens, known)
    z.retain_grad()
    rows, weight = masked_rows(known, B * L)
    u, noise = torch.rand(B * L, 2), torch.randn(B * L, 2, C)
    terms = net.loss(z.flatten(0, 1)[rows], tokens.flatten(0, 1)[rows], u, noise)
    (terms.total * weight[:, None]).sum().backward()
    assert not z.grad[known].any() and z.grad[~known].any(-1).all()
    assert all(not part.requires_grad for part in terms.parts.values())
    untaught = {n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    assert untaught <= {"null_text"}


@torch.no_grad()
def test_P4_no_guidance_is_one_pass_and_none_of_the_text_is_the_null() -> None:
    for head in ("diffusion", "flow", "categorical", "regression"):
        net = network(head=head)
        z, null, (count, width) = torch.randn(4, 32), torch.randn(4, 32), net.draws(6)
        noise, rows = torch.randn(count, 4, width), []
        if not net.discrete:
            net.token_head.network.register_forward_pre_hook(lambda _, inputs, rows=rows: rows.append(len(inputs[0])))
        plain = net.sample(z, noise).tokens
        assert torch.equal(net.sample(z, noise, guidance=1.0, z_null=null * torch.nan).tokens, plain)
        assert torch.equal(net.sample(z * torch.nan, noise, guidance=0.0, z_null=z).tokens, plain)
        assert set(rows) <= {4}
        guided = net.sample(z, noise, guidance=20.0, z_null=null).tokens
        assert not torch.equal(guided, plain) and guided.shape == plain.shape
        with pytest.raises(ValueError, match="null text"):
            net.sample(z, noise, guidance=2.0)


def test_P12_one_matrix_is_embedding_and_output(tmp_path: Path) -> None:
    net = network(head="categorical")
    names = [n for n, p in net.named_parameters() if V in p.shape]
    assert names == ["embedding.weight"]
    net.save_pretrained(tmp_path)
    for other in (net, copy.deepcopy(net), load_model(tmp_path, None)):
        z = torch.randn(2, 32)
        before = other.loss(z, torch.tensor([3, 4])).total
        seen = other._embed(torch.tensor([3]))
        with torch.no_grad():
            other.embedding.weight[3] += 1.0
        torch.testing.assert_close(other._embed(torch.tensor([3])), seen + 1.0)
        assert not torch.allclose(other.loss(z, torch.tensor([3, 4])).total, before)
    torch.testing.assert_close(net._to_head(z), z @ net.embedding.weight.T)


# ---- sizes, folders, memory ----


@pytest.mark.parametrize("size", FIT)
def test_sizes_are_those_of_the_paper(size: str) -> None:
    file = f"configs/networks/fluid_{size}.json"
    for head, millions in zip(("diffusion", "categorical"), FIT[size], strict=True):
        if millions is None:
            continue
        with torch.device("meta"):
            net = build_network({**read_architecture(file), "head": head})
        assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
        assert not list(net.buffers())


def test_the_tiny_network_is_tiny() -> None:
    for order, head in KINDS:
        facts = {**read_architecture("configs/networks/tiny_fluid_tokens.json"), "order": order, "head": head}
        assert 1e6 < sum(p.numel() for p in build_network(facts).parameters()) <= 2e6


@pytest.mark.parametrize(("order", "head"), KINDS)
@torch.no_grad()
def test_a_folder_gives_the_same_network(tmp_path: Path, order: str, head: str) -> None:
    net = network(order=order, head=head, head_options={} if head == "categorical" else {"variance": "small"})
    net.save_pretrained(tmp_path)
    again = load_model(tmp_path, None)
    assert isinstance(again, TokenTransformer)
    assert all(again.config[name] == value for name, value in net.config.items() if name[0] != "_")
    tokens, known = tokens_of(net), torch.rand(B, L) < 0.5
    torch.testing.assert_close(run(again, tokens, known), run(net, tokens, known))
    assert again.draws(4) == net.draws(4)
    noise, z = torch.randn(net.draws(4)[0], 5, net.draws(4)[1]), torch.randn(5, 32)
    assert torch.equal(again.sample(z, noise).tokens, net.sample(z, noise).tokens)


def test_recomputed_activations_give_the_same_gradients() -> None:
    gradients = []
    for again in (False, True):
        net, calls = network(), []
        net.blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        if again:
            net.enable_gradient_checkpointing()
        run(net, torch.ones(B, L, C), torch.arange(L).expand(B, L) % 3 == 0).square().sum().backward()
        assert len(calls) == 1 + again
        gradients.append({n: p.grad for n, p in net.named_parameters() if p.grad is not None})
    torch.testing.assert_close(gradients[1], gradients[0])


def test_dropout_acts_in_training_alone() -> None:
    net, known, tokens = network(dropout=0.5), torch.rand(B, L) < 0.5, torch.randn(B, L, C)
    text = net.align(*words())
    assert torch.equal(net(tokens, text, known), net(tokens, text, known))
    net.train()
    assert not torch.allclose(net(tokens, text, known), net(tokens, text, known))


@pytest.mark.parametrize(("order", "head"), [("random", "diffusion"), ("raster", "categorical")])
@torch.no_grad()
def test_each_part_is_one_graph(order: str, head: str) -> None:
    """No part reads a value or breaks the graph, and places of the cache need no graphs of their own."""
    net = network(order=order, head=head)
    tokens, known, text = tokens_of(net), torch.rand(B, L) < 0.5, net.align(*words(), keep=True)
    (rows, _), z, (count, width) = masked_rows(known, 20), torch.randn(20, 32), net.draws(3)
    target, u, noise = tokens.flatten(0, 1)[rows], torch.rand(20, 2), torch.randn(20, 2, C)
    parts: dict[Callable[..., Any], list[Any]] = {
        lambda *inputs: net(*inputs): [tokens, text, known if order == "random" else None],
        lambda *inputs: net.loss(*inputs).total: [z, target, u, noise],
        lambda z, n, null: net.sample(z, n, guidance=2.0, z_null=null).tokens: [z, torch.randn(count, 20, width), -z],
        lambda known: masked_rows(known, 20)[0]: [known],
    }
    for part, inputs in parts.items():
        graphs = CompileCounter()
        found = torch.compile(part, backend=graphs, fullgraph=True)(*inputs)
        torch.testing.assert_close(found, part(*inputs))
        assert graphs.frame_count == 1
    if order == "raster":
        cache, graphs = net.cache(text), CompileCounter()
        compiled = torch.compile(lambda last: net(last, text, cache=cache), backend=graphs, fullgraph=True)
        steps = [compiled(tokens[:, [i]]) for i in range(4)]
        assert graphs.frame_count == 1 and not torch.equal(steps[0], steps[1])


# ---- mistakes ----


@pytest.mark.parametrize(
    "options",
    [
        {"order": "spiral"},
        {"positions": "none"},
        {"head": "linear"},
        {"heads": 3},
        {"length": 15, "positions": "rope"},
        {"heads": 16, "positions": "rope"},
    ],
)
def test_an_impossible_network_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        network(**options)


def test_the_random_order_needs_to_know_what_is_known() -> None:
    net = network()
    with pytest.raises(ValueError, match="known"):
        net(torch.zeros(B, L, C), net.null(B))
