"""What experts are like: six pictures of a run with all of its deltas, and their numbers in analysis.json.

python -m lightning_t2i.expert_plots runs/NAME [--weights 0.1,0.1,0.2,0.5]

gradients   cosine of the mean loss gradients of theta_0 at pairs of times. Two halves of the data give independent
            gradients, so that the diagonal of `split` is what noise leaves of 1: the ceiling of what is beside it
ranges      held-out loss of base, each expert, the merged model, and experts that take turns, on each range
taus        cosines of the deltas, and their norms
landscape   held-out loss of one range, and of all, on theta_0 + a tau_i + b tau_j
strength    held-out loss of theta_0 + s sum w tau over s
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure  # no pyplot: no global state, no display
from torch import Tensor

from lightning_t2i.errors import UserError
from lightning_t2i.held_out import Data, HeldOut
from lightning_t2i.keys import Keys
from lightning_t2i.networks.denoiser import Denoiser
from lightning_t2i.range_experts import RangeExperts
from lightning_t2i.state_io import write_atomically
from lightning_t2i.streamed import read_header

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
SPAN = (-0.5, 1.5)  # of both coefficients of the landscape


def gradients(module: Any, network: Denoiser, data: Data, times: Sequence[float], keys: Keys) -> Tensor:
    """Mean loss gradient by all weights at each time, over the data: [times, weights] on the CPU."""
    network = network.requires_grad_(True).eval()
    parameters, rows = list(network.parameters()), []
    for t in times:
        total = torch.zeros(sum(p.numel() for p in parameters))
        for records, cond in data:
            at = torch.full((len(records),), t, device=module.device)
            at = at.long() if module.process.discrete else at
            x_t, y = module.noised(module.codec.latents(records), records.position, keys, at)
            loss = (network(x_t, at, cond) - y).square().mean() / len(data)
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            total += torch.cat([torch.zeros(p.numel()) if g is None else g.cpu().flatten()
                                for p, g in zip(parameters, found, strict=True)])  # fmt: skip
        rows.append(total)
    return torch.stack(rows)


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of rows: [m, d] and [n, d] -> [m, n]."""
    return torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T


def gradient_cosines(module: Any, data: Data, times: Sequence[float], keys: Keys) -> dict[str, list[list[float]]]:
    """`same`: cosines on the same samples and noise, ones on the diagonal; `split`: of independent halves."""
    halves: list[Data] = [data[0::2], data[1::2]]
    if not halves[1]:
        raise UserError("Two batches are needed, one for each half", given=len(data), allowed="2 or more")
    first, second = (gradients(module, module.plain(), half, times, keys.fork(str(i))) for i, half in enumerate(halves))
    split, both = cosines(first, second), first + second
    return {"same": cosines(both, both).tolist(), "split": ((split + split.T) / 2).tolist()}


@torch.no_grad()
def range_matrix(module: Any, data: Data, keys: Keys, weights: Sequence[float]) -> dict[str, list[float]]:
    """Held-out loss on each range by what was asked."""
    experts = module.experts()
    asked = {"base": module.plain(), **{f"expert {i}": e for i, e in enumerate(experts)},
             "merged": module.plain(weights), "switched": module.switch(experts)}  # fmt: skip
    return {
        name: torch.stack([module.range_losses(network, r, c, keys) for r, c in data]).mean(0).tolist()
        for name, network in asked.items()
    }


def tau_cosines(files: Sequence[Path]) -> dict[str, Any]:
    """Cosines of deltas [N, N] and their norms [N], tensor by tensor."""
    headers = [read_header(file)[0] for file in files]
    products = np.zeros((len(files), len(files)))
    for name in headers[0]:
        rows = torch.stack([h[name].read().double().flatten() for h in headers])
        products += (rows @ rows.T).numpy()
    norms = np.sqrt(np.diag(products))
    return {"cosines": (products / np.maximum(np.outer(norms, norms), 1e-30)).tolist(), "norms": norms.tolist()}


def landscape(objective: HeldOut, pair: tuple[int, int], points: int) -> dict[str, Any]:
    """Losses on a square of coefficients of two deltas: of the first one's range, and of all."""
    steps, number = np.linspace(*SPAN, points), len(objective.taus)
    own, every = np.zeros((points, points)), np.zeros((points, points))
    for i, a in enumerate(steps):
        for j, b in enumerate(steps):
            weights = [0.0] * number
            weights[pair[0]], weights[pair[1]] = float(a), float(b)
            losses = objective.ranges(weights)
            own[i, j], every[i, j] = losses[pair[0]], float(np.mean(losses))
    return {"pair": list(pair), "steps": steps.tolist(), "own": own.tolist(), "all": every.tolist()}


def strength(objective: HeldOut, weights: Sequence[float]) -> dict[str, list[float]]:
    """The loss over the strength s of a merge."""
    return {"s": list(STRENGTHS), "loss": [objective.value([s * w for w in weights]) for s in STRENGTHS]}


