"""InstaFlow: one-step text-to-image by straightening a teacher's flow first (arXiv 2309.06380).

The paper's time runs from noise (0) to data (1), and its velocity points to the data. This repository's runs the other
way (docs/glossary.md). In the paper's symbols, with s for its time:

    X_s       = s x + (1 - s) z                                       the straight line of a pair              section 2
    Reflow    v_(k+1) = argmin E |(x - z) - v(X_s, s, c)|^2           s ~ U[0, 1],  x = ODE[v_k](z, c)         eq. 3, 4
    OneStep   v'_k    = argmin E D(x, z + v(z, 0, c))                 D: squares of latents, then of pictures  eq. 5
    v^a       = a v(X, s, c) + (1 - a) v(X, s, null)                  guidance                                 section 3
    Euler     X <- X + v^a(X, s) / N,  s = 0, 1/N, ..., 1 - 1/N

    here      t = 1 - s, velocity = -v: dx/dt = velocity, and the network is told 1000 t, so z at 1000.0

    z         unit Gaussian noise, drawn again from a pair's noise seed;   x [B, C, h, w] where the teacher takes it
    v_1       the teacher, never retrained: ODE[v_1] is its own sampler with guidance
    v_k, k > 1   the exported student of the k-1st reflow; it is the teacher of the next, and of OneStep
    a         alpha;   c  caption;   null  the empty caption;   N  steps

The student is a raw velocity head on the teacher's network. What a diffusion teacher's output becomes at the start:

    converted   negated, then `init_steps` training steps on the teacher's exact velocity at X_s; they count too
    raw         read as v, as the authors did: its noise part has the opposite sign
    negated     read as -v

Logged beside student/loss, of Reflow: student/loss_1 ... loss_4, the parts of the loss in the quarters of t from
data to noise, which add up to it.

Deviations: the authors train no `converted` start, which replaces the part of their training that turns the sign;
`raw` is theirs. They do not say whether captions are dropped in reflow: here .1 are, since alpha needs the null branch.
The input of OneStep is z itself at t = 1; RectifiedFlow's code leaks .001 of the target into it. Stages begin with the
averaged weights of the one before, as exported in fp16. Weights of LPIPS are AlexNet's ("lpips_alex") or VGG's. Small
pictures of pixel-space models are enlarged to 224 for LPIPS, as arXiv 2405.20320 does; RectifiedFlow's are not. Left
out: paths other than straight ones between the ends of a pair, and times of reflow in a few discrete steps.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from lightning_modules.teacher import Teacher
from lightning_t2i.batch import Batch, Cond, Records
from lightning_t2i.distillation import Pipeline, picture_distance, refuse_foreign_pairs, without_dropout
from lightning_t2i.errors import UserError
from lightning_t2i.flow_student import FlowStudent
from lightning_t2i.keys import Keys
from lightning_t2i.networks.backbones import negate_output
from lightning_t2i.networks.denoiser import Denoiser, Predictor, Reexpressed
from lightning_t2i.networks.stacked_unet import Junction, StackedUNet, stacked
from lightning_t2i.options import EMAOptions, GroupOptions, MethodOptions
from lightning_t2i.pairs import noise
from lightning_t2i.processes import RectifiedFlow, TimeLaw, Uniform
from lightning_t2i.processes.weights import squares
from lightning_t2i.schedules import Warmup

Init = Literal["converted", "raw", "negated"]


def paper_update() -> GroupOptions:
    """The paper's AdamW, warm-up, clipping and average; the rate is that of its reflows."""
    adam = partial(torch.optim.AdamW, lr=1e-6, weight_decay=1e-2)
    return GroupOptions(adam, schedule=partial(Warmup, steps=1000), clip=1.0, ema=EMAOptions(decay=0.9999))


class Points(NamedTuple):
    """Points x_t of pairs' lines: z, x, x_t [B, C, h, w] in float32, t [B], the condition."""

    z: Tensor
    x: Tensor
    x_t: Tensor
    t: Tensor
    cond: Cond | None


