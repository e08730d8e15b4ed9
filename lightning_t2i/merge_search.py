"""Search for the weights of a merge: w that makes an objective J(w) small; w = 0 is the base.

    uniform      w_i = 1 / N
    grid         all of grid^N                                                     |grid|^N evaluations
    gradient     L-BFGS (strong Wolfe) from 0, with dJ/dw_i = <dJ/dtheta, tau_i>   a forward and backward each;
                 J over its slope at 0, so that no unit of a loss is small or large for it
    quadratic    J(0) + g w + w H w / 2 through N (N + 3) / 2 + 1 evaluations; its least point where H > 0
    coordinate   one weight after the other, a step to each side, which is halved when none helps

Each but `uniform` returns the best of what it evaluated, the base included: on the objective it is never worse than the
base, which says nothing of other data, noise or metrics. The reference has no search (arXiv 2410.06664 names a grid).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Literal, Protocol

import numpy as np
import torch

from lightning_t2i.errors import UserError

Search = Literal["uniform", "grid", "gradient", "quadratic", "coordinate"]
FIRST_STEP = 0.25  # of the coordinate search
MOST = 4096  # points of a grid


class Objective(Protocol):
    """What is to be small."""

    def value(self, weights: Sequence[float]) -> float: ...

    def gradient(self, weights: Sequence[float]) -> tuple[float, list[float]]:
        """The value, and its derivative by each weight."""


@dataclass
class Tried:
    """What a search evaluated: the best weights so far, their value, that of the base, and the count."""

    objective: Objective
    limit: int
    weights: list[float] = field(default_factory=list)
    value: float = float("inf")
    count: int = 0

    def __call__(self, weights: Sequence[float]) -> float:
        return self.note(weights, self.objective.value(weights))

    def note(self, weights: Sequence[float], value: float) -> float:
        self.count += 1
        if value < self.value:
            self.weights, self.value = list(map(float, weights)), value
        return value

    @property
    def spent(self) -> bool:
        return self.count >= self.limit


def search(
    method: Search, number: int, objective: Objective, grid: Sequence[float] = (0.0, 0.5, 1.0), limit: int = 200
) -> Tried:
    """Looks for weights of `number` experts.

    Args:
        grid: values of each weight in the grid search.
        limit: evaluations after which gradient and coordinate search end.

    Raises:
        UserError: a grid of too many points, or an objective that is not finite at the base.
    """
    check_grid(method, number, grid)
    tried = Tried(objective, limit)
    if not math.isfinite(value := tried([0.0] * number)):
        what, fix = "The held-out loss of the base is not finite", "look at the base itself: ./run validate"
        raise UserError(what, where="merge.search", given=value, fix=fix)
    {"uniform": _uniform, "grid": _grid, "gradient": _gradient, "quadratic": _quadratic, "coordinate": _coordinate}[
        method
    ](tried, number, grid)
    return tried


def check_grid(method: Search, number: int, grid: Sequence[float]) -> None:
    """Refuses a grid search of too many points."""
    if method == "grid" and len(grid) ** number > MOST:
        fix = "coordinate or gradient, whose cost does not grow so"
        given = f"{len(grid)} values, {number} experts"
        raise UserError("The grid has too many points", where="merge.grid", given=given, allowed=str(MOST), fix=fix)


def _uniform(tried: Tried, number: int, grid: Sequence[float]) -> None:
    """Uniform weights are taken as they are: it is no search."""
    tried.value = float("inf")
    tried([1 / number] * number)


def _grid(tried: Tried, number: int, grid: Sequence[float]) -> None:
    for weights in product(grid, repeat=number):
        tried(weights)


def _gradient(tried: Tried, number: int, grid: Sequence[float]) -> None:
    w = torch.zeros(number, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [w], max_iter=tried.limit, max_eval=max(tried.limit - tried.count, 1), line_search_fn="strong_wolfe"
    )

    first: list[float] = []

    def closure() -> float:
        weights = w.tolist()
        value, gradient = tried.objective.gradient(weights)
        w.grad = torch.tensor(gradient, dtype=torch.float64)
        tried.note(weights, value)
        first.append(float(w.grad.norm()) or 1.0)
        w.grad /= first[0]  # L-BFGS ends by absolute tolerances
        return value / first[0]

    optimizer.step(closure)


def _points(number: int) -> Iterator[list[float]]:
    """Where a quadratic form of N variables is determined, but for 0."""
    for i in range(number):
        yield [0.5 * (i == k) for k in range(number)]
        yield [1.0 * (i == k) for k in range(number)]
    for i in range(number):
        for j in range(i):
            yield [0.5 * (k in (i, j)) for k in range(number)]


def _terms(w: np.ndarray) -> np.ndarray:
    """1, w_i, and w_i w_j for i >= j."""
    rows, columns = np.tril_indices(len(w))
    return np.concatenate([[1.0], w, w[rows] * w[columns]])


def _quadratic(tried: Tried, number: int, grid: Sequence[float]) -> None:
    points = [[0.0] * number, *_points(number)]
    values = [tried.value, *(tried(p) for p in points[1:])]
    found = np.linalg.solve(np.stack([_terms(np.array(p)) for p in points]), np.array(values))
    slope, hessian = found[1 : number + 1], np.zeros((number, number))
    hessian[np.tril_indices(number)] = found[number + 1 :]
    hessian = hessian + hessian.T  # w_i^2 has H_ii / 2, w_i w_j has H_ij
    if np.linalg.eigvalsh(hessian)[0] > 0:
        tried(np.linalg.solve(hessian, -slope).tolist())


def _coordinate(tried: Tried, number: int, grid: Sequence[float]) -> None:
    step = FIRST_STEP
    while step > FIRST_STEP / 16 and not tried.spent:
        before = tried.value
        for i in range(number):
            for sign in (1, -1):
                here = tried.value
                while (
                    not tried.spent and tried([w + sign * step * (i == k) for k, w in enumerate(tried.weights)]) < here
                ):
                    here = tried.value
        if tried.value == before:
            step /= 2
