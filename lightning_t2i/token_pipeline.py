"""A token transformer with its tokenizer and text encoder: from captions to pictures, and the folder that holds them.

    FOLDER/transformer        TokenTransformer, safetensors
    FOLDER/vae or vqvae       autoencoder of diffusers, whose latents or codes are the tokens
    FOLDER/text_encoder       of transformers, with FOLDER/tokenizer
    FOLDER/sampling.json      how the pictures of its model card were drawn

The layout is that of diffusers' pipelines, but no pipeline of diffusers draws tokens in this way; this one does:

    pipeline = TokenPipeline.from_pretrained(folder)
    pictures = pipeline(["a red square"])
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from lightning_t2i.batch import Cond, Records
from lightning_t2i.errors import UserError
from lightning_t2i.keys import Keys
from lightning_t2i.networks.build import forget_origin
from lightning_t2i.networks.codec import LatentCodec
from lightning_t2i.networks.load import load_model, model_index, read_json
from lightning_t2i.networks.text_encoder import TextEncoder
from lightning_t2i.networks.token_transformer import TokenTransformer
from lightning_t2i.pictures import to_pil
from lightning_t2i.token_sampling import Sampling, sample_tokens

SAMPLING, NAME = "sampling.json", "TokenPipeline"


def patches(latents: Tensor, patch: int) -> Tensor:
    """Latents [B, C, h, w] to tokens [B, L, C patch^2], row by row; within a token the channel varies slowest."""
    return pixel_unshuffle(latents, patch).flatten(2).transpose(1, 2)


def unpatched(tokens: Tensor, patch: int) -> Tensor:
    """Tokens [B, L, C patch^2] of a square picture back to latents [B, C, h, w]."""
    side = math.isqrt(tokens.shape[1])
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (side, side)), patch)


def load_transformer(path: str | Path, revision: str | None = None) -> TokenTransformer:
    """The network of a folder that `TokenPipeline.save` wrote, or of its part `transformer`; float32, eval mode.

    Raises:
        UserError: no such folder, or it holds something else.
    """
    network: Any = load_model(path, "transformer" if model_index(path, revision) else None, revision)
    if not isinstance(network, TokenTransformer):
        raise UserError("Not a token transformer", where=str(path), given=type(network).__name__)
    return network.eval()


@dataclass
class TokenPipeline:
    """The parts; `network` decides whether tokens are latents or codes, and how many places one of them spans."""

    network: TokenTransformer
    codec: LatentCodec
    text: TextEncoder
    sampling: Sampling

    @property
    def patch(self) -> int:
        """Side of the patch of latents that makes a token."""
        facts = self.network.config
        return 1 if self.network.discrete else math.isqrt(facts.channels // self.codec.channels)

    @torch.no_grad()
    def tokens(self, records: Records) -> Tensor:
        """Tokens of pictures or of their cached latents: [B, L, c], or int64 [B, L].

        Raises:
            UserError: the pictures have another number of tokens than the network.
        """
        if self.network.discrete:
            found = self.codec.tokens(records).flatten(1)
        else:
            found = patches(self.codec.latents(records), self.patch)
        if found.shape[1] != self.network.config.length:
            what, allowed = "The pictures do not have as many tokens as the network", self.network.config.length
            raise UserError(what, where="data size and model.size", given=found.shape[1], allowed=str(allowed))
        return found

    @torch.no_grad()
    def condition(self, records: Records) -> Cond:
        """The states of the captions: cached, or encoded."""
        return records.cond if records.cond is not None else self.text(records.caption)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens to pictures [B, 3, H, W] in [-1, 1]."""
        if self.network.discrete:
            side = math.isqrt(tokens.shape[1])
            return self.codec.decode_tokens(tokens.unflatten(1, (side, side))).clamp(-1, 1)
        return self.codec.decode(unpatched(tokens, self.patch)).clamp(-1, 1)

    def sample(self, cond: Cond, keys: Keys, positions: Tensor, **changes: Any) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1]; the draws of a picture depend on keys and position.

        Args:
            changes: fields of `sampling` to replace.
        """
        options = replace(self.sampling, **changes)
        options.refuse_unfit(self.network)
        return self.decode(sample_tokens(self.network, cond, keys, positions, options))

    @torch.no_grad()
    def __call__(self, captions: Sequence[str], seed: int = 0, **changes: Any) -> list[Image.Image]:
        """Pictures of captions; equal seeds give equal pictures."""
        places = torch.arange(len(captions), device=self.network.device)
        return to_pil(self.sample(self.text(list(captions)), Keys(seed).fork("pipeline"), places, **changes))

    @classmethod
    def from_pretrained(cls, folder: str | Path, revision: str | None = None) -> TokenPipeline:
        """Reads what `save` wrote, float32, in eval mode.

        Raises:
            UserError: no such folder, or it holds something else.
        """
        network = load_transformer(folder, revision)
        found = read_json(folder, SAMPLING, revision) or {}
        length = found.pop("text_length", None)
        codec = LatentCodec.from_pretrained(str(folder), revision=revision)
        text = TextEncoder.from_pretrained(str(folder), revision=revision, t5_length=length)
        return cls(network, codec, text, Sampling(**found))

    def save(self, folder: Path) -> None:
        """Writes the folder in fp16, from copies."""
        index: dict[str, Any] = {"_class_name": NAME, "transformer": ["lightning_t2i", TokenTransformer.__name__]}
        vae = "vqvae" if self.network.discrete else "vae"
        index[vae] = ["diffusers", type(self.codec.vae).__name__]
        parts: dict[str, Any] = {"transformer": self.network, vae: self.codec.vae}
        for suffix, (encoder, tokenizer) in zip(("", "_2"), self.text.encoders().values(), strict=False):
            parts[f"text_encoder{suffix}"] = encoder
            index[f"text_encoder{suffix}"] = ["transformers", type(encoder).__name__]
            index[f"tokenizer{suffix}"] = ["transformers", type(tokenizer).__name__]
            tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
        for name, part in parts.items():
            copy.deepcopy(part).half().save_pretrained(folder / name, safe_serialization=True)
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        sampling = {**asdict(self.sampling), "text_length": self.text.t5_length}
        (folder / SAMPLING).write_text(json.dumps(sampling, indent=2) + "\n", encoding="utf-8")
        forget_origin(folder)
