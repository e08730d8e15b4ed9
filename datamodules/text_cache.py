"""Captions as the frozen text encoders see them, encoded once: `python -m datamodules.encode --text FOLDER`.

Beside the shards, `text-<hash of the encoders>-<storage>-<languages>/` holds, for each shard, one safetensors file that
is mapped into memory when read; captions that a shard has twice are there once:

    tokens [T, D]      states of real tokens, caption after caption: those that the denoiser may attend to. Where a mask
                       hides padding (T5 alone) these are the caption's own; elsewhere (CLIP, FLUX) all L of them,
                       since the states of padding are attended to and differ from caption to caption
    start [N + 1]      where in `tokens` a caption begins
    pooled [N, P]      fp32, where the encoders have a pooled output
    first [S + 1]      where in `caption` the captions of a sample begin
    caption [C]        number of each
    null, null_pooled  fp32, of the empty caption

    storage   bytes of a token   error of a value x of a token with largest value m
    fp32      4 D                none
    bf16      2 D                |x| / 2^8, of what is not subnormal
    fp8       D + 4              |x| / 2^4 or m / 448 / 2^10, the larger: e4m3 with one scale a token (arXiv 2209.05433)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from datamodules.caches import Cache, Make, Places
from datamodules.filters import speaking
from datamodules.open_files import MAPPED, Latest, mapped_tensors
from datamodules.pictures import BadSample
from datamodules.records import Shards, captions_in
from datamodules.remote import RemoteOptions
from lightning_t2i.batch import Cond
from lightning_t2i.errors import UserError
from lightning_t2i.frozen import freeze
from lightning_t2i.networks.text_encoder import TextEncoder, text_identity
from lightning_t2i.paths import resolve

FORMAT = 1
STORAGES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
AHEAD = 256  # rows whose captions are fetched at once, where shards are remote
FP8_MAX = 448.0  # the largest number of e4m3


@dataclass(frozen=True)
class TextCache:
    """Which embeddings of captions a stream reads.

    encoder: folder or hub id of the pipeline whose text encoders the method has.
    revision: commit of a hub id.
    length: tokens of a caption for T5, those of the method; null is the pipeline's own number.
    storage: how they are stored.
    trim: pad to the longest caption of the batch, not to `length`, where a mask hides padding; exact, but shapes then
        change from step to step.
    """

    encoder: str
    revision: str | None = None
    length: int | None = None
    storage: Literal["fp32", "bf16", "fp8"] = "bf16"
    trim: bool = False


def stored(x: Tensor, storage: str) -> dict[str, Tensor]:
    """Float32 [T, D] as `tokens` in a precision, and `scale` [T] with fp8."""
    if storage != "fp8":
        return {"tokens": x.to(STORAGES[storage])}
    scale = (x.abs().amax(1) / FP8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    return {"tokens": (x / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(STORAGES[storage]), "scale": scale}


def restored(tokens: Tensor, scale: Tensor | None = None) -> Tensor:
    """Float32 [T, D] of what `stored` made."""
    return tokens.float() if scale is None else tokens.float() * scale[:, None]


def bytes_of_token(width: int, storage: str) -> int:
    """Bytes of a token of D = `width` channels."""
    return width * STORAGES[storage].itemsize + (4 if storage == "fp8" else 0)


def text_folder(folder: Path, options: TextCache, languages: Sequence[str]) -> Path:
    """Where the embeddings of a data-set folder lie."""
    name = text_identity(options.encoder, options.revision).removeprefix("sha256:")
    name = name.replace("/", "--").replace("@", "-")
    return folder / f"text-{name}-{options.storage}-{'-'.join(languages)}"


def text_cache(shards: Shards, options: TextCache, languages: Sequence[str]) -> Cache:
    """The embeddings of a split's captions, and what they depend on."""
    identity = text_identity(options.encoder, options.revision)
    facts = {"format": FORMAT, "encoder": identity, "index": shards.index.sha, "languages": list(languages)}
    facts |= {"length": options.length, "storage": options.storage}
    folder = text_folder(shards.folder, options, languages)
    words = [f"--text {options.encoder} --source {shards.folder} --split {shards.split} --storage {options.storage}"]
    words += [f"--revision {options.revision}"] if options.revision else []
    words += [f"--length {options.length}"] if options.length else []
    command = f"python -m datamodules.encode {' '.join(words)} --languages {' '.join(languages)}"
    return Cache(folder, shards, facts, "text embeddings", command, ".safetensors")


