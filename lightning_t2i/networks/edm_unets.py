"""EDM's U-Nets for pixels (Karras et al., arXiv 2206.00364, appendix F.2): DDPM++ / NCSN++ and ADM.

    SongUNet       CIFAR-10 and 64x64 faces; Song et al., arXiv 2011.13456
    DhariwalUNet   ImageNet-64; Dhariwal and Nichol, arXiv 2105.05233

Called as `backbone(x, t, cond)` on the preconditioned input, t = ln(sigma) / 4; the preconditioning is the Denoiser's.
Classes come as `cond.label`; the label `num_classes` is the null label (no class): training with label dropout sets it
through `Cond.drop` with `null_label = num_classes`. Missing labels mean the same.

Not built: residual encoders and the filter [1, 3, 3, 1] of the full NCSN++; of it there is the Fourier embedding.
Parameter names differ from the published ones by the table in `edm_snapshot`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn.functional import one_hot, silu

from lightning_t2i.batch import Cond
from lightning_t2i.networks.edm_blocks import EDMBlock, FourierFeatures, SelfAttention, Sinusoids, group_norm


class EDMUNet(ModelMixin, ConfigMixin):
    """What both U-Nets share: a stack of blocks per resolution on the way down, and one block more each on the way up.

    Attributes:
        augment_embedding: linear layer for EDM's augmentation parameters, or None.
    """

    config_name = "config.json"
    _no_split_modules = ["EDMBlock"]
    augment_embedding: nn.Module | None

    def _build(self, block: Callable[..., EDMBlock], first: int, heads: Callable[[int], int], everywhere: bool) -> None:
        """Makes encoder, decoder and output layers.

        Args:
            block: makes a block of (inputs, outputs, heads=, direction=).
            first: channels of the first convolution.
            heads: channels -> heads of an attention.
            everywhere: on the way up every block of an attended resolution has attention, else the last one only.
        """
        facts = self.config
        widths = [mult * facts.channels for mult in facts.channel_mult]
        sides = [facts.sample_size >> level for level in range(len(widths))]
        attended = [side in facts.attention_sizes for side in sides]
        self.encoder, self.decoder = nn.ModuleDict(), nn.ModuleDict()
        width, kept = first, [first]
        self.encoder[f"{sides[0]}x{sides[0]}_conv"] = nn.Conv2d(facts.in_channels, first, 3, padding=1)
        for level, side in enumerate(sides):
            if level:
                self.encoder[f"{side}x{side}_down"] = block(width, width, direction="down")
                kept.append(width)
            for i in range(facts.blocks):
                count = heads(widths[level]) if attended[level] else 0
                self.encoder[f"{side}x{side}_block{i}"] = block(width, widths[level], heads=count)
                width = widths[level]
                kept.append(width)
        for level, side in reversed(list(enumerate(sides))):
            if level == len(sides) - 1:
                self.decoder[f"{side}x{side}_in0"] = block(width, width, heads=heads(width))
                self.decoder[f"{side}x{side}_in1"] = block(width, width)
            else:
                self.decoder[f"{side}x{side}_up"] = block(width, width, direction="up")
            for i in range(facts.blocks + 1):
                attends = attended[level] and (everywhere or i == facts.blocks)
                name, count = f"{side}x{side}_block{i}", heads(widths[level]) if attends else 0
                self.decoder[name] = block(width + kept.pop(), widths[level], heads=count)
                width = widths[level]
        self.out_conv = nn.Conv2d(width, facts.out_channels, 3, padding=1)

    @abstractmethod
    def embed(self, noise: Tensor, label: Tensor | None, augment: Tensor | None) -> Tensor:
        """Embeddings of noise level [B, C], one-hot label [B, num_classes], augment [B, augment_dim] -> joint one."""

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None, augment: Tensor | None = None) -> Tensor:
        """x [B, C, H, W], t = ln(sigma) / 4 [B] -> [B, C, H, W].

        Args:
            cond: its label, int64 [B] in 0 ... num_classes, is used; None is the null label.
            augment: parameters of EDM's augmentations [B, augment_dim]; None means none were applied.
        """
        label = None
        if self.config.num_classes:
            label = x.new_zeros(len(x), self.config.num_classes)
            if cond is not None and cond.label is not None:
                label = one_hot(cond.label, self.config.num_classes + 1)[:, :-1].to(x.dtype)
        emb = self.embed(self.noise(t).to(x.dtype), label, augment)
        kept: list[Tensor] = []
        for block in self.encoder.values():
            x = block(x, emb) if isinstance(block, EDMBlock) else block(x)
            kept.append(x)
        for name, block in self.decoder.items():
            x = block(torch.cat([x, kept.pop()], dim=1) if "_block" in name else x, emb)
        return self.out_conv(silu(self.out_norm(x)))

    def drop_augmentation(self) -> None:
        """Deletes the augmentation embedding; without augmentations the network stays the same function."""
        self.augment_embedding = None
        self.register_to_config(augment_dim=0)

    def _augmented(self, emb: Tensor, augment: Tensor | None) -> Tensor:
        if augment is None:
            return emb
        if self.augment_embedding is None:
            raise ValueError(f"{type(self).__name__} has no augmentation embedding")
        return emb + self.augment_embedding(augment.to(emb.dtype))

    def _last_layers(self) -> list[nn.Module]:
        """The last layer of every residual branch and of the network: it starts at or near zero."""
        parts = [m.conv2 for m in self.modules() if isinstance(m, EDMBlock)]
        return [*parts, *(m.out for m in self.modules() if isinstance(m, SelfAttention)), self.out_conv]


class SongUNet(EDMUNet):
    """DDPM++ (`embedding` "positional", `noise_mult` 1), or with NCSN++'s embedding ("fourier", 2).

    Args:
        sample_size: side of the pictures.
        num_classes: 0 for an unconditional network.
        augment_dim: parameters of EDM's augmentations; 0 for no augmentation embedding.
        channels, channel_mult: base width and its multiple per resolution, from the highest.
        embedding_mult, noise_mult: widths of the joint and of the noise embedding as multiples of `channels`.
        blocks: residual blocks per resolution.
        attention_sizes: sides at which blocks have attention.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 3,
        out_channels: int = 3,
        num_classes: int = 0,
        augment_dim: int = 0,
        channels: int = 128,
        channel_mult: tuple[int, ...] = (1, 2, 2, 2),
        embedding_mult: int = 4,
        noise_mult: int = 1,
        blocks: int = 4,
        attention_sizes: tuple[int, ...] = (16,),
        dropout: float = 0.1,
        embedding: str = "positional",
    ):
        super().__init__()
        if embedding not in ("positional", "fourier"):
            raise ValueError(f"embedding is positional or fourier, not {embedding}")
        noise, width = noise_mult * channels, embedding_mult * channels
        self.noise = FourierFeatures(noise) if embedding == "fourier" else Sinusoids(noise, True, sine_first=True)
        self.label_embedding = nn.Linear(num_classes, noise) if num_classes else None
        self.augment_embedding = nn.Linear(augment_dim, noise, bias=False) if augment_dim else None
        self.embed1, self.embed2 = nn.Linear(noise, width), nn.Linear(width, width)

        def block(inputs: int, outputs: int, **options: Any) -> EDMBlock:
            options |= {"dropout": dropout, "adaptive": False, "project": True, "scale": math.sqrt(0.5), "eps": 1e-6}
            return EDMBlock(inputs, outputs, width, **options)

        self._build(block, channels, lambda _: 1, everywhere=False)
        self.out_norm = group_norm(self.out_conv.in_channels, 1e-6)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, SelfAttention):
                nn.init.xavier_uniform_(module.qkv.weight, gain=math.sqrt(0.2))
        for layer in self._last_layers():
            nn.init.xavier_uniform_(layer.weight, gain=1e-5)

    def embed(self, noise: Tensor, label: Tensor | None, augment: Tensor | None) -> Tensor:
        emb = self._augmented(noise, augment)
        if self.label_embedding is not None and label is not None:
            emb = emb + self.label_embedding(label * math.sqrt(self.config.num_classes))
        return silu(self.embed2(silu(self.embed1(emb))))


