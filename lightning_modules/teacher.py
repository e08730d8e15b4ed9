"""Teacher: a pretrained pipeline as it is, which turns noise into data by an ODE solver. It trains nothing.

    x_T = initial(z),  z ~ N(0, I)            80 z for EDM, z else
    x_s = step(x_t, t, s, x0(x_t, t, c))      deterministic; guided x0 = u + scale (c - u)        arXiv 2207.12598
    x0  = x at the time of clean data: a latent of unit scale, or a picture of a pixel-space model

`predict` with `datamodules.pair_prompts.PairPrompts` stores (noise seed, x0, prompt): the regression pairs of DMD
(arXiv 2311.18828, section 3.2), the couplings of reflow and distillation (arXiv 2209.03003, 2309.06380). The k-th flow
of InstaFlow is such a teacher once it is exported.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_t2i.batch import Batch, Cond, Records
from lightning_t2i.errors import UserError
from lightning_t2i.keys import Keys
from lightning_t2i.method import MethodModule
from lightning_t2i.networks.codec import LatentCodec
from lightning_t2i.networks.denoiser import Denoiser
from lightning_t2i.networks.load import components
from lightning_t2i.networks.text_encoder import TextEncoder
from lightning_t2i.options import MethodOptions
from lightning_t2i.pairs import noise, teacher_identity
from lightning_t2i.processes import Process, sample


class Teacher(MethodModule):
    """A frozen pipeline that samples.

    With `common.precision: bf16` its weights are bfloat16; the solver's state is float32 in any case.

    Args:
        network: pipeline folder or hub id; without an autoencoder in it x0 is a picture.
        process, prediction: override what the pipeline's scheduler says.
        revision: commit of a hub id.
        guidance: scale of classifier-free guidance, 1 is none.
        steps, solver: how the ODE is solved.
        embedded_guidance: what a guidance-distilled network (FLUX.1-dev) is told; other networks ignore it.
        size: side of the pictures in pixels; null is the size that the network was made for.
        common: options of the engine; `seed` is that of the pairs.
    """

    def __init__(
        self,
        network: str,
        process: Process | None = None,
        prediction: str | None = None,
        revision: str | None = None,
        guidance: float = 1.0,
        steps: int = 25,
        solver: Literal["ddim", "euler", "heun", "dpmpp_2m"] = "ddim",
        embedded_guidance: float = 1.0,
        size: int | None = None,
        common: MethodOptions | None = None,
    ):
        super().__init__(common)
        if steps < 1:
            raise UserError("A solver needs at least one step", where="model.steps", given=steps)
        self.network, self.process, self.prediction, self.revision = network, process, prediction, revision
        self.guidance, self.steps, self.solver = guidance, steps, solver
        self.embedded_guidance, self.size = embedded_guidance, size

    def _has(self, *names: str) -> bool:
        return bool(components(self.network, self.revision) & set(names))

    def configure_model(self) -> None:
        identity = teacher_identity(self.network, self.revision)
        dtype = torch.bfloat16 if self.common.precision == "bf16" else None
        denoiser = Denoiser.from_pretrained(
            self.network, revision=self.revision, process=self.process, prediction=self.prediction
        )
        codec = LatentCodec.from_pretrained(self.network if self._has("vae", "vqvae") else None, revision=self.revision)
        self.add_frozen("codec", codec, identity)
        self.add_frozen("denoiser", denoiser, identity, dtype)
        if self._has("text_encoder"):
            text = TextEncoder.from_pretrained(self.network, revision=self.revision)
            self.add_frozen("text", text, identity, dtype)
        elif self.guidance != 1 and not self.denoiser.classes:
            raise UserError(
                "A teacher without a condition cannot be guided", where="model.guidance", given=self.guidance, fix="1.0"
            )

    def recipe(self) -> dict[str, Any]:
        """What x0 depends on besides noise and condition."""
        quantized = self.common.quantize
        return {
            "teacher": teacher_identity(self.network, self.revision),
            "process": self.process.to_config() if self.process else "the pipeline's",
            "prediction": self.prediction or "the pipeline's",
            "solver": self.solver,
            "steps": self.steps,
            "guidance": self.guidance,
            "embedded_guidance": self.embedded_guidance,
            "size": self.size or "the network's",
            "precision": ", ".join([self.common.precision, *(f"{n} in {b}" for n, b in sorted(quantized.items()))]),
            "x0": "latent" if self._has("vae", "vqvae") else "image",
        }

    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one z and one x0."""
        return self.codec.latent_shape(self.size or self.denoiser.backbone.config.sample_size * self.codec.factor)

    def condition(self, records: Records) -> Cond | None:
        """Cached conditions, encoded captions, class labels, or none."""
        if records.cond is not None:
            return records.cond
        if hasattr(self, "text"):
            with torch.no_grad():
                cond = self.text(records.caption)
            if getattr(self.denoiser.backbone.config, "guidance_embeds", False):
                cond.guidance = torch.full((len(records),), self.embedded_guidance, device=self.device)
            return cond
        return Cond(label=records.label, null_label=self.denoiser.classes) if self.denoiser.classes else None

    def couple(self, z: Tensor, cond: Cond | None) -> Tensor:
        """x0 [B, ...] of unit Gaussian noise z [B, ...]."""
        return sample(self.denoiser, z, cond, self.steps, self.guidance, self.solver)

    @torch.no_grad()
    def sample(self, cond: Cond | None, keys: Keys, positions: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1]; the noise of a picture depends on keys and position."""
        z = keys.normal("z", positions, self.latent_shape())
        return self.codec.decode(self.couple(z, cond)).clamp(-1, 1)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """x0 of records that have a noise seed (`PairPrompts`), pictures for others."""
        main = batch["main"]
        if main.noise_seed is None:
            return super().predict_step(batch, batch_idx, dataloader_idx)
        return self.couple(noise(main.noise_seed, self.latent_shape()), self.condition(main))