class CachedTexts:
    """Cached conditions of the captions of a split.

    Args:
        shards: the split, with or without filters.
        options: which embeddings.
        languages: of the captions, as the stream draws them.

    Raises:
        UserError: there are none, they are incomplete, or they were made from something else.
    """

    def __init__(self, shards: Shards, options: TextCache, languages: Sequence[str]):
        cache = text_cache(shards, options, languages)
        self.about, self.options = cache.about(), options
        self._names = [cache.folder / name for name in cache.names]
        self._places = Places(shards)
        self._files = Latest(mapped_tensors, MAPPED)
        first = self._files(self._names[0])  # the empty caption is in each; a mapped tensor would be pickled whole
        self._null = {name: first[name].clone() for name in ("null", "null_pooled") if name in first}

    def __call__(self, rows: Sequence[int], draws: Sequence[float]) -> Cond:
        """Float32 conditions of one caption of each row, padded with zeros; null values are those of the whole cache.

        Args:
            rows: of the stream.
            draws: in (0, 1); they choose as `datamodules.records.choose_caption` does.
        """
        _, shards, places = self._places(rows)
        found = [self._caption(*one) for one in zip(shards.tolist(), places.tolist(), draws, strict=True)]
        masks = self.about["masks"]
        length = max(len(tokens) for tokens, _ in found) if masks and self.options.trim else self.about["tokens"]
        embeds = torch.zeros(len(found), length, self._null["null"].shape[1])
        for row, (tokens, _) in zip(embeds, found, strict=True):
            row[: len(tokens)] = tokens
        null = torch.zeros(length, embeds.shape[2])
        shown = self._null["null"][:length]
        null[: len(shown)] = shown
        counts, place = torch.tensor([len(tokens) for tokens, _ in found]), torch.arange(length)
        return Cond(
            embeds=embeds,
            mask=place < counts[:, None] if masks else None,
            pooled=torch.stack([pooled for _, pooled in found]) if "null_pooled" in self._null else None,
            null_embeds=null,
            null_mask=place < len(shown) if masks else None,
            null_pooled=self._null.get("null_pooled"),
        )

    def _caption(self, shard: int, sample: int, u: float) -> tuple[Tensor, Any]:
        """States [n, D] and pooled output [P], or None, of one caption of a sample."""
        file = self._files(self._names[shard])
        first, end = file["first"][sample : sample + 2].tolist()
        number = int(file["caption"][first + int(u * (end - first))])
        start, stop = file["start"][number : number + 2].tolist()
        scale = file["scale"][start:stop] if "scale" in file else None
        return restored(file["tokens"][start:stop], scale), file["pooled"][number] if "pooled" in file else None


