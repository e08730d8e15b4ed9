"""The guard before every update: losses and gradient norms must be finite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_t2i.method import MethodModule


class NonFiniteError(RuntimeError):
    """A loss or gradient norm is not finite; raised before any weight of the step is touched."""


def stop_unless_finite(
    method: MethodModule, losses: list[tuple[str, Tensor]], norms: dict[str, Tensor], seen: list[dict[str, Tensor]]
) -> None:
    """Stops all processes together when one of them has a loss or gradient norm that is not finite.

    Args:
        losses: (group, scalar) of each backward of the training step.
        norms: gradient norm of each group that is due.
        seen: sample ids of each micro-batch by stream, on this process.

    Raises:
        NonFiniteError: with step, losses, norms, ids, keys and the command that replays the step; the same is written
            to the run folder.
    """
    values = [*(loss for _, loss in losses), *norms.values()]
    trainer, step, seed = method.trainer, method.counters.step, method.common.seed
    if not values:  # no group is due in this step
        return
    finite = torch.stack([v.float().isfinite() for v in values]).all().float()
    if bool(trainer.strategy.reduce(finite, reduce_op="sum") > trainer.world_size - 0.5):
        return
    folder = Path(trainer.default_root_dir)
    ids = [{name: found.tolist() for name, found in micro.items()} for micro in seen]
    report = {
        "step": step,
        "seed": seed,
        "rank": method.global_rank,
        "losses": [(name, float(loss)) for name, loss in losses],
        "gradient_norms": {name: float(norm) for name, norm in norms.items()},
        "ids": ids,
        # The run goes on from its newest checkpoint and comes to the same step with the same batches and draws.
        "replay": f"python train.py fit --run {folder.name}",
    }
    file = folder / f"non-finite-step-{step}-rank-{method.global_rank}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1))
    raise NonFiniteError(
        f"A loss or gradient norm is not finite at training step {step}; no weight was changed.\n"
        f"  losses: {report['losses']}\n  gradient norms: {report['gradient_norms']}\n"
        f"  sample ids: {ids}\n  keys: seed {seed}, step {step}\n"
        f"  written: {file}\n  replay:  {report['replay']}"
    )
