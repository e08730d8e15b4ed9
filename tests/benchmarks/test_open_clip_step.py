"""The benchmark against open_clip: our side of it by hand, and where open_clip is there equal towers and losses."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch.nn.functional import normalize

from benchmarks import open_clip_step as benchmark
from lightning_t2i.errors import UserError

THERE = importlib.util.find_spec("open_clip") is not None


def test_our_loss_is_the_mean_of_both_cross_entropies() -> None:
    torch.manual_seed(0)
    x, y = (normalize(torch.randn(6, 5), dim=1) for _ in range(2))
    logits = 20.0 * x @ y.T
    wanted = -(logits.log_softmax(1).diagonal().mean() + logits.log_softmax(0).diagonal().mean()) / 2
    torch.testing.assert_close(benchmark.own_loss(x, y, torch.tensor(20.0)), wanted)


def test_texts_end_in_sep_and_are_padded() -> None:
    pictures, ids = benchmark.inputs(9)
    last = (ids > 0).sum(1) - 1
    assert pictures.shape == (9, 3, 32, 32) and (ids[torch.arange(9), last] == 102).all()
    assert last.min() == 4 and len(set(last.tolist())) > 4


@pytest.mark.skipif(THERE, reason="open_clip is there")
def test_without_open_clip_it_says_what_to_install() -> None:
    with pytest.raises(UserError, match=r'pip install -e "\.\[full\]"'):
        benchmark.theirs()


@pytest.mark.skipif(not THERE, reason="open_clip is not there")
def test_both_sides_have_as_many_parameters_and_one_loss() -> None:
    found = benchmark.measure(quick=True)["tables"][0]["rows"]
    assert [row[0] for row in found] == ["loss", "training step"] and found[1][5] == found[1][6]
