"""DeMe: one expert for each range of timesteps, fine-tuned apart, then merged into one model (arXiv 2410.06664).

    range i  = [floor(i T / N), floor((i + 1) T / N)),  i = 0 ... N - 1                               section 3.1
    x_t      = alpha(t) x0 + sigma(t) eps,  t ~ U(all) with probability p, else U(range i)            section 3.2
    L_i      = mean |e_i(x_t, t, c) - y|^2 + lambda mean |e_i(x_t, t, c) - e_0(x_t, t, c)|^2          eq. 6
             = (1 + lambda) mean |e_i - m|^2 + const,   m = (y + lambda e_0) / (1 + lambda)
    h'       = h + D_i h                  over channels, behind each block; the paper's W_i is I + D_i
    tau_i    = EMA(theta_i) - theta_0     the delta, written when range i is done
    theta    = theta_0 + sum_i w_i tau_i                                                              eq. 8

    theta_0, e_0    the pretrained network, frozen; every expert begins there
    theta_i, e_i    the expert of range i: the student
    y               what the network predicts: eps, v = alpha eps - sigma x0, x0, or eps - x0 of a flow
    x0 [B, C, h, w] latents of unit scale, or pictures; t native time of the process, data at its low end; c condition
    N, p, lambda    num_ranges, p_global, lambda_cons;   w  the merge's weights, see callbacks/deme_merge.py

An expert's optimum is (E[y | x_t] + lambda e_0) / (1 + lambda): with lambda = 1 half of the way to the true denoiser.

Deviations from the paper's code: the teacher stays frozen, where the code overwrites it with the averaged student at
each epoch on one process (`ema_refresh` does that on purpose). The coin for p is thrown per sample, not per batch
(`draw`); it and antithetic pairs are formed on the global batch. D_i = W_i - I is what is stored, so that weight decay
draws W_i to I. Steps are counted, not epochs. The second form of the loss is used: one error, equal gradient. Dropout
is off in the student, as in the teacher. `foldable` projects the up blocks that stock layers can take in; a middle
block cannot be exported as a stock one (lightning_t2i/networks/projections.py). Ranges are of equal width in t.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_t2i.batch import Batch, Cond, Records
from lightning_t2i.distillation import Pipeline, refuse_size
from lightning_t2i.errors import UserError
from lightning_t2i.frozen import folder_identity
from lightning_t2i.keys import Keys
from lightning_t2i.networks.denoiser import Predictor
from lightning_t2i.networks.load import BACKBONES, load_backbone
from lightning_t2i.networks.projections import Blocks, add_projections, fold_stock, mark, projected
from lightning_t2i.networks.switch import Switch
from lightning_t2i.options import EMAOptions, GroupOptions, MethodOptions
from lightning_t2i.paths import resolve
from lightning_t2i.processes import EDM, Uniform, sample
from lightning_t2i.processes.weights import squares
from lightning_t2i.range_experts import RangeExperts
from lightning_t2i.state_io import copy_into, full_tensor


def expert_loss(prediction: Tensor, target: Tensor, anchor: Tensor | None, weight: float) -> Tensor:
    """L_i of predictions, targets y and e_0 [B, C, h, w]; anchor None leaves the consistency out: a scalar."""
    if anchor is None:
        return squares(prediction, target).mean()
    middle = (target + weight * anchor) / (1 + weight)
    apart = weight / (1 + weight) * squares(target, anchor).mean()  # no gradient: makes the value that of eq. 6
    return (1 + weight) * squares(prediction, middle).mean() + apart


def ranges(first: float, end: float, count: int, whole: bool) -> list[tuple[float, float]]:
    """`count` neighbouring ranges [low, high) of equal width that cover [first, end).

    Args:
        whole: bounds are whole numbers, rounded down.
    """
    bounds = [first + i * (end - first) / count for i in range(count + 1)]
    bounds = [float(int(b + 1e-9)) for b in bounds] if whole else bounds
    return list(pairwise(bounds))


def paper_update() -> GroupOptions:
    """AdamW, clipping and EMA of the released LSUN Church script."""
    adam = partial(torch.optim.AdamW, lr=5e-5, betas=(0.95, 0.999), eps=1e-8, weight_decay=1e-6)
    return GroupOptions(adam, clip=1.0, ema=EMAOptions(0.9999, power=0.75))


@dataclass(frozen=True)
class ProjectionOptions:
    """Channel projections.

    Args:
        blocks: "all" as in the paper, exported for this repository's loader; "foldable" those that end in stock layers,
            exported as a stock network; "none".
    """

    blocks: Blocks = "all"


class DeMe(RangeExperts):
    """Trains experts of a pretrained diffusion model, all in one fit or one of them.

    Args:
        base: pipeline folder or hub id of theta_0; without an autoencoder in it x0 is a picture.
        backbone: folder or hub id of a network that takes the place of the pipeline's own as theta_0.
        revision: commit of the hub ids.
        num_ranges: N.
        range_index: the range to train, for arrays of jobs; null trains all, one after the other in one fit.
        steps_per_range: training steps of each range; the fit has N times as many, or as many for one range.
        p_global: p.
        draw: throw the coin for p for each sample (each antithetic pair), or once for each batch.
        antithetic: the times of positions 2j and 2j + 1 are mirror images.
        lambda_cons: lambda; 0 asks no teacher.
        ema_refresh: an ablation: every so many steps the averaged student takes the place of e_0 in the loss.
        projection: which blocks are projected.
        null_probability: how often a condition is replaced by the null condition.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        guidance, steps, solver: how `sample` samples.
        deltas: folder of the deltas, one for all jobs of an array; null is `deltas` in the run's folder.
        delta_precision: of stored deltas; bfloat16 halves them at an error of 2^-9 of tau.
        student: how the weights are updated; optimizer, schedule and EMA begin anew with each range.
        common: options of the engine.
    """

    may_rest = ()

    def __init__(
        self,
        base: str,
        backbone: str | None = None,
        revision: str | None = None,
        num_ranges: int = 4,
        range_index: int | None = None,
        steps_per_range: int = 20000,
        p_global: float = 0.3,
        draw: Literal["sample", "batch"] = "sample",
        antithetic: bool = True,
        lambda_cons: float = 1.0,
        ema_refresh: int | None = None,
        projection: ProjectionOptions | None = None,
        null_probability: float = 0.1,
        gradient_checkpointing: bool = False,
        guidance: float = 3.0,
        steps: int = 25,
        solver: Literal["ddim", "euler", "heun", "dpmpp_2m"] = "ddim",
        deltas: str | None = None,
        delta_precision: Literal["float32", "bfloat16"] = "float32",
        student: GroupOptions | None = None,
        common: MethodOptions | None = None,
    ):
        precision = getattr(torch, delta_precision)
        super().__init__(num_ranges, range_index, steps_per_range, deltas, precision, common)
        for name, value in (("p_global", p_global), ("null_probability", null_probability)):
            if not 0 <= value <= 1:
                raise UserError("Not a probability", where=f"model.{name}", given=value)
        if lambda_cons < 0 or (ema_refresh is not None and (ema_refresh < 1 or not lambda_cons)):
            given = f"lambda_cons {lambda_cons}, ema_refresh {ema_refresh}"
            raise UserError("The consistency cannot be so", where="model.lambda_cons", given=given)
        self.options = student or paper_update()
        if self.options.ema is None or self.options.ema.start or self.options.every > 1:
            what, fix = "An expert is the average of every step of its range", "ema: {decay: 0.999, start: 0}, every: 1"
            raise UserError(what, where="model.student", fix=fix)
        self.source, self.backbone, self.revision = base, backbone, revision
        self.p_global, self.draw, self.antithetic = p_global, draw, antithetic
        self.lambda_cons, self.ema_refresh = lambda_cons, ema_refresh
        self.projection = projection or ProjectionOptions()
        self.null_probability, self.gradient_checkpointing = null_probability, gradient_checkpointing
        self.guidance, self.steps, self.val_steps, self.solver = guidance, steps, steps, solver

    def configure_model(self) -> None:
        pipeline = self.pipeline = Pipeline.load(self.source, self.revision, self.guidance)
        self.process, self.shape, self.identity = pipeline.denoiser.process, pipeline.shape, pipeline.identity
        if isinstance(self.process, EDM):
            what, allowed = "Ranges of equal width make no sense in sigma", "a ddpm or flow process"
            raise UserError(what, where="model.base", given=self.process.name, allowed=allowed)
        if self.backbone is not None:
            pipeline.denoiser = type(pipeline.denoiser)(self.read(), self.process, pipeline.denoiser.prediction)
            self.identity += f"+{folder_identity(resolve(self.backbone), self.revision)}"
        end = self.process.t_max + self.process.discrete
        self.ranges = ranges(self.process.t_min, end, self.num_ranges, self.process.discrete)
        if any(low >= high for low, high in self.ranges):
            what, allowed = "A range holds no time", f"at most {end - self.process.t_min:g}"
            raise UserError(what, where="model.num_ranges", given=self.num_ranges, allowed=allowed)
        student = pipeline.trainable(self.gradient_checkpointing)
        add_projections(student.backbone, self.projection.blocks)
        target = pipeline.trainable() if self.ema_refresh else None
        dtype = torch.bfloat16 if self.common.precision == "bf16" else None
        self.add_frozen("teacher", pipeline.denoiser, self.identity, dtype)
        self.add_frozen("codec", pipeline.codec, pipeline.identity)
        if pipeline.text is not None:
            self.add_frozen("text", pipeline.text, pipeline.identity, dtype)
        if target is not None:  # moves in the training, and so is in the checkpoint
            add_projections(target.backbone, self.projection.blocks)
            self.add_frozen("target", target, self.identity)
        self.add_group("student", student, self.options)

    def on_fit_start(self) -> None:
        """Refuses pictures of another size than the network's, too."""
        super().on_fit_start()
        refuse_size(getattr(self.trainer.datamodule, "training", {}).get("main"), self.codec, self.shape)

    @property
    def drawing(self) -> dict[str, Any]:
        names = ("p_global", "draw", "antithetic", "lambda_cons", "ema_refresh", "null_probability")
        return {name: getattr(self, name) for name in names}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        if self.counters.micro == 0:
            self.begin_step()
        main = batch["main"]
        cond, t = self.condition(main), self.times(main.position)
        if cond is not None:
            cond = cond.drop(self.keys.bernoulli("null", main.position, self.null_probability))
        x_t, y = self.noised(self.codec.latents(main), main.position, self.keys, t)
        anchor = None
        if self.lambda_cons:
            with torch.no_grad():
                anchor = (self.target if self.ema_refresh else self.teacher)(x_t, t, cond)
        prediction = self.student(x_t, t, cond)
        loss = expert_loss(prediction, y, anchor, self.lambda_cons)
        scalars = {} if anchor is None else {"distance": squares(prediction, anchor).mean().detach()}
        self.backward("student", loss, denoising=squares(prediction, y).mean().detach(), **scalars)

    def begin_step(self) -> None:
        super().begin_step()
        if self.ema_refresh and self.counters.step % self.steps_per_range % self.ema_refresh == 0:
            for to, average in zip(self.target.parameters(), self.student_ema.parameters(), strict=True):
                copy_into(to, full_tensor(average))

    def times(self, positions: Tensor) -> Tensor:
        """t [B] of the samples at these positions of the global batch."""
        pairs = positions.div(2, rounding_mode="floor") if self.antithetic else positions
        place = pairs if self.draw == "sample" else torch.full_like(positions, self.counters.micro)
        spans = self.ranges[self.current], (self.ranges[0][0], self.ranges[-1][1])
        own, every = (Uniform(low=a, high=b, antithetic=self.antithetic)(self.process, self.keys, positions)
                      for a, b in spans)  # fmt: skip
        return torch.where(self.keys.bernoulli("global", place, self.p_global), every, own)

    def noised(self, x0: Tensor, places: Tensor, keys: Keys, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x_t, y) [B, C, h, w] of x0 of that shape at these positions and at t [B]."""
        eps = keys.normal("eps", places, tuple(x0.shape[1:]))
        return self.process.add_noise(x0, eps, t), self.student.target(x0, eps, t)

    def range_losses(self, network: Predictor, records: Records, cond: Cond | None, keys: Keys) -> Tensor:
        """mean |e - y|^2 over the samples at times of each range: [N]."""
        return torch.stack(list(self.each_range(network, records, cond, keys)))

    def each_range(self, network: Predictor, records: Records, cond: Cond | None, keys: Keys) -> Iterator[Tensor]:
        """The same, one range after the other, so that a caller can free the graph of each."""
        x0, places = self.codec.latents(records), records.position
        for low, high in self.ranges:
            t = Uniform(low=low, high=high, antithetic=True)(self.process, keys, places)
            x_t, y = self.noised(x0, places, keys, t)
            yield squares(network(x_t, t, cond), y).mean()

    def switch(self, experts: list[Any]) -> Switch:
        """Experts, one for each range, that take turns."""
        return Switch(experts, [high for _, high in self.ranges[:-1]])

    def condition(self, records: Records) -> Cond | None:
        """Cached conditions, encoded captions, class labels, or nothing."""
        return self.pipeline.condition(records)

    def read(self) -> torch.nn.Module:
        return load_backbone(self.backbone or self.source, revision=self.revision)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from super().tensors()
        if self.ema_refresh:
            yield from ((f"target.{name}", p) for name, p in self.target.named_parameters())

    def forward_units(self) -> dict[str, float]:
        """Forward passes of a training step: a gradient costs two more; pictures and captions one, unless cached."""
        anchor = {"target" if self.ema_refresh else "teacher": 1.0} if self.lambda_cons else {}
        text = {"text": 1.0} if hasattr(self, "text") else {}
        return {"student": 3.0, **anchor, "codec.encoder": 1.0, **text}

    @torch.no_grad()
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """mean |e - y|^2 of the averaged student at times of each range, at noise that validations share."""
        main = batch["main"]
        network, keys = self.generator_of("student"), self.keys.fork("validation")
        losses = self.range_losses(network, main, self.condition(main), keys)
        stage = "test" if self.trainer.testing else "val"
        values = {f"{stage}/range_{i}": loss for i, loss in enumerate(losses)} | {f"{stage}/loss": losses.mean()}
        self.log_dict(values, batch_size=len(main), sync_dist=True)

    test_step = validation_step

    @torch.no_grad()
    def sample(self, cond: Cond | None, keys: Keys, positions: Tensor, network: Any = None) -> Tensor:
        """Pictures [B, 3, H, W] of a network, by default the averaged student; noise depends on keys and position."""
        z = keys.normal("z", positions, self.shape)
        scale = self.guidance if cond is not None else 1.0
        latents = sample(network or self.generator_of("student"), z, cond, self.steps, scale, self.solver)
        return self.codec.decode(latents).clamp(-1, 1)

    def export(self, folder: Path, batches: Iterable[Batch]) -> None:
        """Writes the pipeline of the averaged student, an expert; `train.py merge` writes that of the merged model."""
        self.save(folder, self.generator_of("student"))

    def save(self, folder: Path, denoiser: Any) -> None:
        """Writes the pipeline of a network: a stock one where its projections fold into stock layers."""
        network = denoiser.merged()
        is_stock = fold_stock(network.backbone)
        self.pipeline.save(folder, network)
        if not is_stock:
            component = next(name for name in BACKBONES if (folder / name).is_dir())
            mark(folder, component, projected(network.backbone))