@torch.no_grad()
def encode_texts(
    folder: Path,
    split: str,
    options: TextCache,
    languages: Sequence[str],
    batch_size: int = 64,
    device: str = "cpu",
    task: int = 0,
    tasks: int = 1,
    remote: RemoteOptions = RemoteOptions(),
) -> Path:
    """Encodes the captions of a split unless that is done; goes on after an interruption with the missing shards.

    Captions of like length are encoded together and, where a mask hides padding, up to the longest of them only. The
    embeddings of a shard are in memory until they are written.

    Args:
        folder: data-set folder.
        split: split to encode, all of its rows.
        options: encoders and storage.
        languages: of the captions.
        batch_size: captions per forward pass.
        device: where to encode.
        task, tasks: see `Cache.fill`.
        remote: how shards behind URLs are read.

    Returns:
        The folder of the embeddings.

    Raises:
        UserError: embeddings from other data or of another format are in the way, a value is not finite, or nothing is
            in a language.
    """
    shards = Shards(folder, split, remote=remote, parts=("json_", "txt_"))
    speaking(shards.index, languages, slice(0, 0))  # refuses languages that there are not
    cache = text_cache(shards, options, languages)

    def start() -> Make:
        source = str(resolve(options.encoder))
        encoder = TextEncoder.from_pretrained(source, revision=options.revision, t5_length=options.length)
        encoder.trim = encoder.masks
        freeze(encoder).to(device)

        def make(rows: np.ndarray, path: Path) -> dict[str, Any]:
            numbers: dict[str, int] = {}
            captions = _captions(shards, rows, languages)
            chosen = [numbers.setdefault(text, len(numbers)) for texts in captions for text in texts]
            tensors, error = _encoded(encoder, list(numbers), options.storage, batch_size)
            tensors["caption"] = torch.tensor(chosen, dtype=torch.int64)
            tensors["first"] = _starts([len(texts) for texts in captions])
            save_file(tensors, path)
            about = {"lengths": encoder.lengths, "masks": encoder.masks, "zero_null": encoder.zero_null}
            sizes = {"captions": len(numbers), "real_tokens": len(tensors["tokens"]), "bytes": path.stat().st_size}
            return {**about, **sizes, "error": error, "width": tensors["tokens"].shape[1]}

        return make

    cache.fill(start, _merged, task, tasks)
    return cache.folder


def _captions(shards: Shards, rows: np.ndarray, languages: Sequence[str]) -> list[list[str]]:
    """The captions of each row; none of a bad sample, which the stream replaces."""
    found = []
    for first in range(0, len(rows), AHEAD):
        some = rows[first : first + AHEAD].tolist()
        shards.ahead(some)
        for row in some:
            try:
                found.append(captions_in(shards.meta(row), languages))
            except BadSample:
                found.append([])
    return found


def _starts(sizes: Sequence[int]) -> Tensor:
    return torch.tensor([0, *sizes], dtype=torch.int64).cumsum(0)


def _encoded(
    encoder: TextEncoder, texts: list[str], storage: str, batch_size: int
) -> tuple[dict[str, Tensor], list[float]]:
    """The tensors of a file, and the sums of squares of the rounding errors and of the values."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: list[tuple[dict[str, Tensor], Any]] = [({}, None)] * len(texts)
    error, total = 0.0, 0.0
    cond = encoder([""]).to("cpu", torch.float32)
    for start in range(0, len(texts), batch_size):
        chosen = order[start : start + batch_size]
        cond = encoder([texts[i] for i in chosen]).to("cpu", torch.float32)
        for i, row in zip(chosen, cond.to_cache(), strict=True):
            values = row["embeds"]
            found[i] = stored(values, storage), row.get("pooled")
            error += float((restored(**found[i][0]) - values).double().square().sum())
            total += float(values.double().square().sum())
            if not values.isfinite().all():
                raise UserError("A caption's embedding is not finite", where="--text", given=texts[i])
    assert cond.null_embeds is not None
    null = cond.null_embeds if cond.null_mask is None else cond.null_embeds[cond.null_mask]
    tensors = {"null": null, "start": _starts([len(parts["tokens"]) for parts, _ in found])}
    if cond.pooled is not None and cond.null_pooled is not None:
        tensors |= {"null_pooled": cond.null_pooled}
        tensors["pooled"] = torch.stack([pooled for _, pooled in found]) if found else cond.pooled[:0]
    empty = [stored(null[:0], storage)]
    for name in empty[0]:
        tensors[name] = torch.cat([parts[name] for parts in ([p for p, _ in found] or empty)])
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, [error, total]


def _merged(reports: list[Any]) -> dict[str, Any]:
    facts = {name: reports[0][name] for name in ("lengths", "masks", "zero_null", "width")}
    sums = {name: sum(report[name] for report in reports) for name in ("captions", "real_tokens", "bytes")}
    error, total = (sum(report["error"][i] for report in reports) for i in (0, 1))
    lengths = facts["lengths"]
    return {
        **facts,
        **sums,
        "tokens": lengths.get("t5") or lengths["clip"],
        "relative_error": (error / max(total, 1e-30)) ** 0.5,
    }
