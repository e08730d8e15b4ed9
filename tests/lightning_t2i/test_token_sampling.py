"""Sampling on a world whose probabilities are known: four binary tokens on a square, alike where they are neighbours.

p(x) ~ exp(J sum_(i ~ j) s_i s_j + h sum_i s_i),   s = 2 x - 1,   16 states
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from lightning_t2i.batch import Cond
from lightning_t2i.keys import Keys
from lightning_t2i.networks.token_transformer import Text, TokenTransformer
from lightning_t2i.token_sampling import Sampling, sample_tokens

SITES, COUPLING, FIELD = 4, 0.6, 0.2
NEIGHBOURS = ((0, 1), (2, 3), (0, 2), (1, 3))
STATES = torch.tensor(list(itertools.product((0, 1), repeat=SITES)))
SPINS = (2 * STATES - 1).double()
PROBABILITIES = (COUPLING * sum(SPINS[:, i] * SPINS[:, j] for i, j in NEIGHBOURS) + FIELD * SPINS.sum(1)).softmax(0)
ENTROPY = float(-(PROBABILITIES * PROBABILITIES.log()).sum())
MASKS = torch.tensor(list(itertools.product((False, True), repeat=SITES))[1:])  # of masked tokens, all but none


def text(count: int) -> Text:
    return Text(torch.zeros(count, 1, 16), torch.ones(count, 1, dtype=torch.bool))


def cross_entropies(network: TokenTransformer, states: Tensor, masked: Tensor) -> Tensor:
    """-log q of each token of [N, 4] given those that are not masked: [N, 4]."""
    random = network.config.order == "random"
    z = network(states, text(len(states)), ~masked if random else None)
    return network.loss(z.flatten(0, 1), states.flatten()).total.view_as(states)


@pytest.fixture(scope="module")
def trained() -> dict[str, TokenTransformer]:
    """One network for each order, trained on the whole distribution until it stays where it is."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    found = {}
    for order in ("raster", "random"):
        network = TokenTransformer(
            order=order, length=SITES, vocabulary=2, width=16, depth=2, heads=2, text_width=4, aligner_depth=0,
            head="categorical",
        )  # fmt: skip
        masks = MASKS if order == "random" else MASKS[-1:]
        states, masked = STATES.repeat(len(masks), 1), masks.repeat_interleave(len(STATES), 0)
        weights = PROBABILITIES.float().repeat(len(masks))[:, None] * masked / masked.sum(1, keepdim=True)
        optimizer = torch.optim.Adam(network.parameters(), 1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 350)
        for _ in range(350):
            loss = (weights * cross_entropies(network, states, masked)).sum() / len(masks)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        found[order] = network.eval()
    return found


def log_q(network: TokenTransformer, order: tuple[int, ...]) -> Tensor:
    """log q of each state by the chain rule along an order of the tokens: [16]."""
    total, masked = torch.zeros(len(STATES)), torch.ones(len(STATES), SITES, dtype=torch.bool)
    with torch.no_grad():
        for i in order:
            total -= cross_entropies(network, STATES, masked)[:, i]
            masked[:, i] = False
    return total.double()


def test_P14_the_chain_rule_gives_the_entropy(trained) -> None:
    raster = -float((PROBABILITIES * log_q(trained["raster"], (0, 1, 2, 3))).sum())
    assert ENTROPY <= raster <= 1.02 * ENTROPY
    for order in itertools.permutations(range(SITES)):
        assert ENTROPY - 1e-3 <= -float((PROBABILITIES * log_q(trained["random"], order)).sum()) <= 1.02 * ENTROPY


def test_P14_all_orders_agree_on_a_picture(trained) -> None:
    found = torch.stack([log_q(trained["random"], order).exp() for order in itertools.permutations(range(SITES))])
    assert float(found.std(0).sum()) < 0.03  # of a total of 1
    assert float((found.mean(0) - PROBABILITIES).abs().max()) < 0.01


def statistics(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Means of the spins, and means of the products of neighbours less those of the means."""
    spins = 2.0 * tokens - 1
    mean = spins.mean(0)
    return mean, torch.stack([(spins[:, i] * spins[:, j]).mean() - mean[i] * mean[j] for i, j in NEIGHBOURS])


def drawn(network: TokenTransformer, steps: int, count: int = 8192, **options) -> Tensor:
    cond = Cond(embeds=torch.zeros(count, 1, 4), mask=torch.zeros(count, 1, dtype=torch.bool))
    network.null_text.data.zero_()  # the text that it was trained with
    return sample_tokens(network, cond, Keys(5), torch.arange(count), Sampling(steps, guidance=1.0, **options))


@pytest.mark.parametrize(("order", "steps", "coupled"), [("random", 1, 0), ("random", 4, 1), ("raster", 4, 1)])
def test_P15_one_step_knows_the_tokens_and_not_their_ties(trained, order, steps, coupled) -> None:
    mean, ties = statistics(drawn(trained[order], steps))
    expected = (PROBABILITIES[:, None] * SPINS).sum(0)
    products = (PROBABILITIES[:, None] * torch.stack([SPINS[:, i] * SPINS[:, j] for i, j in NEIGHBOURS], 1)).sum(0)
    exact = products - torch.stack([expected[i] * expected[j] for i, j in NEIGHBOURS])
    error = 4 / math.sqrt(8192)  # four standard errors, of at most 1 each
    assert float((mean - expected).abs().max()) < error + 0.01
    assert float((ties - coupled * exact).abs().max()) < error + 0.01
    assert float(exact.min()) > 4 * error


def test_confident_tokens_come_first(trained) -> None:
    """Without noise in the choice, and at no temperature, the likeliest state is drawn."""
    found = drawn(trained["random"], 4, 16, policy="confidence", choice_noise=0.0, temperature=0.0)
    assert found.tolist() == [STATES[int(PROBABILITIES.argmax())].tolist()] * 16


def test_draws_belong_to_pictures(trained) -> None:
    whole = drawn(trained["random"], 2, 64)
    assert torch.equal(whole[:8], drawn(trained["random"], 2, 8))
    assert len({tuple(row) for row in whole.tolist()}) > 4
