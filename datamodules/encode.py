"""Converts a data set once: its pictures to latents (`--vae FOLDER`), its captions to embeddings (`--text FOLDER`).

    python -m datamodules.encode --source shapes --vae assets/tiny/vae
    python -m datamodules.encode --source shapes --text assets/tiny/pixart --storage fp8
    srun python -m datamodules.encode ... --task $SLURM_PROCID --tasks $SLURM_NTASKS     or the numbers of an array

Beside the shards, `latents-<hash of the autoencoder>-<size>/` then holds one fp16 array [samples, C, h, w] per shard,
in the order of the shard and mapped into memory when read, and `<split>.json` with what they were made from. Latents
have unit scale, as `LatentCodec.encode` returns them. With several views of a picture (crops, mirrored ones) the arrays
are [samples, views, C, h, w]. Embeddings: datamodules/text_cache.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.bad_samples import refuse_bad
from datamodules.caches import Cache, Make, Places, default_device
from datamodules.open_files import MAPPED, Latest, mapped
from datamodules.pictures import BadSample, square, to_images
from datamodules.records import Shards, data_folder
from datamodules.remote import RemoteOptions
from datamodules.text_cache import STORAGES, TextCache, encode_texts
from lightning_t2i.errors import UserError
from lightning_t2i.frozen import folder_identity, freeze
from lightning_t2i.keys import Keys
from lightning_t2i.paths import resolve

FORMAT = 1


@dataclass(frozen=True)
class Views:
    """What of a picture is encoded.

    crops: how many squares at random places, the same in every cache; None is the one in the centre.
    flip: each also mirrored.
    """

    crops: int | None = None
    flip: bool = False

    def __len__(self) -> int:
        return (self.crops or 1) * (1 + self.flip)

    @property
    def title(self) -> str:
        """The end of the cache's name."""
        return (f"-crops{self.crops}" if self.crops else "") + ("-flip" if self.flip else "")

    @property
    def cut(self) -> str:
        return ("centre" if self.crops is None else f"{self.crops} random") + (", mirrored" if self.flip else "")

    def places(self, sample: int) -> list[list[float]]:
        """Horizontal and vertical places of a sample's squares in [0, 1]."""
        if self.crops is None:
            return [[0.5, 0.5]]
        return Keys(0).fork("latents").uniform("crop", torch.tensor([sample]), (self.crops, 2))[0].tolist()

    def draw(self, keys: Keys, positions: Tensor) -> np.ndarray:
        """One view for each position, int64 [B]: crops and mirrored ones with equal probability."""
        crop = keys.integers("crop", positions, 0, self.crops or 1)
        flipped = keys.bernoulli("flip", positions, 0.5).long() if self.flip else 0
        return (crop * (1 + self.flip) + flipped).numpy()


def latent_folder(folder: Path, vae: str, size: int, views: Views = Views()) -> Path:
    """Where the latents of a data-set folder lie for one autoencoder, picture size and choice of views."""
    name = folder_identity(resolve(vae)).removeprefix("sha256:").replace("/", "--").replace("@", "-")
    return folder / f"latents-{name}-{size}{views.title}"


def _cache(shards: Shards, vae: str, size: int, views: Views) -> Cache:
    facts = {
        "format": FORMAT,
        "vae": folder_identity(resolve(vae)),
        "index": shards.index.sha,
        "size": size,
        "cut": views.cut,
    }
    options = (f" --crops {views.crops}" if views.crops else "") + (" --flip" if views.flip else "")
    command = f"python -m datamodules.encode --vae {vae} --source {shards.folder} --split {shards.split} --size {size}"
    return Cache(latent_folder(shards.folder, vae, size, views), shards, facts, "latents", command + options, ".npy")


