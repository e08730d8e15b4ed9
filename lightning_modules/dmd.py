"""DMD: a one-step generator by distribution matching distillation (arXiv 2311.18828).

    x      = G(z, c) = mu_student(z, T - 1, c)                        one step from noise            section 3.1
    x_t    = alpha x + sigma eps,  t ~ U{0.02 T, ..., 0.98 T}
    w      = mean over C, h, w of |x - mu_real(x_t, t, c)|                                           eq. 8
    g      = (mu_fake(x_t, t, c) - mu_real(x_t, t, c)) / w            `dm_weight` has other forms    algorithm 2
    L_G    = a 1/2 mean |x - sg(x - g)|^2 + b mean d(G(z_ref, c_ref), y_ref)                         algorithm 1
    L_fake = mean |eps_fake(x_t, t, c) - eps|^2                       DDPM                           algorithm 3
             mean (1/sigma^2 + 1/s^2) |mu_fake(x_t, t, c) - x|^2      EDM;  both: x = sg(x), t ~ U{0, ..., T - 1}

    z, eps      unit Gaussian noise; G starts from process.initial(z), EDM at 80 z
    x [B, C, h, w]   latents of unit scale, or pictures of a pixel-space teacher
    t           time of the process, noise at its high end: DDPM's integers, EDM's 1000 Karras levels
    mu, eps_.   estimates E[x0 | x_t] and E[eps | x_t] of student, real (the frozen teacher) and fake (trained on x)
    mu_real     guided: u + scale (c - u); mu_fake is not, and neither is G
    c           caption; or class, uniform for z; or nothing
    (z_ref, c_ref, y_ref)  teacher pairs: y_ref is where the teacher's sampler ends from z_ref
    a, b        matching_weight, regression_weight;   d  regression_metric
    s           standard deviation of the data that EDM's preconditioning assumes
    sg          stops gradients

The value of the matching loss is 1/2 mean g^2, the size of a gradient, and shows no progress. Logged beside the losses,
as student/...: w, gap = mean |mu_fake - mu_real|, clamped, regression, brightness and contrast (mean and standard
deviation of all x).

Deviations from the paper: eq. 7 and 8 have a factor alpha(t) in g that algorithm 2 lacks; the algorithm is the default
and "dmd_eq8" the equations. w is at least 1e-5, counted in `student/clamped`; values that are not finite stop the
training and are not set to 0. The regression is l2 by default, so that it needs no other weights (the paper's table:
2.78 against LPIPS' 2.66); pictures for the other metrics come from the pipeline's own autoencoder, where the authors
began with a smaller one. Dropout and EDM's embedding of augmentations are off. The loss of the fake network is that of
eps or of EDM's x0, whatever the network predicts.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_modules.teacher import Teacher
from lightning_t2i.batch import Batch, Cond, Records
from lightning_t2i.distillation import Inputs, Pipeline, joined, picture_distance, refuse_foreign_pairs, refuse_time
from lightning_t2i.errors import UserError
from lightning_t2i.keys import Keys
from lightning_t2i.method import MethodModule
from lightning_t2i.networks.denoiser import Denoiser, Predictor
from lightning_t2i.options import GroupOptions, MethodOptions
from lightning_t2i.pairs import noise
from lightning_t2i.processes import DDPM, EDM, Karras, TimeLaw, Uniform, expand, guided, sample
from lightning_t2i.schedules import Stepwise, Warmup, value_at, values_of

Form: TypeAlias = Literal["dmd", "dmd_eq8", "sigma_over_alpha", "sigma3_over_alpha", "none"]
LEVELS = 1000  # of the Karras grid that stands for EDM's times
SMALLEST = 1e-5  # of w


def residual(x: Tensor, real: Tensor) -> Tensor:
    """w before its lower bound: mean |x - mu_real| of each sample; [B, C, h, w] twice -> [B]."""
    return (x - real).abs().flatten(1).mean(1)


def matching_gradient(x: Tensor, real: Tensor, fake: Tensor, alpha: Tensor, sigma: Tensor, form: Form) -> Tensor:
    """g [B, C, h, w] of x and its two estimates of that shape; alpha and sigma [B] are those of t.

    The last three forms weight the difference of scores by sigma / alpha (DreamFusion), sigma^3 / alpha
    (ProlificDreamer), or not the difference of estimates at all.
    """
    inverse = 1 / residual(x, real).clamp_min(SMALLEST)
    weight = {
        "dmd": inverse,
        "dmd_eq8": alpha.to(inverse) * inverse,
        "sigma_over_alpha": alpha / sigma,
        "sigma3_over_alpha": alpha * sigma,
        "none": torch.ones_like(inverse),
    }[form]
    return expand(weight, x) * (fake - real)


def matching_loss(x: Tensor, g: Tensor) -> Tensor:
    """A scalar whose gradient at x [B, C, h, w] is g / (B C h w)."""
    return 0.5 * (x - (x - g).detach()).square().mean()


def denoising_loss(network: Predictor, prediction: Tensor, x_t: Tensor, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """L_fake of clean x and noise eps [B, C, h, w] at t [B], from the network's prediction at x_t: a scalar."""
    if not isinstance(network.process, EDM):
        return (network.convert(prediction, x_t, t, "eps") - eps).square().mean()
    weight = t.double() ** -2 + network.sigma_data**-2
    return (expand(weight, x) * (network.convert(prediction, x_t, t, "x0") - x).square()).mean()


