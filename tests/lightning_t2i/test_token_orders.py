"""Orders of token prediction: the spec's constants, moments of the mask laws, every token predicted exactly once."""

import math

import pytest
import torch

from lightning_t2i.errors import UserError
from lightning_t2i.keys import Keys
from lightning_t2i.token_orders import (
    MaskLaw,
    guidance_scales,
    mask_ratio,
    most_confident,
    permutations,
    remaining,
)

LAWS = ("cosine", "arccos", "truncnorm")


def predicted(length: int, steps: int) -> list[int]:
    left = remaining(length, steps)
    return [a - b for a, b in zip([length, *left[:-1]], left, strict=True)]


# ---- steps (P5) ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "steps", "counts"),
    [
        (256, 16, [2, 3, 7, 8, 11, 13, 15, 16, 19, 20, 22, 23, 23, 25, 24, 25]),
        (256, 8, [5, 15, 24, 31, 39, 45, 48, 49]),
        (64, 16, [1, 1, 1, 2, 3, 3, 4, 4, 5, 5, 5, 6, 6, 6, 6, 6]),
        (64, 8, [2, 3, 6, 8, 10, 11, 12, 12]),
        (256, 256, [1] * 256),
    ],
)
def test_P5_tokens_of_each_step_are_those_of_the_reference(length, steps, counts):
    assert predicted(length, steps) == counts


def test_P5_tokens_of_64_steps_begin_and_end_as_in_the_reference():
    found = predicted(256, 64)
    assert found[:24] == [1] * 13 + [2, 3, 2, 2, 3, 3, 3, 3, 3, 3, 4]
    assert found[-10:] == [6, 7, 6, 6, 6, 6, 7, 6, 6, 6]


def test_P5_every_number_of_steps_predicts_all_tokens_and_some_in_each():
    for length in (1, 2, 7, 64, 100):
        for steps in range(1, length + 1):
            found = predicted(length, steps)
            assert sum(found) == length
            assert len(found) == steps
            assert min(found) >= 1


@pytest.mark.parametrize("steps", [0, 65])
def test_P5_more_steps_than_tokens_are_refused(steps):
    with pytest.raises(UserError, match="so many steps"):
        remaining(64, steps)


def test_linear_guidance_rises_with_the_known_tokens_and_never_reaches_its_scale():
    left = remaining(64, 64)
    scales = guidance_scales("linear", 3.0, left, 64)
    assert scales[0] == 1 + 2 / 64
    assert scales[-1] == scales[-2] == 1 + 2 * 63 / 64
    assert scales == sorted(scales)
    assert guidance_scales("constant", 3.0, left, 64) == [3.0] * 64
    assert set(guidance_scales("linear", 1.0, left, 64)) == {1.0}


# ---- masks (P10) ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("law", "mean", "square"),
    [("cosine", 0.6366, 0.5), ("arccos", 0.6366, 0.4627), ("truncnorm", 0.8670, None)],
)
@pytest.mark.parametrize("strata", [1, 32])
def test_P10_moments_of_the_mask_laws(law, mean, square, strata):
    r = MaskLaw(law, strata).ratios(Keys(3), torch.arange(2**15))
    error = 4 / 2**7.5 * 0.31  # four standard errors
    assert float(r.mean()) == pytest.approx(mean, abs=5e-5 if strata > 1 else error)
    assert square is None or float(r.square().mean()) == pytest.approx(square, abs=2e-4 if strata > 1 else error)
    assert 0 <= float(r.min()) <= float(r.max()) <= 1
    assert law != "truncnorm" or float(r.min()) >= 0.7


def test_P10_densities_of_the_two_laws_with_one_mean():
    """P(r < 1/2): 1 - (2/pi) arccos(1/2) for the cosine, 1 - cos(pi/4) for the arc cosine."""
    u = (torch.arange(10**5, dtype=torch.float64) + 0.5) / 10**5
    below = {law: float((mask_ratio(law, u) < 0.5).double().mean()) for law in ("cosine", "arccos")}
    assert below["cosine"] == pytest.approx(1 / 3, abs=1e-4)
    assert below["arccos"] == pytest.approx(1 - math.cos(math.pi / 4), abs=1e-4)


