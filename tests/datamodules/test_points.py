"""The toy world: its density, its order, and mixtures that are none."""

from __future__ import annotations

import pytest
import torch

from datamodules.points import Points
from lightning_t2i.batch import Records
from lightning_t2i.errors import UserError

MEANS, SHARES, STD = [(-0.3, -0.3, 0.0), (0.5, 0.5, 0.0), (0.0, 1.0, 0.2)], [0.5, 0.3, 0.2], 0.12


def begun(name: str = "main", seed: int = 0, **options) -> Points:
    stream = Points(MEANS, SHARES, STD, **options)
    stream.setup()
    stream.begin(seed, name)
    return stream


def same(a: Records, b: Records) -> bool:
    return torch.equal(a.image, b.image) and torch.equal(a.id, b.id) and torch.equal(a.label, b.label)


def test_points_have_the_declared_mixture() -> None:
    found = begun(size=20_000).load(range(20_000), 0)
    assert found.image.shape == (20_000, 3, 1, 1) and found.image.dtype == torch.float32
    for k, (mean, share) in enumerate(zip(MEANS, SHARES, strict=True)):
        own = found.image[found.label == k].flatten(1)
        assert len(own) / 20_000 == pytest.approx(share, abs=0.015)
        torch.testing.assert_close(own.mean(0), torch.tensor(mean), atol=0.01, rtol=0)
        torch.testing.assert_close(own.T.cov(), STD**2 * torch.eye(3), atol=0.001, rtol=0)


def test_a_point_depends_on_seed_name_and_position_alone() -> None:
    whole = begun().load(range(8), 0)
    assert same(begun(size=3, batch_size=4).load(range(4, 8), 1), whole.slice(4, 8))
    assert len(set(whole.id.tolist())) == 8
    for other in (begun("val"), begun(seed=1)):
        assert not torch.equal(other.load(range(8), 0).image, whole.image)
    assert begun().identity != begun(size=3).identity


@pytest.mark.parametrize(
    ("shares", "options"),
    [([0.5, 0.5], {}), ([0.5, 0.3, 0.3], {}), ([1.5, -0.3, -0.2], {}), (SHARES, {"std": 0.0}), (SHARES, {"size": 0})],
    ids=str,
)
def test_mixtures_that_are_none_are_refused(shares, options) -> None:
    with pytest.raises(UserError, match="shares|width"):
        Points(MEANS, shares, **{"std": STD, **options})
