"""Whether captions are better encoded in the training or once before it: bytes, operations, epochs.

spent = steps B f                        operations of the encoder in the training, f for a caption, B a step's
made  = N f r / L                        of encoding each of N captions once, cut to its r of L tokens (r = L where
                                         no mask hides padding)
bytes = N (r b + 4 P + 16)               b bytes a token (datamodules/text_cache.py), P pooled channels
cached if the encoder has SHARE of a step's operations or more, made < spent, and the disk has room
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from datamodules.text_cache import bytes_of_token, text_folder
from lightning_t2i.networks.text_encoder import TextEncoder
from lightning_t2i.preflight.bill import Bill
from lightning_t2i.preflight.records import some_captions, text_encoder
from lightning_t2i.preflight.sources import Source, Store, folder_of, free_bytes

SHARE = 0.05  # of a step's operations, below which a cache is not worth its bytes and its staleness


@dataclass(frozen=True)
class Captions:
    """The captions of a training stream.

    name; text: what the config says; share: of a step's operations that encode them online; epochs: passes over the
    samples, None where their number is not known; captions: how many there are; tokens: the mean number that is
    stored of one, of `length`; sizes: bytes of a caption by storage, and "padded" in bf16; spent, made: operations of
    all processes in the training and to make the cache; better: what the numbers speak for.
    """

    name: str
    text: str
    share: float
    epochs: float | None
    captions: int | None
    tokens: float
    length: int
    sizes: dict[str, float]
    spent: float
    made: float | None
    better: str


def captions_of(
    method: Any, streams: Mapping[str, Any], sources: list[Source], bill: Bill, ranks: int, steps: int
) -> list[Captions]:
    """The streams whose captions a frozen text encoder of the method reads.

    Args:
        method: rehearsed.
        streams: of the training; `sources` are what is known of their data.
        ranks: processes.
        steps: of the training.
    """
    encoder, found = text_encoder(method), []
    if encoder is None:
        return []
    name = next(child for child, network in method.named_children() if network is encoder)
    others = sum(flops for network, flops in bill.flops_of.items() if network.partition(".")[0] != name)
    each = {n: e.flops * method.common.accumulate for n, e in bill.encodings.items()}
    for source in sources:
        if source.name in each and hasattr(streams[source.name], "text"):
            share = each[source.name] / max(others + sum(each.values()), 1)
            spent = float(steps * each[source.name] * ranks)
            found.append(
                _of(encoder, streams[source.name], source, bill, method.common.accumulate * steps, share, spent)
            )
    return found


def _of(
    encoder: TextEncoder, stream: Any, source: Source, bill: Bill, batches: int, share: float, spent: float
) -> Captions:
    encoding, known = bill.encodings[source.name], some_captions(stream)
    texts = [text for own in known for text in own]
    length = encoder.lengths.get("t5") or encoder.lengths["clip"]
    tokens = float(length)
    if encoder.masks and texts:
        counts = encoder.encoders()["t5"][1].counts(texts, length)
        tokens = sum(counts) / len(counts)
    rest = 4 * encoding.pooled + 16
    sizes = {storage: tokens * bytes_of_token(encoding.width, storage) + rest for storage in ("bf16", "fp8")}
    sizes["padded"] = float(length * bytes_of_token(encoding.width, "bf16") + rest)
    count = made = None
    if source.rows is not None:
        count = round(source.rows * len(texts) / max(len(known), 1)) if known else source.rows
        made = count * encoding.flops / encoding.rows * tokens / length
    room = free_bytes(folder_of(source.place)) if count is not None else 0
    pays = made is not None and share >= SHARE and made < spent and (count or 0) * sizes["bf16"] < room
    epochs = batches * stream.batch_size / source.rows if source.rows else None
    better = "cached" if pays else "online" if made is not None else "unknown"
    return Captions(source.name, stream.text, share, epochs, count, tokens, length, sizes, spent, made, better)


def text_caches(found: list[Captions], streams: Mapping[str, Any]) -> Iterator[Store]:
    """Embeddings that are still to be made."""
    sizes = {plan.name: (plan.captions, plan.sizes) for plan in found}
    for name, stream in streams.items():
        if getattr(stream, "text", "online") == "online":
            continue
        options = stream.text_cache
        place = text_folder(folder_of(stream.source), options, stream.languages)
        file = place / f"{stream.split}.json"
        if file.is_file() and json.loads(file.read_text()).get("complete"):
            continue
        count, of_caption = sizes.get(name, (None, {}))
        whole = round(count * of_caption[options.storage]) if count and options.storage in of_caption else None
        yield Store(f"embeddings of {name}", place, whole, f"data.{name}.text")
