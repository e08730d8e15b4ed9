"""Token-wise similarity: exact in values and gradients at every tile, pads, losses, gathering, top tokens, memory."""

import math

import pytest
import torch
from wukong_parts import plain_loss, plain_similarity, ragged, unit

from lightning_t2i.processes import similarity
from lightning_t2i.processes.similarity import (
    contrastive_loss,
    gather_rows,
    sigmoid_loss,
    strips,
    token_similarity,
    top_tokens,
)

SCALE = torch.tensor(14.0, dtype=torch.float64)


def parts(b=5, n=4, many=5, m=6, d=3):
    mask = ragged([6, 2, 1, 4, 3][:many], m)
    return unit(b, n, d, seed=1), unit(many, m, d, seed=2), mask


@pytest.mark.parametrize("pad", ["exact", "zero_floor"])
@pytest.mark.parametrize("tile", [1, 5 * 4 * 6 * 3, 10**6], ids=["1", "3", "all"])
def test_values_and_gradients_are_those_of_loops(pad, tile):
    images, texts, mask = parts()
    found, wanted = [], []
    for kept, ours in ((found, True), (wanted, False)):
        x, y = images.clone().requires_grad_(), texts.clone().requires_grad_()
        if ours:
            there, back = token_similarity(x, y, None, mask, pad, back=True, tile=tile)
        else:
            there, back = plain_similarity(x, y, mask, pad == "zero_floor")
        loss = contrastive_loss(there, back, SCALE) if ours else plain_loss(there, back, SCALE)
        loss.backward()
        kept += [there, back, loss, x.grad, y.grad]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_one_direction_alone_equals_both_in_one_pass():
    images, texts, mask = parts()
    there, back = token_similarity(images, texts, None, mask, back=True)
    alone, nothing = token_similarity(images, texts, None, mask)
    other, _ = token_similarity(texts, images, mask)
    assert nothing is None
    torch.testing.assert_close(alone, there)
    torch.testing.assert_close(other, back)
    assert not torch.allclose(there, back.T, atol=1e-3)
    with pytest.raises(ValueError, match="all tokens of x count"):
        token_similarity(texts, images, mask, back=True)


def test_pads_in_closed_form():
    images = torch.tensor([[[1.0, 0.0]]])
    texts, mask = torch.tensor([[[-0.6, 0.8], [-0.8, 0.6], [0.3, 0.1]]]), torch.tensor([[True, True, False]])
    there, back = token_similarity(images, texts, None, mask, back=True)
    floor, same = token_similarity(images, texts, None, mask, "zero_floor", back=True)
    assert there.item() == pytest.approx(-0.6) and floor.item() == 0
    assert back.item() == pytest.approx(-0.7) and same.item() == pytest.approx(-0.7)


def test_the_first_of_equal_cosines_takes_the_gradient():
    x = torch.tensor([[[1.0, 0.0]]], requires_grad=True)
    y = torch.tensor([[[0.6, 0.8], [0.6, -0.8]]], requires_grad=True)
    token_similarity(x, y)[0].sum().backward()
    assert y.grad.tolist() == [[[1.0, 0.0], [0.0, 0.0]]]


