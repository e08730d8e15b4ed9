"""Heads of the token transformer: from a vector z of a token to its distribution.

    categorical   p(x) = softmax(E z), E the embedding's matrix                                    cross-entropy
    diffusion     denoises x_t given t and z, variance learned                                     see token_diffusion
    flow          v(x_t, t, z) = eps - x on x_t = (1 - t) x + t eps, t logit-normal                rectified flow
    regression    x = f(z): what a squared error does without a distribution, for comparisons

Diffusion and flow share one network, see token_head_network. The arithmetic of their schedules is float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_t2i.errors import UserError
from lightning_t2i.networks.token_diffusion import VARIANCES, TokenDiffusion
from lightning_t2i.networks.token_head_network import HeadNetwork, NoiseHead
from lightning_t2i.processes import LogitNormal, RectifiedFlow


class Terms(NamedTuple):
    """A loss before any mean: total [M, m], with gradient, and its parts [M, m] by name, without."""

    total: Tensor
    parts: dict[str, Tensor]


class Sampled(NamedTuple):
    """Tokens [M, c] or int64 [M]; confidence: log p of discrete ones [M], else None."""

    tokens: Tensor
    confidence: Tensor | None = None


def masked_rows(known: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Where a batch has unknown tokens, in a number of rows that is fixed before the mask is seen.

    Args:
        known: bool [B, L].
        count: at least the number of unknown tokens; graphs stay static where it does.

    Returns:
        Indices int64 [count] into the flattened batch, unknown places first, and weights [count], 1 for these and 0
        for the surplus.
    """
    rows = known.flatten().to(torch.uint8).argsort(stable=True)[:count]
    return rows, (~known.flatten()[rows]).to(torch.float32)


class DiffusionHead(NoiseHead):
    """Diffusion of a token in 1000 times.

    Args:
        variance: "learned", "large" or "small", see token_diffusion.
        first: "discretized" or "gaussian", see token_diffusion.
        clip: bound of the estimate of x while sampling; null: none.

    Raises:
        UserError: another variance or `first`.
    """

    t_end = 1000

    def __init__(
        self,
        width: int,
        channels: int,
        depth: int = 6,
        hidden: int = 768,
        variance: str = "learned",
        first: str = "discretized",
        clip: float | None = None,
    ):
        for where, given, allowed in (
            ("variance", variance, VARIANCES),
            ("first", first, ("discretized", "gaussian")),
        ):
            if given not in allowed:
                raise UserError("No such diffusion of tokens", where=where, given=given, allowed=allowed)
        super().__init__(width, channels, depth, hidden, 2 * channels if variance == "learned" else channels)
        self.diffusion, self.clip = TokenDiffusion.cosine(self.t_end, variance, first), clip

    def times(self, u: Tensor) -> Tensor:
        """Times int64 below `t_end` of uniform draws u, which rounding may have brought up to 1."""
        return (u * self.t_end).long().clamp(max=self.t_end - 1)

    def loss(self, z: Tensor, target: Tensor, u: Tensor, noise: Tensor) -> Terms:
        """Squared error of eps, with learned variance plus its bits; see `TokenTransformer.loss`."""
        t, x = self.times(u), target.float()[:, None]
        x_t = self.diffusion.add_noise(x, noise.float(), t)
        eps, *v = self.predict(x_t, t, z).split(self.channels, -1)
        error = (eps - noise).square().mean(-1)
        if not v:
            return Terms(error, {"eps_mse": error.detach()})
        bits = self.diffusion.bits(x, x_t, t, eps, v[0])
        return Terms(error + bits, {"eps_mse": error.detach(), "vb_bits": bits.detach()})

    def sample(self, z: Tensor, noise: Tensor, temperature: float = 1.0, guidance: float = 1.0) -> Sampled:
        """Ancestral sampling in len(noise) steps; see `TokenTransformer.sample`."""
        diffusion = self.diffusion.respaced(len(noise))
        say = self.stepwise(z, torch.tensor(diffusion.times, device=z.device), guidance)

        def predict(x: Tensor, j: int) -> tuple[Tensor, Tensor | None]:
            eps, *v = say(x, j).split(self.channels, -1)
            return eps, v[0] if v else None

        return Sampled(diffusion.sample(predict, noise, temperature, self.clip))


