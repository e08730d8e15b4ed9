"""Wukong: Chinese vision-language pre-training with a locked image tower (arXiv 2202.06767).

    g    s_ij = <zI_i, zT_j>, one vector each: sI = s, sT = s^T                                   CLIP (2103.00020)
    f    sI_ij = mean_k max_r <zI_i[k], zT_j[r]>,  sT_ij = mean_r max_k <zT_i[r], zI_j[k]>        FILIP (2111.07783)
    r    f with the n1 tokens of a picture reduced to K               lightning_t2i/networks/token_reduction.py
    L    = 1/2 [mean_i CE(a sI_i, i) + mean_i CE(a sT_i, i)]            over the pairs of all processes, micro-batches
    or   -1/B sum_ij log sigmoid(y_ij (a s_ij + b)),  s = 1/2 (sI + sT^T),  y = 1 for pairs, -1 else       (2303.15343)

    zI [B, n1, D]  unit tokens of a picture: projected outputs of the image tower, [CLS] left out (g: [CLS] alone, or
                   the mean of Swin's positions)
    zT [B, n2, D]  unit tokens of a text, r over [CLS] ... [SEP]; pads do not count (g: [SEP] alone)
    a, b           scale, kept between 1 and 100 after every update; bias of the sigmoid loss alone

The image tower is locked (LiT, 2111.07991): a frozen network, not in the checkpoint. With `tower` it is trained from
training step `tower.start` on, and locked before. `common.accumulate` micro-batches make one batch of contrast, see
lightning_t2i/cached_features.py. Logged as towers/...: loss, accuracy (how often a picture's own text is its nearest),
scale, own (mean sI of pairs) and other (of the rest). Validation: recalls both ways over all captions of a picture.

Deviations: pads are left out of the max where the published weights were trained with zero vectors (`pad`); one
scale, no label smoothing; all tokens take part (`top_image`, `top_text` keep those that match others best, FILIP 3.2);
tables of positions decay as matrices do. The streams of a batch are contrasted together. The sigmoid loss begins with
the scale of the other (its paper: 10).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_t2i.batch import Batch, Records
from lightning_t2i.cached_features import CachedFeatures
from lightning_t2i.dual_encoder_pipeline import DualEncoderPipeline
from lightning_t2i.errors import UserError
from lightning_t2i.frozen import folder_identity
from lightning_t2i.lamb import MatrixDecayAdamW
from lightning_t2i.method import MethodModule
from lightning_t2i.metrics.retrieval import RetrievalRecall
from lightning_t2i.networks.chinese_tokenizer import VOCABULARY, ChineseTokenizer, refuse_text
from lightning_t2i.networks.dual_encoder import DualEncoder, Features, initialise_image, initialise_text
from lightning_t2i.networks.image_tower import ImageTower
from lightning_t2i.networks.load import build_network, locate
from lightning_t2i.options import GroupOptions, MethodOptions
from lightning_t2i.paths import resolve
from lightning_t2i.processes.similarity import (
    Pad,
    contrastive_loss,
    gather_rows,
    sigmoid_loss,
    strips,
    token_similarity,
    top_tokens,
)
from lightning_t2i.schedules import Warmup


def paper_update() -> GroupOptions:
    """AdamW of Chinese-CLIP with a warm-up; the paper's LAMB is lightning_t2i.lamb.LAMB."""
    return GroupOptions(partial(MatrixDecayAdamW, lr=1e-3), schedule=partial(Warmup, steps=3000))


