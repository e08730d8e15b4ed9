"""Streams whose captions may be encoded already, and whether the method would encode them in the same way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from datamodules.caches import default_device
from datamodules.records import Shards, Stream, captioned
from datamodules.remote import RemoteOptions
from datamodules.text_cache import CachedTexts, TextCache, encode_texts
from lightning_t2i.batch import Records
from lightning_t2i.errors import UserError
from lightning_t2i.networks.text_encoder import TextEncoder, text_identity


class Captioned(Stream):
    """A stream of a data set whose captions may be encoded already.

    Attributes:
        text: whether the method encodes captions in the training ("online"), or the batch holds their conditions.
        text_cache: which ones.
        texts: reads them, after `open_texts`.
    """

    languages: tuple[str, ...]
    split: str
    remote: RemoteOptions
    text: Literal["online", "cached"] = "online"
    text_cache: TextCache | None = None
    texts: CachedTexts | None = None

    def choose_text(self, text: Literal["online", "cached"], options: TextCache | None) -> None:
        """Raises UserError where embeddings are asked for and nobody says which."""
        if text == "cached" and options is None:
            fix = "text_cache: {encoder: PIPELINE}"
            raise UserError("Cached captions of which text encoder?", where="text_cache", given="null", fix=fix)
        self.text, self.text_cache = text, options

    def make_texts(self, folder: Path) -> None:
        """Encodes what is not encoded yet."""
        if self.text == "cached" and self.text_cache is not None:
            encode_texts(
                folder, self.split, self.text_cache, self.languages, device=default_device(), remote=self.remote
            )

    def open_texts(self, shards: Shards) -> None:
        """Maps the embeddings into memory."""
        if self.text == "cached" and self.text_cache is not None:
            self.texts = CachedTexts(shards, self.text_cache, self.languages)

    def captioned(self, source: Any, rows: Sequence[int], metas: Sequence[dict], positions: Tensor) -> Records:
        """Records of `rows` with drawn captions and, where they are cached, the conditions of just these."""
        records = captioned(source, self.keys, self.languages, rows, metas, positions)
        if self.texts is not None:
            draws = self.keys.uniform("caption", positions, dtype=torch.float64)  # those that chose the captions
            records.cond = self.texts(rows, draws.tolist())
        return records


def refuse_other_encoders(method: Any, streams: Mapping[str, Any]) -> None:
    """Refuses cached conditions that are not what a method's own text encoders would give.

    Args:
        method: built.
        streams: name -> stream.

    Raises:
        UserError: the method trains its text encoder, has another one, cuts captions elsewhere, or adds to conditions.
    """
    modules = list(method.modules()) if isinstance(method, nn.Module) else []
    encoders = [module for module in modules if isinstance(module, TextEncoder)]
    told = any(getattr(getattr(module, "config", None), "guidance_embeds", False) for module in modules)
    for name, stream in streams.items():
        texts: CachedTexts | None = getattr(stream, "texts", None)
        if texts is None:
            continue
        where, fix = f"data.{name}.text", "text: online, or a text_cache of what the method has"
        if told:
            what = "A guidance-distilled network is told a scale with its captions, which no cache has"
            raise UserError(what, where=where, given="cached", fix="text: online")
        for encoder in encoders:
            if any(p.requires_grad for p in encoder.parameters()):
                what = "The captions of a text encoder that is trained cannot be cached"
                raise UserError(what, where=where, given="cached", fix="text: online")
            identity = text_identity(*encoder.source) if encoder.source else "random weights"
            ours = {"encoder": identity, "lengths": encoder.lengths, "zero_null": encoder.zero_null}
            for fact, value in ours.items():
                if texts.about[fact] != value:
                    what = f"The cached text embeddings are not of the method's text encoder: '{fact}' differs"
                    raise UserError(what, where=where, given=texts.about[fact], allowed=str(value), fix=fix)