def test_places_are_bytes_and_nothing_else_of_that_size_is_kept():
    images, texts, mask = unit(3, 7, 4, dtype=torch.float32), unit(6, 5, 4, dtype=torch.float32), ragged([5] * 6, 5)
    saved = []

    def pack(tensor):
        saved.append((tensor.dtype, tensor.numel()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_similarity(images.requires_grad_(), texts.requires_grad_(), None, mask, back=True)
    places = [count for dtype, count in saved if dtype == torch.uint8]
    assert sorted(places) == sorted([3 * 7 * 6, 3 * 6 * 5])
    assert max(count for dtype, count in saved if dtype != torch.uint8) == texts.numel()


def test_more_than_256_tokens_have_places_too():
    images, texts = unit(2, 3, 4), unit(2, 300, 4, seed=3)
    x, y = images.clone().requires_grad_(), texts.clone().requires_grad_()
    there, back = token_similarity(x, y, back=True)
    (there.sum() + back.sum()).backward()
    p, q = images.clone().requires_grad_(), texts.clone().requires_grad_()
    (sum(s.sum() for s in plain_similarity(p, q, ragged([300, 300], 300)))).backward()
    torch.testing.assert_close(y.grad, q.grad)
    torch.testing.assert_close(x.grad, p.grad)


def test_half_precision_sums_in_float32():
    images, texts, mask = (
        unit(3, 8, 16, dtype=torch.bfloat16),
        unit(3, 4, 16, dtype=torch.bfloat16),
        ragged([4, 1, 2], 4),
    )
    x = images.clone().requires_grad_()
    there, back = token_similarity(x, texts, None, mask, back=True)
    (there.sum() + back.sum()).backward()
    assert there.dtype == torch.float32 and x.grad.dtype == torch.bfloat16
    assert bool(there.isfinite().all()) and bool(x.grad.isfinite().all())
    wanted, _ = plain_similarity(images.float(), texts.float(), mask)
    torch.testing.assert_close(there, wanted, atol=0.02, rtol=0)


def test_smoothing_mixes_in_a_uniform_target():
    there, back = unit(4, 4, seed=4), unit(4, 4, seed=5)
    sharp = contrastive_loss(there, back, SCALE)
    uniform = -sum((SCALE * s).log_softmax(1).mean() for s in (there, back)) / 2
    found = contrastive_loss(there, back, SCALE, smoothing=0.1)
    torch.testing.assert_close(found, 0.9 * sharp + 0.1 * uniform)


def test_the_sigmoid_loss_is_that_of_its_pairs():
    s, bias = unit(3, 5, seed=6), torch.tensor(-2.0, dtype=torch.float64)
    total = 0.0
    for i in range(3):
        for j in range(5):
            sign = 1 if j == i + 2 else -1
            total += math.log1p(math.exp(-sign * float(SCALE * s[i, j] + bias)))
    assert float(sigmoid_loss(s, SCALE, bias, first=2)) == pytest.approx(total / 3, rel=1e-9)


def test_one_process_gathers_nothing():
    rows = unit(2, 3)
    assert gather_rows(rows) is rows


def shares(rank: int, style: str) -> list[torch.Tensor]:
    """Loss and gradients of two processes, each with its half of six pairs; gradients of the scale are averaged."""
    images, texts, mask = six_pairs(style)
    own = slice(3 * rank, 3 * rank + 3)
    x, y, scale = (
        images[own].clone().requires_grad_(),
        texts[own].clone().requires_grad_(),
        SCALE.clone().requires_grad_(),
    )
    there, back = strips(x, y, mask[own])
    assert there.shape == back.shape == (3, 6)
    loss = contrastive_loss(there, back, scale, first=3 * rank)
    loss.backward()
    return [loss.detach(), x.grad, y.grad, scale.grad]


def six_pairs(style: str):
    n, m = (1, 1) if style == "g" else (4, 6)
    lengths = [1] * 6 if style == "g" else [6, 2, 1, 4, 3, 5]
    return unit(6, n, 3, seed=1), unit(6, m, 3, seed=2), ragged(lengths, m)


@pytest.mark.parametrize("style", ["g", "f"])
def test_the_mean_over_processes_is_the_whole_loss_with_its_gradients(ranks, style):
    images, texts, mask = six_pairs(style)
    x, y, scale = images.requires_grad_(), texts.requires_grad_(), SCALE.clone().requires_grad_()
    loss = contrastive_loss(*strips(x, y, mask), scale)
    loss.backward()
    found = ranks(shares, style)
    torch.testing.assert_close(sum(f[0] for f in found) / 2, loss.detach())
    torch.testing.assert_close(sum(f[3] for f in found) / 2, scale.grad)
    for index, whole in ((1, x.grad), (2, y.grad)):  # weights see the mean of both processes' gradients
        torch.testing.assert_close(torch.cat([f[index] for f in found]) / 2, whole)


def test_top_tokens_are_those_that_match_best_and_never_pads():
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.6, 0.8]]])
    y, y_mask = torch.tensor([[[0.0, -1.0], [0.96, 0.28], [0.0, 1.0]]]), torch.tensor([[True, True, False]])
    kept, nothing = top_tokens(x, None, y, y_mask, 0.5)
    assert nothing is None
    assert kept.tolist() == [[x[0, 0].tolist(), x[0, 3].tolist()]]
    pads = torch.tensor([[True, False, False, False]])
    chosen, mask = top_tokens(-x, pads, y, y_mask, 0.5)
    assert mask.tolist() == [[True, False]] and chosen[0, 0].tolist() == [-1.0, 0.0]
    assert top_tokens(x, None, y, y_mask, 0.01)[0].shape == (1, 1, 2)


def test_the_tile_bounds_what_is_held(monkeypatch):
    sizes = []
    einsum = torch.einsum

    def watched(equation, first, *rest):
        sizes.append(first.numel())
        return einsum(equation, first, *rest)

    monkeypatch.setattr(similarity.torch, "einsum", watched)
    images, texts = unit(4, 5, 3), unit(9, 2, 3)
    token_similarity(images, texts, back=True, tile=4 * 5 * 2 * 3)
    assert len(sizes) == 2 * 3 and max(sizes) == 4 * 5 * 3
