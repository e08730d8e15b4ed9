"""Tokenizer: autoencoders that turn pictures into latents, continuous (KL) or discrete (VQ).

    z = E(x),  x' = D(z)
    L_KL = |x - x'| + |x - x'|^2 + beta KL(q(z|x) || N(0, I)) + lambda d(x', x)    (arXiv 2112.10752, G)
    L_VQ = |x - x'| + |x - x'|^2 + 0.25 |sg(E(x)) - e|^2 + |E(x) - sg(e)|^2 + the same lambda  (arXiv 1711.00937, 3)

    x [B, 3, H, W] in [-1, 1]; z [B, C, h, w]; e the nearest codebook vectors; d a frozen perceptual distance.

Deviations: no adversarial term, since the tiny pictures have no texture that needs one; all errors are means over
elements where the reference sums over a picture; codes that die early are started again (see `restart_until`). The
paper has its 0.25 at the encoder's term; this is diffusers' quantizer with its legacy order of the two. The exported KL
autoencoder carries the scaling factor that gives its latents unit standard deviation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_t2i.batch import Batch
from lightning_t2i.errors import UserError
from lightning_t2i.frozen import folder_identity
from lightning_t2i.method import MethodModule
from lightning_t2i.networks.build import forget_origin
from lightning_t2i.networks.load import build_network
from lightning_t2i.networks.perceptual import PerceptualNetwork
from lightning_t2i.options import GroupOptions, MethodOptions
from lightning_t2i.paths import resolve
from lightning_t2i.state_io import copy_into, full_tensor

RESTART_EVERY = 25


def reconstruction_loss(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute plus mean squared error of pictures [B, 3, H, W]."""
    return (x - y).abs().mean() + (x - y).square().mean()


def kl_loss(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) per latent element, averaged: 1/2 (mean^2 + var - 1 - log var)."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


