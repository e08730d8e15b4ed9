"""Fréchet and kernel distance against closed forms; equal on one and two ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from largest import Largest
from torch import Tensor, nn

from lightning_t2i.errors import UserError
from lightning_t2i.metrics import frechet
from lightning_t2i.metrics.frechet import (
    FrechetDistance,
    InceptionFeatures,
    KernelDistance,
    Recall,
    frechet_distance,
    kernel_distance,
    recall,
)


class Pixels(nn.Module):
    """The first channel's pixels are the features."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, images: Tensor) -> Tensor:
        return images[:, 0].flatten(1)


def gaussian(mean: Tensor, cov: Tensor, n: int, seed: int) -> Tensor:
    """n points [n, D], float64, whose sample mean and unbiased covariance are exactly these."""
    x = torch.randn(n, len(mean), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False)
    return (torch.linalg.cholesky(cov) @ whitened).T + mean


def images(features: Tensor) -> Tensor:
    return features[:, None, None, :].expand(-1, 3, 1, -1)


def spd(d: int, seed: int) -> Tensor:
    a = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a @ a.T + 0.1 * torch.eye(d, dtype=torch.float64)


def measured(metric: FrechetDistance | KernelDistance, generated: Tensor, real: Tensor, batch: int = 37) -> float:
    for block in generated.split(batch):
        metric.update(images(block))
    for block in real.split(batch):
        metric.update(images(block), real=True)
    return float(metric.compute())


