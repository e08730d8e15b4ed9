"""Batches as a data module would give them, by the declared options of its streams; captions are read, pictures not."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from datamodules.image_text import ImageText
from datamodules.order import batch_positions
from datamodules.pairs import Pairs
from datamodules.pictures import BadSample
from datamodules.points import Points
from datamodules.prompts import SUFFIXES, Prompts
from datamodules.records import Shards, captions_in
from datamodules.shards import index_path
from lightning_t2i.batch import Batch, Records
from lightning_t2i.errors import UserError
from lightning_t2i.networks.text_encoder import TextEncoder
from lightning_t2i.preflight.sources import folder_of, latent_shape

# A scene of the shapes world, which its classifiers are trained to read.
SCENE = {"objects": [{"cell": [0, 0], "shape": "circle", "colour": "red"}]}
UNKNOWN = ""  # a caption that the stand-in for a tokenizer gives its full length
LOOKED_AT = 256  # captions of a data set, to know how long they are


def batch_of(streams: dict[str, Any], world: int, method: Any) -> Batch:
    """One micro-batch of a process: a Records for each training stream, without values.

    Args:
        streams: name -> stream of a data module.
        world: processes that share each batch.
        method: built; knows the shape of a latent and whether there are classes.

    Raises:
        UserError: a batch that does not divide by the processes, or a stream of an unknown kind.
    """
    batch: Batch = {}
    for name, stream in streams.items():
        rows = len(batch_positions(0, stream.batch_size, world=world, where=f"data.{name}.batch_size"))
        kind = next((k for k in type(stream).__mro__ if k in SHAPES), None)
        if kind is None:
            what = "The shapes of this stream's samples are not known beforehand"
            allowed = ", ".join(k.__name__ for k in SHAPES)
            raise UserError(what, where=f"data.{name}", given=type(stream).__name__, allowed=allowed)
        classes = _classes(method)
        label = torch.zeros(rows, dtype=torch.int64) if classes else None
        found = SHAPES[kind](stream, rows, method)
        with unset_fake_temporarily():  # the engine notes the ids of samples
            ids = torch.arange(rows)
        batch[name] = Records(id=ids, position=torch.arange(rows), **{"label": label, **found})
    return batch


def some_captions(stream: Any) -> list[list[str]]:
    """Captions of some samples from all over a data set, none where there is no data set or one behind the network."""
    place = stream.source
    if Path(place).suffix in SUFFIXES or not index_path(folder_of(place), stream.split).is_file():
        return []
    where = getattr(stream, "where", None)
    shards = Shards(folder_of(place), stream.split, stream.languages, stream.limit, where)
    if shards.extents is not None:
        return []
    found = []
    for row in range(0, len(shards), math.ceil(len(shards) / LOOKED_AT)):
        with contextlib.suppress(BadSample):
            found.append(captions_in(shards.meta(row), stream.languages))
    return found


def captions(stream: ImageText, rows: int) -> list[str]:
    """As many captions as rows: the longest of some from all over the data set, `UNKNOWN` where there is none."""
    found = {text for texts in some_captions(stream) for text in texts}
    longest = sorted(found, key=len, reverse=True) or [UNKNOWN]
    return (longest * rows)[:rows]


def text_encoder(method: Any) -> TextEncoder | None:
    """The frozen text encoder of a built method, whose captions can be cached."""
    found = [getattr(method, name) for name in getattr(method, "frozen_identities", ())]
    return next((network for network in found if isinstance(network, TextEncoder)), None)


def _words(stream: Any, texts: list[str], method: Any) -> dict[str, Any]:
    """Captions and, where they are cached, the conditions that the method's own text encoder gives."""
    words = {"caption": texts, "scene": [SCENE] * len(texts)}
    if stream.text == "online":
        return words
    encoder = text_encoder(method)
    if encoder is None:
        what, allowed = "No frozen text encoder says what cached captions are", "text: online"
        raise UserError(what, where="data", given=f"text: cached of {stream.source}", allowed=allowed)
    trim, encoder.trim = encoder.trim, stream.text_cache.trim and encoder.masks
    with torch.no_grad():
        cond = encoder(texts)
    encoder.trim = trim
    return {**words, "cond": cond.to(dtype=torch.float32)}


def _classes(method: Any) -> int:
    denoiser = getattr(method, "denoiser", None)
    return getattr(method, "classes", 0) or getattr(denoiser, "classes", 0)


def _image_text(stream: ImageText, rows: int, method: Any) -> dict[str, Any]:
    words = _words(stream, captions(stream, rows), method)
    if stream.latents is not None:
        return {"latent": torch.zeros(rows, *latent_shape(stream.latents, stream.size), dtype=torch.float16), **words}
    return {"image": torch.zeros(rows, 3, stream.size, stream.size), **words}


def _prompts(stream: Prompts, rows: int, method: Any) -> dict[str, Any]:
    return _words(stream, [UNKNOWN] * rows, method)


def _pairs(stream: Pairs, rows: int, method: Any) -> dict[str, Any]:
    kind = "image" if method.codec.vae is None else "latent"
    x0: Tensor = torch.zeros(rows, *method.shape)
    return {"noise_seed": torch.zeros(rows, dtype=torch.int64), "caption": [UNKNOWN] * rows, kind: x0}


def _points(stream: Points, rows: int, method: Any) -> dict[str, Any]:
    return {"image": torch.zeros(rows, 3, 1, 1), "label": torch.zeros(rows, dtype=torch.int64)}


SHAPES: dict[type, Callable[[Any, int, Any], dict[str, Any]]] = {
    ImageText: _image_text,
    Prompts: _prompts,
    Pairs: _pairs,
    Points: _points,
}
