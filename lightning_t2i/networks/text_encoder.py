"""Text encoders of stock pipelines: captions to `Cond`.

    CLIP alone   Stable Diffusion   last hidden state, padded to the tokenizer's length, all attended (no mask)
    T5 alone     PixArt             last hidden state with its mask; may be trimmed to the longest caption of the batch
    CLIP and T5  FLUX               T5's states without a mask, CLIP's pooled output
    two CLIPs    SDXL               the last hidden states but one of both side by side, the second's projected output

The unconditional condition is the empty caption, encoded in the same way; zeros where SDXL's pipeline asks for them.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_t2i.batch import Cond
from lightning_t2i.errors import UserError
from lightning_t2i.frozen import folder_identity
from lightning_t2i.paths import resolve
from lightning_t2i.state_io import local_tensor

Tokens: TypeAlias = dict[str, Tensor]
Encoded: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None]

# Classes of text_encoder, text_encoder_2, ... of the pipelines that are served -> what they are called here.
SERVED = {
    ("CLIPTextModel",): ("clip",),
    ("T5EncoderModel",): ("t5",),
    ("CLIPTextModel", "T5EncoderModel"): ("clip", "t5"),
    ("CLIPTextModel", "CLIPTextModelWithProjection"): ("clip", "clip_2"),
}


class TextEncoder(nn.Module):
    """One or two text encoders with their tokenizers.

    Args:
        clip, clip_tokenizer: CLIPTextModel and its fast tokenizer.
        clip_2, clip_2_tokenizer: SDXL's second encoder, a CLIPTextModelWithProjection, and its fast tokenizer.
        t5, t5_tokenizer: T5EncoderModel and its fast tokenizer.
        t5_length: tokens per caption for T5 (PixArt-alpha 120, FLUX.1-dev 512).
        trim: encode only up to the longest caption of the batch; exact, and only where a mask hides the padding.
        zero_null: the unconditional condition is zeros, not the empty caption (SDXL's `force_zeros_for_empty_prompt`).

    Raises:
        UserError: no encoder, encoders that no pipeline has together, or `trim` without a mask.
    """

    def __init__(
        self,
        clip: nn.Module | None = None,
        clip_tokenizer: Any = None,
        t5: nn.Module | None = None,
        t5_tokenizer: Any = None,
        t5_length: int = 120,
        trim: bool = False,
        clip_2: nn.Module | None = None,
        clip_2_tokenizer: Any = None,
        zero_null: bool = False,
    ):
        super().__init__()
        if clip is None and t5 is None:
            raise UserError("A text encoder needs CLIP or T5")
        if clip_2 is not None and (clip is None or t5 is not None):
            raise UserError("A second CLIP is served beside a first one, without T5")
        if zero_null and clip_2 is None:
            raise UserError("Zeros are the unconditional condition of SDXL alone", where="zero_null", given=True)
        if trim and clip is not None:
            raise UserError(
                "Captions can be trimmed only where padding is masked", where="trim", given=True, allowed="T5 alone"
            )
        self.clip, self.clip_2, self.t5 = clip, clip_2, t5
        self._clip_tokenizer, self._clip_2_tokenizer = clip_tokenizer, clip_2_tokenizer
        self._t5_tokenizer = t5_tokenizer
        self.trim, self.t5_length, self.zero_null = trim, t5_length, zero_null
        self._null: tuple[Any, Encoded] | None = None
        self.source: tuple[str, str | None] | None = None  # folder or hub id and revision that it was read from

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        revision: str | None = None,
        torch_dtype: torch.dtype = torch.float32,
        t5_length: int | None = None,
        trim: bool = False,
        variant: str | None = None,
    ) -> TextEncoder:
        """The text encoders of a pipeline folder or hub id (components text_encoder, text_encoder_2, ...).

        Raises:
            UserError: the pipeline has none, or of kinds that are not served.
        """
        import transformers

        from lightning_t2i.networks import load

        index = load.model_index(path, revision)
        suffixes = [s for s in ("", "_2", "_3", "_4") if (index.get(f"text_encoder{s}") or [None])[0]]
        classes = tuple(index[f"text_encoder{suffix}"][1] for suffix in suffixes)
        if not classes:
            raise UserError("The pipeline has no text encoder", where=str(path))
        if classes not in SERVED:
            allowed = "; ".join(" + ".join(served) for served in SERVED)
            what = "Text encoders of this pipeline are not served"
            raise UserError(what, where=str(path), given=" + ".join(classes), allowed=allowed)
        parts: dict[str, Any] = {}
        for suffix, kind in zip(suffixes, SERVED[classes], strict=True):
            parts[kind] = load.load_model(path, f"text_encoder{suffix}", revision, torch_dtype, variant)
            tokenizer = getattr(transformers, index[f"tokenizer{suffix}"][1])
            parts[f"{kind}_tokenizer"] = tokenizer.from_pretrained(
                load.locate(path), revision=revision, subfolder=f"tokenizer{suffix}"
            )
        if "clip_2" in parts:  # a pipeline that does not say it takes zeros
            parts["zero_null"] = bool(index.get("force_zeros_for_empty_prompt", True))
        length = t5_length or (512 if "clip" in parts else 120)
        found = cls(**parts, t5_length=length, trim=trim).eval()
        found.source = str(path), revision
        return found

    def encoders(self) -> dict[str, tuple[Any, Any]]:
        """The encoders that there are with their tokenizers, by name, in the order of a pipeline's components."""
        every = {
            "clip": (self.clip, self._clip_tokenizer),
            "clip_2": (self.clip_2, self._clip_2_tokenizer),
            "t5": (self.t5, self._t5_tokenizer),
        }
        return {name: pair for name, pair in every.items() if pair[0] is not None}

    @property
    def width(self) -> int:
        """D, channels of the embeddings."""
        widths = {name: encoder.config.d_model if name == "t5" else encoder.config.hidden_size
                  for name, (encoder, _) in self.encoders().items()}  # fmt: skip
        return widths.get("t5") or sum(widths.values())

    @property
    def lengths(self) -> dict[str, int]:
        """Tokens at which each encoder's captions are cut, and to which they are padded unless trimmed."""
        most = {name: self.t5_length if name == "t5" else encoder.config.max_position_embeddings
                for name, (encoder, _) in self.encoders().items()}  # fmt: skip
        return {name: min(tokenizer.model_max_length, most[name]) for name, (_, tokenizer) in self.encoders().items()}

    @property
    def masks(self) -> bool:
        """Whether a mask hides padding from the denoiser; elsewhere every position counts, padding too."""
        return self.clip is None

    def shard_roots(self) -> list[nn.Module]:
        """What is sharded, each as a root of its own."""
        return [encoder for encoder, _ in self.encoders().values()]

    def tokenize(self, captions: list[str]) -> Tokens:
        """Captions to "clip", "clip_2" int64 [B, L] and "t5", "t5_mask" int64 [B, L'] on the CPU; long ones are cut."""
        tokens: Tokens = {}
        lengths = self.lengths
        for name, (_, tokenizer) in self.encoders().items():
            padding = "longest" if name == "t5" and self.trim else "max_length"
            out = self._call(tokenizer, captions, lengths[name], padding)
            tokens[name] = out["input_ids"]
            if name == "t5":
                tokens["t5_mask"] = out["attention_mask"]
        return tokens

    def encode(self, tokens: Tokens) -> Encoded:
        """embeds [B, L, D], mask bool [B, L] or None, pooled [B, P] or None."""
        device = next(self.parameters()).device
        tokens = {name: value.to(device) for name, value in tokens.items()}
        if self.clip is not None and self.clip_2 is not None:
            first: Any = self.clip(input_ids=tokens["clip"], output_hidden_states=True)
            second: Any = self.clip_2(input_ids=tokens["clip_2"], output_hidden_states=True)
            return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), None, second.text_embeds
        clip: Any = self.clip(input_ids=tokens["clip"]) if self.clip is not None else None
        if self.t5 is None:
            return clip.last_hidden_state, None, None
        if clip is not None:
            return self.t5(input_ids=tokens["t5"]).last_hidden_state, None, clip.pooler_output
        mask = tokens["t5_mask"]
        return self.t5(input_ids=tokens["t5"], attention_mask=mask).last_hidden_state, mask.bool(), None

    def forward(self, captions: list[str]) -> Cond:
        """Conditions of B captions (empty ones allowed) with the null values: those of the empty caption, or zeros.

        While parameters require gradients the empty caption is encoded within the batch, with its gradient; a frozen
        encoder encodes it once. Zeros have no gradient.
        """
        if self.zero_null:
            embeds, mask, pooled = self.encode(self.tokenize(captions))
            null = torch.zeros_like(embeds[0]), None, None if pooled is None else torch.zeros_like(pooled[0])
        elif any(p.requires_grad for p in self.parameters()):
            embeds, mask, pooled = self.encode(self.tokenize([*captions, ""]))
            null = _row((embeds, mask, pooled), -1)
            embeds, mask, pooled = (None if p is None else p[:-1] for p in (embeds, mask, pooled))
        else:
            embeds, mask, pooled = self.encode(self.tokenize(captions))
            null = self._frozen_null()
        null_embeds, null_mask, null_pooled = null
        length = embeds.shape[1]
        return Cond(
            embeds=embeds,
            mask=mask,
            pooled=pooled,
            null_embeds=null_embeds[:length],
            null_mask=None if null_mask is None else null_mask[:length],
            null_pooled=null_pooled,
        )

    @torch.no_grad()
    def _frozen_null(self) -> Encoded:
        """The encoded empty caption; encoded again when a parameter was moved, cast or written in place.

        Averages are written shard by shard, which the version of a sharded parameter does not tell.
        """
        key = [(id(p), p.device, p.dtype, local_tensor(p)._version) for p in self.parameters()]
        if self._null is None or self._null[0] != key:
            trim, self.trim = self.trim, False
            parts = self.encode(self.tokenize([""]))
            self.trim = trim
            self._null = key, _row(parts, 0)
        return self._null[1]

    @staticmethod
    def _call(tokenizer: Any, captions: list[str], length: int, padding: str) -> Any:
        return tokenizer(list(captions), padding=padding, max_length=length, truncation=True, return_tensors="pt")


def text_identity(source: str, revision: str | None = None) -> str:
    """What the text encoders of a pipeline are known by: the hash of their folders and tokenizers, or id and commit."""
    return folder_identity(resolve(source), revision, ("text_encoder", "tokenizer"))


def _row(parts: Encoded, row: int) -> Encoded:
    embeds, mask, pooled = parts
    return embeds[row], None if mask is None else mask[row], None if pooled is None else pooled[row]