class InstaFlow(FlowStudent):
    """What both stages share.

    Args:
        teacher: pipeline folder or hub id that made the pairs: a diffusion teacher, or an exported flow.
        revision: commit of a hub id.
        guidance: scale at which the pairs were sampled: the teacher's, or alpha of the flow that made them.
        init: how a diffusion teacher's network becomes a velocity head; a flow is one already.
        init_steps: training steps of the conversion.
        start: checkpoint folder of another run whose weights, averages and optimizer states this one begins with; there
            is no conversion then.
        start_optimizer: take the optimizer's states from there too, with its rate and schedule in place of `student`'s.
        size: side of the pictures in pixels; null is the size that the network was made for (FLUX has none).
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        val_steps: steps of the teacher's sampler that validation compares with.
        student: how the weights are updated.
        common: options of the engine.
    """

    may_rest = ()

    def __init__(
        self,
        teacher: str,
        revision: str | None = None,
        guidance: float = 5.0,
        init: Init = "converted",
        init_steps: int = 1000,
        start: str | None = None,
        start_optimizer: bool = True,
        size: int | None = None,
        gradient_checkpointing: bool = False,
        val_steps: int = 25,
        student: GroupOptions | None = None,
        common: MethodOptions | None = None,
    ):
        super().__init__(common)
        if init_steps < 0:
            raise UserError("A number of steps is negative", where="model.init_steps", given=init_steps)
        self.source, self.revision, self.guidance, self.val_steps = teacher, revision, guidance, val_steps
        self.init, self.init_steps, self.start, self.start_optimizer = init, init_steps, start, start_optimizer
        self.size, self.gradient_checkpointing, self.options = size, gradient_checkpointing, student or paper_update()

    def configure_model(self) -> None:
        pipeline = self.pipeline = Pipeline.load(self.source, self.revision, self.guidance, self.size)
        self.process, self.shape = RectifiedFlow(), pipeline.shape
        student = Denoiser(self.backbone(pipeline), self.process, "velocity")
        dtype = torch.bfloat16 if self.common.precision == "bf16" else None
        self.add_frozen("teacher", pipeline.denoiser, pipeline.identity, dtype)
        self.add_frozen("codec", pipeline.codec, pipeline.identity)
        if pipeline.text is not None:
            self.add_frozen("text", pipeline.text, pipeline.identity, dtype)
        self.add_group("student", student, self.options)

    def backbone(self, pipeline: Pipeline) -> Any:
        """The network with which the student begins: a copy of the teacher's, with the sign that `init` says."""
        network = pipeline.trainable(self.gradient_checkpointing).backbone
        if isinstance(pipeline.denoiser.process, RectifiedFlow):
            if self.init != "converted":
                allowed = "converted, which is exact for a flow"
                raise UserError("This teacher is a flow already", where="model.init", given=self.init, allowed=allowed)
        elif self.init == "raw":
            negate_output(network)
        return network

    @property
    def converting(self) -> bool:
        """Whether this training step is one of the conversion."""
        flow = self.start is not None or isinstance(self.teacher.process, RectifiedFlow)  # what it begins with
        return self.init == "converted" and not flow and self.counters.step < self.init_steps

    @property
    def sees_pictures(self) -> bool:
        """Whether D compares decoded pictures in this training step."""
        return False

    def on_fit_start(self) -> None:
        """Refuses pairs that are missing, or those of another teacher or scale."""
        recipe = Teacher(self.source, revision=self.revision).recipe
        pairs = self.trainer.datamodule.training.get("main")
        refuse_foreign_pairs(pairs, recipe, self.shape, self.guidance, "data.main")

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        at = self.points(batch["main"], self.keys)
        if self.converting:
            errors = squares(self.student(at.x_t, at.t, at.cond), self.teacher_velocity(at.x_t, at.t, at.cond))
        else:
            errors = self.errors(self.student, at)
        self.backward("student", errors.mean(), **self.signals(at, errors))

    def points(self, pairs: Records, keys: Keys) -> Points:
        """Where a network is asked: here at the noise, t = 1."""
        assert pairs.noise_seed is not None
        x = pairs.image if self.codec.vae is None else pairs.latent
        assert x is not None
        z, t = noise(pairs.noise_seed, self.shape), torch.ones(len(x), device=x.device)
        return Points(z, x, z, t, self.condition(pairs))

    def pair_loss(self, pairs: Records, network: Predictor, keys: Keys) -> Tensor:
        return self.errors(network, self.points(pairs, keys)).mean()

    @abstractmethod
    def errors(self, network: Predictor, at: Points) -> Tensor:
        """What is minimised, of each sample: [B]."""

    def signals(self, at: Points, errors: Tensor) -> dict[str, Tensor]:
        """What is logged beside the loss."""
        return {}

    @torch.no_grad()
    def teacher_velocity(self, x_t: Tensor, t: Tensor | float, cond: Cond | None) -> Tensor:
        """The teacher's velocity at a point of the straight process, converted exactly, unguided: [B, C, h, w]."""
        return Reexpressed(self.teacher, "velocity", self.process).predict(x_t, t, cond)

    def add_metric(self, kind: str, weights: str | None) -> None:
        """The frozen distance of pictures; LPIPS sees those of pixel-space models enlarged."""
        metric = picture_distance(kind, weights, self.codec)
        self.add_frozen("metric", metric, metric.identity)

    def picture_errors(self, found: Tensor, x: Tensor) -> Tensor:
        """The metric's distance of both decoded, [B]; x has no gradient."""
        with torch.no_grad():
            picture = self.codec.decode(x)
        distances: Tensor = self.metric(self.codec.decode(found), picture)
        return distances

    def forward_units(self) -> dict[str, float]:
        """Forward passes of a training step as the next one: a gradient costs two more."""
        units = {"student": 3.0, "text": 1.0} if hasattr(self, "text") else {"student": 3.0}
        if self.converting:
            return units | {"teacher": 1.0}
        if self.sees_pictures:
            units |= {"metric": 2.0, "codec.decoder": 3.0 * (self.codec.vae is not None)}
        return units


