"""Diffusion: trains or fine-tunes a denoiser, and so makes the teachers of all other methods.

    x_t  = alpha(t) x0 + sigma(t) eps,     t ~ law,  eps ~ N(0, I)
    loss = w(t) |F(x_t, t, c) - target|^2                   target: eps, v = alpha eps - sigma x0, x0 or eps - x0
    w    = 1, or min-SNR (arXiv 2303.09556, section 3.4), truncated SNR, SNR + 1, P2, or learned: processes/weights.py
    c    = null with probability p                          (classifier-free guidance, arXiv 2207.12598)

    x0 [B, C, h, w] latents of unit scale, or pictures; t native time of the process, data at its low end;
    snr = alpha^2 / sigma^2. Papers: DDPM 2006.11239, EDM 2206.00364 (whose target is its preconditioned network's),
    rectified flow 2209.03003, latent diffusion 2112.10752.

Deviations: the null condition replaces captions per sample by keyed draws; noise and times are keyed by position.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lightning_t2i.batch import Batch, Cond, Records
from lightning_t2i.errors import UserError
from lightning_t2i.frozen import folder_identity
from lightning_t2i.keys import Keys
from lightning_t2i.method import MethodModule
from lightning_t2i.networks.build import add_adapters, save_pipeline, text_encoder_of
from lightning_t2i.networks.codec import LatentCodec
from lightning_t2i.networks.denoiser import Denoiser
from lightning_t2i.networks.load import build_network, components
from lightning_t2i.options import GroupOptions, MethodOptions
from lightning_t2i.paths import resolve
from lightning_t2i.processes import Process, TimeLaw, Uniform, sample
from lightning_t2i.processes.weights import Uncertainty, Weighting, loss_weight, squares


def weighted_loss(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """mean over the batch of w |prediction - target|^2; [B, C, h, w] twice and [B] -> scalar."""
    return (weight * squares(prediction, target)).mean()


class Diffusion(MethodModule):
    """Trains a denoiser on pictures or cached latents.

    Args:
        network: pipeline folder or hub id to fine-tune, or a JSON architecture file to train from random weights.
        process: noise process of a network from random weights; null reads it from the pipeline's scheduler.
        prediction: what the network predicts; null reads it from the scheduler.
        codec: folder or hub id of the autoencoder; null uses the pipeline's, or pictures themselves.
        text: folder or hub id with text encoder and tokenizer, a JSON architecture file of a CLIP text encoder beside
            the tokenizer folder `tokenizer`, or null for no text.
        tokenizer: tokenizer folder of a text encoder from random weights.
        revision: commit of the hub ids.
        train_text: train the text encoder with the denoiser.
        law: distribution of the training times.
        weighting: weight of the loss over t; "uncertainty" learns one for each of `intervals` equal parts of the time.
        min_snr_gamma: gamma of min-SNR.
        null_probability: how often a caption is replaced by the null condition.
        lora_rank: train low-rank adapters of this rank instead of the weights; null trains the weights.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        guidance, steps, solver: how `sample` samples.
        embedded_guidance: what a guidance-distilled network (FLUX.1-dev) is told; other networks ignore it.
        size: side of sampled pictures in pixels; null is the size that the network was made for.
        denoiser, text_encoder: how the weights are updated.
        uncertainty: how the log variances of that weighting are; null is Adam at .02, since at a network's rate they
            would stay near 0.
        common: options of the engine.
    """

    may_rest = ()

    def __init__(
        self,
        network: str,
        process: Process | None = None,
        prediction: str | None = None,
        codec: str | None = None,
        text: str | None = None,
        tokenizer: str | None = None,
        revision: str | None = None,
        train_text: bool = False,
        law: TimeLaw | None = None,
        weighting: Weighting = "none",
        min_snr_gamma: float = 5.0,
        intervals: int = 8,
        null_probability: float = 0.1,
        lora_rank: int | None = None,
        gradient_checkpointing: bool = False,
        guidance: float = 3.0,
        steps: int = 25,
        solver: Literal["ddim", "euler", "heun", "dpmpp_2m"] = "ddim",
        embedded_guidance: float = 1.0,
        size: int | None = None,
        denoiser: GroupOptions | None = None,
        text_encoder: GroupOptions | None = None,
        uncertainty: GroupOptions | None = None,
        common: MethodOptions | None = None,
    ):
        super().__init__(common)
        if not 0 <= null_probability < 1:
            raise UserError("Not a probability", where="model.null_probability", given=null_probability)
        self.network, self.process, self.prediction, self.revision = network, process, prediction, revision
        self.codec_source, self.text_source = codec, text
        self.tokenizer, self.train_text = tokenizer, train_text
        self.law, self.weighting, self.min_snr_gamma = law or Uniform(), weighting, min_snr_gamma
        self.intervals, self.null_probability, self.lora_rank = intervals, null_probability, lora_rank
        self.gradient_checkpointing = gradient_checkpointing
        self.guidance, self.steps, self.solver = guidance, steps, solver
        self.embedded_guidance, self.size = embedded_guidance, size
        self.options, self.text_options = denoiser or GroupOptions(), text_encoder or GroupOptions()
        self.variance_options = uncertainty or GroupOptions(partial(torch.optim.Adam, lr=0.02))

    def configure_model(self) -> None:
        if self.network.endswith(".json"):
            if self.process is None or self.prediction is None:
                raise UserError("A network from random weights needs a process and a prediction", where="model.process")
            denoiser = Denoiser(build_network(self.network), self.process, self.prediction)
        else:
            denoiser = Denoiser.from_pretrained(
                self.network, revision=self.revision, process=self.process, prediction=self.prediction
            )
            parts = components(self.network, self.revision)  # a pipeline on pixels has no autoencoder
            self.codec_source = self.codec_source or (self.network if parts & {"vae", "vqvae"} else None)
            self.text_source = self.text_source or (self.network if "text_encoder" in parts else None)
        loss_weight(self.weighting, torch.ones(1), denoiser.prediction)  # raises what does not fit
        codec = LatentCodec.from_pretrained(self.codec_source, revision=self.revision)
        denoiser.backbone.picture_factor = codec.factor  # what SDXL is told of the pictures depends on it
        text = text_encoder_of(self.text_source, self.tokenizer, self.revision)
        if self.gradient_checkpointing:
            denoiser.backbone.enable_gradient_checkpointing()
        if self.lora_rank is not None:
            add_adapters(denoiser.backbone, self.lora_rank)
        self.add_frozen("codec", codec, folder_identity(resolve(self.codec_source or "pixels"), self.revision))
        self.add_group("denoiser", denoiser, self.options)
        if self.weighting == "uncertainty":
            self.add_group("uncertainty", Uncertainty(self.intervals), self.variance_options)
        if text is not None and self.train_text:
            self.add_group("text", text, self.text_options)
        elif text is not None:
            self.add_frozen("text", text, folder_identity(resolve(self.text_source), self.revision))

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        loss = self.loss(batch["main"], self.denoiser, self.condition(batch["main"], averaged=False), self.keys)
        self.backward(tuple(self.groups), loss)

    def loss(self, records: Records, denoiser: Denoiser, cond: Cond | None, keys: Keys) -> Tensor:
        """The denoising loss of a micro-batch: a scalar."""
        x0 = self.codec.latents(records)
        t = self.law(denoiser.process, keys, records.position)
        eps = keys.normal("eps", records.position, tuple(x0.shape[1:]))
        if cond is not None:
            cond = cond.drop(keys.bernoulli("null", records.position, self.null_probability))
        x_t = denoiser.process.add_noise(x0, eps, t)
        snr = denoiser.process.log_snr(t).exp()
        weight = loss_weight(self.weighting, snr, denoiser.prediction, self.min_snr_gamma)
        learned = self.uncertainty(denoiser.process, t) if self.weighting == "uncertainty" else torch.zeros_like(weight)
        loss = weighted_loss(denoiser(x_t, t, cond), denoiser.target(x0, eps, t), weight * torch.exp(-learned))
        return loss + learned.mean()

    def forward_units(self) -> dict[str, float]:
        """Forward passes of a training step: a gradient costs two more; pictures and captions one, unless cached."""
        text = {"text": 3.0 if "text" in self.groups else 1.0} if hasattr(self, "text") else {}
        return {"denoiser": 3.0, "codec.encoder": 1.0, **text}

    def condition(self, records: Records, averaged: bool = True) -> Cond | None:
        """The condition of each sample: cached, encoded from its caption, its class label, or none.

        Args:
            averaged: by the averaged weights of a trained text encoder.
        """
        if records.cond is not None:
            return records.cond
        if hasattr(self, "text") and records.caption is not None:
            return self.encode(records.caption, averaged)
        classes = self.denoiser.classes
        return Cond(label=records.label, null_label=classes) if classes and records.label is not None else None

    def encode(self, captions: list[str], averaged: bool) -> Cond:
        """Conditions of captions by the text encoder, or by its averaged weights."""
        cond = (self.generator_of("text") if averaged and "text" in self.groups else self.text)(captions)
        if getattr(self.denoiser.backbone.config, "guidance_embeds", False):
            cond.guidance = torch.full((len(captions),), self.embedded_guidance, device=self.device)
        return cond

    @torch.no_grad()
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """The loss of the averaged weights at noise and times that every validation shares."""
        records = batch["main"]
        loss = self.loss(records, self.generator_of("denoiser"), self.condition(records), self.keys.fork("validation"))
        self.log(f"{'test' if self.trainer.testing else 'val'}/loss", loss, batch_size=len(records), sync_dist=True)

    test_step = validation_step

    @torch.no_grad()
    def sample(
        self, cond: Cond | None, keys: Keys, positions: Tensor, guidance: float | None = None, steps: int | None = None
    ) -> Tensor:
        """Pictures [B, 3, H, W] of the averaged weights; the noise of a picture depends on keys and position."""
        denoiser = self.generator_of("denoiser")
        size = self.size or denoiser.backbone.config.sample_size * self.codec.factor
        z = keys.normal("z", positions, self.codec.latent_shape(size))
        scale = self.guidance if guidance is None else guidance
        latents = sample(denoiser, z, cond, steps or self.steps, scale if cond is not None else 1.0, self.solver)
        return self.codec.decode(latents).clamp(-1, 1)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Pictures through the autoencoder: the best that a latent model can do."""
        return self.codec.decode(self.codec.encode(images)).clamp(-1, 1)

    def export(self, folder: Path, batches: Iterable[Batch]) -> None:
        """Writes the stock diffusers pipeline of the averaged weights, fp16."""
        text = self.generator_of("text") if "text" in self.groups else getattr(self, "text", None)
        save_pipeline(folder, self.generator_of("denoiser"), self.codec, text)