class Wukong(MethodModule):
    """Trains a text tower, projections and, in style r, a token reduction on a locked image tower.

    Args:
        image: folder or hub id with a CLIPModel, CLIPVisionModel or SwinModel; or a JSON architecture file, whose
            random weights only make sense with `tower`.
        text: JSON architecture file of a CLIPTextModel; or an exported folder, to go on from all of its weights but the
            image tower's.
        revision: commit of the image tower's hub id.
        tokenizer: folder or hub id of the BertTokenizer, with the vocabulary of Chinese BERT.
        tokenizer_revision: commit of that hub id.
        style: g, f or r, see above.
        width: D.
        reduced: K, of style r.
        objective: InfoNCE or the sigmoid loss.
        pad: what pads do in a maximum over a text's tokens; "zero_floor" is the published weights' way.
        top_image, top_text: share of the tokens that enter the loss.
        smoothing: of the labels.
        scale: initial a.
        bias: initial b of the sigmoid loss.
        lock_projection: keep the image tower's own projection as it is.
        merge_queries: equal captions are one query in validation, which any of its pictures answers (MUGE's rule).
        keep_vectors: remember a locked tower's outputs by sample, for small data without augmentation.
        tower: how the image tower's weights are updated once they are; null locks it for good.
        towers: how all other weights are updated.
        common: options of the engine.
    """

    may_rest: tuple[str, ...] = ("image",)

    def __init__(
        self,
        image: str,
        text: str,
        revision: str | None = None,
        tokenizer: str = VOCABULARY,
        tokenizer_revision: str | None = None,
        style: Literal["g", "f", "r"] = "r",
        width: int = 256,
        reduced: int = 12,
        objective: Literal["softmax", "sigmoid"] = "softmax",
        pad: Pad = "exact",
        top_image: float = 1.0,
        top_text: float = 1.0,
        smoothing: float = 0.0,
        scale: float = 1 / 0.07,
        bias: float = -10.0,
        lock_projection: bool = False,
        merge_queries: bool = False,
        keep_vectors: bool = False,
        tower: GroupOptions | None = None,
        towers: GroupOptions | None = None,
        common: MethodOptions | None = None,
    ):
        super().__init__(common)
        for name, value in (("top_image", top_image), ("top_text", top_text)):
            if not 0 < value <= 1 or (style == "g" and value < 1):
                allowed = "1 in style g, which has one token, else a share in (0, 1]"
                raise UserError("Not a share of the tokens", where=f"model.{name}", given=value, allowed=allowed)
        if not 1 <= scale <= 100:
            raise UserError("The scale is out of range", where="model.scale", given=scale, allowed="1 to 100")
        if image.endswith(".json") and tower is None:
            what, fix = "A tower of random weights is locked", "a folder or hub id as image, or tower: {}"
            raise UserError(what, where="model.image", given=image, fix=fix)
        if smoothing and objective == "sigmoid":
            what, fix = "The sigmoid loss smooths no labels", "smoothing: 0"
            raise UserError(what, where="model.smoothing", given=smoothing, fix=fix)
        if keep_vectors and tower is not None:
            fix = "keep_vectors: false"
            raise UserError(
                "A tower that is trained gives new outputs", where="model.keep_vectors", given=True, fix=fix
            )
        self.image_source, self.text_source, self.revision = image, text, revision
        self.tokenizer_source, self.tokenizer_revision = tokenizer, tokenizer_revision
        self.style, self.width, self.reduced = style, width, reduced if style == "r" else None
        self.objective, self.pad, self.top_image, self.top_text = objective, pad, top_image, top_text
        self.smoothing, self.scale, self.lock_projection = smoothing, scale, lock_projection
        self.bias, self.merge_queries = bias if objective == "sigmoid" else None, merge_queries
        self.tower, self.options = tower, towers or paper_update()
        self.kept: dict[tuple[str, int], Tensor] | None = {} if keep_vectors else None
        self.cached = CachedFeatures(self, self.encode, self.loss)
        self.recall = RetrievalRecall()

    def configure_model(self) -> None:
        tokens = self.style != "g"
        image = ImageTower.build(self.image_source, tokens, self.revision)
        if self.image_source.endswith(".json") and image.is_vit:
            initialise_image(image.backbone)
        towers = self.built(image, tokens)
        text = towers.text.config
        refuse_text(text)
        length = text.max_position_embeddings
        self.tokenize = ChineseTokenizer(self.tokenizer_source, length, self.tokenizer_revision)
        if self.tower is None:
            dtype = torch.bfloat16 if self.common.precision == "bf16" else None
            self.add_frozen("image", image, folder_identity(resolve(self.image_source), self.revision), dtype)
        else:
            self.add_group("image", image, self.tower)
        self.add_group("towers", towers, self.options)

    def built(self, image: ImageTower, tokens: bool) -> DualEncoder:
        """A new text tower and heads, or those of an exported folder."""
        if self.text_source.endswith(".json"):
            text: Any = build_network(self.text_source)
            initialise_text(text)
            return DualEncoder(
                text, image.width, self.width, tokens, self.reduced, self.scale, self.bias, image.projection,
                self.lock_projection,
            )  # fmt: skip
        towers = DualEncoderPipeline.from_pretrained(locate(self.text_source)).towers.train()
        found = {"width": towers.image_projection.out_features, "reduced": towers.count, "style": towers.tokens}
        wanted = {"width": self.width, "reduced": self.reduced, "style": tokens}
        if wrong := [name for name in wanted if found[name] != wanted[name]]:
            what, given = "The trained dual encoder is another one", {name: wanted[name] for name in wrong}
            raise UserError(what, where="model.text", given=given, allowed=str({name: found[name] for name in wrong}))
        towers.image_projection.requires_grad_(not self.lock_projection)
        if (towers.logits.bias is None) != (self.bias is None):  # it belongs to this objective, not to the one before
            towers.logits.bias = None if self.bias is None else torch.nn.Parameter(torch.tensor([self.bias]))
        return towers

    def configure_optimizers(self) -> list[Any]:
        found = super().configure_optimizers()
        optimizer = self.groups["towers"].optimizer
        assert optimizer is not None
        optimizer.register_step_post_hook(lambda *_: self.towers.clamp_scale())
        return found

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        unlocked = self.tower is not None and self.due("image")
        if self.tower is not None and self.image.training != unlocked:
            self.image.train(unlocked)
        start = torch.cat([r.image if unlocked else self.vectors(r, name) for name, r in batch.items()])
        texts = [text for records in batch.values() for text in records.caption]
        whole = self.pad == "zero_floor" or self.top_text < 1 or self.trainer.world_size * self.common.accumulate > 1
        ids = self.tokenize(texts, full=whole).to(self.device)
        self.cached.backward(("towers", "image") if unlocked else ("towers",), start, ids)

    @torch.no_grad()
    def vectors(self, records: Records, stream: str = "main") -> Tensor:
        """The locked tower's outputs [B, n, width]. Kept ones are computed picture by picture, so that their bits do
        not depend on the batch in which a picture first came."""
        if self.kept is None:
            return self.image(records.image)
        for row, id in enumerate(ids := records.id.tolist()):
            if (stream, id) not in self.kept:
                self.kept[stream, id] = self.image(records.image[row : row + 1])[0]
        return torch.stack([self.kept[stream, id] for id in ids])

    def encode(self, start: Tensor, ids: Tensor) -> Features:
        """Features of pictures, or of what the locked tower made of them, and of texts; the tokens that take part."""
        vectors = self.image(start) if start.ndim == 4 else start
        images, texts, mask, scale, bias = self.towers(vectors, ids)
        if self.top_image < 1 or self.top_text < 1:
            all_images, all_texts, all_mask = images, texts, mask
            images, _ = top_tokens(all_images, None, all_texts, all_mask, self.top_image)
            texts, kept = top_tokens(all_texts, all_mask, all_images, None, self.top_text)
            mask = all_mask if kept is None else kept
        return images, texts, mask, scale, bias

    def loss(self, features: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        """L over own rows against those of all processes, and what is logged beside it."""
        images, texts, mask, scale, bias = features
        first = self.global_rank * len(images)
        if self.objective == "sigmoid":
            every = gather_rows(mask.to(torch.uint8)).bool()
            there, back = token_similarity(images, gather_rows(texts), None, every, self.pad, back=True)
            assert back is not None
            loss = sigmoid_loss((there + back.T) / 2, scale.mean(), bias.mean(), first)
        else:
            there, back = strips(images, texts, mask, self.pad)
            loss = contrastive_loss(there, back, scale.mean(), first, self.smoothing)
        rows = torch.arange(len(there), device=there.device)
        own, total = there[rows, first + rows], there.detach().sum(1)
        other = (total - own).mean() / max(1, there.shape[1] - 1)
        accuracy = (there.argmax(1) == first + rows).float().mean()
        return loss, {"accuracy": accuracy, "scale": scale.mean(), "own": own.mean(), "other": other}

    def forward_units(self) -> dict[str, float]:
        """Forward passes of the next training step: a gradient costs two more, another pass over micro-batches one."""
        trained = 3.0 if self.common.accumulate == 1 else 4.0
        locked = 0.0 if self.kept is not None else 1.0
        return {"towers": trained, "image": trained if self.tower is not None and self.due("image") else locked}

    @property
    def pipeline(self) -> DualEncoderPipeline:
        """Averaged weights with the tokenizer."""
        image = self.image if self.tower is None else self.generator_of("image")
        return DualEncoderPipeline(image, self.generator_of("towers"), self.tokenize, self.pad)

    def encode_image(self, images: Tensor) -> Tensor:
        return self.pipeline.encode_image(images)

    def encode_text(self, texts: list[str]) -> Tensor:
        return self.pipeline.encode_text(texts)

    def on_validation_epoch_start(self) -> None:
        self.recall.reset()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Keeps the features of pictures and of all their captions."""
        main = batch["main"]
        captions = main.captions or [[text] for text in main.caption]
        owners = main.id.repeat_interleave(torch.tensor([len(texts) for texts in captions], device=main.id.device))
        words = [text for own in captions for text in own]
        found = self.encode_image(main.image), main.id, self.encode_text(words), owners
        self.recall.add(*found, words if self.merge_queries else None)

    def on_validation_epoch_end(self) -> None:
        stage = "test" if self.trainer.testing else "val"
        self.log_dict({f"{stage}/{name}": v for name, v in self.recall.compute(self.pipeline.similarity).items()})

    on_test_epoch_start, test_step, on_test_epoch_end = (
        on_validation_epoch_start,
        validation_step,
        on_validation_epoch_end,
    )

    def export(self, folder: Path, batches: Iterable[Batch]) -> None:
        """Writes the folder of `DualEncoderPipeline`: a CLIPModel where the image tower is a ViT."""
        self.pipeline.save(folder)
