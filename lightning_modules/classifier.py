"""Classifier: trains the two small classifiers of the shapes world: the metric network and the perceptual one.

    loss = CE(shape of each cell) + CE(colour of each cell) + CE(number of objects)

    x [B, 3, 32, 32] in [-1, 1]; cells of the 3x3 grid row by row; class 0 is the empty cell.

Half of the pictures are noised by N(0, s^2), s uniform in [0, 0.2], so that features stay meaningful on generated
pictures. The metric network gives the features of Fréchet distances, so no method may train on it; the perceptual one,
of another architecture and seed, is there for losses.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from datamodules.worlds.shapes_scenes import COLOURS, SHAPES
from lightning_t2i.batch import Batch
from lightning_t2i.method import MethodModule
from lightning_t2i.networks.classifier import ShapesClassifier
from lightning_t2i.networks.perceptual import PerceptualNetwork
from lightning_t2i.options import GroupOptions, MethodOptions


def targets(scenes: list[dict], grid: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Shape [B, grid^2], colour [B, grid^2] and count [B] of scenes, int64; 0 is the empty cell."""
    shape = torch.zeros(len(scenes), grid * grid, dtype=torch.int64)
    colour = torch.zeros_like(shape)
    for i, scene in enumerate(scenes):
        for found in scene["objects"]:
            cell = found["cell"][0] * grid + found["cell"][1]
            shape[i, cell] = 1 + list(SHAPES).index(found["shape"])
            colour[i, cell] = 1 + list(COLOURS).index(found["colour"])
    return shape, colour, torch.tensor([len(scene["objects"]) for scene in scenes])


class Classifier(MethodModule):
    """Trains a ShapesClassifier or a PerceptualNetwork on the shapes world.

    Args:
        network: "metric" or "perceptual".
        noise: largest standard deviation of the noise on pictures.
        classifier: how the network is updated.
        common: options of the engine.
    """

    may_rest = ()

    def __init__(
        self,
        network: Literal["metric", "perceptual"] = "metric",
        noise: float = 0.2,
        classifier: GroupOptions | None = None,
        common: MethodOptions | None = None,
    ):
        super().__init__(common)
        self.network, self.noise, self.options = network, noise, classifier or GroupOptions()

    def configure_model(self) -> None:
        networks = {"metric": ShapesClassifier, "perceptual": PerceptualNetwork}
        self.add_group("classifier", networks[self.network](), self.options)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        records = batch["main"]
        scale = self.keys.uniform("scale", records.position, (1, 1, 1)) * 2 * self.noise - self.noise
        noise = self.keys.normal("noise", records.position, tuple(records.image.shape[1:]))
        scores = self.classifier.classify(records.image + scale.clamp_min(0) * noise)
        self.backward("classifier", scores.loss(*(t.to(self.device) for t in targets(records.scene))))

    @torch.no_grad()
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Share of pictures whose every cell and count are right."""
        records = batch["main"]
        scores = self.generator_of("classifier").classify(records.image)
        shape, colour, count = (t.to(self.device) for t in targets(records.scene))
        right = (scores.shape.argmax(-1) == shape).all(1) & (scores.colour.argmax(-1) == colour).all(1)
        right &= scores.count.argmax(-1) == count
        self.log("val/exact", right.float().mean(), batch_size=len(records), sync_dist=True)

    def export(self, folder: Path, batches: Iterable[Batch]) -> None:
        """Writes the folder that `from_pretrained` of the network's class reads."""
        self.generator_of("classifier").save_pretrained(folder)
