"""Cells of DeMe's claims: weights of a merge, held-out losses on each range, pictures, gradients over times."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_modules.deme import DeMe
from lightning_modules.diffusion import Diffusion
from lightning_t2i.batch import Cond, Records
from lightning_t2i.claims.fluid_cells import scenes
from lightning_t2i.claims.spec import Cell, Measured
from lightning_t2i.claims.training import RUN, measure
from lightning_t2i.cli.restore import constructed, restore
from lightning_t2i.expert_plots import gradient_cosines, tau_cosines
from lightning_t2i.held_out import Data, HeldOut
from lightning_t2i.keys import Keys
from lightning_t2i.merge_search import search
from lightning_t2i.paths import resolve
from lightning_t2i.token_orders import permutations

FLIPS = 4  # choices of flipped signs of the deltas that a control is the mean of


def experts_of(run: Path) -> DeMe:
    """The method of a run with all of its deltas, in eval mode."""
    method = constructed(run / "config.yaml")
    assert isinstance(method, DeMe)
    restore(method, run)
    method.deltas = str(run / "deltas")
    return method


def joint_of(run: Path) -> Diffusion:
    """The method of a joint fine-tuning, in eval mode."""
    method = constructed(run / "config.yaml")
    assert isinstance(method, Diffusion)
    restore(method, run)
    return method


@torch.no_grad()
def held_out(method: DeMe, split: str, n: int) -> Data:
    return [(records, method.condition(records)) for records in scenes(split, n)]


def choose(cell: Cell) -> Measured:
    """Weights w0, w1, ... by the held-out loss on validation pictures: options of, search, n, limit."""
    options, method = cell.options, experts_of(cell.after[cell.options["of"]] / RUN)
    objective = HeldOut(method, held_out(method, "val", options["n"]), Keys(cell.seed).fork("choose"))
    found = search(options["search"], method.num_ranges, objective, limit=options["limit"])
    base = objective.value([0.0] * method.num_ranges)
    numbers = {f"w{i}": w for i, w in enumerate(found.weights)}
    return Measured({**numbers, "search_gain": base - found.value, "sum": sum(found.weights)})


def chosen(cell: Cell, arm: str) -> list[float]:
    """The weights that another arm chose, in order."""
    numbers = cell.measured(arm).numbers
    return [numbers[f"w{i}"] for i in range(sum(name[:1] == "w" and name[1:].isdigit() for name in numbers))]


@torch.no_grad()
def losses(cell: Cell) -> Measured:
    """Held-out losses on test pictures, at noise that no search saw: options of, weights, joint, n.

    Numbers: loss (of the merged model), base, switched, uniform, flipped, joint: means over all ranges; gain_i, the
    share of the base's loss on range i that expert i is below it, least_gain of them; rise, the mean share by which
    experts are above the base outside of their range; drift, the mean norm of tau.
    """
    options, method = cell.options, experts_of(cell.after[cell.options["of"]] / RUN)
    data, keys, n = held_out(method, "test", options["n"]), Keys(cell.seed).fork("report"), method.num_ranges

    def on(network: Any) -> np.ndarray:
        found = torch.stack([method.range_losses(network, r, c, keys) for r, c in data]).mean(0)
        return np.array(found.tolist())

    base, matrix = on(method.plain()), np.stack([on(expert) for expert in method.experts()])
    gains, outside = 1 - matrix.diagonal() / base, ~np.eye(n, dtype=bool)
    numbers = {f"gain_{i}": float(gain) for i, gain in enumerate(gains)}
    numbers |= {
        "least_gain": float(gains.min()),
        "rise": float((matrix / base - 1)[outside].mean()) if n > 1 else 0.0,
        "drift": float(np.mean(tau_cosines(method.found_deltas())["norms"])),
        "base": float(base.mean()),
        "switched": float(matrix.diagonal().mean()),
        "uniform": float(on(method.plain([1 / n] * n)).mean()),
    }
    if "weights" in options:
        w = chosen(cell, options["weights"])
        numbers["loss"] = float(on(method.plain(w)).mean())
        numbers["flipped"] = float(np.mean([on(method.plain(signed(w, i))).mean() for i in range(FLIPS)]))
        others = ("base", "uniform", "flipped")
        numbers |= {f"loss_gain_over_{name}": numbers[name] - numbers["loss"] for name in others}
    if "joint" in options:
        joint = joint_of(cell.after[options["joint"]] / RUN)
        numbers["joint"] = float(on(joint.generator_of("denoiser")).mean())
        numbers |= {"loss_gain_over_joint": numbers["joint"] - numbers["loss"]} if "loss" in numbers else {}
    return Measured(numbers)


def signed(weights: Sequence[float], number: int) -> list[float]:
    """Weights of which some, by a keyed choice, have the other sign: other ones for each number below 2^N - 1."""
    kinds = 2 ** len(weights) - 1
    order = permutations(Keys(0), "signs", torch.zeros(1, dtype=torch.int64), kinds)[0]
    flips = 1 + int(order[number % kinds])  # its bits; 0, which would flip none, is left out
    return [-w if flips >> i & 1 else w for i, w in enumerate(weights)]


class Subject:
    """A network that is sampled as its method samples.

    Args:
        method: whose conditions, guidance and solver are used.
        network: None is the method's own.
        steps: of the sampler.
    """

    def __init__(self, method: Any, network: Any, steps: int):
        self.method, self.network = method, network
        method.steps = steps

    def condition(self, records: Records) -> Cond | None:
        found: Cond | None = self.method.condition(records)
        return found

    def sample(self, cond: Cond | None, keys: Keys, positions: Tensor) -> Tensor:
        more = {} if self.network is None else {"network": self.network}
        pictures: Tensor = self.method.sample(cond, keys, positions, **more)
        return pictures


def draw(cell: Cell) -> Measured:
    """The metrics of pictures: options of, model ("base", "merged", "switched", "joint"), weights, split, n, steps."""
    options, run = cell.options, cell.after[cell.options["of"]] / RUN
    if options["model"] == "joint":
        subject = Subject(joint_of(run), None, options["steps"])
    else:
        method = experts_of(run)
        network = {
            "base": method.plain,
            "merged": lambda: method.plain(chosen(cell, options["weights"])),
            "switched": lambda: method.switch(method.experts()),
        }[options["model"]]()
        subject = Subject(method, network, options["steps"])
    return measure(subject, options["split"], options["n"], cell.seed, ["shapes_score", "fd"])


def gradients(cell: Cell) -> Measured:
    """Cosines of loss gradients of theta_0 at pairs of times: options config, n, times.

    Numbers: near and far, of times in neighbouring and in the most distant quarters; banded, their difference; whole
    and quarter, of all pairs and of those in the first quarter of the times; local, their difference; ceiling, of one
    time.
    """
    options = cell.options
    method = constructed(resolve(options["config"]))
    assert isinstance(method, DeMe)
    method.configure_model()
    count = options["times"]
    times = np.linspace(method.process.t_min, method.process.t_max, count).round().tolist()
    data = held_out(method.eval(), "val", options["n"])
    matrix = np.array(gradient_cosines(method, data, times, Keys(cell.seed).fork("gradients"))["split"])
    apart = np.abs(np.subtract.outer(range(count), range(count))) / count
    off, first = apart > 0, np.arange(count) < count // 4
    found = {
        "near": matrix[off & (apart <= 0.25)].mean(),
        "far": matrix[apart >= 0.75].mean(),
        "whole": matrix[off].mean(),
        "quarter": matrix[off & np.logical_and.outer(first, first)].mean(),
        "ceiling": matrix.diagonal().mean(),
    }
    found |= {"banded": found["near"] - found["far"], "local": found["quarter"] - found["whole"]}
    return Measured({name: float(value) for name, value in found.items()})
