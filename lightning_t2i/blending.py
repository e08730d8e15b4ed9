"""Representation blending (arXiv 2505.14705), and the draws of an inner loop, which two passes share.

    f~_i = lam f_i + (1 - lam) f_p(i),   y~_i = lam y_i + (1 - lam) y_p(i)        lam ~ Beta(c, c), p a permutation
    noise of the same variance, for comparison: f_i + (1 - lam) sqrt(2) s eps_i    s: deviation in the batch

The displacement (1 - lam) (f_p(i) - f_i) has variance 2 (1 - lam)^2 s^2, and so has that noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from scipy.stats import beta
from torch import Tensor

from lightning_t2i.errors import UserError
from lightning_t2i.keys import Keys
from lightning_t2i.networks.projection import Branches, Student


@dataclass(frozen=True)
class Blending:
    """What happens to features and text vectors of an inner batch before the heads.

    Args:
        kind: blend rows, add noise of the blend's variance, or nothing.
        concentration: c of Beta(c, c); the reference has 1, which is uniform.
        each: draw lam for each row, not once for the batch.
        branches: which modalities.
    """

    kind: Literal["blend", "noise", "none"] = "blend"
    concentration: float = 1.0
    each: bool = False
    branches: Literal["both", "image", "text"] = "both"

    def __post_init__(self) -> None:
        if self.concentration <= 0:
            where, allowed = "model.blending.concentration", "above 0"
            raise UserError("Not a Beta distribution", where=where, given=self.concentration, allowed=allowed)

    def shares(self, keys: Keys, name: str, rows: int) -> Tensor:
        """lam [rows, 1]."""
        u = keys.uniform(name, torch.arange(rows if self.each else 1), (1,), torch.float64)
        if self.concentration != 1:
            u = torch.from_numpy(beta.ppf(u.numpy(), self.concentration, self.concentration))
        return u.float().expand(rows, 1)


def blend(rows: Tensor, share: Tensor, order: Tensor) -> Tensor:
    """lam x_i + (1 - lam) x_p(i) of rows [b, d], lam [b, 1], p [b]; the rows themselves, bit by bit, where lam is 1."""
    return torch.lerp(rows[order], rows, share.to(rows))


@dataclass(frozen=True)
class Plan:
    """The draws of an inner loop of T steps with batches of b.

    rows [T, b] pairs of each batch; used [U] the pairs that occur, place [M] where each is among them; shares [T, b, 1]
    and orders [T, b] of the blend; keys, name: what dropout and noise are drawn with.
    """

    rows: Tensor
    used: Tensor
    place: Tensor
    shares: Tensor
    orders: Tensor
    keys: Keys
    name: str

    @classmethod
    def draw(cls, keys: Keys, name: str, pairs: int, steps: int, batch: int, blending: Blending, device=None) -> Plan:
        """A permutation of all pairs is cut into batches; what is left is dropped and the next one is drawn."""
        every, chunks = torch.arange(pairs), pairs // batch
        orders = [keys.uniform(f"{name}/pairs/{k}", every).argsort() for k in range(-(-steps // chunks))]
        rows = torch.cat([order[: chunks * batch].view(chunks, batch) for order in orders])[:steps]
        used = rows.unique()
        place = torch.zeros(pairs, dtype=torch.int64)
        place[used] = torch.arange(len(used))
        slots = torch.arange(batch)
        mixing = torch.stack([keys.uniform(f"{name}/blend/{k}", slots).argsort() for k in range(steps)])
        shares = torch.stack([blending.shares(keys, f"{name}/share/{k}", batch) for k in range(steps)])
        rows, used, place, shares, mixing = (t.to(device) for t in (rows, used, place, shares, mixing))
        return cls(rows, used, place, shares, mixing, keys, name)

    def mixed(self, k: int, images: Tensor, texts: Tensor, blending: Blending) -> tuple[Tensor, Tensor]:
        """Features and text vectors of batch k, [b, d] and [b, d'], as the heads get them."""
        found = {"image": images, "text": texts}
        for branch in found.keys() if blending.kind != "none" else ():
            if blending.branches not in ("both", branch):
                continue
            rows = found[branch]
            if blending.kind == "blend":
                found[branch] = blend(rows, self.shares[k], self.orders[k])
            else:
                slots = torch.arange(len(rows), device=rows.device)
                noise = self.keys.normal(f"{self.name}/{branch}/{k}", slots, tuple(rows.shape[1:])).to(rows)
                spread = (1 - self.shares[k]).to(rows) * 2**0.5 * rows.detach().std(0)
                found[branch] = rows + spread * noise
        return found["image"], found["text"]

    def keep(self, k: int, student: Student, anew: bool = False) -> Branches:
        """What dropout leaves in step k; `anew` draws others than the first pass had."""
        slots = torch.arange(self.rows.shape[1], device=self.rows.device)
        return student.keep(self.keys, f"{self.name}/dropout{'/anew' * anew}/{k}", slots)