class Tokenizer(MethodModule):
    """Trains an AutoencoderKL or a VQModel of diffusers.

    Args:
        network: JSON file of the architecture (its `_class_name` decides which), or a pretrained folder.
        kl_weight: beta, weight of the KL term.
        restart_until: every RESTART_EVERY training steps before this one, codes that no place of a batch chooses become
            encoder outputs drawn from it, as in Jukebox (arXiv 2005.00341, section 3.1); 0 is never.
        train_encoder: false keeps the latents or codes as they are and improves the decoder alone, as models that were
            trained on them need it.
        perceptual: folder of a PerceptualNetwork, or null for none.
        perceptual_weight: lambda.
        autoencoder: how the autoencoder is updated.
        common: options of the engine.
    """

    used: Tensor  # [codes], how often each was chosen in this validation

    may_rest = ()

    def __init__(
        self,
        network: str,
        kl_weight: float = 1e-6,
        restart_until: int = 0,
        train_encoder: bool = True,
        perceptual: str | None = None,
        perceptual_weight: float = 1.0,
        autoencoder: GroupOptions | None = None,
        common: MethodOptions | None = None,
    ):
        super().__init__(common)
        if restart_until and not train_encoder:
            what, fix = "Codes that are kept do not start again", "restart_until: 0"
            raise UserError(what, where="model.restart_until", given=restart_until, fix=fix)
        self.network, self.kl_weight, self.train_encoder = network, kl_weight, train_encoder
        self.restart_until = restart_until
        self.perceptual, self.perceptual_weight = perceptual, perceptual_weight
        self.options = autoencoder or GroupOptions()

    def configure_model(self) -> None:
        autoencoder = build_network(self.network)
        self.discrete = hasattr(autoencoder, "quantize")
        for name in () if self.train_encoder else ("encoder", "quant_conv", "quantize"):
            if (part := getattr(autoencoder, name, None)) is not None:
                part.requires_grad_(False)
        if self.perceptual is not None:
            folder = resolve(self.perceptual)
            self.add_frozen("distance", PerceptualNetwork.from_pretrained(folder), folder_identity(folder))
        self.add_group("autoencoder", autoencoder, self.options)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        x = torch.cat([records.image for records in batch.values()])
        positions = torch.cat([records.position for records in batch.values()])
        y, regulariser = self.discrete_pass(x) if self.discrete else self.gaussian_pass(x, positions)
        loss = reconstruction_loss(x, y) + regulariser
        if self.perceptual is not None:
            loss = loss + self.perceptual_weight * self.distance(y, x).mean()
        self.backward("autoencoder", loss, regulariser=regulariser, psnr=psnr(x, y))

    def gaussian_pass(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction from a sampled latent, and the weighted KL term."""
        q = self.autoencoder.encode(x).latent_dist
        mean, logvar = q.mean.float(), q.logvar.float()
        z = mean + (0.5 * logvar).exp() * self.keys.normal("z", positions, tuple(mean.shape[1:]))
        return self.autoencoder.decode(z).sample, self.kl_weight * kl_loss(mean, logvar)

    def discrete_pass(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction from the nearest codes (gradient straight through), and codebook plus commitment loss."""
        with watched(self.autoencoder.quantize) as seen:
            output = self.autoencoder(x)
        step = self.counters.step
        if step < self.restart_until and step % RESTART_EVERY == 0 and self.counters.micro == 0:
            self.restart_codes(*seen[0])
        return output.sample, output.commit_loss.mean()

    @torch.no_grad()
    def restart_codes(self, features: Tensor, chosen: Tensor) -> None:
        """Moves the codes that are not in `chosen` [N] to rows of `features` [N, D], equally on all processes."""
        features, chosen = self.gathered(features).cpu(), self.gathered(chosen).cpu()
        weight = self.autoencoder.quantize.embedding.weight
        codes = full_tensor(weight)
        unused = torch.bincount(chosen, minlength=len(codes)) == 0
        rows = self.keys.integers("restart", torch.arange(len(codes)), 0, len(features))
        copy_into(weight, torch.where(unused[:, None], features[rows], codes))

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Pictures after encoding (the mean, or the nearest codes) and decoding: [B, 3, H, W]."""
        autoencoder = self.generator_of("autoencoder")
        if self.discrete:
            return autoencoder(images).sample
        return autoencoder.decode(autoencoder.encode(images).latent_dist.mean).sample

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Errors of reconstructions, and over the whole split the share of the codebook that is used."""
        x = batch["main"].image
        with watched(getattr(self.generator_of("autoencoder"), "quantize", None)) as seen:
            y = self.reconstruct(x)
        for _, chosen in seen:
            used = torch.bincount(self.gathered(chosen), minlength=self.autoencoder.config.num_vq_embeddings)
            self.used = self.used + used if batch_idx else used
        self.log("val/reconstruction", reconstruction_loss(x, y), batch_size=len(x), sync_dist=True)
        self.log("val/psnr", psnr(x, y), batch_size=len(x), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        if self.discrete:
            self.log("val/usage", (self.used > 0).float().mean())

    @torch.no_grad()
    def export(self, folder: Path, batches: Iterable[Batch]) -> None:
        """Writes the diffusers folder, fp16, with the scale that gives the latents of `batches` unit deviation."""
        autoencoder: Any = copy.deepcopy(self.generator_of("autoencoder"))
        if not self.discrete and self.train_encoder:  # else the latents, and with them their scale, are as before
            z = torch.cat([autoencoder.encode(b["main"].image).latent_dist.mean for b in batches])
            autoencoder.register_to_config(scaling_factor=1 / float(z.std()))
        autoencoder.half().save_pretrained(folder)
        forget_origin(folder)


@contextmanager
def watched(quantizer: nn.Module | None) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collects (features [N, D], indices of their codes [N]) of each pass through a VQModel's quantizer, if any."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, inputs: tuple[Tensor], out: Any) -> None:
        seen.append((inputs[0].detach().permute(0, 2, 3, 1).flatten(0, 2), out[2][2].flatten()))

    handle = quantizer.register_forward_hook(keep) if quantizer is not None else None
    try:
        yield seen
    finally:
        if handle is not None:
            handle.remove()


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1], mean over the batch."""
    error = (x - y).square().flatten(1).mean(1).clamp_min(1e-10)
    return (10 * torch.log10(4 / error)).mean()