class Latents:
    """Cached latents of the rows of a split.

    Args:
        shards: the split, with or without filters.
        vae: the autoencoder's folder or hub id.
        size: picture size that was encoded.
        views: of each picture.

    Raises:
        UserError: there are none, they are incomplete, or they were made from something else.
    """

    def __init__(self, shards: Shards, vae: str, size: int, views: Views = Views()):
        cache = _cache(shards, vae, size, views)
        about = cache.about()
        self.folder, self._names, self.views = cache.folder, cache.names, views
        self.shape: tuple[int, ...] = tuple(about["shape"])
        self._bad = {int(row): reason for row, reason in about["bad"].items()}
        self._places = Places(shards)
        self._files = Latest(mapped, MAPPED)

    def check(self, row: int) -> None:
        """Raises BadSample if the picture of the row could not be encoded."""
        if self._bad and (reason := self._bad.get(int(self._places([row])[0][0]))) is not None:
            raise BadSample(reason)

    def take(self, rows: Sequence[int] | np.ndarray, views: np.ndarray | None = None) -> Tensor:
        """Latents of `rows`, as they are stored: float16 [B, C, h, w].

        Args:
            views: which view of each, int64 [B]; None is the first.
        """
        _, shards, places = self._places(rows)
        places = places * len(self.views) + (0 if views is None else views)
        out: np.ndarray = np.empty((len(places), *self.shape), dtype=np.float16)
        for shard in np.unique(shards).tolist():
            chosen, found = shards == shard, self._files(self.folder / self._names[shard])
            out[chosen] = found.reshape(-1, *self.shape)[places[chosen]]
        return torch.from_numpy(out)


def encode(
    folder: Path,
    split: str,
    vae: str,
    size: int = 32,
    batch_size: int = 64,
    device: str | None = None,
    views: Views = Views(),
    task: int = 0,
    tasks: int = 1,
    remote: RemoteOptions = RemoteOptions(),
    max_bad_fraction: float = 1.0,
) -> Path:
    """Encodes the pictures of a split unless that is done; goes on after an interruption with the missing shards.

    Args:
        folder: data-set folder.
        split: split to encode, all of its rows.
        vae: folder or hub id of a diffusers autoencoder.
        size: side of the square pictures.
        batch_size: pictures per forward pass.
        device: where to encode; a GPU when there is one.
        views: what of each picture is encoded.
        task, tasks: see `Cache.fill`.
        remote: how shards behind URLs are read.
        max_bad_fraction: pictures that cannot be read before it is an error, as a share of the split.

    Returns:
        The folder of the latents.

    Raises:
        UserError: latents from other data or of another format are in the way, or too many pictures are bad.
    """
    shards = Shards(folder, split, remote=remote)
    cache = _cache(shards, vae, size, views)

    def start() -> Make:
        from lightning_t2i.networks.codec import LatentCodec

        place = device or default_device(task)
        codec = freeze(LatentCodec.from_pretrained(str(resolve(vae)))).to(place)

        def make(rows: np.ndarray, path: Path) -> dict[str, Any]:
            latents, bad = _encode_rows(codec, shards, rows, size, batch_size, place, views)
            with path.open("wb") as stream:
                np.save(stream, latents if len(views) > 1 else latents[:, 0])
            exact = latents.astype(np.float64)
            facts = {"scaling": codec.vae.config.get("scaling_factor"), "shape": latents.shape[2:], "bad": bad}
            return {**facts, "count": exact.size, "total": exact.sum(), "squares": np.square(exact).sum()}

        return make

    def merge(reports: list[Any]) -> dict[str, Any]:
        merged = _merged(reports)
        bad = {shards.title(int(row)): reason for row, reason in merged["bad"].items()}
        refuse_bad(bad, len(shards), max_bad_fraction)
        return merged

    cache.fill(start, merge, task, tasks)
    return cache.folder


def _merged(reports: list[Any]) -> dict[str, Any]:
    count, total, squares = (sum(report[name] for report in reports) for name in ("count", "total", "squares"))
    bad = {row: reason for report in reports for row, reason in report["bad"].items()}
    mean = total / count
    found = {"mean": mean, "std": (squares / count - mean**2) ** 0.5, "bad": bad}
    return {**found, "shape": reports[0]["shape"], "scaling": reports[0]["scaling"]}


