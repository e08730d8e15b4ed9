"""DMD2: distribution matching with two time scales, a discriminator and students of several steps (arXiv 2405.14867).

    x      = mu_student(x_i, t_i, c)                            one of the student's times t_1 > ... > t_K; x_1 is noise
    x_i    = alpha x' + sigma eps at t_i                        i > 1: x' is what the student makes of other noise by
                                                                its steps 1 ... i - 1, without gradient    section 4.5
    L_G    = a 1/2 mean |x - sg(x - g)|^2 + b mean softplus(-D(x_t))                                       section 4.3
    L_fake = L_fake of DMD + d mean (softplus(D(x_t)) + softplus(-D(real_t)))
    D(x_t) = head(middle features of fake(x_t, t, c)),  t ~ U{0, ..., T - 1}

    G every r-th training step, fake and D in each one, on new samples each time: `student.every` = r      section 4.2
    a, b, d     matching_weight, gan_weight, discriminator_weight;  g, fake and its loss are DMD's;  sg stops gradients
    real        latents of pictures, or pictures, with conditions of their own: the data's stream `real`

There is no regression, and so no pairs. Logged besides DMD's: student/adversarial = softplus(-D), discriminator/real
and discriminator/fake, the shares that D gets right.

With `lora_rank` student and fake are adapters of one backbone whose bare form is the teacher (arXiv 2106.09685).

Deviations from the authors' code: the gradient of b's term reaches x alone, so that fake and head never hold one that
is not theirs (the authors freeze them for that pass and clear what is left); D(x_t) is read in the pass of L_fake and
so shares its t and eps; the head has its own optimizer and clipping. Every pass runs the whole U-Net, also where only
its first half is needed. The ablation with the discriminator alone is not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from lightning_modules.dmd import DMD, denoising_loss, matching_loss, paper_update
from lightning_t2i.batch import Batch, Cond, Records
from lightning_t2i.distillation import Pipeline, refuse_time
from lightning_t2i.errors import UserError
from lightning_t2i.keys import Keys
from lightning_t2i.networks.adapters import roles
from lightning_t2i.networks.build import ATTENTION
from lightning_t2i.networks.denoiser import Denoiser, Predictor
from lightning_t2i.networks.discriminator import Discriminator, middle
from lightning_t2i.options import GroupOptions
from lightning_t2i.processes import EDM
from lightning_t2i.schedules import Stepwise, value_at, values_of
from lightning_t2i.strategies.fsdp2 import mesh_of
from lightning_t2i.strategies.sharding import unsharded

REAL_FIX = "data.real: a stream of pictures, as data.main of configs/data/shapes.yaml"


class DMD2(DMD):
    """Distils a diffusion teacher without pairs, into one step or a few.

    Args:
        teacher: pipeline folder or hub id.
        student_times: the student's times t_1 > ... > t_K in the process's own units (DDPM: 0 to 999; EDM: sigma);
            null is one step from the last time.
        backward_simulation: x' as above; else it is a real picture.
        student_from: pipeline folder or hub id whose weights the student begins with; null is the teacher.
        gan_weight: b, which may change on the way: {0: 0, 40000: 0.001}. While it is 0 the discriminator
            rests, and real pictures are no more than checked.
        discriminator_weight: d.
        discriminator: how the weights of the head are updated.
        lora_rank: rank of the adapters; null trains whole networks.
        lora_alpha, lora_targets: factor alpha / rank, where null is 1, and layers of the adapters.
        base_precision: precision of the backbone under the adapters.
        options: DMD's, but for those of its regression.
    """

    def __init__(
        self,
        teacher: str,
        student_times: list[float] | None = None,
        backward_simulation: bool = True,
        student_from: str | None = None,
        gan_weight: Stepwise = 0.0,
        discriminator_weight: float = 0.01,
        discriminator: GroupOptions | None = None,
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
        lora_targets: Sequence[str] = ATTENTION,
        base_precision: Literal["fp32", "bf16"] = "fp32",
        **options: Any,
    ):
        first = student_times[0] if student_times else None
        if options.get("matching_weight") == 0:
            what, allowed = "DMD2 has no training without matching", "above 0"
            raise UserError(what, where="model.matching_weight", given=0, allowed=allowed)
        super().__init__(teacher, regression_weight=0.0, match_pairs=False, student_t=first, **options)
        if student_times and (min(student_times) < 0 or any(a <= b for a, b in pairwise(student_times))):
            allowed = "times that fall, none below 0"
            raise UserError("Not a student's times", where="model.student_times", given=student_times, allowed=allowed)
        self.has_discriminator = any(weights := values_of(gan_weight, "model.gan_weight"))
        if min(*weights, discriminator_weight) < 0:
            raise UserError("A weight is negative", where="model.gan_weight or model.discriminator_weight")
        if student_from is not None and lora_rank is not None:
            what = "Adapters begin as the teacher"
            raise UserError(what, where="model.student_from", given=student_from, allowed="null with lora_rank")
        if self.options["fake"].every != 1:
            what = "The fake network learns in every training step"
            raise UserError(what, where="model.fake.every", given=self.options["fake"].every, fix="student: {every: 5}")
        self.student_times, self.backward_simulation = student_times or [None], backward_simulation
        self.steps = len(self.student_times)
        self.student_from, self.gan_weight, self.discriminator_weight = student_from, gan_weight, discriminator_weight
        self.options["discriminator"] = discriminator or paper_update()
        self.lora_rank, self.lora_alpha, self.lora_targets = lora_rank, lora_alpha, lora_targets
        self.base_precision = base_precision
        self.reals_per_sample = 1.0  # rows of `real` for each of `main`, once training begins

    def configure_model(self) -> None:
        super().configure_model()
        for t in self.student_times:
            if t or isinstance(self.process, EDM):  # there is noise at DDPM's time 0, and none at EDM's
                refuse_time(self.process, t, "model.student_times")
        if self.has_discriminator:
            self.layer, channels, side = middle(self.teacher)
            self.add_group("discriminator", Discriminator(channels, side), self.options["discriminator"])

    def copies(self, pipeline: Pipeline) -> list[Denoiser]:
        if self.student_from is not None:
            begun = pipeline.beginning_with(self.student_from)
            return [p.trainable(self.gradient_checkpointing) for p in (begun, pipeline)]
        if self.lora_rank is None:
            return super().copies(pipeline)
        if mesh_of(self) is not None:
            raise UserError("Adapters of one backbone are not sharded", where="trainer.strategy", fix="strategy: auto")
        dtype = torch.bfloat16 if self.base_precision == "bf16" else None
        networks = roles(
            pipeline.denoiser, ("student", "fake"), self.lora_rank, dtype, self.gradient_checkpointing,
            self.lora_alpha, self.lora_targets,
        )  # fmt: skip
        pipeline.denoiser = networks[0]
        return networks[1:]

    @property
    def needs_reals(self) -> bool:
        return self.has_discriminator or (self.steps > 1 and not self.backward_simulation)

    def on_fit_start(self) -> None:
        """Refuses to begin without the real pictures that it needs."""
        super().on_fit_start()
        if self.needs_reals:
            streams = self.trainer.datamodule.training
            if "real" not in streams:
                raise UserError("This training needs real pictures", where="data.real", given="null", fix=REAL_FIX)
            self.reals_per_sample = streams["real"].batch_size / streams["main"].batch_size
            if not self.backward_simulation and self.reals_per_sample != 1:
                what, given = "Real pictures stand in for samples", streams["real"].batch_size
                allowed = f"{streams['main'].batch_size}, as data.main has"
                raise UserError(what, where="data.real.batch_size", given=given, allowed=allowed)

    def refuse_reals(self, reals: Records) -> None:
        """Refuses real records that do not go with the samples.

        Raises:
            UserError: latents of another shape, or no captions or labels where the teacher is asked with them.
        """
        if reals.latent is not None:
            shape = tuple(reals.latent.shape[1:])
        else:
            assert reals.image is not None
            shape = self.codec.latent_shape((reals.image.shape[-2], reals.image.shape[-1]))
        if shape != self.shape:
            what, allowed = "Real pictures have another size than samples", f"latents of {self.shape}"
            raise UserError(what, where="data.real", given=f"latents of {shape}", allowed=allowed)
        if reals.cond is None and self.pipeline.text is not None and reals.caption is None:
            raise UserError("Real pictures of a teacher with text need captions", where="data.real")
        if reals.cond is None and self.classes and reals.label is None:
            raise UserError("Real pictures of a class-conditional teacher need labels", where="data.real")

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        due, reals, gan_weight = self.due("student"), batch.get("real"), value_at(self.gan_weight, self.counters.step)
        if self.needs_reals:  # also while the discriminator rests: what it will stumble over is told now
            self.refuse_reals(batch["real"])
        z, cond, places = self.inputs(batch["main"])
        with torch.set_grad_enabled(due):
            x_i, t, cond = self.student_input(z, cond, places, reals)
            x = self.student.x0(x_i, t, cond)
        fixed = x.detach(), cond, places
        if due:
            loss = self.matching_weight * matching_loss(x, self.matching(*fixed))
            if gan_weight:
                towards = self.adversarial_gradient(*fixed)
                loss = loss + gan_weight * ((x - fixed[0]) * towards).sum()  # adds a gradient and no value
            self.backward("student", loss, brightness=x.mean(), contrast=x.std())
        if gan_weight:
            self.backward(("fake", "discriminator"), self.guidance_loss(*fixed, reals))
        else:
            self.backward("fake", self.fake_loss(*fixed))

    def student_input(
        self, z: Tensor, cond: Cond | None, places: Tensor, reals: Records | None
    ) -> tuple[Tensor, Tensor | float, Cond | None]:
        """(x_i [B, C, h, w], t_i, its condition) of a step i that all samples of the training step share, on all
        processes. A noised real picture keeps the condition that it came with."""
        i = int(self.keys.integers("step", torch.zeros(1, dtype=torch.int64), 0, self.steps))
        if i == 0:
            t = self.student_t
            return self.process.initial(z, t), self.process.t_max if t is None else t, cond
        if self.backward_simulation:
            with torch.no_grad():
                other = self.keys.normal("simulated_z", places, self.shape)
                clean = self.generate(self.student, other, cond, self.keys, places, steps=i)
        else:
            clean, cond = self.codec.latents(reals), self.condition(reals)
        t = self.student_times[i]
        return self.process.add_noise(clean, self.keys.normal("student_eps", places, self.shape), t), t, cond

    def generate(
        self,
        network: Predictor,
        z: Tensor,
        cond: Cond | None,
        keys: Keys,
        places: Tensor,
        steps: int | None = None,
    ) -> Tensor:
        """x [B, C, h, w] of unit Gaussian noise of that shape, by all steps of the student or its first ones.

        Args:
            keys, places: of the noise between two steps.
        """
        x = super().generate(network, z, cond, keys, places)
        for i, t in enumerate(self.student_times[1:steps], start=1):
            eps = keys.normal(f"between_{i}", places, self.shape)
            x = network.x0(self.process.add_noise(x, eps, t), t, cond)
        return x

    def adversarial_gradient(self, x: Tensor, cond: Cond | None, places: Tensor) -> Tensor:
        """The gradient of mean softplus(-D(x_t)) at x [B, C, h, w], without any of fake and D."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            x_t, _, t = self.noised(x, places, "gan")
            _, features = self.fake.features(x_t, t, cond, [self.layer])
            loss = softplus(-self.discriminator(features[self.layer])).mean()
        self.note(**{"student/adversarial": loss})
        with unsharded(self.fake):
            return torch.autograd.grad(loss, x)[0]

    def guidance_loss(self, x: Tensor, cond: Cond | None, places: Tensor, reals: Records) -> Tensor:
        """L_fake of samples x [B, C, h, w] without gradient and of real records: a scalar."""
        x_t, eps, t = self.noised(x, places, "fake")
        real_t, _, real_times = self.noised(self.codec.latents(reals), reals.position, "real")
        both = cond.cat(self.condition(reals)) if cond is not None else None
        rows, times = torch.cat([x_t, real_t]), torch.cat([t, real_times])
        prediction, features = self.fake.features(rows, times, both, [self.layer])
        logits, n = self.discriminator(features[self.layer]).float(), len(x)
        ours, theirs = logits[:n], logits[n:]
        right = {"fake": ours < 0, "real": theirs > 0}
        self.note(**{f"discriminator/{name}": rows.float().mean() for name, rows in right.items()})
        adversarial = softplus(ours).mean() + softplus(-theirs).mean()
        return denoising_loss(self.fake, prediction[:n], x_t, x, eps, t) + self.discriminator_weight * adversarial

    def forward_units(self) -> dict[str, float]:
        """DMD's, and those of steps before the student's, of real rows and of the discriminator's passes."""
        due, reals = 1 / self.options["student"].every, self.reals_per_sample
        units = super().forward_units()
        units["student"] += self.backward_simulation * (self.steps - 1) / 2
        if self.has_discriminator:
            units["fake"] += due + 3 * reals  # the gradient that leaves its middle is not counted
            units["discriminator"] = 3 * (due + 1 + reals)
            if "text" in units:
                units["text"] += reals
        if self.needs_reals and self.codec.vae is not None:
            units["codec.encoder"] = reals
        return units
