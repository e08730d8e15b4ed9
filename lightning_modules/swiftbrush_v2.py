"""SwiftBrush v2: a better start, a clamped CLIP loss and the average of two students (arXiv 2408.14176).

    L_G    = 1/2 mean |x - sg(x - g)|^2 + b(k) mean max(0, tau - cos(E_image(D(x)), E_text(c)))
    b(k)   = b max(0, 1 - k / K)                           k training steps so far
    theta  = share theta_1 + (1 - share) theta_2           two students of one architecture: `average_students`

    D           decoder of the pipeline, or of a smaller autoencoder with the same latents
    E_image, E_text   towers of a CLIP, frozen;  c  the caption of x
    tau         clip_threshold: a sample that fits its caption so well adds nothing
    b, K        clip_weight, clip_until

The rest is SwiftBrush's. The student may begin as another network of one step, as SD-Turbo (`student_from`), and may
be an adapter of where it begins (`student_rank`). The maximum is taken for each sample, before the mean. Logged besides
SwiftBrush's, as student/...: clip, the mean of the maxima, and fits = mean cos.

Deviations: the authors' regularisation on pairs of pictures is left out, for its loss is not published exactly.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_modules.swiftbrush import SwiftBrush
from lightning_t2i.batch import Records
from lightning_t2i.distillation import Pipeline, shapes_of
from lightning_t2i.errors import UserError
from lightning_t2i.frozen import folder_identity
from lightning_t2i.metrics.clip_score import TransformersClip
from lightning_t2i.networks.adapters import roles
from lightning_t2i.networks.codec import LatentCodec
from lightning_t2i.networks.denoiser import Denoiser
from lightning_t2i.networks.load import locate


def clamped(fits: Tensor, threshold: float) -> Tensor:
    """mean max(0, tau - cos) of the cosines [B] of pictures and captions: a scalar."""
    return (threshold - fits).clamp_min(0).mean()


@torch.no_grad()
def average_students(first: str, second: str, out: Path, share: float = 0.5) -> None:
    """Writes the pipeline of the weighted mean of two exported students, with all else as the first has it.

    Args:
        share: of the first one.

    Raises:
        UserError: they are not of one kind.
    """
    ours, theirs = (Pipeline.load(source) for source in (first, second))
    one, other = ours.denoiser, theirs.denoiser
    if shapes_of(one) != shapes_of(other) or (one.process, one.prediction) != (other.process, other.prediction):
        raise UserError("Students of two kinds have no average", given=second, allowed="the first one's kind")
    for parameter, its in zip(one.parameters(), other.parameters(), strict=True):
        parameter.lerp_(its, 1 - share)
    ours.save(out, one)


class SwiftBrushV2(SwiftBrush):
    """SwiftBrush with another start and a CLIP loss.

    Args:
        teacher: pipeline folder or hub id.
        student_from: pipeline folder or hub id whose weights the student begins with; null is the teacher.
        student_from_revision, clip_revision, decoder_revision: commits of these hub ids.
        student_rank: rank of an adapter of these weights that is trained in their place; alpha is twice as large, as
            the authors'. Null trains all weights.
        student_targets: layers of that adapter.
        clip: folder or hub id of a CLIPModel; null is no CLIP loss.
        clip_weight: b. 0.1 is the authors'.
        clip_threshold: tau; 1 clamps nothing.
        clip_until: K, training steps after which the CLIP loss is gone; null keeps b as it is.
        decoder: folder or hub id of another autoencoder for D, as madebyollin/taesd; null is the pipeline's.
        options: SwiftBrush's.
    """

    def __init__(
        self,
        teacher: str,
        student_from: str | None = None,
        student_from_revision: str | None = None,
        student_rank: int | None = None,
        student_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0"),
        clip: str | None = None,
        clip_revision: str | None = None,
        clip_weight: float = 0.1,
        clip_threshold: float = 0.35,
        clip_until: int | None = None,
        decoder: str | None = None,
        decoder_revision: str | None = None,
        **options: Any,
    ):
        super().__init__(teacher, **options)
        if clip_weight < 0 or not -1 <= clip_threshold <= 1:
            given = f"clip_weight {clip_weight:g}, clip_threshold {clip_threshold:g}"
            raise UserError("Not a CLIP loss", where="model.clip_weight", given=given, allowed=">= 0; a cosine")
        if clip_until is not None and clip_until < 1:
            raise UserError("The CLIP loss has no steps", where="model.clip_until", given=clip_until, fix="clip: null")
        if student_rank is not None and student_rank < 1:
            what = "An adapter has a rank"
            raise UserError(what, where="model.student_rank", given=student_rank, allowed="1 or more, or null")
        self.student_from, self.student_rank, self.student_targets = student_from, student_rank, student_targets
        self.clip_source, self.clip_weight, self.clip_threshold = clip, clip_weight, clip_threshold
        self.clip_until, self.decoder_source = clip_until, decoder
        self.student_from_revision = student_from_revision
        self.clip_revision, self.decoder_revision = clip_revision, decoder_revision

    def configure_model(self) -> None:
        super().configure_model()
        self.decoder = self.codec
        if self.clip_source is None:
            return
        source, revision = locate(self.clip_source), self.clip_revision
        clip = TransformersClip.from_pretrained(source, revision)
        self.add_frozen("clip", clip, folder_identity(source, revision))
        if self.decoder_source is not None:
            codec = LatentCodec.from_pretrained(self.decoder_source, revision=self.decoder_revision)
            if codec.channels != self.codec.channels or codec.factor != self.codec.factor:
                what, given = "This autoencoder has other latents", f"{codec.channels} channels, 1 : {codec.factor}"
                allowed = f"{self.codec.channels} channels, 1 : {self.codec.factor}"
                raise UserError(what, where="model.decoder", given=given, allowed=allowed)
            self.add_frozen("decoder", codec, folder_identity(locate(self.decoder_source), self.decoder_revision))

    def begun(self, pipeline: Pipeline) -> Denoiser:
        start = pipeline
        if self.student_from is not None:
            start = pipeline.beginning_with(self.student_from, self.student_from_revision)
        if self.student_rank is None:
            return start.trainable(self.gradient_checkpointing)
        identity = pipeline.identity
        if self.student_from is not None:
            identity = folder_identity(locate(self.student_from), self.student_from_revision)
        base, student = roles(
            copy.deepcopy(start.denoiser), ("student",), self.student_rank, None, self.gradient_checkpointing,
            2 * self.student_rank, self.student_targets,
        )  # fmt: skip
        self.add_frozen("student_base", base, identity)
        return student

    def student_loss(self, x: Tensor, g: Tensor, records: Records) -> Tensor:
        loss, weight = super().student_loss(x, g, records), self.clip_weight
        if self.clip_until is not None:
            weight *= max(0.0, 1 - self.counters.step / self.clip_until)
        if self.clip_source is None or not weight:
            return loss
        if records.caption is None:
            raise UserError("The CLIP loss needs captions", where="data.main", given="none", fix="clip: null")
        with torch.no_grad():
            texts = self.clip.encode_text(records.caption)
        fits = (self.clip.encode_image(self.decoder.decode(x), clamp=False) * texts).sum(1)
        misfit = clamped(fits, self.clip_threshold)
        self.note(**{"student/clip": misfit, "student/fits": fits.mean()})
        return loss + weight * misfit

    def forward_units(self) -> dict[str, float]:
        """SwiftBrush's, and the decoder's with the gradient that passes through; CLIP's are not counted."""
        units = super().forward_units()
        if self.clip_source is not None and self.clip_weight:
            name = "codec" if self.decoder_source is None else "decoder"
            units[f"{name}.decoder"] = 2 / self.options["student"].every
        return units