@torch.no_grad()
def _encode_rows(
    codec: Any, shards: Shards, rows: np.ndarray, size: int, batch_size: int, device: str, views: Views
) -> tuple[np.ndarray, dict[str, str]]:
    """fp16 latents [rows, views, C, h, w] of index rows, zeros where a picture is bad, and the reasons by row."""
    parts, bad = [], {}
    step = max(batch_size // len(views), 1)
    for start in range(0, len(rows), step):
        chosen = rows[start : start + step].tolist()
        shards.ahead(chosen)
        pixels: np.ndarray = np.zeros((len(chosen), views.crops or 1, size, size, 3), np.uint8)
        for i, row in enumerate(chosen):
            try:
                picture = shards.picture(row, size)
                for j, place in enumerate(views.places(shards.id(row))):
                    pixels[i, j] = square(picture, size, (place[0], place[1]))
            except BadSample as reason:
                bad[str(row)] = str(reason)
        images = to_images(pixels.reshape(-1, size, size, 3)).to(device)
        if views.flip:
            images = torch.stack([images, images.flip(-1)], 1).flatten(0, 1)
        latents = codec.encode(images).cpu().to(torch.float16).numpy()
        parts.append(latents.reshape(len(chosen), len(views), *latents.shape[1:]))
    return np.concatenate(parts), bad


def main(arguments: Sequence[str] | None = None) -> int:
    about, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        "python -m datamodules.encode",
        description=about,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--source", required=True, help="embedded world or data-set folder")
    parser.add_argument("--split", default="train")
    parser.add_argument("--vae", help="folder or hub id of an autoencoder, e.g. assets/tiny/vae")
    parser.add_argument("--size", type=int, default=32, help="side of the square pictures")
    parser.add_argument("--crops", type=int, help="squares at random places of each picture; default: the centre")
    parser.add_argument("--flip", action="store_true", help="each also mirrored")
    parser.add_argument("--text", help="folder or hub id of a pipeline with text encoders, e.g. assets/tiny/pixart")
    parser.add_argument("--revision", help="commit of the hub id of --text")
    parser.add_argument("--length", type=int, help="tokens of a caption for T5; default: the pipeline's")
    parser.add_argument("--storage", choices=list(STORAGES), default="bf16", help="of embeddings (default: bf16)")
    parser.add_argument("--languages", nargs="+", default=["en"], help="of the captions (default: en)")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--task", type=int, default=0, help="number of this task of an array, from 0")
    parser.add_argument("--tasks", type=int, default=1, help="tasks of the array")
    parser.add_argument("--max_bad_fraction", type=float, default=0.01, help="(default: %(default)s)")
    for field in fields(RemoteOptions):
        kind = str if field.default is None else type(field.default)
        parser.add_argument(f"--{field.name}", type=kind, default=field.default, help="of remote shards")
    given = parser.parse_args(arguments)
    remote = RemoteOptions(**{field.name: getattr(given, field.name) for field in fields(RemoteOptions)})
    if not (given.vae or given.text):
        parser.error("nothing to encode: give --vae, --text or both")
    try:
        work: dict[str, Any] = {"batch_size": given.batch_size, "task": given.task, "tasks": given.tasks}
        work["remote"] = remote
        work["device"] = given.device or default_device(given.task)
        folder = data_folder(given.source)
        if given.vae:
            views = Views(given.crops, given.flip)
            print(
                encode(
                    folder,
                    given.split,
                    given.vae,
                    given.size,
                    views=views,
                    max_bad_fraction=given.max_bad_fraction,
                    **work,
                )
            )
        if given.text:
            options = TextCache(given.text, given.revision, given.length, given.storage)
            print(encode_texts(folder, given.split, options, given.languages, **work))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