def test_frechet_distance_of_diagonal_gaussians() -> None:
    a, b = torch.tensor([1.0, 4.0, 0.25], dtype=torch.float64), torch.tensor([9.0, 1.0, 0.25], dtype=torch.float64)
    shift = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    closed_form = float(shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    metric = FrechetDistance(Pixels(3), "gaussian")
    zero = torch.zeros(3, dtype=torch.float64)
    distance = measured(metric, gaussian(zero, a.diag(), 200, 1), gaussian(shift, b.diag(), 150, 2))
    assert distance == pytest.approx(closed_form, rel=1e-6)
    assert closed_form == pytest.approx(5.25 + 5.0)


def test_frechet_distance_of_gaussians_that_do_not_commute() -> None:
    c, r, mean = spd(6, 1), spd(6, 2), torch.linspace(-1, 1, 6, dtype=torch.float64)
    root = scipy.linalg.sqrtm((c @ r).numpy())
    closed_form = float(mean.square().sum() + c.trace() + r.trace() - 2 * np.trace(root).real)
    metric = FrechetDistance(Pixels(6), "gaussian")
    distance = measured(metric, gaussian(mean, c, 300, 1), gaussian(torch.zeros_like(mean), r, 300, 2))
    assert distance == pytest.approx(closed_form, rel=1e-6)


def test_frechet_distance_is_zero_for_equal_and_singular_sets() -> None:
    x = torch.randn(5, 8, dtype=torch.float64)  # fewer points than features
    assert measured(FrechetDistance(Pixels(8), "self"), x, x) == pytest.approx(0, abs=1e-6)
    flat = torch.zeros(3, 3, dtype=torch.float64)
    assert float(frechet_distance(flat[0], flat, flat[0], flat)) == 0


def cubic_moments(x: Tensor) -> tuple[float, float, float]:
    return tuple(float(x.pow(k).mean()) for k in (1, 2, 3))  # type: ignore[return-value]


def test_kernel_distance_of_one_feature_is_a_difference_of_moments() -> None:
    # (xy + 1)^3 = 1 + 3 xy + 3 x^2 y^2 + x^3 y^3: pairs of different points, written with moments and their diagonal.
    x, y = torch.randn(60, 1, dtype=torch.float64), 0.5 + torch.rand(45, 1, dtype=torch.float64)
    weights = (3, 3, 1)

    def within(z: Tensor) -> float:
        n = len(z)
        pairs = n * n * (1 + sum(w * m * m for w, m in zip(weights, cubic_moments(z), strict=True)))
        return (pairs - float((z * z + 1).pow(3).sum())) / (n * (n - 1))

    products = zip(weights, cubic_moments(x), cubic_moments(y), strict=True)
    closed_form = within(x) + within(y) - 2 * (1 + sum(w * a * b for w, a, b in products))
    assert float(kernel_distance(x, y)) == pytest.approx(closed_form, rel=1e-10)
    assert measured(KernelDistance(Pixels(1), "y"), x, y) == pytest.approx(closed_form, rel=1e-6)


def test_kernel_distance_has_no_bias() -> None:
    # x ~ N(0, 1), y ~ N(1, 1): moments (0, 1, 0) and (1, 2, 4), so MMD^2 = 3 (1)^2 + 3 (1)^2 + 4^2 = 22.
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(400, 2, 40, 1, generator=generator, dtype=torch.float64)
    values = torch.stack([kernel_distance(x, 1 + y) for x, y in draws])
    assert abs(float(values.mean()) - 22) < 3 * float(values.std()) / 20
    same = torch.stack([kernel_distance(x, y) for x, y in draws])
    assert abs(float(same.mean())) < 3 * float(same.std()) / 20 and float(same.min()) < 0


def test_recall_is_the_share_of_the_reference_that_is_covered() -> None:
    def points(centre: float, n: int, seed: int) -> Tensor:
        noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return noise + centre

    y = torch.cat([points(0, 400, 0), points(50, 600, 1)])
    one, both = points(0, 500, 2), torch.cat([points(0, 250, 3), points(50, 250, 4)])
    assert float(recall(one, y)) == pytest.approx(0.4, abs=0.03)  # of two modes it has the one with 400 of 1000
    assert float(recall(both, y)) > 0.9 and float(recall(points(200, 500, 5), y)) == 0
    assert float(recall(points(0, 500, 2) * 0.01, y)) < 0.01  # collapsed to a point
    # By hand: the third neighbours of 0, 1, 2, 3, 10 are 3, 2, 2, 3 and 9 away.
    line = torch.tensor([0.0, 1, 2, 3, 10]).double()[:, None]
    probes = torch.tensor([-3.5, -2.9, 5.9, 6.1, 18.9, 19.1]).double()[:, None]
    assert [float(recall(line, p[None])) for p in probes] == [0, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("width", [2, 40])
def test_recall_in_blocks_is_recall_of_whole_matrices(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(200, width).double(), torch.randn(330, width).double()
    whole = [float((torch.cdist(y, x) <= torch.cdist(x, x).kthvalue(k + 1, 1).values).any(1).double().mean())
             for k in (1, 3)]  # fmt: skip
    assert 0 < whole[0] < whole[1] < 1
    monkeypatch.setattr(frechet, "ROWS", 16)
    with Largest() as largest:
        assert [float(recall(x, y, k)) for k in (1, 3)] == pytest.approx(whole, abs=1e-12)
    assert largest.entries <= max(y.numel(), 330 * 2 + 16 * 200, 330 * (width + 2))  # no matrix of all pairs


def test_recall_needs_neighbours() -> None:
    metric = Recall(Pixels(4), "ones")
    metric.update(torch.rand(10, 3, 2, 2), real=True)
    metric.update(torch.rand(4, 3, 2, 2))
    with pytest.raises(UserError, match="five generated"):
        metric.compute()
    assert metric.higher_is_better


def test_kernel_sums_do_not_depend_on_blocks() -> None:
    x = torch.randn(2500, 4, dtype=torch.float64)
    gram = (x @ x.T / 4 + 1).pow(3)
    direct = (gram.sum() - gram.diag().sum()) / (2500 * 2499) * 2 - 2 * gram.mean()
    assert float(kernel_distance(x, x)) == pytest.approx(float(direct), rel=1e-9)


@pytest.mark.parametrize("kind", [FrechetDistance, KernelDistance, Recall])
def test_name_has_number_and_reference(kind: type) -> None:
    metric = kind(Pixels(2), "shapes-val")
    measured(metric, torch.randn(7, 2), torch.randn(9, 2))
    assert metric.name == f"{kind.symbol}@n=7,ref=shapes-val:9"


@pytest.mark.parametrize("kind", [FrechetDistance, KernelDistance, Recall])
def test_reset_keeps_the_reference(kind: type) -> None:
    first, second, real = (torch.randn(n, 2, dtype=torch.float64) for n in (7, 5, 9))
    metric = kind(Pixels(2), "shapes-val")
    measured(metric, first, real)
    metric.reset()
    metric.update(images(second))
    assert float(metric.compute()) == measured(kind(Pixels(2), "x"), second, real)
    assert metric.name == f"{kind.symbol}@n=5,ref=shapes-val:9"


def test_only_inception_gives_the_name_fid() -> None:
    class Inception(Pixels):
        symbols = InceptionFeatures.symbols

    assert FrechetDistance(Inception(2), "coco").name == "fid@n=0,ref=coco:0"
    assert KernelDistance(Inception(2), "coco").name == "kid@n=0,ref=coco:0"


def test_inception_is_never_downloaded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Inception weights are not there"):
        InceptionFeatures(tmp_path / "missing.pth")


@pytest.mark.parametrize("kind", [FrechetDistance, KernelDistance, Recall])
def test_saved_reference_gives_the_same_distance(kind: type, tmp_path: Path) -> None:
    generated, real = torch.randn(40, 3).double(), (1 + torch.randn(50, 3)).double()
    metric = kind(Pixels(3), "shapes-val")
    expected = measured(metric, generated, real)
    metric.save_reference(tmp_path / "reference.safetensors")
    other = kind(Pixels(3), "to be read")
    other.load_reference(tmp_path / "reference.safetensors")
    other.update(images(generated))
    assert (
        float(other.compute()) == pytest.approx(expected, rel=1e-12)
        and other.name == f"{kind.symbol}@n=40,ref=shapes-val:50"
    )


def test_reference_of_another_network_is_refused(tmp_path: Path) -> None:
    metric = FrechetDistance(Pixels(2), "shapes-val")
    measured(metric, torch.randn(4, 2), torch.randn(4, 2))
    metric.save_reference(tmp_path / "reference.safetensors")
    other = FrechetDistance(Pixels(2), "shapes-val")
    other.extractor.identity = "sha256:1"
    with pytest.raises(UserError, match="another network"):
        other.load_reference(tmp_path / "reference.safetensors")


def test_too_few_pictures_are_an_error() -> None:
    metric = FrechetDistance(Pixels(2), "x")
    metric.update(images(torch.randn(1, 2)))
    metric.update(images(torch.randn(3, 2)), real=True)
    with pytest.raises(UserError, match="two pictures"):
        metric.compute()


def test_features_of_another_size_are_an_error() -> None:
    with pytest.raises(ValueError, match="features"):
        FrechetDistance(Pixels(3), "x").update(images(torch.randn(4, 2)))


def distances_of_a_rank(rank: int, generated: Tensor, real: Tensor, folder: str) -> tuple[list[float], list[str]]:
    shares = slice(0, 13) if rank == 0 else slice(13, None)  # not equal
    values, names = [], []
    for kind in (FrechetDistance, KernelDistance):
        metric = kind(Pixels(3), "shapes-val")
        values.append(measured(metric, generated[shares], real[shares], batch=8))
        names.append(metric.name)
        metric.save_reference(f"{folder}/{kind.symbol}.safetensors")
        torch.distributed.barrier()
        other = kind(Pixels(3), "to be read")
        other.load_reference(f"{folder}/{kind.symbol}.safetensors")
        other.update(images(generated[shares]))
        values.append(float(other.compute()))
    return values, names


def test_two_ranks_agree_with_one(ranks, tmp_path: Path) -> None:
    generated, real = torch.randn(40, 3).double(), (1 + torch.randn(50, 3)).double()
    (first, names), (second, _) = ranks(distances_of_a_rank, generated, real, str(tmp_path))
    frechet = measured(FrechetDistance(Pixels(3), "x"), generated, real)
    kernel = measured(KernelDistance(Pixels(3), "x"), generated, real)
    assert first == second == pytest.approx([frechet, frechet, kernel, kernel], rel=1e-5)
    assert names == ["fd@n=40,ref=shapes-val:50", "kd@n=40,ref=shapes-val:50"]