class FlowHead(NoiseHead):
    """Rectified flow of a token (as NextStep-1, arXiv 2508.10711): t logit-normal, velocity eps - x.

    Args:
        mean, std: of the logit of t.
        eta: noise of the sampling steps, 1 as in ancestral sampling, 0 for the ordinary differential equation.
    """

    t_end = 1

    def __init__(
        self,
        width: int,
        channels: int,
        depth: int = 6,
        hidden: int = 768,
        mean: float = 0.0,
        std: float = 1.0,
        eta: float = 1.0,
    ):
        super().__init__(width, channels, depth, hidden, channels)
        self.flow, self.law, self.eta = RectifiedFlow(), LogitNormal(mean=mean, std=std), eta

    def times(self, u: Tensor) -> Tensor:
        """Times float32 between 0 and `t_end` of uniform draws u."""
        return self.law.quantile(self.flow, u.double()).float()

    def loss(self, z: Tensor, target: Tensor, u: Tensor, noise: Tensor) -> Terms:
        """Squared error of the velocity; see `TokenTransformer.loss`."""
        t = self.times(u)
        x, noise = target.float()[:, None], noise.float()
        velocity = self.predict((1 - t)[..., None] * x + t[..., None] * noise, 1000 * t, z)
        error = (velocity - (noise - x)).square().mean(-1)
        return Terms(error, {"velocity_mse": error.detach()})

    def sample(self, z: Tensor, noise: Tensor, temperature: float = 1.0, guidance: float = 1.0) -> Sampled:
        """len(noise) equal steps from noise to data; the temperature is a factor of the steps' noise."""
        times = self.flow.timesteps(len(noise), z.device)
        say, x = self.stepwise(z, 1000 * times, guidance), noise[0]
        for j in range(len(noise)):
            estimate = x - times[j].to(x.dtype) * say(x, j)
            following = temperature * noise[(j + 1) % len(noise)]  # the last step adds none
            x = self.flow.step(x, times[j], times[j + 1], estimate, self.eta, following)
        return Sampled(x)


class CategoricalHead(nn.Module):
    """Softmax over the vocabulary; z are logits [M, V] here.

    Args:
        width, channels, depth, hidden: not looked at; other heads need them.
        label_smoothing: share of the target that is spread over the vocabulary in training.
    """

    def __init__(self, width: int, channels: int, depth: int = 0, hidden: int = 0, label_smoothing: float = 0.0):
        super().__init__()
        self.label_smoothing = label_smoothing

    def draws(self, steps: int) -> tuple[int, int]:
        return 1, 1

    def loss(self, z: Tensor, target: Tensor, u: Tensor | None = None, noise: Tensor | None = None) -> Terms:
        """Cross-entropy in nats; its part "ce" is the one without smoothing."""
        plain = cross_entropy(z, target, reduction="none")
        total = plain
        if self.label_smoothing:
            total = cross_entropy(z, target, reduction="none", label_smoothing=self.label_smoothing)
        return Terms(total[:, None], {"ce": plain.detach()[:, None]})

    def sample(
        self,
        z: Tensor,
        noise: Tensor,
        temperature: float = 1.0,
        guidance: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> Sampled:
        """One token of each row by the inverse of the distribution function, at the quantile of its normal draw.

        Args:
            temperature: divides the logits; 0 takes the likeliest.
            top_k: only the k likeliest.
            top_p: only the likeliest until they have this probability together.
        """
        if guidance != 1:
            told, null = z.chunk(2)
            z = null + guidance * (told - null)
        best, order = z.sort(-1, descending=True)
        probability = (best / temperature if temperature else torch.where(best == best[:, :1], 0, -math.inf)).softmax(
            -1
        )
        before = probability.double().cumsum(-1) - probability
        if top_p is not None:
            probability = torch.where(before < top_p, probability, 0)
        if top_k is not None:
            probability = torch.where(torch.arange(z.shape[1], device=z.device) < top_k, probability, 0)
        reached = probability.double().cumsum(-1)
        place = (reached <= torch.special.ndtr(noise[0].double()) * reached[:, -1:]).sum(-1, keepdim=True)
        place = place.clamp(max=z.shape[1] - 1)
        confidence = (probability.gather(-1, place) / reached[:, -1:]).log()
        return Sampled(order.gather(-1, place)[:, 0], confidence[:, 0].to(z.dtype))


class RegressionHead(nn.Module):
    """A squared error instead of a distribution (Fluid's foil): x = f(z)."""

    def __init__(self, width: int, channels: int, depth: int = 6, hidden: int = 768):
        super().__init__()
        self.channels = channels
        self.condition = nn.Linear(width, hidden)
        self.network = HeadNetwork(hidden, channels, hidden, depth)

    def draws(self, steps: int) -> tuple[int, int]:
        return 0, self.channels

    def predict(self, z: Tensor) -> Tensor:
        y = self.condition(z)
        return self.network(y, y)

    def loss(self, z: Tensor, target: Tensor, u: Tensor | None = None, noise: Tensor | None = None) -> Terms:
        """Squared error of the token."""
        error = (self.predict(z) - target).square().mean(-1, keepdim=True)
        return Terms(error, {"mse": error.detach()})

    def sample(self, z: Tensor, noise: Tensor, temperature: float = 1.0, guidance: float = 1.0) -> Sampled:
        """The prediction; neither noise nor temperature has a part."""
        x = self.predict(z)
        if guidance != 1:
            told, null = x.chunk(2)
            x = null + guidance * (told - null)
        return Sampled(x)


HEADS: dict[str, Callable[..., nn.Module]] = {
    "categorical": CategoricalHead,
    "diffusion": DiffusionHead,
    "flow": FlowHead,
    "regression": RegressionHead,
}
