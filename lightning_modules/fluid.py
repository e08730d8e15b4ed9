"""Fluid: text-to-image autoregression on continuous or discrete tokens, in random or raster order (arXiv 2410.13863).

    p(x | y) = prod_i p(x_i | x_1 ... x_(i-1), y)                                 raster order, row by row
    p(x | y) = prod_k prod_(i in S_k) p(x_i | x_(S_1 ... S_(k-1)), y)             random order, K groups S_k
    z   = transformer(x, known, y)                 raster: z_i sees what comes before i; random: what is known
    L   = sum_(i in M) l(x_i, z_i) / |M|           M: all tokens (raster), the masked ones of the batch (random)
    l   = -log softmax(E z_i)_(x_i)                                               discrete: "categorical"
    l   = mean_t |eps - eps_theta(x_i^t, t, z_i)|^2 + L_vb                  continuous: "diffusion" (MAR, 2406.11838)
    l   = mean_t |v_theta(x_i^t, t, z_i) - (eps - x_i)|^2                         continuous: "flow"
    masks   n = max(1, ceil(r L)) tokens at random places, r = cos(pi u / 2), u ~ U(0, 1), for each picture
    y   becomes a learned null token with probability p (classifier-free guidance, arXiv 2207.12598)

    x [B, L, c]  patches of an autoencoder's latents of unit scale, or int64 [B, L] codes of a VQ autoencoder
    y            states of a frozen text encoder, made fit by the transformer's own aligner
    t, eps       m of each for every token of M ("copies"), from one z_i;  x_i^t  the noised token
    L_vb         bits of the learned variance, with no gradient to the mean; E the embedding's own matrix
    w, tau, K    guidance, temperature, steps: lightning_t2i/token_sampling.py; laws of r: lightning_t2i/token_orders.py

|M| is that of the batch of all processes. Logged beside the loss as transformer/...: its parts and the share of masked
tokens. Validation: the parts of averaged weights with captions, without dropping any, at draws that depend on the seed
and the picture alone, `val_copies` stratified times for each token; in all, by ten bins of the mask ratio (r0 ... r9)
and by ten of u, of which t is the quantile (t0 ... t9), as bins/....

Deviations from the paper, which has no code: u is stratified over neighbours in the batch, so that the head runs on a
fixed number of rows; latents are the encoder's mean. What of the paper could not be read and is its default here:
position tables, guidance linear in the share of known tokens, the width of the aligner, L_vb, T5 tokens, m = 4 (MAR's).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_t2i.batch import Batch, Cond, Records
from lightning_t2i.binned import BinnedMean
from lightning_t2i.errors import UserError
from lightning_t2i.frozen import folder_identity
from lightning_t2i.keys import Keys
from lightning_t2i.method import MethodModule
from lightning_t2i.networks.codec import LatentCodec
from lightning_t2i.networks.load import build_network, read_architecture
from lightning_t2i.networks.text_encoder import TextEncoder
from lightning_t2i.networks.token_heads import Terms, masked_rows
from lightning_t2i.networks.token_transformer import TokenTransformer
from lightning_t2i.options import EMAOptions, GroupOptions, MethodOptions
from lightning_t2i.paths import resolve
from lightning_t2i.schedules import Warmup
from lightning_t2i.token_orders import MaskLaw
from lightning_t2i.token_pipeline import TokenPipeline, load_transformer
from lightning_t2i.token_sampling import Sampling

TIMED = ("diffusion", "flow")  # heads that see noised tokens
VALIDATION_STRATA = 64  # of masks: the same for all sizes, whose batches differ
BINS = 10


def masked_mean(values: Tensor, weight: Tensor, count: Tensor) -> Tensor:
    """sum_i w_i mean_m values_im / count, the mean over masked tokens: [M, m], [M] and a scalar -> scalar."""
    return (weight * values.mean(1)).sum() / count


def paper_update() -> GroupOptions:
    """AdamW, warm-up and EMA of the continuous models; the clip norm is MAR's."""
    adam = partial(torch.optim.AdamW, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.02)
    return GroupOptions(adam, schedule=partial(Warmup, steps=65_000), clip=3.0, ema=EMAOptions(0.9999))


