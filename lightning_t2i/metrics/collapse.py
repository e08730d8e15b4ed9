"""Modality collapse: whether embeddings of a set huddle together in each modality and part from the other.

intra   mean of <z_i, z_j> over i /= j, in one modality: the higher, the less diverse;  diversity = 1 - intra
gap     |mean_i x_i - mean_j y_j|                                                    arXiv 2203.02053
pair    mean of <x_i, y_i>
cr42    share of pairs i /= j of one modality whose cosine exceeds t; t is the (1 - 0.42)-quantile of random real pairs,
        which so have 0.42. The paper's concentration ratio has values on this scale; its formula is not known to us.
stripes share of the variance off S's diagonal that a sum u_i + v_j explains: 1 if S is striped

x, y [M, D] of unit length
"""

from __future__ import annotations

import torch
from torch import Tensor

SHARE = 0.42  # of random real pairs above the threshold, as in the paper's figure 2


def off_diagonal(matrix: Tensor) -> Tensor:
    """Entries i /= j of [M, M], row by row."""
    m = len(matrix)
    return matrix[~torch.eye(m, dtype=torch.bool, device=matrix.device)]


def intra(z: Tensor) -> float:
    """Mean cosine of different items."""
    return float(off_diagonal(z @ z.T).double().mean())


def gap(x: Tensor, y: Tensor) -> float:
    """Distance of the modalities' means."""
    return float((x.double().mean(0) - y.double().mean(0)).norm())


def threshold(x: Tensor, y: Tensor) -> float:
    """t of random real pairs."""
    cosines = torch.cat([off_diagonal(z @ z.T) for z in (x, y)])
    return float(torch.quantile(cosines.double(), 1 - SHARE))


def concentration(x: Tensor, y: Tensor, t: float) -> float:
    """cr42 of both modalities together."""
    cosines = torch.cat([off_diagonal(z @ z.T) for z in (x, y)])
    return float((cosines > t).double().mean())


def stripes(similarity: Tensor) -> float:
    """Share of the variance off the diagonal of S [M, M] that u_i + v_j explains, by least squares; 0 of a constant.

    With the mean taken away, and r and c the sums of rows and columns without the diagonal, the normal equations

        (M - 1) u_i + sum_j v_j - v_i = r_i        (M - 1) v_i + sum_j u_j - u_i = c_i

    have the solution u + v = (r + c) / (M - 2), u - v = (r - c) / M; two pairs are always explained, with r + c = 0.
    """
    m = len(similarity)
    values = similarity.detach().cpu().double()
    values = (values - off_diagonal(values).mean()).fill_diagonal_(0)
    total = values.square().sum()
    if float(total) == 0:
        return 0.0
    both, difference = (values.sum(1) + values.sum(0)) / max(m - 2, 1), (values.sum(1) - values.sum(0)) / m
    rest = (values - (both + difference)[:, None] / 2 - (both - difference) / 2).fill_diagonal_(0)
    return float(1 - rest.square().sum() / total)


def collapse(x: Tensor, y: Tensor, t: float | None = None) -> dict[str, float]:
    """intra of both and their mean, diversity, gap, pair, and cr42 where a threshold is given; x, y [M, D] unit."""
    found = {"intra_image": intra(x), "intra_text": intra(y), "gap": gap(x, y)}
    found["intra"] = (found["intra_image"] + found["intra_text"]) / 2
    found |= {"diversity": 1 - found["intra"], "pair": float((x * y).sum(1).mean())}
    return found if t is None else {**found, "cr42": concentration(x, y, t)}
