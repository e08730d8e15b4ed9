"""Latent codecs: pictures in [-1, 1] to latents of unit scale and back.

latent = (z - shift) * scaling_factor                     AutoencoderKL, VQModel, AutoencoderTiny
latent = (z - latents_mean) * scaling_factor / latents_std   when the config has per-channel statistics

aMUSEd's VQModel, known by its `lookup_from_codebook`, works on pictures in [0, 1]: they are brought there and back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_t2i.batch import Records
from lightning_t2i.errors import UserError


def factor_of(config: Mapping[str, Any]) -> int:
    """How many pixels one latent position of an autoencoder with this config spans per side."""
    blocks = config.get("block_out_channels") or config["encoder_block_out_channels"]
    return 2 ** (len(blocks) - 1)


class LatentCodec(nn.Module):
    """An autoencoder of diffusers, or the identity for pixel-space models.

    Args:
        vae: AutoencoderKL, VQModel or AutoencoderTiny; None is the identity.

    Attributes:
        factor: how many pixels one latent position spans per side.
        channels: latent channels.
    """

    def __init__(self, vae: nn.Module | None = None):
        super().__init__()
        self.vae: Any = vae
        self.factor, self.channels = 1, 3
        if vae is None:
            return
        config = vae.config
        self.channels = config.latent_channels
        self.factor = factor_of(config)
        self._from_zero = bool(config.get("lookup_from_codebook"))  # its pictures lie in [0, 1]
        # Statistics are plain numbers, not buffers: they follow the config, never a checkpoint.
        self._scale = [float(config.get("scaling_factor") or 1.0)]
        self._shift = [float(config.get("shift_factor") or 0.0)]
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            self._scale = [self._scale[0] / float(std) for std in config["latents_std"]]
            self._shift = [float(mean) for mean in config["latents_mean"]]

    @classmethod
    def from_pretrained(
        cls,
        path: str | None,
        subfolder: str | None = None,
        revision: str | None = None,
        torch_dtype: torch.dtype = torch.float32,
        variant: str | None = None,
    ) -> LatentCodec:
        """From an autoencoder folder or a pipeline (its component "vae" or "vqvae"); None is the identity.

        Raises:
            UserError: no autoencoder there.
        """
        if path is None:
            return cls()
        from lightning_t2i.networks import load

        if subfolder is None:
            index = load.model_index(path, revision)
            subfolder = next((name for name in ("vae", "vqvae") if name in index), None)
            if subfolder is None and index:
                raise UserError("The pipeline has no autoencoder", where=str(path), allowed=["vae", "vqvae"])
        return cls(load.load_model(path, subfolder, revision, torch_dtype, variant))

    def shard_roots(self) -> list[nn.Module]:
        """What is sharded, each as a root of its own."""
        return [self.vae] if self.vae is not None else []

    def latent_shape(self, size: int | tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) of the latents of pictures of this height and width.

        Raises:
            UserError: the size is not a multiple of `factor`.
        """
        height, width = (size, size) if isinstance(size, int) else size
        if height % self.factor or width % self.factor:
            raise UserError(
                "Picture size does not fit the autoencoder",
                where="size",
                given=size,
                allowed=f"multiples of {self.factor}",
            )
        return self.channels, height // self.factor, width // self.factor

    def encode(self, images: Tensor, eps: Tensor | None = None) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] to float32 latents [B, C, h, w] of unit scale.

        Args:
            eps: unit Gaussian noise [B, C, h, w] for a draw from the posterior of a KL autoencoder; None is its mean.
        """
        if self.vae is None:
            return images
        out = self._encoded(images)
        if hasattr(out, "latent_dist"):
            z = out.latent_dist.mean.float()
            if eps is not None:
                z = z + out.latent_dist.std.float() * eps
        else:
            z = out.latents.float()
        return (z - self._statistic(self._shift, z)) * self._statistic(self._scale, z)

    @torch.no_grad()
    def latents(self, records: Records) -> Tensor:
        """Unit-scale latents [B, C, h, w] of records: cached ones where the data has them."""
        return self.encode(records.image) if records.latent is None else records.latent.float()

    def decode(self, latents: Tensor) -> Tensor:
        """Latents of unit scale to float32 pictures [B, 3, H, W], near [-1, 1] but not clamped; differentiable."""
        if self.vae is None:
            return latents
        return self._shown(self.vae.decode(self.raw(latents).to(self._dtype)))

    def raw(self, latents: Tensor) -> Tensor:
        """Latents of unit scale to the autoencoder's own scale."""
        return latents / self._statistic(self._scale, latents) + self._statistic(self._shift, latents)

    def encode_tokens(self, images: Tensor) -> Tensor:
        """Pictures to codebook indices of a VQModel: int64 [B, h, w]."""
        return self._nearest(self._encoded(images).latents)

    @torch.no_grad()
    def tokens(self, records: Records) -> Tensor:
        """Codebook indices of records: those nearest to the cached latents where the data has them."""
        if records.latent is None:
            return self.encode_tokens(records.image)
        return self._nearest(self.raw(records.latent.float()).to(self._dtype))

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """Codebook indices [B, h, w] of a VQModel to float32 pictures [B, 3, H, W]."""
        shape = (*tokens.shape, self.vae.config.vq_embed_dim or self.channels)
        if self.vae.config.lookup_from_codebook:  # aMUSEd's, which takes indices
            return self._shown(self.vae.decode(tokens.flatten(), force_not_quantize=True, shape=shape))
        z = self.vae.quantize.get_codebook_entry(tokens.flatten(), shape)
        return self._shown(self.vae.decode(z.to(self._dtype), force_not_quantize=True))

    def _encoded(self, images: Tensor) -> Any:
        """The autoencoder's output for pictures in [-1, 1]."""
        return self.vae.encode(((images + 1) / 2 if self._from_zero else images).to(self._dtype))

    def _shown(self, out: Any) -> Tensor:
        """What the autoencoder decoded as float32 pictures near [-1, 1]."""
        images = out.sample.float()
        return 2 * images - 1 if self._from_zero else images

    def _nearest(self, z: Tensor) -> Tensor:
        """Indices [B, h, w] of the codes nearest to z [B, C, h, w], which is of the autoencoder's own scale."""
        return self.vae.quantize(z)[2][2].view(len(z), *z.shape[2:])

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.vae.parameters()).dtype

    def _statistic(self, values: list[float], x: Tensor) -> Tensor:
        return torch.tensor(values, device=x.device, dtype=x.dtype).view(1, -1, 1, 1)
