"""Distances between the feature distributions of generated and reference pictures.

    FD    |m - m_r|^2 + tr(C + C_r - 2 (C C_r)^(1/2))            Fréchet distance of Gaussians (arXiv 1706.08500)
    KD    E k(x, x') + E k(y, y') - 2 E k(x, y)                  squared MMD, unbiased, k(a, b) = (a.b / D + 1)^3
                                                                 (arXiv 1801.01401, there over random subsets)
    recall   share of reference pictures that lie within the distance between some generated picture and its third
             nearest generated neighbour: how much of the reference is covered (arXiv 1904.06991, eq. 1)

FD is biased by O(1 / n): compare equal n only. KD has no bias and uses all pairs. A number is called FID or KID only
when the features are Inception's; its name always holds n and the reference with its size.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_t2i.errors import UserError

ROWS = 1024  # of a matrix of all pairs that are in memory at once


def frechet_distance(mean: Tensor, cov: Tensor, mean_ref: Tensor, cov_ref: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance between two Gaussians: means [D], covariances [D, D], float64 -> scalar."""
    values, vectors = torch.linalg.eigh(cov)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # C C_r and C^(1/2) C_r C^(1/2) have the same eigenvalues; the second is symmetric, so its roots are real.
    cross = torch.linalg.eigvalsh(root @ cov_ref @ root).clamp(min=0).sqrt().sum()
    distance = (mean - mean_ref).square().sum() + cov.trace() + cov_ref.trace() - 2 * cross
    return distance.clamp(min=0)


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([(block @ y.T / x.shape[1] + 1).pow(3).sum() for block in x.split(ROWS)]).sum()


def _mean_of_pairs(x: Tensor) -> Tensor:
    same = (x.square().sum(1) / x.shape[1] + 1).pow(3).sum()
    return (_kernel_sum(x, x) - same) / (len(x) * (len(x) - 1))