class Reflow(InstaFlow):
    """Straightens the flow that made the pairs.

    Args:
        teacher: see `InstaFlow`.
        law: distribution of the times.
        null_probability: how often a caption is replaced by the null condition.
        steps, alpha: steps and guidance of the student's own sampling.
        options: those that both stages share.
    """

    def __init__(
        self,
        teacher: str,
        law: TimeLaw | None = None,
        null_probability: float = 0.1,
        steps: int = 25,
        alpha: float = 1.5,
        **options: Any,
    ):
        super().__init__(teacher, **options)
        if not 0 <= null_probability < 1:
            raise UserError("Not a probability", where="model.null_probability", given=null_probability)
        if steps < 1:
            raise UserError("A solver needs at least one step", where="model.steps", given=steps)
        self.law, self.null_probability = law or Uniform(), null_probability
        self.steps, self.alpha = steps, alpha

    def points(self, pairs: Records, keys: Keys) -> Points:
        z, x, _, _, cond = super().points(pairs, keys)
        if cond is not None and self.null_probability:
            cond = cond.drop(keys.bernoulli("null", pairs.position, self.null_probability))
        t = self.law(self.process, keys, pairs.position)
        return Points(z, x, self.process.add_noise(x, z, t), t, cond)

    def errors(self, network: Predictor, at: Points) -> Tensor:
        return squares(network(at.x_t, at.t, at.cond), network.target(at.x, at.z, at.t))

    def signals(self, at: Points, errors: Tensor) -> dict[str, Tensor]:
        quarter = (4 * at.t).long().clamp(max=3)
        return {f"loss_{q + 1}": (errors * (quarter == q)).mean() for q in range(4)}


class OneStep(InstaFlow):
    """Distils a flow, or a diffusion teacher without reflow, into one step.

    Args:
        teacher: see `InstaFlow`.
        guidance: see `InstaFlow`; alpha of the pairs.
        perceptual_from: training step from which D compares decoded pictures; null never does.
        metric: D of pictures: "perceptual", "lpips" (VGG) or "lpips_alex".
        metric_weights: folder of the "perceptual" network, safetensors file of the others.
        junction: stack two copies of a U-Net, joined in this way (1.7B); null keeps one.
        residual: let the second begin as a correction of nothing.
        options: those that both stages share.
    """

    steps, alpha = 1, 1.0

    def __init__(
        self,
        teacher: str,
        guidance: float = 1.5,
        perceptual_from: int | None = None,
        metric: Literal["perceptual", "lpips", "lpips_alex"] = "lpips_alex",
        metric_weights: str | None = None,
        junction: Junction | None = None,
        residual: bool = False,
        **options: Any,
    ):
        super().__init__(teacher, guidance=guidance, **options)
        self.perceptual_from, self.metric_kind, self.metric_weights = perceptual_from, metric, metric_weights
        self.junction, self.residual = junction, residual
        if residual and junction not in ("full", "features"):
            raise UserError("No such residual", where="model.residual", given=junction, allowed="full or features")

    def configure_model(self) -> None:
        super().configure_model()
        if self.perceptual_from is not None:
            self.add_metric(self.metric_kind, self.metric_weights)

    def backbone(self, pipeline: Pipeline) -> Any:
        network = super().backbone(pipeline)
        if isinstance(network, StackedUNet):
            theirs = {name: network.config[name] for name in ("junction", "residual")}
            if self.junction is not None and theirs != (ours := {"junction": self.junction, "residual": self.residual}):
                what, fix = "The teacher is a stack already, joined in another way", "junction: null keeps it"
                raise UserError(what, where="model.junction", given=ours, allowed=str(theirs), fix=fix)
            return network
        if self.junction is None:
            return network
        if not isinstance(network, UNet2DConditionModel):
            what, given = "Only U-Nets with text are stacked", type(network).__name__
            raise UserError(what, where="model.junction", given=given, fix="junction: null")
        double = without_dropout(stacked(network, self.junction, self.residual))
        if self.gradient_checkpointing:
            double.enable_gradient_checkpointing()
        return double

    @property
    def sees_pictures(self) -> bool:
        return self.perceptual_from is not None and self.counters.step >= self.perceptual_from

    def errors(self, network: Predictor, at: Points) -> Tensor:
        found = network.x0(at.x_t, at.t, at.cond)
        return self.picture_errors(found, at.x) if self.sees_pictures else squares(found, at.x)
