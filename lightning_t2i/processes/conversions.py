"""What a network may predict, and the conversions between these predictions.

    x_t = alpha x0 + sigma eps                     (DDPM: a^2 + s^2 = 1; EDM: a = 1; flow: a + s = 1)
    v        = alpha eps - sigma x0                Salimans and Ho, arXiv 2202.00512, appendix D
    velocity = eps - x0                            rectified flow, arXiv 2209.03003, with t = 0 data and t = 1 noise
    score    = -eps / sigma                        grad log p_t(x_t) when eps is the posterior mean

Each prediction is p x0 + q eps; with x_t that makes two linear equations for (x0, eps), so one function converts all.
Coefficients are float64, tensors float64 or float32, never a half format: one-step students divide by
alpha_T = 0.07.
"""

from __future__ import annotations

import torch
from torch import Tensor

PREDICTIONS = ("x0", "eps", "v", "velocity", "score")


def expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """Shapes a coefficient [B] (or a scalar) to broadcast over x [B, ...] and gives it the working dtype of x."""
    coefficient = coefficient.to(x.device, work_dtype(x))
    return coefficient if coefficient.dim() == 0 else coefficient.view(-1, *[1] * (x.dim() - 1))


def work_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 input, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


def _parts(kind: str, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(p, q) such that the prediction is p x0 + q eps."""
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    return {
        "x0": lambda: (one, zero),
        "eps": lambda: (zero, one),
        "v": lambda: (-sigma, alpha),
        "velocity": lambda: (-one, one),
        "score": lambda: (zero, -1 / sigma),
    }[kind]()


def convert_coefficients(alpha: Tensor, sigma: Tensor, source: str, target: str) -> tuple[Tensor, Tensor]:
    """(a, b), float64 [B] or scalar, such that target = a * x_t + b * source.

    They are infinite where the conversion does not exist: eps to x0 at alpha = 0, x0 to eps at sigma = 0.
    """
    alpha, sigma = alpha.to(torch.float64), sigma.to(torch.float64)
    (p, q), (r, w) = _parts(source, alpha, sigma), _parts(target, alpha, sigma)
    determinant = alpha * q - sigma * p
    return (r * q - w * p) / determinant, (w * alpha - r * sigma) / determinant


def convert(prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, source: str, target: str) -> Tensor:
    """Re-expresses a prediction at x_t [B, ...] as another kind.

    Args:
        prediction: [B, ...], of kind `source`.
        x_t: the noisy sample that was given to the network, same shape.
        alpha, sigma: [B] or scalar, from `Process.alpha_sigma(t, torch.float64)`.
        source, target: members of PREDICTIONS.

    Returns:
        The prediction of kind `target`, at least float32.

    Raises:
        KeyError: an unknown kind.
    """
    dtype = torch.promote_types(work_dtype(x_t), prediction.dtype)
    if source == target:
        return prediction.to(dtype)
    a, b = (expand(c, x_t).to(dtype) for c in convert_coefficients(alpha, sigma, source, target))
    return a * x_t.to(dtype) + b * prediction.to(dtype)