def paper_update() -> GroupOptions:
    """The paper's AdamW, warm-up and clipping, with the learning rate of its text-to-image models."""
    adam = partial(torch.optim.AdamW, lr=1e-5, betas=(0.9, 0.999), weight_decay=0.01)
    return GroupOptions(adam, schedule=partial(Warmup, steps=500), clip=10.0)


class DMD(MethodModule):
    """Distils a diffusion teacher on latents with text, or on pixels (EDM) with or without classes.

    Args:
        teacher: pipeline folder or hub id; without an autoencoder in it x is a picture.
        revision: commit of a hub id.
        guidance: scale of the real estimate's guidance, 1 is none; that of the pairs is the same, where x is drawn to
            them.
        matching_weight: a; 0 is the ablation without distribution matching, which needs no fake network.
        dm_weight: form of g.
        t_min, t_max: range of the matching's times, as shares of T; both ends are included.
        regression_weight: b; 0 is the ablation without regression, which needs no pairs. This and t_max may change on
            the way: {0: 0.98, 74000: 0.5} holds .98 up to training step 74,000.
        regression_metric: d, on x itself ("l2") or on decoded pictures.
        metric_weights: folder of the "perceptual" network, safetensors file of "lpips".
        match_pairs: match the distribution of G(z_ref) as well, as the paper does for text-to-image.
        student_t: time at which the student is asked for x, in the process's own units; null is its last, T - 1.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        val_steps: steps of the teacher's sampler that validation compares with.
        student, fake: how the weights are updated.
        common: options of the engine.
    """

    may_rest: tuple[str, ...] = ("student",)

    def __init__(
        self,
        teacher: str,
        revision: str | None = None,
        guidance: float = 3.0,
        matching_weight: float = 1.0,
        dm_weight: Form = "dmd",
        t_min: float = 0.02,
        t_max: Stepwise = 0.98,
        regression_weight: Stepwise = 0.25,
        regression_metric: Literal["l2", "perceptual", "lpips"] = "l2",
        metric_weights: str | None = None,
        match_pairs: bool = False,
        student_t: float | None = None,
        gradient_checkpointing: bool = False,
        val_steps: int = 25,
        student: GroupOptions | None = None,
        fake: GroupOptions | None = None,
        common: MethodOptions | None = None,
    ):
        super().__init__(common)
        if min(matching_weight, *values_of(regression_weight, "model.regression_weight")) < 0:
            raise UserError("A weight is negative", where="model.matching_weight or model.regression_weight")
        if not matching_weight and (match_pairs or not regression_weight):
            raise UserError("Nothing is left to train on", where="model.matching_weight", given=0, allowed="above 0")
        if not all(0 <= t_min < high <= 1 for high in values_of(t_max, "model.t_max")):
            raise UserError("Not a range of times", where="model.t_min", given=t_min, allowed="0 <= t_min < t_max <= 1")
        self.source, self.revision, self.guidance, self.val_steps = teacher, revision, guidance, val_steps
        self.matching_weight, self.dm_weight, self.t_min, self.t_max = matching_weight, dm_weight, t_min, t_max
        self.regression_weight, self.regression_metric = regression_weight, regression_metric
        self.metric_weights, self.match_pairs = metric_weights, match_pairs
        self.student_t, self.student_times, self.gradient_checkpointing = student_t, [student_t], gradient_checkpointing
        self.pairs_per_sample = 1.0  # rows of `pairs` for each of `main`, once training begins
        self.options = {"student": student or paper_update(), "fake": fake or paper_update()}

    def configure_model(self) -> None:
        pipeline = self.pipeline = Pipeline.load(self.source, self.revision, self.guidance)
        self.process, self.shape, self.classes = pipeline.denoiser.process, pipeline.shape, pipeline.classes
        if not isinstance(self.process, DDPM | EDM):
            what, allowed = "DMD has no times and weights of this process", "a teacher of a ddpm or edm process"
            raise UserError(what, where="model.teacher", given=self.process.name, allowed=allowed)
        refuse_time(self.process, self.student_t)
        student, fake = self.copies(pipeline)
        dtype = torch.bfloat16 if self.common.precision == "bf16" else None
        self.add_frozen("teacher", pipeline.denoiser, pipeline.identity, dtype)
        self.add_frozen("codec", pipeline.codec, pipeline.identity)
        if pipeline.text is not None:
            self.add_frozen("text", pipeline.text, pipeline.identity, dtype)
        if self.regression_weight and self.regression_metric != "l2":
            metric = picture_distance(self.regression_metric, self.metric_weights, pipeline.codec)
            self.add_frozen("metric", metric, metric.identity)
        self.add_group("student", student, self.options["student"], student.owns)
        if self.matching_weight:
            self.add_group("fake", fake, self.options["fake"], fake.owns)

    def copies(self, pipeline: Pipeline) -> list[Denoiser]:
        """Student and fake, which begin as the teacher."""
        return [pipeline.trainable(self.gradient_checkpointing) for _ in range(2)]

    def on_fit_start(self) -> None:
        """Refuses pairs that are missing, or do not fit the teacher or the guidance."""
        assert not any(p.requires_grad for p in self.teacher.parameters()), "the teacher must stay frozen"
        if self.regression_weight or self.match_pairs:
            streams, recipe = self.trainer.datamodule.training, Teacher(self.source, revision=self.revision).recipe
            guidance = self.guidance if self.regression_weight else None  # else no term sees what became of z_ref
            refuse_foreign_pairs(streams.get("pairs"), recipe, self.shape, guidance)
            self.pairs_per_sample = streams["pairs"].batch_size / streams["main"].batch_size

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        main, due = batch["main"], self.due("student")
        parts = [self.inputs(main)] if self.matching_weight else []
        if self.match_pairs or (due and self.regression_weight):
            parts.append(self.inputs(batch["pairs"]))
        if not parts:
            return
        z, cond, places = joined(parts)
        with torch.set_grad_enabled(due):
            x = self.generate(self.student, z, cond, self.keys, places)  # x and x_ref in one call
        matched = slice(None if self.match_pairs else len(main))
        fixed = x[matched].detach(), cond and cond.index(matched), places[matched]
        if due:
            loss = x.new_zeros(())
            if self.matching_weight:
                loss = loss + self.matching_weight * matching_loss(x[matched], self.matching(*fixed))
            if self.regression_weight:  # x_ref comes last
                weight = value_at(self.regression_weight, self.counters.step)
                loss = loss + weight * self.regression(x[-len(batch["pairs"]) :], batch["pairs"])
            self.backward("student", loss, brightness=x.mean(), contrast=x.std())
        if self.matching_weight:  # on the same x, made before G moves
            self.backward("fake", self.fake_loss(*fixed))

    def inputs(self, records: Records) -> Inputs:
        """What pairs were made of; for other records new noise with their captions, or with uniform classes."""
        cond = self.condition(records)
        if records.noise_seed is not None:
            return noise(records.noise_seed, self.shape), cond, records.noise_seed
        if self.classes and records.cond is None:
            cond.label = self.keys.integers("label", records.position, 0, self.classes)
        return self.keys.normal("z", records.position, self.shape), cond, records.position

    def generate(self, network: Predictor, z: Tensor, cond: Cond | None, keys: Keys, places: Tensor) -> Tensor:
        """x [B, C, h, w] of unit Gaussian noise of that shape; keys and places are for draws, and one step has none."""
        return network.generate(z, cond, self.student_t)

    def times(self, low: float = 0.0, high: float = 1.0) -> TimeLaw:
        """The uniform law between two shares of T, both ends included."""
        edm = isinstance(self.process, EDM)
        levels = LEVELS if edm else int(self.process.t_max) + 1
        first, last = round(low * levels), min(round(high * levels), levels - 1)
        return Karras(count=levels, low=first, high=last + 1) if edm else Uniform(low=first, high=last + 1)

    def noised(self, x: Tensor, places: Tensor, name: str, *shares: float) -> tuple[Tensor, Tensor, Tensor]:
        """(x_t, eps, t) of x [B, C, h, w] with the draws called `name`; shares of T as in `times`."""
        t = self.times(*shares)(self.process, self.keys, places, f"{name}_t")
        eps = self.keys.normal(f"{name}_eps", places, self.shape)
        return self.process.add_noise(x, eps, t), eps, t

    @torch.no_grad()
    def matching(self, x: Tensor, cond: Cond | None, places: Tensor) -> Tensor:
        """g at x [B, C, h, w], which has no gradient."""
        x_t, _, t = self.noised(x, places, "matching", self.t_min, value_at(self.t_max, self.counters.step))
        real = guided(self.teacher.x0, x_t, t, cond, self.guidance)
        fake, w = self.fake.x0(x_t, t, cond), residual(x, real)
        found = {"w": w.mean(), "clamped": (w < SMALLEST).sum(), "gap": (fake - real).abs().mean()}
        self.note(**{f"student/{name}": value for name, value in found.items()})
        return matching_gradient(x, real, fake, *self.process.alpha_sigma(t, torch.float64), self.dm_weight)

    def regression(self, x_ref: Tensor, pairs: Records) -> Tensor:
        """mean d(x_ref, y_ref): a scalar."""
        y_ref = pairs.image if self.codec.vae is None else pairs.latent
        if self.regression_metric == "l2":
            loss = (x_ref - y_ref).square().mean()
        else:
            with torch.no_grad():
                picture = self.codec.decode(y_ref)
            loss = self.metric(self.codec.decode(x_ref), picture).mean()
        self.note(**{"student/regression": loss})
        return loss

    def fake_loss(self, x: Tensor, cond: Cond | None, places: Tensor) -> Tensor:
        """L_fake of samples x [B, C, h, w] without gradient: a scalar."""
        x_t, eps, t = self.noised(x, places, "fake")
        return denoising_loss(self.fake, self.fake(x_t, t, cond), x_t, x, eps, t)

    def forward_units(self) -> dict[str, float]:
        """Forward passes of a training step: a gradient costs two more, a guided estimate one more."""
        due, pairs = 1 / self.options["student"].every, self.pairs_per_sample
        matched = bool(self.matching_weight) + pairs * self.match_pairs
        regressed = pairs * (bool(self.regression_weight) and not self.match_pairs)  # rows that only due steps have
        units = {
            "student": 3 * due * (matched + regressed) + (1 - due) * matched,
            "teacher": due * matched * (1 + (self.guidance != 1)),
            "fake": (due + 3) * matched,
        }
        if hasattr(self, "text"):
            units["text"] = matched + due * regressed
        if hasattr(self, "metric"):
            units |= {"metric": 2 * due * pairs, "codec.decoder": 3 * due * pairs * (self.codec.vae is not None)}
        return units

    def condition(self, records: Records) -> Cond | None:
        """Cached conditions, encoded captions, class labels (in turn where records have none), or nothing."""
        return self.pipeline.condition(records)

    @torch.no_grad()
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Mean absolute distance of G(z) from where the teacher's sampler ends, at noise that validations share."""
        main, keys = batch["main"], self.keys.fork("validation")
        z, cond = keys.normal("z", main.position, self.shape), self.condition(main)
        end = sample(self.teacher, z, cond, self.val_steps, self.guidance)
        distance = (self.generate(self.generator_of("student"), z, cond, keys, main.position) - end).abs().mean()
        stage = "test" if self.trainer.testing else "val"
        self.log(f"{stage}/distance", distance, batch_size=len(main), sync_dist=True)

    test_step = validation_step

    @torch.no_grad()
    def sample(self, cond: Cond | None, keys: Keys, positions: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] of the averaged student, as `generate` does; the noise depends on keys and position."""
        z = keys.normal("z", positions, self.shape)
        return self.codec.decode(self.generate(self.generator_of("student"), z, cond, keys, positions)).clamp(-1, 1)

    def export(self, folder: Path, batches: Iterable[Batch]) -> None:
        """Writes the stock pipeline of the averaged student, or the model folder of an EDM network."""
        self.pipeline.save(folder, self.generator_of("student"), self.student_times)
