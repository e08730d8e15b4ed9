"""Straightness: of lines, of bent paths written out, over batches and ranks, and of a converted teacher."""

from __future__ import annotations

import pytest
import torch
from closed_forms import Gaussian

from lightning_t2i.metrics.straightness import Straightness, trajectory
from lightning_t2i.networks.denoiser import Predictor
from lightning_t2i.processes import DDPM, Process, RectifiedFlow, sample


class Exact(Predictor):
    def __init__(self, process: Process):
        super().__init__(process, "x0")

    def predict(self, x_t, t, cond=None):
        return Gaussian(0.3, 0.5).x0(self.process, x_t, torch.as_tensor(t).expand(len(x_t)))


def value(*points: torch.Tensor) -> float:
    metric = Straightness()
    for paths in points:
        metric.update(paths)
    return float(metric.compute())


def test_lines_at_constant_speed_are_straight_and_others_are_not() -> None:
    z, x = torch.zeros(3, 4), torch.arange(12.0).view(3, 4)
    s = torch.linspace(0, 1, 11).view(-1, 1, 1)
    assert value(z + s * (x - z)) < 1e-9
    assert value(z + s**2 * (x - z)) > 1  # a line at changing speed
    bent = torch.tensor([0.0, 1.0, 1.0]).view(3, 1, 1)  # speeds 2 and 0, on the whole 1
    assert value(bent) == pytest.approx(1.0)


def test_values_are_means_over_paths_and_numbers() -> None:
    paths = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 2.0]]).view(3, 2, 1)  # the second path is straight
    assert value(paths) == pytest.approx(0.5)
    assert value(paths[:, :1], paths[:, 1:]) == pytest.approx(0.5)
    assert value(paths.repeat(1, 1, 7)) == pytest.approx(0.5)
    metric = Straightness()
    metric.update(paths)
    metric.reset()
    metric.update(paths[:, 1:])
    assert float(metric.compute()) == 0


def on_ranks(rank: int) -> float:
    paths = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 2.0]]).view(3, 2, 1)
    return value(paths[:, rank : rank + 1])


@pytest.mark.slow
def test_two_ranks_give_the_mean_of_both(ranks) -> None:
    assert ranks(on_ranks) == [0.5, 0.5]


def test_paths_end_where_the_sampler_does_and_a_ddpm_is_converted() -> None:
    z = torch.linspace(-2, 2, 8).view(8, 1, 1, 1).double()
    flow = Exact(RectifiedFlow())
    points = trajectory(flow, z, steps=10)
    assert points.shape == (11, 8, 1, 1, 1) and torch.equal(points[0], z)
    torch.testing.assert_close(points[-1], sample(flow, z, None, 10, 1.0, "euler"))
    converted = trajectory(Exact(DDPM()), z, steps=10)
    torch.testing.assert_close(converted[:-1], points[:-1], atol=0.02, rtol=0)  # equal but below the DDPM's range