def analyse(module: Any, data: Data, weights: Sequence[float], times: int = 12, points: int = 9) -> dict[str, Any]:
    """All numbers, as plain values.

    Args:
        data: two batches or more.
        weights: of the merged model.
        times: of the gradients, evenly spaced.
        points: of each side of the landscape.
    """
    if module.all_deltas() is None:
        given = f"{len(module.found_deltas())} of {module.num_ranges}"
        raise UserError("Deltas are missing", where=str(module.delta_folder), given=given, fix="train the others first")
    keys, grid = module.keys.fork("analysis"), np.linspace(module.process.t_min, module.process.t_max, times)
    grid = grid.round() if module.process.discrete else grid
    objective, last = HeldOut(module, data, keys), module.num_ranges - 1
    return {
        "times": grid.tolist(),
        "weights": list(weights),
        "gradients": gradient_cosines(module, data, grid.tolist(), keys),
        "ranges": range_matrix(module, data, keys, weights),
        "taus": tau_cosines(module.all_deltas()),
        "landscape": landscape(objective, (last, max(last - 1, 0)), points),
        "strength": strength(objective, weights),
    }


def draw(found: dict[str, Any]) -> Figure:
    """The pictures in two rows of three."""
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    span = (found["times"][0], found["times"][-1])
    losses, names = np.array(list(found["ranges"].values())), list(found["ranges"])
    gains, slope = 100 * (losses / losses[0] - 1), found["landscape"]
    most, (first, second) = float(np.abs(gains).max()), slope["pair"]
    cosine: dict[str, Any] = {"vmin": -1, "vmax": 1, "cmap": "RdBu"}
    half = (SPAN[1] - SPAN[0]) / (len(slope["steps"]) - 1) / 2  # of a cell, whose middle is its point
    square = {"extent": (SPAN[0] - half, SPAN[1] + half) * 2, "origin": "lower"}
    pictures: list[tuple[str, str, str, np.ndarray, dict[str, Any]]] = [
        ("gradient cosines (independent halves)", "time", "time", np.array(found["gradients"]["split"]),
         {**cosine, "extent": (*span, *span[::-1])}),
        ("held-out loss against the base, %", "range", "", gains, {"vmin": -most, "vmax": most, "cmap": "RdBu_r"}),
        ("cosines of deltas", "range", "range", np.array(found["taus"]["cosines"]), cosine),
        (f"loss of range {first}", f"delta {second}", f"delta {first}", np.array(slope["own"]), square),
        ("loss of all ranges", f"delta {second}", f"delta {first}", np.array(slope["all"]), square),
    ]  # fmt: skip
    for axis, (title, across, down, values, options) in zip(axes, pictures, strict=False):
        axis.set(title=title, xlabel=across, ylabel=down)
        figure.colorbar(axis.imshow(values, aspect="auto", **options), ax=axis)
    for axis, values, limit in ((axes[1], gains, most), (axes[2], pictures[2][3], 1)):
        axis.set_xticks(range(values.shape[1]))
        for (row, column), value in np.ndenumerate(values):
            color = "white" if abs(value) > 0.6 * limit else "black"
            axis.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=8, color=color)
    axes[1].set_yticks(range(len(names)), names, fontsize=8)
    axes[2].set_yticks(range(len(pictures[2][3])))
    axes[5].set(title="loss of all ranges by strength", xlabel="strength s")
    axes[5].plot(found["strength"]["s"], found["strength"]["loss"], marker="o")
    return figure


def of_run(run: Path, weights: str | None, batches: int, times: int, points: int) -> Path:
    """Analyses a run folder and writes analysis.json and analysis.png into it.

    Args:
        weights: numbers with commas between them; None is those of `merged/merge.json`, else 1 / N.
        batches: validation batches that losses and gradients are means of.
    """
    from lightning_t2i.cli.configs import merge
    from lightning_t2i.cli.merge import parse_weights
    from lightning_t2i.cli.restore import restore
    from lightning_t2i.cli.session import Session, quiet

    quiet()
    session = Session()
    session.parse(merge([run / "config.yaml"]), "validate")
    session.construct()
    method, data = session.method, session.data
    if not isinstance(method, RangeExperts):
        raise UserError("This run trained no experts", where=str(run), given=type(method).__name__)
    restore(method, run)
    method.deltas = method.deltas or str(run / "deltas")
    file = run / "merged" / "merge.json"
    if weights is None and file.is_file():
        chosen = json.loads(file.read_text())["weights"]
    else:
        chosen = parse_weights(weights or "uniform", method.num_ranges)
    data.prepare_data()
    data.setup("validate")
    found = [batch["main"] for batch, _ in zip(data.val_dataloader(), range(batches), strict=False)]
    with torch.no_grad():
        pairs = [(records, method.condition(records)) for records in found]
    numbers = analyse(method, pairs, chosen, times, points)
    write_atomically(run / "analysis.json", (json.dumps(numbers, indent=1) + "\n").encode())
    draw(numbers).savefig(run / "analysis.png", dpi=90)
    return run / "analysis.png"


def main(arguments: Sequence[str] | None = None) -> int:
    """Analyses a run; 2 for a mistake."""
    parser = argparse.ArgumentParser("python -m lightning_t2i.expert_plots", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="run folder with the deltas of all ranges")
    parser.add_argument("--weights", help="of the merged model, as 0.1,0.1,0.2,0.5")
    parser.add_argument("--batches", type=int, default=4, help="validation batches")
    parser.add_argument("--times", type=int, default=12, help="times of the gradients")
    parser.add_argument("--points", type=int, default=9, help="points of each side of the landscape")
    options = parser.parse_args(arguments)
    try:
        print(of_run(options.run, options.weights, options.batches, options.times, options.points))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