class Fluid(MethodModule):
    """Trains a token transformer.

    Args:
        network: JSON file of a TokenTransformer, whose order, head and tokens the next arguments decide; or a folder or
            hub id with a trained one, to go on from.
        codec: folder or hub id of the autoencoder: a VQModel where `head` is "categorical".
        text: folder or hub id of a pipeline with the text encoder.
        revision: commit of the hub id of `network`.
        codec_revision, text_revision: commits of those of `codec` and `text`.
        order: the order in which tokens are predicted.
        head: what a token's distribution is; "regression" has none, for comparison.
        head_options: further arguments of the head (lightning_t2i/networks/token_heads.py) of a new network.
        size: side of the pictures in pixels.
        patch: side of the patch of latents that makes a continuous token.
        text_length: tokens of a caption; null is the pipeline's own number.
        trim: encode captions up to the longest of the batch only; exact, but shapes then change from step to step.
        mask: law of the masks of the random order.
        copies: m.
        null_probability: p.
        val_copies: times for each token in validation.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        sampling: how `sample` draws.
        transformer: how the weights are updated.
        common: options of the engine.
    """

    may_rest = ()

    def __init__(
        self,
        network: str,
        codec: str,
        text: str,
        revision: str | None = None,
        codec_revision: str | None = None,
        text_revision: str | None = None,
        order: Literal["random", "raster"] = "random",
        head: Literal["diffusion", "flow", "categorical", "regression"] = "diffusion",
        head_options: dict[str, Any] | None = None,
        size: int = 256,
        patch: int = 1,
        text_length: int | None = 128,
        trim: bool = False,
        mask: MaskLaw | None = None,
        copies: int = 4,
        null_probability: float = 0.1,
        val_copies: int = 4,
        gradient_checkpointing: bool = False,
        sampling: Sampling | None = None,
        transformer: GroupOptions | None = None,
        common: MethodOptions | None = None,
    ):
        super().__init__(common)
        if not 0 <= null_probability < 1:
            raise UserError("Not a probability", where="model.null_probability", given=null_probability)
        if min(copies, val_copies, patch) < 1:
            raise UserError(
                "Counts begin at 1", where="model.copies, val_copies, patch", given=(copies, val_copies, patch)
            )
        if revision is not None and network.endswith(".json"):
            what, fix = "An architecture file has no revision", "codec_revision and text_revision, for these two"
            raise UserError(what, where="model.revision", given=revision, fix=fix)
        self.network, self.codec_source, self.text_source = network, codec, text
        self.revision, self.codec_revision, self.text_revision = revision, codec_revision, text_revision
        self.order, self.head, self.head_options = order, head, head_options or {}
        self.size, self.patch = size, patch
        self.text_length, self.trim, self.mask = text_length, trim, mask or MaskLaw()
        self.copies, self.val_copies, self.null_probability = copies, val_copies, null_probability
        self.gradient_checkpointing = gradient_checkpointing
        self.sampling, self.options = sampling or Sampling(), transformer or paper_update()
        self.means: dict[str, BinnedMean] = {}

    def configure_model(self) -> None:
        codec = LatentCodec.from_pretrained(self.codec_source, revision=self.codec_revision)
        text = TextEncoder.from_pretrained(
            self.text_source, revision=self.text_revision, t5_length=self.text_length, trim=self.trim
        )
        network = self.built(codec, text.width)
        self.sampling.refuse_unfit(network)
        if self.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        dtype = torch.bfloat16 if self.common.precision == "bf16" else None
        self.add_frozen("codec", codec, folder_identity(resolve(self.codec_source), self.codec_revision))
        self.add_frozen("text", text, folder_identity(resolve(self.text_source), self.text_revision), dtype)
        self.add_group("transformer", network, self.options)

    def built(self, codec: LatentCodec, text_width: int) -> TokenTransformer:
        """The network of an architecture file with what the other parts decide, or a trained one that fits them."""
        discrete = self.head == "categorical"
        if discrete != hasattr(codec.vae, "quantize"):
            what, allowed = "The autoencoder has no such tokens", "a VQModel for discrete tokens, and only for them"
            raise UserError(what, where="model.codec", given=f"{self.codec_source}, head {self.head}", allowed=allowed)
        channels, height, width = codec.latent_shape(self.size)
        if (discrete and self.patch != 1) or height % self.patch:
            what, allowed = "Latents cannot be cut into such patches", "1 for codes, else a divisor of their side"
            raise UserError(what, where="model.patch", given=self.patch, allowed=allowed)
        facts: dict[str, Any] = {
            "order": self.order,
            "head": self.head,
            "length": height * width // self.patch**2,
            "text_width": text_width,
        }
        facts |= {"vocabulary": codec.vae.config.num_vq_embeddings} if discrete else {}
        facts |= {} if discrete else {"channels": channels * self.patch**2}
        if self.network.endswith(".json"):
            return build_network({**read_architecture(self.network), **facts, "head_options": self.head_options})
        network = load_transformer(self.network, self.revision)
        if wrong := {name: value for name, value in facts.items() if network.config[name] != value}:
            given = {name: network.config[name] for name in wrong}
            raise UserError(
                "The trained network is another one", where="model.network", given=given, allowed=str(wrong)
            )
        return network

    @property
    def pipeline(self) -> TokenPipeline:
        """Averaged weights with autoencoder and text encoder."""
        return TokenPipeline(self.generator_of("transformer"), self.codec, self.text, self.sampling)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        main = batch["main"]
        drop = self.keys.bernoulli("null", main.position, self.null_probability)
        terms, weight, masked, _ = self.terms(self.transformer, main, self.keys, self.copies, drop)
        count = self.gathered(weight.sum()[None]).mean()  # of masked tokens, the mean over processes
        parts = {name: masked_mean(values, weight, count) for name, values in terms.parts.items()}
        self.backward("transformer", masked_mean(terms.total, weight, count), masked=masked.float().mean(), **parts)

    def terms(
        self,
        network: TokenTransformer,
        records: Records,
        keys: Keys,
        copies: int,
        drop: Tensor | None = None,
        stratified: bool = False,
    ) -> tuple[Terms, Tensor, Tensor, Tensor]:
        """The loss of each masked token.

        Args:
            copies: m.
            drop: bool [B], pictures whose caption becomes the null token.
            stratified: as in validation: the m times of a token lie in m equal parts of their law, and masks do not
                depend on the strata of training.

        Returns:
            The terms [M, m]; weights [M], 0 for rows that fill up; masked tokens bool [B, L]; and for each row its
            picture's mask ratio and its times' u in [0, 1]: [M, 1 + m].
        """
        x, positions = TokenPipeline(network, self.codec, self.text, self.sampling).tokens(records), records.position
        batch, length = x.shape[:2]
        masked = torch.ones(batch, length, dtype=torch.bool, device=x.device)
        count = masked.numel()  # a batch of validation may begin within a stratum
        if self.order == "random":
            law = replace(self.mask, strata=VALIDATION_STRATA) if stratified else self.mask
            masked, count = law.masks(keys, positions, length), count if stratified else law.rows(batch, length)
        rows, weight = masked_rows(~masked, count)
        cond = self.condition(records)
        text = network.align(cond.embeds, cond.mask, drop)
        z = network(x, text, ~masked if self.order == "random" else None)
        u = keys.uniform("t", positions, (length, copies)).flatten(0, 1)[rows]
        if stratified:
            u = (torch.arange(copies, device=u.device) + u) / copies
        noise = None
        if self.head in TIMED:
            noise = keys.normal("eps", positions, (length, copies, x.shape[2])).flatten(0, 1)[rows]
        terms = network.loss(z.flatten(0, 1)[rows], x.flatten(0, 1)[rows], u, noise)
        ratio = masked.float().mean(1)[rows.div(length, rounding_mode="floor")]
        return terms, weight, masked, torch.cat([ratio[:, None], u], 1)

    def forward_units(self) -> dict[str, float]:
        """Forward passes of a training step: a gradient costs two more; pictures and captions one, unless cached."""
        return {"transformer": 3.0, "codec.encoder": 1.0, "text": 1.0}

    def condition(self, records: Records) -> Cond:
        """The states of the captions: cached, or encoded."""
        return self.pipeline.condition(records)

    def on_validation_epoch_start(self) -> None:
        self.means = {}

    @torch.no_grad()
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds the parts of the loss of the averaged weights, at draws that every validation shares."""
        network, keys = self.generator_of("transformer"), self.keys.fork("validation")
        terms, weight, _, where = self.terms(network, batch["main"], keys, self.val_copies, stratified=True)
        for name, values in terms.parts.items():
            weights = weight[:, None].expand_as(values)
            self.means.setdefault(name, BinnedMean(1)).add(values, weights, torch.zeros_like(values))
        name, values = next(iter(terms.parts.items()))
        axes = {"r": where[:, :1].expand_as(values)} | ({"t": where[:, 1:]} if self.head in TIMED else {})
        for axis, place in axes.items():
            self.means.setdefault(f"{name}/{axis}", BinnedMean(BINS)).add(
                values, weight[:, None].expand_as(values), place
            )

    def on_validation_epoch_end(self) -> None:
        stage = "test" if self.trainer.testing else "val"
        for name, found in self.means.items():
            means = found.means(self.gathered)
            if found.bins == 1:
                self.log(f"{stage}/{name}", means[0])
            else:
                self.log_dict({f"bins/{name}{i}": value for i, value in means.items()})

    on_test_epoch_start, test_step, on_test_epoch_end = (
        on_validation_epoch_start,
        validation_step,
        on_validation_epoch_end,
    )

    def sample(self, cond: Cond, keys: Keys, positions: Tensor, **changes: Any) -> Tensor:
        """Pictures [B, 3, H, W] of the averaged weights; the draws of a picture depend on keys and position.

        Args:
            changes: options of the sampling to replace, as in `guidance=1.0`.
        """
        return self.pipeline.sample(cond, keys, positions, **changes)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Pictures through the autoencoder: the best that a model of its tokens can do."""
        places = torch.arange(len(images), device=images.device)
        return self.pipeline.decode(self.pipeline.tokens(Records(places, places, image=images)))

    def export(self, folder: Path, batches: Iterable[Batch]) -> None:
        """Writes the folder of `TokenPipeline`, fp16: no stock pipeline draws tokens in this way."""
        self.pipeline.save(folder)
