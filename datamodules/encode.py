"""Converts the pictures of a data set to latents once: `python -m datamodules.encode --vae FOLDER --source shapes`.

Beside the shards, `latents-<hash of the autoencoder>-<size>/` then holds one fp16 array [samples, C, h, w] per shard,
in the order of the shard and mapped into memory when read, and `<split>.json` with what they were made from. Latents
have unit scale, as `LatentCodec.encode` returns them.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from datamodules.image_text import square, to_images
from datamodules.records import BadSample, Shards, data_folder, refuse_bad
from datamodules.remote import RemoteOptions
from lightning_t2i.errors import UserError
from lightning_t2i.frozen import folder_identity, freeze
from lightning_t2i.paths import resolve

FORMAT = 1


def latent_folder(folder: Path, vae: str, size: int) -> Path:
    """Where the latents of a data-set folder lie for one autoencoder and picture size."""
    name = folder_identity(resolve(vae)).removeprefix("sha256:").replace("/", "--").replace("@", "-")
    return folder / f"latents-{name}-{size}"


def _facts(shards: Shards, vae: str, size: int) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "vae": folder_identity(resolve(vae)),
        "index": shards.index.sha,
        "size": size,
        "cut": "centre",
    }


def _check(found: dict[str, Any], facts: dict[str, Any], where: Path) -> None:
    """Refuses latents of other data, another autoencoder, size or format."""
    for key, value in facts.items():
        if found.get(key) != value:
            raise UserError(
                f"The cached latents are stale: '{key}' has changed since they were made",
                where=str(where),
                given=found.get(key),
                allowed=str(value),
                fix=f"delete {where.parent} and encode again with: python -m datamodules.encode",
            )


def _write(path: Path, write: Any) -> None:
    """Writes under a temporary name, flushes and renames, so that a file that exists is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as stream:
        write(stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write(path, lambda stream: stream.write(json.dumps(content, indent=1).encode()))


class Latents:
    """Cached latents of the rows of a split.

    Args:
        shards: the split, with or without filters.
        vae: the autoencoder's folder or hub id.
        size: picture size that was encoded.

    Raises:
        UserError: there are none, they are incomplete, or they were made from something else.
    """

    def __init__(self, shards: Shards, vae: str, size: int):
        self.folder = latent_folder(shards.folder, vae, size)
        self.file = self.folder / f"{shards.split}.json"
        about = json.loads(self.file.read_text()) if self.file.is_file() else {}
        if not about.get("complete"):
            raise UserError(
                "There are no cached latents" if not about else "The cached latents are incomplete",
                where=str(self.file),
                fix=f"python -m datamodules.encode --vae {vae} --source {shards.folder} --split {shards.split} "
                f"--size {size}",
            )
        _check(about, _facts(shards, vae, size), self.file)
        self.shape: tuple[int, ...] = tuple(about["shape"])
        self._bad = {int(row): reason for row, reason in about["bad"].items()}
        self._index_rows = shards.rows
        self._index = shards.index
        self._first = np.array([shards.index.rows_of(shard).start for shard in range(len(shards.index.shards))])
        self._names = [f"{stem}.npy" for stem in shards.index.stems]
        self._open: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a mapped array would be pickled whole

    def check(self, row: int) -> None:
        """Raises BadSample if the picture of the row could not be encoded."""
        reason = self._bad.get(int(self._index_rows[row]))
        if reason is not None:
            raise BadSample(reason)

    def __getitem__(self, rows) -> Tensor:
        """Latents of `rows`: float32 [B, C, h, w]."""
        wanted = self._index_rows[np.asarray(rows)]
        shards = self._index["shard"][wanted]
        out: np.ndarray = np.empty((len(wanted), *self.shape), dtype=np.float16)
        for shard in np.unique(shards).tolist():
            if shard not in self._open:
                self._open[shard] = np.asarray(np.load(self.folder / self._names[shard], mmap_mode="r"))
            chosen = shards == shard
            out[chosen] = self._open[shard][wanted[chosen] - self._first[shard]]
        return torch.from_numpy(out).to(torch.float32)


def encode(
    folder: Path,
    split: str,
    vae: str,
    size: int = 32,
    batch_size: int = 64,
    device: str | None = None,
    remote: RemoteOptions = RemoteOptions(),
    max_bad_fraction: float = 1.0,
) -> Path:
    """Encodes a split unless that is done; goes on after an interruption with the first missing shard.

    Args:
        folder: data-set folder.
        split: split to encode, all of its rows.
        vae: folder or hub id of a diffusers autoencoder.
        size: side of the square pictures, cut from the centre.
        batch_size: pictures per forward pass.
        device: where to encode; a GPU when there is one.
        remote: how shards behind URLs are read.
        max_bad_fraction: pictures that cannot be read before it is an error, as a share of the split.

    Returns:
        The folder of the latents.

    Raises:
        UserError: latents from other data or of another format are in the way, or too many pictures are bad.
    """
    shards = Shards(folder, split, remote=remote)
    target = latent_folder(folder, vae, size)
    target.mkdir(exist_ok=True)
    file, facts = target / f"{split}.json", _facts(shards, vae, size)
    with FileLock(target / f".{split}.lock"):  # another process may be at it
        about = json.loads(file.read_text()) if file.is_file() else {**facts, "complete": False, "bad": {}}
        _check(about, facts, file)
        if about["complete"]:
            return target
        _write_json(file, about)
        from lightning_t2i.networks.codec import LatentCodec

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        codec = freeze(LatentCodec.from_pretrained(str(resolve(vae)))).to(device)
        about["scaling"] = codec.vae.config.get("scaling_factor")
        count, total, squares = 0, 0.0, 0.0
        for shard in tqdm(range(len(shards.index.shards)), desc=f"latents of {split}", unit="shard"):
            path = target / f"{shards.index.stems[shard]}.npy"
            if not path.is_file():
                rows = np.array(shards.index.rows_of(shard))
                latents, bad = _encode_rows(codec, shards, rows, size, batch_size, device)
                about["bad"].update(bad)
                refuse_bad(
                    {shards.title(int(row)): why for row, why in about["bad"].items()}, len(shards), max_bad_fraction
                )
                _write_json(file, about)
                _write(path, lambda stream, latents=latents: np.save(stream, latents))
            latents = np.load(path).astype(np.float64)
            count, total, squares = count + latents.size, total + latents.sum(), squares + np.square(latents).sum()
        mean = total / count
        about |= {"shape": list(latents.shape[1:]), "mean": mean, "std": (squares / count - mean**2) ** 0.5}
        _write_json(file, {**about, "complete": True})
    return target


@torch.no_grad()
def _encode_rows(
    codec: Any, shards: Shards, rows: np.ndarray, size: int, batch_size: int, device: str
) -> tuple[np.ndarray, dict[str, str]]:
    """fp16 latents of index rows, zeros where a picture is bad, and the reasons by row."""
    parts, bad = [], {}
    for start in range(0, len(rows), batch_size):
        chosen = rows[start : start + batch_size]
        shards.ahead(chosen.tolist())
        pixels: np.ndarray = np.zeros((len(chosen), size, size, 3), np.uint8)
        for i, row in enumerate(chosen.tolist()):
            try:
                pixels[i] = square(shards.picture(row, size), size)
            except BadSample as reason:
                bad[str(row)] = str(reason)
        images = to_images(pixels).to(device)
        parts.append(codec.encode(images).cpu().to(torch.float16).numpy())
    return np.concatenate(parts), bad


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m datamodules.encode", description=__doc__.splitlines()[0])
    parser.add_argument("--vae", required=True, help="folder or hub id of the autoencoder, e.g. assets/tiny/vae")
    parser.add_argument("--source", required=True, help="embedded world or data-set folder")
    parser.add_argument("--split", default="train")
    parser.add_argument("--size", type=int, default=32, help="side of the square pictures")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--max_bad_fraction", type=float, default=0.01, help="(default: %(default)s)")
    for field in fields(RemoteOptions):
        kind = str if field.default is None else type(field.default)
        parser.add_argument(f"--{field.name}", type=kind, default=field.default, help="of remote shards")
    given = vars(parser.parse_args())
    remote = RemoteOptions(**{field.name: given.pop(field.name) for field in fields(RemoteOptions)})
    try:
        print(encode(data_folder(given.pop("source")), remote=remote, **given))
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
