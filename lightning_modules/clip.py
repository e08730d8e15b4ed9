"""CLIP: two towers for pictures and texts, trained by contrast; the judge of alignment and a start for retrieval.

    s_ij = scale <f(x_i), g(y_j)>                                f, g of unit length, scale learned and at most 100
    loss = 1/2 (CE(s, i = j) over texts + CE(s, i = j) over pictures)       InfoNCE (arXiv 2103.00020, figure 3)

    x [B, 3, H, W] pictures in [-1, 1], y their captions, B the pairs of all processes.

Deviations: the streams of a batch are contrasted together, so that pictures of one data set are negatives of another's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_t2i.batch import Batch
from lightning_t2i.method import MethodModule
from lightning_t2i.networks.towers import Towers
from lightning_t2i.options import GroupOptions, MethodOptions
from lightning_t2i.state_io import Stored

SCALE = "clip.logit_scale"  # of the group `towers`


def info_nce(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE in both directions of unit vectors, [B, D] twice, and a scalar scale of the logits: a scalar.

    In float32 (float64 of float64): in bfloat16 cosines that differ would be equal.
    """
    kind = torch.promote_types(images.dtype, torch.float32)
    logits = scale * images.to(kind) @ texts.to(kind).T
    own = torch.arange(len(logits), device=logits.device)
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2


def with_dimension(value: Any) -> Any:
    """A tensor of a checkpoint, [1] where it has no dimension; anything else as it is."""
    if not isinstance(value, Tensor | Stored) or len(value.shape):
        return value
    return (value.whole() if isinstance(value, Stored) else value).reshape(1)


class CLIP(MethodModule):
    """Trains a CLIPModel of transformers.

    Args:
        network: JSON file of the architecture, or a CLIPModel folder or hub id.
        tokenizer: folder or hub id of its CLIP tokenizer; null takes the network's.
        towers: how the weights are updated.
        common: options of the engine.
    """

    may_rest = ()

    def __init__(
        self,
        network: str,
        tokenizer: str | None = None,
        towers: GroupOptions | None = None,
        common: MethodOptions | None = None,
    ):
        super().__init__(common)
        self.network, self.tokenizer, self.options = network, tokenizer, towers or GroupOptions()

    def configure_model(self) -> None:
        self.add_group("towers", Towers.build(self.network, self.tokenizer), self.options)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        loss, accuracy = self.contrast(batch, self.towers)
        self.backward("towers", loss, accuracy=accuracy)

    def contrast(self, batch: Batch, towers: Towers) -> tuple[Tensor, Tensor]:
        """The loss over the pairs of all processes, and how often a picture's own text is its nearest: scalars."""
        images = torch.cat([records.image for records in batch.values()])
        texts = [text for records in batch.values() for text in records.caption]
        f, g, scale = towers(images, towers.tokenize(texts))
        f, g = self.gathered(f, gradients=True), self.gathered(g, gradients=True)
        nearest = (f @ g.T).argmax(1) == torch.arange(len(f), device=f.device)
        return info_nce(f, g, scale), nearest.float().mean()

    @torch.no_grad()
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        loss, accuracy = self.contrast(batch, self.generator_of("towers"))
        name, size = "test" if self.trainer.testing else "val", len(batch["main"])
        self.log_dict({f"{name}/loss": loss, f"{name}/accuracy": accuracy}, batch_size=size, sync_dist=True)

    test_step = validation_step

    def encode_image(self, images: Tensor) -> Tensor:
        return self.generator_of("towers").encode_image(images)

    def encode_text(self, texts: list[str]) -> Tensor:
        towers = self.generator_of("towers")
        return towers.encode_text(towers.tokenize(texts))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes older checkpoints too, in which the scale and what its optimizer keeps of it have no dimension."""
        for name, tensor in checkpoint["state_dict"].items():
            if name.endswith("logit_scale"):
                checkpoint["state_dict"][name] = with_dimension(tensor)
        states = checkpoint.get("t2i", {}).get("groups", {}).get("towers", {}).get("states", {}).get(SCALE, {})
        states.update({k: with_dimension(v) for k, v in states.items() if k != "step"})
        super().on_load_checkpoint(checkpoint)

    def export(self, folder: Path, batches: Iterable[Batch]) -> None:
        """Writes the CLIPModel folder of the averaged weights, fp16, with tokenizer and image processor."""
        copy.deepcopy(self.generator_of("towers")).save_pretrained(folder)
