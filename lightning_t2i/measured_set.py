"""MeasuredSet: the half of a distillation that trains new students on the set, lets them retrieve, and hands it out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_t2i.batch import Batch
from lightning_t2i.coresets import drawn_pairs
from lightning_t2i.keys import Keys
from lightning_t2i.method import MethodModule
from lightning_t2i.metrics.collapse import collapse, stripes, threshold
from lightning_t2i.metrics.retrieval import RetrievalRecall
from lightning_t2i.networks.frozen_pair import facts_of
from lightning_t2i.networks.projection import Branches, Student
from lightning_t2i.pair_features import PairFeatures
from lightning_t2i.retrieval_student import Protocol, TrainingSet, evaluate, recall_of
from lightning_t2i.set_pictures import draw_embeddings, draw_pairs
from lightning_t2i.soft_contrast import Objective
from lightning_t2i.synthetic_set import SyntheticSet, nearest_captions

RANDOM_PAIRS = 500  # of the real set, for the threshold of `cr42`


class MeasuredSet(MethodModule):
    """What a method has to set: student, objective, protocol, alpha, chunk; `learned` and, once known, `judge`.

    student, objective, protocol: of new students; alpha: scale of S; chunk: pictures encoded at a time;
    judge: weights of both heads whose embeddings tell of collapse; known: features of the real pairs.
    """

    student: Student
    objective: Objective
    protocol: Protocol
    alpha: float
    chunk: int | None
    judge: Branches | None = None
    known: PairFeatures | None = None
    image: Any
    text: Any

    def learned(self) -> list[Tensor]:
        """X, Y, eta and the factors of S, whole."""
        return [t for name in self.groups for t in self.groups[name].network()]

    @property
    def identities(self) -> list[str]:
        return [self.frozen_identities[name] for name in ("image", "text")]

    @torch.no_grad()
    def training_set(self) -> TrainingSet:
        """What new students are trained on."""
        pictures, texts, rates, *factors = self.learned()
        features = torch.cat([self.image(part) for part in pictures.split(self.chunk or len(pictures))])
        return TrainingSet(features, texts, tuple(factors), self.alpha, rates)

    def on_validation_epoch_start(self) -> None:
        self.recall = RetrievalRecall()

    @torch.no_grad()
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Keeps the features of pictures and of all their captions."""
        main = batch["main"]
        captions = main.captions or [[text] for text in main.caption or []]
        owners = main.id.repeat_interleave(torch.tensor([len(texts) for texts in captions], device=main.id.device))
        texts = self.text([text for own in captions for text in own])
        self.recall.add(self.image(main.image), main.id, texts, owners)

    @torch.inference_mode(False)  # students are trained here
    def on_validation_epoch_end(self) -> None:
        """Recalls of new students; how far the modalities have collapsed."""
        stage, pairs = "test" if self.trainer.testing else "val", self.training_set()
        splits, select = {stage: self.recall}, None
        finite = getattr(self.trainer.datamodule, "finite", {})
        if self.trainer.testing and "val" in finite:
            self.trainer.datamodule.setup("validate")
            known = PairFeatures.of(finite["val"], (self.image, self.text), self.identities, self.device)
            splits, select = {**splits, "val": recall_of(known)}, "val"
        keys = Keys(self.common.seed).fork("evaluation")
        found = evaluate(self.student, pairs, self.objective, self.protocol, keys, splits, select)
        found[f"{stage}/mean"] = found[f"{stage}/last/mean"]
        if self.judge is not None:
            embedded = collapse(*self.student.embed(self.judge, pairs.images, pairs.texts), self.usual_cosine())
            found |= {f"{stage}/collapse/{name}": value for name, value in embedded.items()}
        if pairs.factors:
            found[f"{stage}/collapse/stripes"] = stripes(self.synthetic_set().similarity)
        self.log_dict(found)

    on_test_epoch_start, test_step, on_test_epoch_end = (
        on_validation_epoch_start,
        validation_step,
        on_validation_epoch_end,
    )

    @torch.no_grad()
    def usual_cosine(self) -> float | None:
        """The threshold of `cr42` in the judge's space, of random real pairs; None while none are known."""
        if self.known is None or self.judge is None:
            return None
        n = len(self.known)
        rows = drawn_pairs(min(RANDOM_PAIRS, n), n, Keys(self.common.seed).fork("judge"))
        real = TrainingSet.of_pairs(self.known, rows.to(self.known.owner.device))
        return threshold(*self.student.embed(self.judge, real.images, real.texts))

    def synthetic_set(self) -> SyntheticSet:
        """The set as it is, on the CPU."""
        pictures, texts, rates, *factors = (t.detach().cpu() for t in self.learned())
        facts = {**facts_of(self.frozen_identities, self.student), "alpha": self.alpha}
        return SyntheticSet(pictures, texts, tuple(factors), rates, facts)

    @torch.no_grad()
    def draw(self, name: str) -> None:
        """Writes pairs-NAME.png and embeddings-NAME.png into the run folder: the set, beside as many real pairs."""
        found, pairs, known = self.synthetic_set(), self.training_set(), self.known
        if known is None or self.judge is None or not self.trainer.is_global_zero:
            return
        folder = Path(self.trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        near = nearest_captions(found.texts, known.texts.cpu(), known.captions)
        draw_pairs(found.images, near).save(folder / f"pairs-{name}.png")
        rows = drawn_pairs(len(found), len(known), Keys(self.common.seed).fork("real")).to(known.owner.device)
        real = TrainingSet.of_pairs(known, rows)
        sets = {"synthetic": (pairs.images, pairs.texts), "real": (real.images, real.texts)}
        embedded = {kind: self.student.embed(self.judge, *rows) for kind, rows in sets.items()}
        draw_embeddings({kind: (x.cpu(), y.cpu()) for kind, (x, y) in embedded.items()},
                        folder / f"embeddings-{name}.png")  # fmt: skip

    @torch.no_grad()
    def export(self, folder: Path, batches: Iterable[Batch]) -> None:
        """Writes the synthetic set; its nearest captions are those of the validation pictures."""
        captions = sorted({text for batch in batches for own in batch["main"].captions or [] for text in own})
        found = self.synthetic_set()
        near = nearest_captions(found.texts, self.text(captions).cpu(), captions) if captions else []
        replace(found, captions=near).save(folder)