def kernel_distance(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased squared maximum mean discrepancy of features [N, D] and [M, D], float64 -> scalar; may be negative."""
    return _mean_of_pairs(x) + _mean_of_pairs(y) - 2 * _kernel_sum(x, y) / (len(x) * len(y))


def recall(x: Tensor, y: Tensor, neighbours: int = 3) -> Tensor:
    """Share of the reference y [M, D] that generated features x [N, D] cover, float64 -> scalar; N > neighbours."""
    nearest = [torch.cdist(block, x).kthvalue(neighbours + 1, dim=1).values for block in x.split(ROWS)]
    radius = torch.cat(nearest)  # the nearest one is itself, so one more
    return torch.cat([(torch.cdist(block, x) <= radius).any(1) for block in y.split(ROWS)]).double().mean()


class InceptionFeatures(nn.Module):
    """torchmetrics' Inception v3 (the TensorFlow weights of FID), read from a file and never downloaded.

    Args:
        weights: the file `pt_inception-2015-12-05-6726825d.pth` of torch-fidelity.

    Raises:
        UserError: the file or the package torch-fidelity is missing.
    """

    num_features = 2048
    symbols = {"fd": "fid", "kd": "kid"}

    def __init__(self, weights: str | Path):
        super().__init__()
        if not Path(weights).is_file():
            raise UserError("The Inception weights are not there", where="inception", given=weights, allowed="a file")
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights))
        except ModuleNotFoundError as error:
            raise UserError("FID needs the package torch-fidelity", fix="pip install torch-fidelity") from error
        self.identity = f"inception:{Path(weights).name}"

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, 2048]."""
        return self.network(((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))


class FeatureMetric(Metric):
    """Compares generated pictures with a reference in the feature space of a network.

    `update(images, real=True)` gathers the reference, `update(images)` what was generated; or `load_reference` reads
    one that `save_reference` wrote. `reset` forgets the generated pictures only.

    Args:
        extractor: module with `num_features`, images [B, 3, H, W] in [-1, 1] -> features [B, num_features].
        reference: name of the reference, for instance "shapes-val".
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    symbol: str
    stored: str  # symbol of the metric whose files hold the reference
    generated: Tensor
    referenced: Tensor

    def __init__(self, extractor: nn.Module, reference: str, **kwargs: Any):
        super().__init__(**kwargs)
        self.extractor = extractor.eval().requires_grad_(False)
        self.reference = reference
        self.add_state("generated", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("referenced", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self._loaded: dict[str, Tensor] | None = None
        self._pictures: dict[str, Any] = {}
        self._counts: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """Symbol, number of generated pictures, reference and its number of pictures: "fd@n=400,ref=shapes-val:1000".

        The numbers are those of all ranks once the metric is computed, of this rank before.
        """
        symbol = getattr(self.extractor, "symbols", {}).get(self.symbol, self.symbol)
        n, referenced = self._counts or (int(self.generated), int(self._state()["n"]))
        return f"{symbol}@n={n},ref={self.reference}:{referenced}"

    @torch.no_grad()
    def update(self, images: Tensor, real: bool = False) -> None:
        """Adds pictures [B, 3, H, W] in [-1, 1]."""
        features = self.extractor.eval()(images).double()
        if features.shape != (len(images), self.extractor.num_features):
            raise ValueError(
                f"features {tuple(features.shape)} of {len(images)} images x {self.extractor.num_features}"
            )
        self._add(features, real)
        if real:
            self.referenced += len(images)
        else:
            self.generated += len(images)

    def compute(self) -> Tensor:
        state = self._state()
        self._counts = int(self.generated), int(state["n"])
        if min(self._counts) < 2:
            raise UserError(
                f"{self.symbol} needs two pictures or more on either side",
                given=f"{self._counts[0]} generated, {self._counts[1]} of the reference",
            )
        return self._distance({k: v.to(self.device) for k, v in state.items()}).float()

    def reset(self) -> None:
        kept = {name: getattr(self, name) for name in self._defaults if name.startswith("reference")}
        kept = {name: list(value) if isinstance(value, list) else value for name, value in kept.items()}
        super().reset()  # empties lists in place
        for name, value in kept.items():
            setattr(self, name, value)
        self._counts = None

    def save_reference(self, path: str | Path, pictures: Mapping[str, Any] | None = None) -> None:
        """Writes the reference of all ranks; on several ranks a collective call after which rank 0 has written.

        Args:
            pictures: what tells them from others of the same name, plain values; see `check_pictures`.
        """
        with self.sync_context():
            state = self._state()
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            # Single features are float32 by nature; sums of them are not.
            tensors = {name: (t.float() if name == "features" else t).cpu().contiguous() for name, t in state.items()}
            facts = {"reference": self.reference, "extractor": self._identity}
            save_file(tensors, str(path), facts | ({"pictures": json.dumps(dict(pictures))} if pictures else {}))

    def load_reference(self, path: str | Path) -> None:
        """Reads a reference.

        Raises:
            UserError: it was made with another extractor.
        """
        with safe_open(str(path), "pt") as file:
            facts = file.metadata()
            if facts["extractor"] != self._identity:
                raise UserError(
                    "The reference statistics were made with another network",
                    where=str(path),
                    given=facts["extractor"],
                    allowed=self._identity,
                    fix="delete the file; it is made again",
                )
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        self._loaded = {name: t.double() if t.is_floating_point() else t for name, t in found.items()}
        self.reference, self._file = facts["reference"], path
        self._pictures = json.loads(facts.get("pictures", "{}"))  # of older files nothing is known

    def check_pictures(self, pictures: Mapping[str, Any]) -> None:
        """Compares what is known of the pictures of a reference that was read with what they should be.

        Raises:
            UserError: they are others.
        """
        for name in pictures.keys() & self._pictures.keys():
            if self._pictures[name] != pictures[name]:
                raise UserError(
                    f"The reference statistics were made of other pictures: '{name}' is not that of the data",
                    where=str(self._file),
                    given=self._pictures[name],
                    allowed=str(pictures[name]),
                    fix="delete the file; it is made again",
                )

    def _state(self) -> dict[str, Tensor]:
        return self._loaded if self._loaded is not None else self._reference_state()

    @property
    def _identity(self) -> str:
        return str(getattr(self.extractor, "identity", type(self.extractor).__name__))

    @abstractmethod
    def _add(self, features: Tensor, real: bool) -> None:
        """Adds features [B, D], float64, to one of the two sides."""

    @abstractmethod
    def _reference_state(self) -> dict[str, Tensor]:
        """What the distance needs to know of the reference, with its number of pictures `n`."""

    @abstractmethod
    def _distance(self, reference: dict[str, Tensor]) -> Tensor:
        """Distance of what was generated to a reference state."""


class FrechetDistance(FeatureMetric):
    """Fréchet distance from float64 sums of features and of their outer products, see the module's docstring."""

    symbol = stored = "fd"

    def __init__(self, extractor: nn.Module, reference: str, **kwargs: Any):
        super().__init__(extractor, reference, **kwargs)
        d = extractor.num_features
        for side in ("generated", "reference"):
            self.add_state(f"{side}_sum", torch.zeros(d, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{side}_outer", torch.zeros(d, d, dtype=torch.float64), dist_reduce_fx="sum")

    def _add(self, features: Tensor, real: bool) -> None:
        side = "reference" if real else "generated"
        setattr(self, f"{side}_sum", getattr(self, f"{side}_sum") + features.sum(0))
        setattr(self, f"{side}_outer", getattr(self, f"{side}_outer") + features.T @ features)

    def _reference_state(self) -> dict[str, Tensor]:
        return {"n": self.referenced, "sum": self.reference_sum, "outer": self.reference_outer}

    def _distance(self, reference: dict[str, Tensor]) -> Tensor:
        mean, cov = _moments(self.generated, self.generated_sum, self.generated_outer)
        return frechet_distance(mean, cov, *_moments(reference["n"], reference["sum"], reference["outer"]))


def _moments(n: Tensor, total: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased covariance from the number of rows, their sum and the sum of their outer products."""
    mean = total / n
    return mean, (outer - n * torch.outer(mean, mean)) / (n - 1)


class KernelDistance(FeatureMetric):
    """Kernel distance over all pairs, see the module's docstring; keeps every feature (n x D x 8 bytes)."""

    symbol = stored = "kd"

    def __init__(self, extractor: nn.Module, reference: str, **kwargs: Any):
        super().__init__(extractor, reference, **kwargs)
        self.add_state("generated_features", [], dist_reduce_fx="cat")
        self.add_state("reference_features", [], dist_reduce_fx="cat")

    def _add(self, features: Tensor, real: bool) -> None:
        (self.reference_features if real else self.generated_features).append(features)

    def _reference_state(self) -> dict[str, Tensor]:
        features = self.reference_features
        empty = torch.zeros(0, self.extractor.num_features, dtype=torch.float64)
        joined = torch.cat(features) if isinstance(features, list) and features else features
        return {"n": self.referenced, "features": joined if isinstance(joined, Tensor) else empty}

    @property
    def _generated(self) -> Tensor:
        features = self.generated_features
        return torch.cat(features) if isinstance(features, list) else features

    def _distance(self, reference: dict[str, Tensor]) -> Tensor:
        return kernel_distance(self._generated, reference["features"])


class Recall(KernelDistance):
    """How much of the reference is covered, see the module's docstring; the more pictures, the higher."""

    symbol = "recall"
    higher_is_better = True

    def _distance(self, reference: dict[str, Tensor]) -> Tensor:
        if len(self._generated) < 5:
            raise UserError("recall needs five generated pictures or more", given=len(self._generated))
        return recall(self._generated, reference["features"])
