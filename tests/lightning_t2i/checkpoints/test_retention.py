"""Which checkpoints stay."""

import math

import pytest

from lightning_t2i.checkpoints.retention import BestOptions, kept

STEPS = range(100, 1000, 100)
SCORES = {100: 3.0, 200: 1.0, 300: math.nan, 400: 1.0, 500: 2.0, 600: -math.inf, 800: 9.0}


@pytest.mark.parametrize(
    ("last", "every", "best", "expected"),
    [
        (1, 0, None, {900}),
        (3, 0, None, {700, 800, 900}),
        (20, 0, None, set(STEPS)),
        (1, 300, None, {300, 600, 900}),
        (1, 0, BestOptions("m", "min", 1), {400, 900}),  # of equal ones the newer
        (1, 0, BestOptions("m", "min", 3), {200, 400, 500, 900}),
        (1, 0, BestOptions("m", "max", 2), {100, 800, 900}),
        (2, 400, BestOptions("m", "max", 1), {400, 800, 900}),
        (1, 0, BestOptions("m", "min", 99), {100, 200, 400, 500, 800, 900}),  # what is not finite is no score
    ],
)
def test_what_stays(last, every, best, expected):
    assert kept(STEPS, last, every, best, SCORES) == expected
