"""Searches on quadratic objectives, whose best weights are known."""

import pytest
import torch

from lightning_t2i.errors import UserError
from lightning_t2i.merge_search import search


class Quadratic:
    """(w - best)' H (w - best) / 2 + 3."""

    def __init__(self, number: int = 4):
        root = torch.randn(number, number, dtype=torch.float64)
        self.hessian = root @ root.T + torch.eye(number, dtype=torch.float64)
        self.best = torch.rand(number, dtype=torch.float64)

    def value(self, weights):
        apart = torch.tensor(weights, dtype=torch.float64) - self.best
        return float(apart @ self.hessian @ apart) / 2 + 3

    def gradient(self, weights):
        apart = torch.tensor(weights, dtype=torch.float64) - self.best
        return self.value(weights), (self.hessian @ apart).tolist()


@pytest.mark.parametrize(("method", "evaluations"), [("quadratic", 4 * 7 // 2 + 2), ("gradient", 60)])
def test_a_quadratic_objective_is_solved(method, evaluations):
    objective = Quadratic()
    found = search(method, 4, objective, limit=60)
    assert found.weights == pytest.approx(objective.best.tolist(), abs=1e-3)
    assert found.value == pytest.approx(3, abs=1e-5)
    assert found.count <= evaluations


@pytest.mark.parametrize("size", [1e-8, 1e-4, 1e4])
def test_the_unit_of_the_objective_is_no_matter(size):
    class Small(Quadratic):
        def value(self, weights):
            return size * super().value(weights)

        def gradient(self, weights):
            return self.value(weights), [size * slope for slope in super().gradient(weights)[1]]

    objective = Small()
    assert search("gradient", 4, objective, limit=60).weights == pytest.approx(objective.best.tolist(), abs=1e-3)


@pytest.mark.parametrize("method", ["gradient", "coordinate", "uniform"])
def test_an_objective_that_is_no_number_is_told(method):
    class Broken(Quadratic):
        def value(self, weights):
            return float("nan")

    with pytest.raises(UserError, match="not finite"):
        search(method, 4, Broken())


def test_quadratic_search_uses_the_fewest_evaluations_that_determine_it():
    assert search("quadratic", 3, Quadratic(3)).count == 3 * 6 // 2 + 1 + 1  # and one at its least point


def test_quadratic_search_keeps_the_best_point_of_an_objective_without_a_least_one():
    class Saddle(Quadratic):
        def value(self, weights):
            return -sum(w * w for w in weights)

    assert search("quadratic", 2, Saddle(2)).weights in ([1.0, 0.0], [0.0, 1.0])


def test_coordinate_search_comes_near():
    objective = Quadratic()
    objective.hessian = torch.eye(4, dtype=torch.float64)
    found = search("coordinate", 4, objective, limit=300)
    assert found.weights == pytest.approx(objective.best.tolist(), abs=0.05)
    assert search("coordinate", 4, objective, limit=10).count <= 11


def test_grid_search_takes_the_best_of_all_points():
    objective = Quadratic(2)
    objective.hessian, objective.best = torch.eye(2, dtype=torch.float64), torch.tensor([0.2, 0.9], dtype=torch.float64)
    found = search("grid", 2, objective, grid=[0.0, 0.5, 1.0])
    assert found.weights == [0.0, 1.0] and found.count == 10
    with pytest.raises(UserError, match="too many points"):
        search("grid", 8, objective, grid=[0.0, 0.25, 0.5, 1.0])


def test_uniform_weights_are_no_search():
    objective = Quadratic()
    objective.best = torch.full((4,), -5.0, dtype=torch.float64)
    found = search("uniform", 4, objective)
    assert found.weights == [0.25] * 4 and found.value > objective.value([0.0] * 4)


@pytest.mark.parametrize("method", ["grid", "gradient", "quadratic", "coordinate"])
def test_no_search_is_worse_than_the_base_on_its_own_objective(method):
    objective = Quadratic()
    objective.best = torch.zeros(4, dtype=torch.float64)
    found = search(method, 4, objective, grid=[0.0, 1.0])
    assert found.value <= objective.value([0.0] * 4)
    assert found.weights == pytest.approx([0.0] * 4, abs=1e-6)
