"""InstaFlow in the plane: two modes, the exact flow towards them, and what reflow and distillation make of it.

    teacher    the exact velocity of x_t = (1 - t) x + t z, x ~ 1/2 N(m, s^2 I) + 1/2 N(-m, s^2 I)
    reflow     an MLP on the teacher's pairs (z, x)
    distilled  another in one step, on the pairs of the reflowed MLP
    direct     another in one step, on the teacher's pairs, for as many updates as both together

m lies on the first axis, so that both coordinates are independent and the exact map of noise to data keeps the order of
the first one: two pairs cross there if and only if their order changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_t2i.batch import Cond
from lightning_t2i.keys import Keys
from lightning_t2i.networks.denoiser import Denoiser, Predictor
from lightning_t2i.networks.mlp import MLP
from lightning_t2i.processes import RectifiedFlow, expand
from lightning_t2i.processes.base import Time
from lightning_t2i.processes.sampling import sample
from lightning_t2i.processes.weights import squares

MODE, STD = 1.5, 0.25
SOLVED = 50  # Euler steps of pairs


class TwoModes(Predictor):
    """The exact denoiser of the two modes, on points [B, 2, 1, 1]."""

    def __init__(self, mode: float = MODE, std: float = STD):
        super().__init__(RectifiedFlow(), "x0")
        self.mode, self.std = mode, std

    def predict(self, x_t: Tensor, t: Time, cond: Cond | None = None) -> Tensor:
        alpha, sigma = (expand(c, x_t) for c in self.process.alpha_sigma(torch.as_tensor(t), torch.float64))
        variance = alpha**2 * self.std**2 + sigma**2
        gain = alpha * self.std**2 / variance
        mean = torch.zeros_like(x_t)
        mean[:, :1] = self.mode * torch.tanh(alpha * self.mode * x_t[:, :1] / variance)
        return mean + gain * (x_t - alpha * mean)

    def draw(self, keys: Keys, n: int) -> Tensor:
        """Points of the data [n, 2, 1, 1]."""
        places = torch.arange(n)
        points = self.std * keys.normal("data", places, (2, 1, 1))
        points[:, 0, 0, 0] += self.mode * (2 * keys.bernoulli("mode", places, 0.5).float() - 1)
        return points


class Timed(nn.Module):
    """The MLP, told its time in [-1, 1]."""

    def __init__(self, width: int):
        super().__init__()
        self.inner = MLP(sample_size=1, in_channels=2, width=width, depth=3)

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None) -> Tensor:
        out: Tensor = self.inner(x, t / 500 - 1)
        return out


@dataclass
class Flows:
    """The teacher and the three that learned from it."""

    teacher: Predictor
    reflowed: Denoiser
    distilled: Denoiser
    direct: Denoiser


def fitted(teacher: Predictor, keys: Keys, steps: int, batch: int, one_step: bool, width: int = 64) -> Denoiser:
    """An MLP trained on a teacher's pairs, by the loss of `Reflow` or of `OneStep` in latents."""
    keys.seed_globals()
    network = Denoiser(Timed(width), RectifiedFlow(), "velocity")
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    z = keys.normal("z", torch.arange(16 * batch), (2, 1, 1))
    x = sample(teacher, z, None, SOLVED, 1.0, "euler")
    for step in range(steps):
        places = torch.arange(batch) + step * batch
        rows = keys.integers("row", places, 0, len(z))
        t = torch.ones(batch) if one_step else keys.uniform("t", places)
        noise, data = z[rows], x[rows]
        loss = squares(network(network.process.add_noise(data, noise, t), t), noise - data).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def flows(seed: int, steps: int = 1000, batch: int = 256) -> Flows:
    """Trains the three; reflow has `steps` updates, the distillation half as many."""
    keys, teacher = Keys(seed), TwoModes()
    reflowed = fitted(teacher, keys.fork("reflow"), steps, batch, one_step=False)
    distilled = fitted(reflowed, keys.fork("distil"), steps // 2, batch, one_step=True)
    direct = fitted(teacher, keys.fork("direct"), steps + steps // 2, batch, one_step=True)
    return Flows(teacher, reflowed, distilled, direct)


def crossings(z: Tensor, x: Tensor) -> float:
    """Share of two pairs that cross on the first axis; z, x [B, 2, 1, 1]."""
    a, b = z[:, 0, 0, 0], x[:, 0, 0, 0]
    swapped = (a[:, None] - a) * (b[:, None] - b) < 0
    return float(swapped.double().sum() / (len(a) * (len(a) - 1)))


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|A - B| - E|A - A'| - E|B - B'| of points [N, 2, 1, 1] and [M, 2, 1, 1]; of equal laws 0 but for chance."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    within = sum(float(torch.cdist(p, p).sum()) / (len(p) * (len(p) - 1)) for p in (a, b))
    return 2 * float(torch.cdist(a, b).mean()) - within
