"""The metric network of the shapes world: a small classifier whose trunk gives the features of Fréchet distances.

    picture [B, 3, 32, 32] -> trunk [B, D, 8, 8] -> mean over places: features [B, D]
                                                 -> mean over each grid cell: shape and colour of what is in it
                                                 -> features: number of objects

Class 0 of shape and colour is the empty cell. Metrics only: a loss that used it would train on its own score.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy

from lightning_t2i.errors import UserError
from lightning_t2i.frozen import folder_identity
from lightning_t2i.paths import resolve

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@dataclass(frozen=True)
class ClassifierConfig:
    """Sizes of the classifier.

    Args:
        grid: cells per side of a scene.
        shapes, colours: number of each, the empty cell not counted.
        max_count: largest number of objects in a scene.
        widths: channels at full, half and quarter resolution; the last is the number of features.
    """

    grid: int = 3
    shapes: int = 4
    colours: int = 8
    max_count: int = 3
    widths: tuple[int, int, int] = (32, 48, 80)


@dataclass
class Scores:
    """Logits of B pictures: shape [B, grid^2, shapes + 1], colour [B, grid^2, colours + 1], count [B, max_count + 1].

    Cells are numbered row by row from the upper left.
    """

    shape: Tensor
    colour: Tensor
    count: Tensor

    def loss(self, shape: Tensor, colour: Tensor, count: Tensor) -> Tensor:
        """Mean cross-entropy of the three heads; targets int64 [B, grid^2], [B, grid^2] and [B]."""
        cells = cross_entropy(self.shape.flatten(0, 1), shape.flatten())
        cells = cells + cross_entropy(self.colour.flatten(0, 1), colour.flatten())
        return cells + cross_entropy(self.count, count)


def save_network(network: nn.Module, config: Any, folder: str | Path) -> None:
    """Writes config.json (class and fields of a config dataclass) and model.safetensors (float16)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({"_class_name": type(network).__name__, **asdict(config)}, indent=1))
    weights = {name: tensor.detach().cpu().half().contiguous() for name, tensor in network.state_dict().items()}
    save_file(weights, str(folder / WEIGHTS))


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ShapesClassifier(nn.Module):
    """About 0.2 M parameters; an extractor for FrechetDistance and KernelDistance when called."""

    def __init__(self, config: ClassifierConfig | None = None):
        super().__init__()
        self.config = config or ClassifierConfig()
        first, second, width = self.config.widths
        self.trunk = nn.Sequential(
            nn.Conv2d(3, first, 3, padding=1), Residual(first),
            nn.Conv2d(first, second, 3, stride=2, padding=1), Residual(second),
            nn.Conv2d(second, width, 3, stride=2, padding=1), Residual(width),
            nn.GroupNorm(8, width), nn.SiLU(),
        )  # fmt: skip
        self.shape = nn.Linear(width, self.config.shapes + 1)
        self.colour = nn.Linear(width, self.config.colours + 1)
        self.count = nn.Linear(width, self.config.max_count + 1)
        self.identity = "untrained"

    @property
    def num_features(self) -> int:
        return self.config.widths[-1]

    def features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, num_features]."""
        return self.trunk(images).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """The features: what the metrics call."""
        return self.features(images)

    def classify(self, images: Tensor) -> Scores:
        """[B, 3, H, W] in [-1, 1] -> logits."""
        trunk = self.trunk(images)
        cells = adaptive_avg_pool2d(trunk, self.config.grid).flatten(2).transpose(1, 2)
        return Scores(self.shape(cells), self.colour(cells), self.count(trunk.mean((2, 3))))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors (float16)."""
        save_network(self, self.config, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ShapesClassifier:
        """Reads a folder, found from the working directory or beside train.py; float32, eval.

        Raises:
            UserError: there is no classifier in the folder.
        """
        path = resolve(folder)
        if not (path / CONFIG).is_file():
            raise UserError("There is no classifier in this folder", given=folder, allowed=f"{CONFIG} and {WEIGHTS}")
        facts = json.loads((path / CONFIG).read_text())
        facts.pop("_class_name", None)
        network = cls(ClassifierConfig(**{**facts, "widths": tuple(facts["widths"])}))
        network.load_state_dict({name: t.to(torch.float32) for name, t in load_file(str(path / WEIGHTS)).items()})
        network.identity = folder_identity(path)
        return network.eval().requires_grad_(False)