@pytest.mark.parametrize("law", LAWS)
def test_P10_each_picture_has_at_least_one_mask_and_may_have_all(law):
    counts = MaskLaw(law).masks(Keys(0), torch.arange(4096), 16).sum(1)
    assert int(counts.min()) >= 1
    assert int(counts.max()) == 16
    assert law == "truncnorm" or int(counts.min()) == 1


def test_P10_masked_places_are_uniform():
    masked = MaskLaw().masks(Keys(1), torch.arange(2**14), 16)
    rates = masked.double().mean(0)
    assert float((rates - rates.mean()).abs().max()) < 4 * 0.49 / 2**7
    assert len(set(masked[:64].double().argmax(1).tolist())) > 4


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("batch", "first"), [(64, 0), (64, 640), (32, 96), (96, 0), (33, 5), (8, 30), (1, 0)])
def test_P10_masked_tokens_never_exceed_their_rows(law, batch, first):
    found = MaskLaw(law)
    for seed in range(20):
        positions = torch.arange(first, first + batch)
        assert int(found.masks(Keys(seed), positions, 16).sum()) <= found.rows(batch, 16) <= batch * 16


def test_P10_strata_make_rows_few():
    assert MaskLaw("cosine", 64).rows(64, 64) == math.ceil((64 * 2 / math.pi + 1) * 64) + 64
    assert MaskLaw("cosine", 1).rows(64, 64) == 64 * 64


def test_P10_strata_keep_each_picture_free():
    """Over seeds, u of one position is uniform and that of its neighbour is not tied to it."""
    ratios = torch.stack([MaskLaw("cosine", 4).ratios(Keys(seed), torch.arange(4)) for seed in range(2000)])
    u = torch.arccos(ratios) * 2 / math.pi
    assert float((u.mean(0) - 0.5).abs().max()) < 4 * 0.289 / 2000**0.5
    assert float(u.quantile(0.25)) == pytest.approx(0.25, abs=0.03)
    assert set((u[:, 0] * 4).floor().tolist()) == {0.0, 1.0, 2.0, 3.0}
    assert all(sorted(row) == [0, 1, 2, 3] for row in (u * 4).floor().tolist())


def test_P10_masks_depend_on_positions_and_not_on_the_batch():
    law, keys = MaskLaw(), Keys(5, step=3)
    whole = law.masks(keys, torch.arange(64), 16)
    assert torch.equal(torch.cat([law.masks(keys, torch.arange(a, a + 16), 16) for a in range(0, 64, 16)]), whole)
    assert not torch.equal(law.masks(keys.at(4), torch.arange(64), 16), whole)


@pytest.mark.parametrize("options", [{"law": "sine"}, {"strata": 0}])
def test_unknown_laws_are_refused(options):
    with pytest.raises(UserError, match="law|strata"):
        MaskLaw(**options)


# ---- orders -----------------------------------------------------------------------------------------------


def test_permutations_hold_each_token_once():
    order = permutations(Keys(0), "order", torch.arange(100), 16)
    assert torch.equal(order.sort(1).values, torch.arange(16).expand(100, 16))
    assert len({tuple(row) for row in order.tolist()}) == 100


def test_the_least_confident_tokens_stay_masked():
    log_p = torch.tensor([[-1.0, -5.0, -3.0, -2.0]])
    masked = torch.tensor([[True, True, True, False]])
    still = torch.zeros(1, 4)
    assert most_confident(log_p, masked, 1, still).tolist() == [[False, True, False, False]]
    assert most_confident(log_p, masked, 2, still).tolist() == [[False, True, True, False]]
    assert most_confident(log_p, masked, 0, still).tolist() == [[False] * 4]
    noise = torch.tensor([[-9.0, 0.0, 0.0, -99.0]])
    assert most_confident(log_p, masked, 1, noise).tolist() == [[True, False, False, False]]
