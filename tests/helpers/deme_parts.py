"""What tests of DeMe share: an expert's options, a fit of all ranges, and deltas that are made up."""

from __future__ import annotations

from pathlib import Path

import torch
from pictures import Pictures, fit

from lightning_modules.deme import DeMe, ProjectionOptions
from lightning_t2i.keys import Keys
from lightning_t2i.merging import save_delta
from lightning_t2i.options import EMAOptions, GroupOptions

STEPS = 3  # of each range


def update(lr: float = 1e-3, **options) -> GroupOptions:
    return GroupOptions(lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=0.0), **{"ema": EMAOptions(0.5), **options})


def deme(base, deltas=None, **options) -> DeMe:
    """A DeMe of a tiny pipeline: two ranges of a few steps."""
    few = {"num_ranges": 2, "steps_per_range": STEPS, "guidance": 2.0, "steps": 4, "student": update()}
    return DeMe(str(base), deltas=deltas and str(deltas), **{**few, **options})


def built(base, deltas=None, **options) -> DeMe:
    module = deme(base, deltas, **options)
    module.configure_model()
    return module.eval()


def trained(folder: Path, base, data: Pictures | None = None, **options) -> DeMe:
    """All ranges in one fit; the deltas are in `folder/deltas`."""
    module = deme(base, folder / "deltas", **options)
    number = 1 if module.range_index is not None else module.num_ranges
    fit(folder, module, number * module.steps_per_range, data)
    return module.eval()


def made_up(module: DeMe, scale: float = 0.01) -> list[dict[str, torch.Tensor]]:
    """Writes a keyed delta for each range into the module's folder."""
    found = []
    for i in range(module.num_ranges):
        keys = Keys(i).fork("delta")
        taus = {
            name: scale * keys.normal(name, torch.zeros(1, dtype=torch.int64), tuple(p.shape))[0]
            for name, p in module.student.backbone.named_parameters()
        }
        name = f"range-{i}-of-{module.num_ranges}.safetensors"
        save_delta(module.delta_folder / name, taus.items(), module.about | {"index": i})
        found.append(taus)
    return found


__all__ = ["STEPS", "Pictures", "ProjectionOptions", "built", "deme", "made_up", "trained", "update"]
