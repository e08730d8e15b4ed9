"""Squared errors, and weights of the denoising loss over the noise levels.

Weights are factors of |eps_hat - eps|^2; snr = alpha^2 / sigma^2.

    min_snr         min(snr, gamma) / snr             arXiv 2303.09556, section 3.4; gamma = 5
    truncated_snr   max(1, 1 / snr)                   arXiv 2202.00512, section 4: max(snr, 1) of the x0 loss
    snr_plus_one    1 + 1 / snr                       arXiv 2202.00512, section 4: the loss of v
    p2              1 / (k + snr)^gamma               arXiv 2204.00227, eq. 8, beside the eps loss; k = gamma = 1
    uncertainty     exp(-s_j), and s_j is added       s_j is learned for the j-th interval of times, arXiv 1705.07115

The error of x0 is eps' times 1 / snr, that of v is eps' times (1 + snr) / snr, so that a weight is the same loss for
every prediction.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lightning_t2i.errors import UserError
from lightning_t2i.processes.base import Process

Weighting = Literal["none", "min_snr", "truncated_snr", "snr_plus_one", "p2", "uncertainty"]
UNITS = ("x0", "eps", "v")  # predictions in whose units a weight is known


def squares(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean square of each sample's error, [B, ...] twice -> [B]."""
    return (prediction - target).square().flatten(1).mean(1)


def loss_weight(kind: str, snr: Tensor, prediction: str, gamma: float = 5.0) -> Tensor:
    """The weight of each sample's loss, in the units of a prediction: [B] -> [B].

    Args:
        kind: one of the table; "none" and "uncertainty", whose weights are learned, are 1.
        gamma: of min_snr.

    Raises:
        UserError: a prediction whose units are not known.
    """
    if kind in ("none", "uncertainty"):
        return snr.new_ones(snr.shape)
    if prediction not in UNITS:
        raise UserError(f"{kind} weights eps, v and x0 losses", where="model.weighting", given=prediction)
    if prediction == "eps":
        return {
            "min_snr": lambda: (gamma / snr).clamp(max=1),
            "truncated_snr": lambda: (1 / snr).clamp(min=1),
            "snr_plus_one": lambda: 1 + 1 / snr,
            "p2": lambda: 1 / (1 + snr),
        }[kind]()
    weight = {  # of x0's error; written out, since 1 / snr is infinite where nothing but noise is left
        "min_snr": lambda: snr.clamp(max=gamma),
        "truncated_snr": lambda: snr.clamp(min=1),
        "snr_plus_one": lambda: 1 + snr,
        "p2": lambda: snr / (1 + snr),
    }[kind]()
    return weight if prediction == "x0" else weight / (1 + snr)


class Uncertainty(nn.Module):
    """Learned log variances s_j of N equal intervals of a process's time, 0 at first.

    Args:
        intervals: N.
    """

    def __init__(self, intervals: int):
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(intervals))

    def forward(self, process: Process, t: Tensor) -> Tensor:
        """s of the intervals that the times [B] are in: [B]."""
        span = process.t_max - process.t_min + process.discrete
        place = ((t - process.t_min) / span * len(self.log_variance)).long()
        return self.log_variance[place.clamp(max=len(self.log_variance) - 1)]
