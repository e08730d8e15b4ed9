"""Wukong with one vector (style g) on a distilled set: its texts are vectors of a frozen encoder, its targets are soft.

    s_ij = <zI_i, zT_j>,  zI = normalize(P_I v_i),  zT = normalize(P_T y_j)
    L    = objective(a s, S)                                       lightning_t2i/soft_contrast.py

    v_i    global vector of the locked image tower;  y_j  text vector of a pair, or of a caption by the set's encoder
    P_I, P_T, a    trained: both projections and the scale;  S  the set's similarity of its pairs, I where it has none

A set of RepBlend (arXiv 2505.14705, lightning_modules/repblend.py) has no captions: Wukong's own text tower cannot read
it, and token-wise styles have no tokens to compare. So the text tower is the frozen encoder that the set was distilled
with. Real captions are encoded by it in validation.

Deviations from lightning_modules/wukong.py: no text tower is trained, and a batch is contrasted on one process.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lightning_modules.wukong import Wukong, paper_update
from lightning_t2i.batch import Batch, Records
from lightning_t2i.dual_encoder_pipeline import DualEncoderPipeline
from lightning_t2i.errors import UserError
from lightning_t2i.frozen import folder_identity
from lightning_t2i.networks.dual_encoder import DualEncoder
from lightning_t2i.networks.frozen_pair import FrozenTexts
from lightning_t2i.networks.image_tower import ImageTower
from lightning_t2i.options import GroupOptions, MethodOptions
from lightning_t2i.paths import resolve
from lightning_t2i.soft_contrast import OBJECTIVES
from lightning_t2i.synthetic_set import SyntheticSet


class Elsewhere(nn.Module):
    """Stands where the text tower of a `DualEncoder` is: text vectors come from a frozen network outside of it."""

    _no_split_modules: list[str] = []

    def __init__(self, width: int):
        super().__init__()
        self.config = SimpleNamespace(hidden_size=width)


class VectorEncoder(DualEncoder):
    """A dual encoder whose texts are vectors [B, d'] in place of token ids."""

    def _text(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        mask = torch.ones(len(ids), 1, dtype=torch.bool, device=ids.device)
        return normalize(self.text_projection(ids.to(self.text_projection.weight.dtype)), dim=-1)[:, None], mask


class WukongOfSet(Wukong):
    """Trains projections of a locked image tower and of a frozen text encoder on a distilled set.

    Args:
        image: see Wukong.
        text: folder or hub id of the text encoder with which the set was distilled.
        targets: folder of the set, whose similarity is S.
        revision: commit of the image tower's hub id.
        text_revision: commit of the text encoder's.
        style: g; others need tokens.
        width: D.
        contrast: how S enters the loss.
        scale: initial a.
        lock_projection: see Wukong.
        towers: how the projections and the scale are updated.
        common: options of the engine.
    """

    may_rest = ()

    def __init__(
        self,
        image: str,
        text: str,
        targets: str,
        revision: str | None = None,
        text_revision: str | None = None,
        style: Literal["g", "f", "r"] = "g",
        width: int = 256,
        contrast: Literal["wbce", "infonce", "ence", "cwcl", "bce", "mse", "kl"] = "wbce",
        scale: float = 1 / 0.07,
        lock_projection: bool = False,
        towers: GroupOptions | None = None,
        common: MethodOptions | None = None,
    ):
        if style != "g":
            what = "The texts of a distilled set are vectors without tokens"
            raise UserError(what, where="model.style", given=style, allowed="g")
        super().__init__(
            image, text, revision, style="g", width=width, scale=scale, lock_projection=lock_projection,
            keep_vectors=True, towers=towers or paper_update(), common=common,
        )  # fmt: skip
        if self.common.accumulate > 1:
            what = "A distilled set is one batch of contrast"
            raise UserError(what, where="common.accumulate", given=self.common.accumulate, allowed="1")
        self.targets, self.text_revision, self.contrast = targets, text_revision, contrast

    def configure_model(self) -> None:
        image = ImageTower.build(self.image_source, False, self.revision)
        texts, identity = FrozenTexts.build(self.text_source, self.text_revision)
        found = SyntheticSet.load(resolve(self.targets))
        if identity != found.facts["text"]:
            fix = "the text encoder of config.json in the set's folder"
            what = "The set was distilled with another text encoder"
            raise UserError(what, where="model.text", given=identity, allowed=found.facts["text"], fix=fix)
        dtype = torch.bfloat16 if self.common.precision == "bf16" else None
        self.add_frozen("image", image, folder_identity(resolve(self.image_source), self.revision), dtype)
        self.add_frozen("text", texts, identity)
        self.register_buffer("similarity", found.similarity, persistent=False)
        towers = VectorEncoder(
            Elsewhere(texts.width), image.width, self.width, False, None, self.scale, None, image.projection,
            self.lock_projection,
        )  # fmt: skip
        self.add_group("towers", towers, self.options)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.trainer.world_size > 1:
            what, given = "A distilled set is contrasted on one process", self.trainer.world_size
            raise UserError(what, where="trainer.devices", given=given, allowed="1")

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        loss, scalars = self.set_loss(batch["main"])
        self.backward("towers", loss, **scalars)

    def set_loss(self, pairs: Records) -> tuple[Tensor, dict[str, Tensor]]:
        """L of pairs with their vectors as `cond` and their numbers as `label`, and what is logged beside it."""
        assert pairs.cond is not None and pairs.label is not None  # a stream of a set gives both
        images, texts, _, scale, _ = self.towers(self.vectors(pairs), pairs.cond.embeds[:, 0])
        there, rows = images[:, 0] @ texts[:, 0].T, pairs.label
        loss = OBJECTIVES[self.contrast](scale * there, self.similarity[rows[:, None], rows])
        accuracy = (there.argmax(1) == torch.arange(len(rows), device=rows.device)).float().mean()
        return loss, {"accuracy": accuracy, "scale": scale.detach().mean()}

    def forward_units(self) -> dict[str, float]:
        """Forward passes of a training step: a gradient costs two more; the tower's outputs are kept."""
        return {"towers": 3.0, "image": 0.0}

    @property
    def pipeline(self) -> DualEncoderPipeline:
        """Averaged weights with the set's text encoder in the tokenizer's place."""

        def encoded(texts: Any, full: bool = True) -> Tensor:
            return self.text(list(texts))

        return DualEncoderPipeline(self.image, self.generator_of("towers"), encoded, self.pad)  # type: ignore[arg-type]

    def export(self, folder: Any, batches: Any) -> None:
        """There is no stock folder of it."""
        what, fix = "Two projections over frozen encoders are no model of their own", "train Wukong on captions"
        raise UserError(what, where="export", fix=fix)
