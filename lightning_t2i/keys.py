"""Keyed randomness: a draw is a function of (seed, stream, training step, position), never of a rank or a call order.

    counter = (block, step, position low, position high)      four 32-bit words
    key     = blake2b(seed, stream)                           two 32-bit words
    words   = Philox4x32-10(counter, key)                     Salmon et al., SC 2011, figure 2 and table 2
    uniform = (word + 1/2) / 2^32,   normal = inverse normal CDF of the uniform (AS 241, Wichura 1988)

Only integer arithmetic and the exactly rounded operations +, *, /, sqrt in float64 are used, so the bits are the same
on CPU and GPU. Draw outside compiled regions: a compiler may fuse a multiplication and an addition, which changes bits.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

Array = TypeVar("Array", Tensor, np.ndarray)

_WORD = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

# Numerator and denominator, highest power first, of AS 241's PPND16: centre, middle and far tail.
_CENTRE = (
    (2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4,
     1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.3871328727963666080e0),
    (5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4, 2.1213794301586595867e4,
     5.3941960214247511077e3, 6.8718700749205790830e2, 4.2313330701600911252e1, 1.0),
)  # fmt: skip
_MIDDLE = (
    (7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258e0,
     3.64784832476320460504e0, 5.76949722146069140550e0, 4.63033784615654529590e0, 1.42343711074968357734e0),
    (1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1,
     6.89767334985100004550e-1, 1.67638483018380384940e0, 2.05319162663775882187e0, 1.0),
)  # fmt: skip
_TAIL = (
    (2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.24266094738807843860e-3, 2.65321895265761230930e-2,
     2.96560571828504891230e-1, 1.78482653991729133580e0, 5.46378491116411436990e0, 6.65790464350110377720e0),
    (2.04426310338993978564e-15, 1.42151175831644588870e-7, 1.84631831751005468180e-5, 7.86869131145613259100e-4,
     1.48753612908506148525e-2, 1.36929880922735805310e-1, 5.99832206555887937690e-1, 1.0),
)  # fmt: skip


def philox(counter: Array, key: tuple[int, int]) -> Array:
    """Philox4x32-10 of int64 counters [4, n] that hold 32-bit words; the words of each block come out as [4, n].

    In each round (x0, x1, x2, x3) becomes (hi(b x2) ^ x1 ^ k0, lo(b x2), hi(a x0) ^ x3 ^ k1, lo(a x0)). The pairs
    (x0, x2) and (x1, x3) are one array each. NumPy arrays and torch tensors give the same words; on the CPU, where
    draws are small and every operation costs its call, NumPy takes a quarter of the time.
    """
    array: Callable[[Any], Array] = np.array if isinstance(counter, np.ndarray) else partial(_tensor, counter)
    multiplier = array([[m] for m in _MULTIPLIERS])
    rounds = array([[[(k + r * w) & _WORD] for k, w in zip(key, _WEYL, strict=True)] for r in range(_ROUNDS)])
    even, odd = counter[0::2], counter[1::2]
    for r in range(_ROUNDS):
        # An unsigned 32 x 32 bit product may wrap into the sign of int64; shift and mask still read its two halves.
        product = even * multiplier
        product = product[::-1] if isinstance(product, np.ndarray) else product.flip(0)
        even, odd = ((product >> 32) & _WORD) ^ odd ^ rounds[r], product & _WORD
    words = np.empty_like(counter) if isinstance(counter, np.ndarray) else torch.empty_like(counter)
    words[0::2], words[1::2] = even, odd
    return words


def _tensor(like: Tensor, values: Any) -> Tensor:
    return torch.tensor(values, device=like.device)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = x * coefficients[0]
    for c in coefficients[1:-1]:
        value.add_(c).mul_(x)
    return value.add_(coefficients[-1])


def _rational(coefficients: tuple[tuple[float, ...], tuple[float, ...]], x: Tensor) -> Tensor:
    return _polynomial(coefficients[0], x).div_(_polynomial(coefficients[1], x))


def _log(x: Tensor) -> Tensor:
    """Natural logarithm of positive float64 values to about 1e-15 from exactly rounded operations.

    x = m 2^e with m in [1/2, 1); log m = 2 artanh(s), s = (m - 1) / (m + 1), |s| <= 1/3, by its power series.
    """
    mantissa, exponent = torch.frexp(x)
    s = (mantissa - 1) / (mantissa + 1)
    square = s * s
    series = torch.full_like(s, 1 / 33)
    for power in range(31, 0, -2):
        series = series * square + 1 / power
    return 2 * s * series + exponent.to(torch.float64) * math.log(2)


def inverse_normal_cdf(u: Tensor) -> Tensor:
    """Quantile of the standard normal for float64 u in (0, 1), relative error about 1e-16 (AS 241)."""
    q = u - 0.5
    centre = q * _rational(_CENTRE, 0.180625 - q * q)
    outside = q.abs() > 0.425
    if not bool(outside.any()):
        return centre
    tail_u = u[outside]
    r = torch.sqrt(-_log(torch.minimum(tail_u, 1 - tail_u)))
    tail = _rational(_MIDDLE, r - 1.6)
    if bool((r > 5).any()):  # below 1.4e-11: no draw from 32 bits comes there
        tail = torch.where(r <= 5, tail, _rational(_TAIL, r - 5))
    centre[outside] = torch.where(tail_u < 0.5, -tail, tail)
    return centre


@dataclass(frozen=True)
class Keys:
    """A source of draws for one training step.

    Args:
        seed: the run's seed.
        step: the training step that the draws belong to.
        namespace: keeps draws of different purposes (training, validation, samples) apart; see `fork`.
    """

    seed: int
    step: int = 0
    namespace: str = ""

    def at(self, step: int) -> Keys:
        """The same source at another training step."""
        return replace(self, step=step)

    def fork(self, namespace: str) -> Keys:
        """An independent source, at step 0: fixed noise for validation and pictures."""
        return replace(self, step=0, namespace=f"{self.namespace}/{namespace}")

    def words(self, stream: str, positions: Tensor, count: int) -> Tensor:
        """`count` 32-bit words for each position: int64 [B, count] with values in [0, 2^32).

        Args:
            stream: the name of the draw, for instance "noise"; another name gives independent words.
            positions: int64 [B], global positions in the stream of samples, or sample ids.
        """
        digest = hashlib.blake2b(f"{self.seed}\0{self.namespace}\0{stream}".encode(), digest_size=8).digest()
        key = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
        positions = positions.to(torch.int64)
        size, blocks = len(positions), -(-count // 4)
        if positions.device.type == "cpu":
            where, counter = positions.numpy()[:, None], np.empty((4, size, blocks), np.int64)
            counter[0] = np.arange(blocks)
        else:
            where, counter = positions[:, None], positions.new_empty(4, size, blocks)
            counter[0] = torch.arange(blocks, device=positions.device)
        counter[1], counter[2], counter[3] = self.step & _WORD, where & _WORD, (where >> 32) & _WORD
        words = torch.as_tensor(philox(counter.reshape(4, -1), key))
        return words.T.reshape(size, 4 * blocks)[:, :count]

    def _open_unit(self, stream: str, positions: Tensor, count: int) -> Tensor:
        """float64 [B, count] in (0, 1): the centres of 2^32 equal intervals."""
        return self.words(stream, positions, count).to(torch.float64).add_(0.5).mul_(2.0**-32)

    def uniform(
        self, stream: str, positions: Tensor, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Uniform draws in the open interval (0, 1): [B, *shape]."""
        u = self._open_unit(stream, positions, math.prod(shape))
        if dtype != torch.float64:  # rounding could reach 1
            u = u.clamp(max=1 - torch.finfo(dtype).eps / 2)
        return u.to(dtype).view(len(positions), *shape)

    def normal(
        self, stream: str, positions: Tensor, shape: tuple[int, ...] = (), dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Standard normal draws: [B, *shape]."""
        u = self._open_unit(stream, positions, math.prod(shape))
        return inverse_normal_cdf(u).to(dtype).view(len(positions), *shape)

    def integers(self, stream: str, positions: Tensor, low: int, high: int, shape: tuple[int, ...] = ()) -> Tensor:
        """Integers in [low, high): int64 [B, *shape]; the bias is below (high - low) / 2^32."""
        words = self.words(stream, positions, math.prod(shape))
        return (low + ((words * (high - low)) >> 32)).view(len(positions), *shape)

    def bernoulli(self, stream: str, positions: Tensor, p: float) -> Tensor:
        """True with probability p: bool [B]."""
        return self.uniform(stream, positions, dtype=torch.float64) < p

    def seed_globals(self, *where: int) -> None:
        """Seeds Python's, numpy's and torch's global generators, for dropout and library code.

        Args:
            where: what else the seed depends on, for instance micro-batch and rank.
        """
        text = f"{self.seed}\0{self.namespace}\0{self.step}\0{where}"
        value = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
        random.seed(value)
        np.random.seed(value & _WORD)
        torch.default_generator.manual_seed(value)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(value)