class DhariwalUNet(EDMUNet):
    """ADM, with 64 channels per attention head.

    Args: see `SongUNet`.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        out_channels: int = 3,
        num_classes: int = 0,
        augment_dim: int = 0,
        channels: int = 192,
        channel_mult: tuple[int, ...] = (1, 2, 3, 4),
        embedding_mult: int = 4,
        blocks: int = 3,
        attention_sizes: tuple[int, ...] = (32, 16, 8),
        dropout: float = 0.1,
    ):
        super().__init__()
        width = embedding_mult * channels
        self.noise = Sinusoids(channels, False, sine_first=False)
        self.label_embedding = nn.Linear(num_classes, width, bias=False) if num_classes else None
        self.augment_embedding = nn.Linear(augment_dim, channels, bias=False) if augment_dim else None
        self.embed1, self.embed2 = nn.Linear(channels, width), nn.Linear(width, width)

        def block(inputs: int, outputs: int, **options: Any) -> EDMBlock:
            return EDMBlock(inputs, outputs, width, dropout=dropout, **options)

        self._build(block, channel_mult[0] * channels, lambda outputs: max(1, outputs // 64), everywhere=True)
        self.out_norm = group_norm(self.out_conv.in_channels, 1e-5)
        for layer in self._last_layers():  # torch's own uniform initialisation is EDM's for all other layers
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        if self.label_embedding is not None:
            nn.init.normal_(self.label_embedding.weight)
        if self.augment_embedding is not None:
            nn.init.zeros_(self.augment_embedding.weight)

    def embed(self, noise: Tensor, label: Tensor | None, augment: Tensor | None) -> Tensor:
        emb = self.embed2(silu(self.embed1(self._augmented(noise, augment))))
        if self.label_embedding is not None and label is not None:
            emb = emb + self.label_embedding(label)
        return silu(emb)
