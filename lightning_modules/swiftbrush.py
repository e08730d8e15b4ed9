"""SwiftBrush: an image-free one-step student by variational score distillation (arXiv 2312.05239).

    x      = f(z, c) = (z - sigma_T eps_student(z, T, c)) / alpha_T            of a v network: alpha_T z - sigma_T v
    x_t    = alpha x + sigma eps,  t ~ U{0.02 T, ..., 0.98 T}
    g      = w(t) (eps_teacher(x_t, t, c) - eps_lora(x_t, t, c)),  w = sigma^2
    L_G    = 1/2 mean |x - sg(x - g)|^2
    L_lora = mean alpha^2 |eps_lora(x_t, t, c) - eps|^2,  x = sg(x), t ~ U{0, ..., T}, c dropped with probability 0.1

    z, eps      unit Gaussian noise
    x [B, C, h, w]   latents of unit scale;  c  caption
    t, T        time of the DDPM, and its last one;  alpha_T, sigma_T  its alpha and sigma there
    teacher     frozen, guided in g: u + scale (c - u)
    lora        the teacher with a low-rank adapter (arXiv 2106.09685) that learns the score of what the student makes,
                guided in g too, with a scale of its own; in memory it is the adapter alone
    student     all weights, begins as the teacher; neither guided nor dropped
    sg          stops gradients

sigma^2 (eps_teacher - eps_lora) = sigma alpha (mu_lora - mu_teacher) in estimates mu of x: DMD's step with the weight
sigma^3 / alpha and an adapter for the fake network, so what a student is and how it samples is DMD's. The value of L_G
is half the mean square of a gradient and shows no progress. It is exactly 0 in the first training step, where the
adapter is 0. Logged as student/...: g = mean |g|, and g_low, g_mid, g_high of the samples in each third of T, nan
where a training step has none; gap = mean |eps_teacher - eps_lora|; cosine of eps_teacher - eps and eps_lora - eps;
brightness and contrast, mean and standard deviation of x.

Deviations from the authors' code: alpha_T is the schedule's own (.06826 for Stable Diffusion) and not sqrt(.0047),
which `alpha_T_sq` gives back; captions are dropped for each sample and not for a whole batch; values that are not
finite stop the training and are not set to 0; guided and unguided rows are one call. The student may be asked at an
earlier time than T (`student_t`), which is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_modules.dmd import DMD, matching_loss
from lightning_t2i.batch import Batch, Cond, Records
from lightning_t2i.distillation import Pipeline, refuse_time
from lightning_t2i.errors import UserError
from lightning_t2i.networks.adapters import roles
from lightning_t2i.networks.denoiser import Denoiser
from lightning_t2i.options import EMAOptions, GroupOptions, MethodOptions
from lightning_t2i.processes import DDPM, expand, guided
from lightning_t2i.quantization import Bits
from lightning_t2i.schedules import Stepwise, value_at
from lightning_t2i.strategies.fsdp2 import mesh_of

Form: TypeAlias = Literal["sigma2", "one", "sigma_over_alpha"]
Score: TypeAlias = Literal["lora", "noise", "teacher"]
THIRDS = ("student/g_low", "student/g_mid", "student/g_high")
FORMATS: dict[str, Bits] = {"nf4": "nf4", "int8": "int8"}  # of quantised backbones


def vsd_gradient(teacher: Tensor, score: Tensor, alpha: Tensor, sigma: Tensor, form: Form) -> Tensor:
    """g [B, C, h, w] of two estimates of the noise of that shape; alpha and sigma [B] are those of t.

    "sigma_over_alpha" is the plain difference of the estimates of x (Diff-Instruct, arXiv 2305.18455).
    """
    weight = {"sigma2": sigma**2, "one": torch.ones_like(sigma), "sigma_over_alpha": sigma / alpha}[form]
    return expand(weight, teacher) * (teacher - score)


def score_loss(prediction: Tensor, eps: Tensor, alpha: Tensor, weight: Literal["abar", "uniform"]) -> Tensor:
    """L_lora of an estimate of the noise and the noise, [B, C, h, w] each, and alpha [B]: a scalar."""
    factor = alpha**2 if weight == "abar" else torch.ones_like(alpha)
    return (expand(factor, eps) * (prediction - eps).square()).mean()


def ending_at(process: DDPM, t: int, alpha_sq: float) -> DDPM:
    """The process with another alpha^2 at t.

    Raises:
        UserError: there would be less noise than one time earlier, or nothing else.
    """
    before = float(process.alphas_cumprod[t - 1])
    if not 0 < alpha_sq < before:
        allowed = f"between 0 and {before:.6g}"
        raise UserError("Not an alpha^2 of the last time", where="model.alpha_T_sq", given=alpha_sq, allowed=allowed)
    betas = process.betas.double()
    betas[t] = 1 - alpha_sq / process.alphas_cumprod[t - 1].double()
    return DDPM(steps=process.steps, trained_betas=betas.tolist(), clip=process.clip)


def paper_update(lr: float, ema: EMAOptions | None = None) -> GroupOptions:
    """The authors' Adam without weight decay, and their clipping."""
    return GroupOptions(partial(torch.optim.Adam, lr=lr, betas=(0.9, 0.999)), clip=1.0, ema=ema)


class SwiftBrush(DMD):
    """Distils a DDPM teacher with text into one step, from prompts alone.

    Args:
        teacher: pipeline folder or hub id.
        revision: commit of a hub id.
        guidance: scale of the teacher's guidance in g, 1 is none.
        lora_guidance: scale of lora's; 1 saves a pass.
        weight: form of w.
        t_min, t_max: range of the times of g, as shares of T, both ends included; t_max may change on the way.
        alpha_T_sq: alpha_T^2 of the student; null is the schedule's, .0047 that of the authors' published student.
        student_t: time at which the student is asked for x; null is the last.
        reparameterised: false takes the student's output for x itself, the ablation of the paper.
        score: "lora"; "noise" puts eps in its place (DreamFusion's gradient, SDS), "teacher" the teacher without
            guidance: the ablations without an adapter.
        lora_rank, lora_alpha, lora_targets: rank, factor alpha / rank and layers of the adapter.
        lora_weight: weight alpha^2 of L_lora, or none, as the paper writes it.
        drop_probability: of captions in L_lora.
        drop_batch: all captions of a training step at once, as the authors do.
        base_precision: precision of the frozen weights that teacher and lora share.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        val_steps: steps of the teacher's sampler that validation compares with.
        student, lora: how the weights are updated.
        common: options of the engine.
    """

    may_rest = ("student", "lora")
    _thirds: Tensor  # of a training step that is logged: sums and numbers of samples [2, 3]

    def __init__(
        self,
        teacher: str,
        revision: str | None = None,
        guidance: float = 4.5,
        lora_guidance: float = 4.5,
        weight: Form = "sigma2",
        t_min: float = 0.02,
        t_max: Stepwise = 0.98,
        alpha_T_sq: float | None = None,
        student_t: int | None = None,
        reparameterised: bool = True,
        score: Score = "lora",
        lora_rank: int = 64,
        lora_alpha: float = 108.0,
        lora_targets: Sequence[str] = ("to_q", "to_v"),
        lora_weight: Literal["abar", "uniform"] = "abar",
        drop_probability: float = 0.1,
        drop_batch: bool = False,
        base_precision: Literal["fp32", "bf16", "nf4", "int8"] = "fp32",
        gradient_checkpointing: bool = False,
        val_steps: int = 25,
        student: GroupOptions | None = None,
        lora: GroupOptions | None = None,
        common: MethodOptions | None = None,
    ):
        super().__init__(
            teacher, revision, guidance, t_min=t_min, t_max=t_max, regression_weight=0.0, student_t=student_t,
            gradient_checkpointing=gradient_checkpointing, val_steps=val_steps, common=common,
        )  # fmt: skip
        if not 0 <= drop_probability < 1:
            raise UserError(
                "Not a probability", where="model.drop_probability", given=drop_probability, allowed="[0, 1)"
            )
        if lora_rank < 1:
            raise UserError("An adapter has a rank", where="model.lora_rank", given=lora_rank, allowed="1 or more")
        if not reparameterised and alpha_T_sq is not None:
            what = "A student whose output is x has no alpha_T"
            raise UserError(what, where="model.alpha_T_sq", given=alpha_T_sq, fix="alpha_T_sq: null")
        if "teacher" in self.common.quantize and score == "lora":
            what, fix = "Teacher and lora share their weights", f"base_precision: {self.common.quantize['teacher']}"
            raise UserError(what, where="model.common.quantize", given="teacher", fix=fix)
        if score != "lora" and base_precision != "fp32":
            what, fix = "No adapter shares the teacher's weights", "common: {quantize: {teacher: nf4}}"
            raise UserError(what, where="model.base_precision", given=base_precision, fix=fix)
        self.lora_guidance, self.weight, self.score = lora_guidance, weight, score
        self.alpha_T_sq, self.reparameterised = alpha_T_sq, reparameterised
        self.lora_rank, self.lora_alpha, self.lora_targets = lora_rank, lora_alpha, tuple(lora_targets)
        self.lora_weight, self.drop_probability, self.drop_batch = lora_weight, drop_probability, drop_batch
        self.base_precision = base_precision
        self.options = {
            "student": student or paper_update(1e-6, EMAOptions(decay=0.9999)),
            "lora": lora or paper_update(1e-3),
        }

    def configure_model(self) -> None:
        guidance = self.guidance if self.guidance != 1 else self.lora_guidance
        pipeline = self.pipeline = Pipeline.load(self.source, self.revision, guidance)
        self.process, self.shape, self.classes = pipeline.denoiser.process, pipeline.shape, pipeline.classes
        if not isinstance(self.process, DDPM):
            what, allowed = "SwiftBrush knows the last time of a DDPM alone", "a teacher of a ddpm process"
            raise UserError(what, where="model.teacher", given=self.process.name, allowed=allowed)
        student = self.one_step(self.begun(pipeline))
        teacher, *adapters = self.shared(pipeline) if self.score == "lora" else [pipeline.denoiser]
        bits = FORMATS.get(self.base_precision)
        self.add_frozen("teacher", teacher, f"{pipeline.identity} in {bits}" if bits else pipeline.identity)
        self.add_frozen("codec", pipeline.codec, pipeline.identity)
        if pipeline.text is not None:
            dtype = torch.bfloat16 if self.common.precision == "bf16" else None
            self.add_frozen("text", pipeline.text, pipeline.identity, dtype)
        self.add_group("student", student, self.options["student"], student.owns)
        for lora in adapters:
            self.add_group("lora", lora, self.options["lora"], lora.owns)
            teacher.compute_dtype = lora.compute_dtype

    def begun(self, pipeline: Pipeline) -> Denoiser:
        """The student before its first training step."""
        return pipeline.trainable(self.gradient_checkpointing)

    def one_step(self, student: Denoiser) -> Denoiser:
        """The student as f: what its output means, and at which alpha."""
        assert isinstance(self.process, DDPM)
        last = int(self.process.t_max)
        t = last if self.student_t is None else int(self.student_t)
        refuse_time(self.process, t)
        if not self.reparameterised:
            student.prediction = "x0"
        elif self.alpha_T_sq is not None:
            student.process = ending_at(self.process, t, self.alpha_T_sq)
        if student.prediction == "eps" and self.process.zero_terminal_snr and t == last:
            what, fix = "At the last time nothing is left to divide by", "a v teacher, or an earlier student_t"
            raise UserError(what, where="model.teacher", given="eps with a zero terminal SNR", fix=fix)
        return student

    def shared(self, pipeline: Pipeline) -> list[Denoiser]:
        """Teacher and lora: the bare backbone and its adapter."""
        if mesh_of(self) is not None and self.base_precision != "fp32":
            what, fix = "Adapters are cut with their backbone, in one precision", "base_precision: fp32, or one process"
            raise UserError(what, where="model.base_precision", given=self.base_precision, fix=fix)
        dtype = torch.bfloat16 if self.base_precision == "bf16" else None
        bits = FORMATS.get(self.base_precision) if self.quantizes else None
        return roles(
            pipeline.denoiser, ("lora",), self.lora_rank, dtype, self.gradient_checkpointing, self.lora_alpha,
            self.lora_targets, bits,
        )  # fmt: skip

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        main, due = batch["main"], self.due("student")
        z, cond, places = self.inputs(main)
        with torch.set_grad_enabled(due):
            x = self.generate(self.student, z, cond, self.keys, places)
        fixed = x.detach(), cond, places
        if due:
            loss = self.student_loss(x, self.vsd(*fixed), main)
            self.backward("student", loss, brightness=x.mean(), contrast=x.std())
        if self.score == "lora" and self.due("lora"):  # on the same x, made before the student moves
            self.backward("lora", self.lora_loss(*fixed))

    def student_loss(self, x: Tensor, g: Tensor, records: Records) -> Tensor:
        """L_G of x [B, C, h, w], made for these records, and of its gradient g: a scalar."""
        return matching_loss(x, g)

    @torch.no_grad()
    def vsd(self, x: Tensor, cond: Cond | None, places: Tensor) -> Tensor:
        """g at x [B, C, h, w], which has no gradient."""
        x_t, eps, t = self.noised(x, places, "vsd", self.t_min, value_at(self.t_max, self.counters.step))
        teacher = guided(self.teacher.eps, x_t, t, cond, self.guidance)
        if self.score == "lora":
            score = guided(self.lora.eps, x_t, t, cond, self.lora_guidance)
        else:
            score = eps if self.score == "noise" else self.teacher.eps(x_t, t, cond)
        g = vsd_gradient(teacher, score, *self.process.alpha_sigma(t, torch.float64), self.weight)
        sizes = g.abs().flatten(1).mean(1)
        self.note_thirds(sizes, 3 * t // (int(self.process.t_max) + 1))
        deltas = [(estimate - eps).flatten(1) for estimate in (teacher, score)]
        self.note(**{"student/g": sizes.mean(), "student/gap": (teacher - score).abs().mean()})
        self.note(**{"student/cosine": torch.cosine_similarity(*deltas).mean()})
        return g

    def note_thirds(self, sizes: Tensor, third: Tensor) -> None:
        """Notes the mean of sizes [B] in each third [B], 0 to 2, over all micro-batches of all processes.

        A batch of one process may have no sample in a third: means of its means would be wrong.
        """
        if not self.logs_now:
            return
        if self.counters.micro == 0:
            self._thirds = sizes.new_zeros(2, 3)
        inside = (third[:, None] == torch.arange(3, device=third.device)).to(sizes)
        self._thirds += torch.stack([sizes @ inside, inside.sum(0)])
        if self.counters.micro + 1 == self.common.accumulate:
            sums, counts = self.gathered(self._thirds[None]).sum(0)
            self.note(**dict(zip(THIRDS, sums / counts, strict=True)))

    def lora_loss(self, x: Tensor, cond: Cond | None, places: Tensor) -> Tensor:
        """L_lora of samples x [B, C, h, w] without gradient: a scalar."""
        x_t, eps, t = self.noised(x, places, "lora")
        if cond is not None and self.drop_probability:
            keyed = torch.zeros_like(places) if self.drop_batch else places
            cond = cond.drop(self.keys.bernoulli("lora_drop", keyed, self.drop_probability))
        alpha, _ = self.process.alpha_sigma(t, torch.float64)
        return score_loss(self.lora.eps(x_t, t, cond), eps, alpha, self.lora_weight)

    def forward_units(self) -> dict[str, float]:
        """Forward passes of a training step: a gradient costs two more, a guided estimate one more."""
        due = 1 / self.options["student"].every
        units = {"student": 1 + 2 * due, "teacher": due * (1 + (self.guidance != 1) + (self.score == "teacher"))}
        if self.score == "lora":
            units["lora"] = due * (1 + (self.lora_guidance != 1)) + 3 / self.options["lora"].every
        if hasattr(self, "text"):
            units["text"] = 1.0
        return units
