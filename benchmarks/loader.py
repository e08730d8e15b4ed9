"""Samples per second of the loader against webdataset's own decoding, tarfile + PIL and PIL alone.

    python -m benchmarks.loader [--samples 600] [--workers 0 2] [--rounds 3] [--sets small large]
    python -m benchmarks.loader --plan 100000000      the order of so many rows: seconds and memory, and to seek in it

"small" are 32 x 32 PNG pictures read at 32, "large" are JPEG photographs of 640 x 480 read at 256, both drawn on the
spot with English and Chinese captions. All contestants read the same shards, decode, resize, cut, turn into float
batches of 64 in [-1, 1] and carry one caption per picture. Rounds alternate between contestants; the median counts.
PIL alone has the bytes in memory and reads no captions. Latents are read by the loader from its cache, once with
captions from the shards and once with everything but the latents kept in memory (`in_memory`).
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image

from benchmarks.rendering import tables
from datamodules.encode import encode
from datamodules.image_text import ImageText
from datamodules.order import GlobalOrder
from datamodules.pictures import to_images
from datamodules.shards import ShardWriter
from datamodules.streams import StreamLoader

BATCH = 64
DECODED, MAPPED = 1.3, 50.0  # goals: decoded pictures against webdataset's, latents against decoded pictures
SETS = {"small": ("png", (32, 32), 32), "large": ("jpg", (640, 480), 256)}  # name -> format, stored size, size read


def draw(i: int, extension: str, width: int, height: int) -> bytes:
    """An encoded picture of a few soft patches with grain, so that its file is about as large as a photograph's."""
    generator = np.random.default_rng(i)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    grain = generator.integers(-12, 13, (height, width, 1), dtype=np.int16)
    stream = io.BytesIO()
    options = {"quality": 90} if extension == "jpg" else {}
    image = Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))
    image.save(stream, "jpeg" if extension == "jpg" else "png", **options)
    return stream.getvalue()


def make_data_set(folder: Path, name: str, samples: int) -> Path:
    extension, (width, height), _ = SETS[name]
    folder = folder / name
    folder.mkdir()
    writer = ShardWriter(folder, "train", samples_per_shard=max(1, samples // 8))
    for i in range(samples):
        caption = {"en": [f"picture number {i} of soft patches", f"patches, {i}"], "zh": [f"第{i}张图片"]}
        writer.write(f"{i:08d}", draw(i % 200, extension, width, height), extension, {"caption": caption})
    writer.close()
    (folder / "dataset.json").write_text(json.dumps({"name": name, "splits": {"train": samples}}))
    return folder


def pillow_square(image: Image.Image, size: int) -> np.ndarray:
    """The centre square with Pillow's own resize, as the other contestants would use it."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    if side != size:
        image = image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    return np.asarray(image)


def ours(folder: Path, size: int, workers: int, **options: Any) -> Iterator[tuple]:
    stream = ImageText(str(folder), batch_size=BATCH, size=size, **options)
    stream.prepare()
    stream.setup()
    stream.begin(0, "main")
    for batch in StreamLoader({"main": stream}, lambda _: 0, workers=workers):
        records = batch["main"]
        yield (records.latent if records.image is None else records.image), records.caption


def through_webdataset(folder: Path, size: int, workers: int) -> Iterator[tuple]:
    def prepare(sample: tuple) -> tuple:
        image, meta = sample
        return to_images(pillow_square(image, size)[None])[0], meta["caption"]["en"][0]

    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    dataset = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0).shuffle(1000).decode("pilrgb")
    dataset = dataset.to_tuple("png;jpg", "json").map(prepare).batched(BATCH).repeat()
    yield from webdataset.WebLoader(dataset, batch_size=None, num_workers=workers)


def members(shard: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(shard) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None  # our shards hold nothing but files
            yield member.name, file.read()


def through_tarfile(folder: Path, size: int) -> Iterator[tuple]:
    pictures, captions = [], []
    while True:
        for path in sorted(folder.glob("*.tar")):
            for name, data in members(path):
                if name.endswith(".json"):
                    captions.append(json.loads(data)["caption"]["en"][0])
                else:
                    pictures.append(pillow_square(Image.open(io.BytesIO(data)).convert("RGB"), size))
                if len(pictures) == len(captions) == BATCH:
                    yield to_images(np.stack(pictures)), captions
                    pictures, captions = [], []


def pil_alone(folder: Path, size: int) -> Iterator[tuple]:
    files = [data for name, data in members(min(folder.glob("*.tar"))) if not name.endswith(".json")]
    start = 0
    while True:
        chosen = [files[(start + i) % len(files)] for i in range(BATCH)]
        yield to_images(np.stack([pillow_square(Image.open(io.BytesIO(f)).convert("RGB"), size) for f in chosen])), []
        start += BATCH


def rate(batches: Iterator[tuple], samples: int) -> float:
    """Samples per second after a warm-up that starts workers and fills shuffle buffers."""
    for _ in range(1100 // BATCH):
        next(batches)
    count, start = 0, time.perf_counter()
    while count < samples:
        count += len(next(batches)[0])
    return count / (time.perf_counter() - start)


def small_vae(folder: Path) -> str:
    """An untrained autoencoder with the shapes of a real one; its weights do not matter for reading latents."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=2,
        latent_channels=4,
    )
    vae.save_pretrained(folder)
    return str(folder)


def compare(samples: int, workers: Sequence[int], rounds: int, sets: Sequence[str]) -> list[list[Any]]:
    """Rows of (pictures, workers, contestant, median samples per second, the same over webdataset's, over ours)."""
    rows: list[list[Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        vae = small_vae(Path(temporary) / "vae")
        for name in sets:
            size = SETS[name][2]
            folder = make_data_set(Path(temporary), name, samples)
            encode(folder, "train", vae, size)
            for count in workers:
                contestants: dict[str, Callable[[], Iterator[tuple]]] = {
                    "ours, decoded": partial(ours, folder, size, count),
                    "webdataset, decoded": partial(through_webdataset, folder, size, count),
                    "ours, latents": partial(ours, folder, size, count, latents=vae),
                    "ours, latents, captions in memory": partial(
                        ours, folder, size, count, latents=vae, in_memory=True
                    ),
                }
                if count == 0:  # these two have no workers
                    contestants["tarfile + PIL"] = partial(through_tarfile, folder, size)
                    contestants["PIL alone"] = partial(pil_alone, folder, size)
                rates: dict[str, list[float]] = {label: [] for label in contestants}
                for _ in range(rounds):
                    for label, start in contestants.items():
                        rates[label].append(rate(start(), samples))
                medians = {label: statistics.median(values) for label, values in rates.items()}
                references = [medians[f"{whose}, decoded"] for whose in ("webdataset", "ours")]
                rows += [
                    [name, count, label, value, *(value / r for r in references)] for label, value in medians.items()
                ]
    return rows


def goals(rows: list[list[Any]]) -> list[list[Any]]:
    """Rows of (pictures, workers, what, times, goal, whether it is met).

    Decoded pictures are measured against webdataset's own decoding. Cached latents are against our decoded pictures,
    where there is something to decode: a picture of 32 x 32 takes hardly longer than its latent.
    """
    found: list[list[Any]] = []
    for name, workers, label, _, against_webdataset, against_decoded in rows:
        if label == "ours, decoded":
            found.append([name, workers, "decoded, against webdataset", against_webdataset, DECODED])
        elif label.startswith("ours, latents") and name == "large":
            found.append([name, workers, f"{label.removeprefix('ours, ')}, against decoded", against_decoded, MAPPED])
    return [[*row, "yes" if row[3] >= row[4] else "no"] for row in found]


def plan_cost(n: int) -> list[tuple[str, float]]:
    """Seconds and GB to plan an epoch of n rows, and seconds to go to a place of the third, as a resumed run does."""

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6

    before, start = peak(), time.perf_counter()
    order = GlobalOrder(n, "sha", 0)
    order.rows(np.arange(1024))
    planned = time.perf_counter()
    memory = peak() - before
    GlobalOrder(n, "sha", 0).rows(np.arange(2 * n + n // 2, 2 * n + n // 2 + 1024))
    return [("plan, s", planned - start), ("plan, GB", memory), ("seek, s", time.perf_counter() - planned)]


def result(rows: list[list[Any]]) -> dict[str, Any]:
    columns = [
        ["pictures", ""],
        ["workers", "d"],
        ["contestant", ""],
        ["samples/s", ",.0f"],
        ["against webdataset", ".2f"],
        ["against ours, decoded", ".2f"],
    ]
    aims = [["pictures", ""], ["workers", "d"], ["what", ""], ["times", ".2f"], ["goal", "g"], ["met", ""]]
    found = [{"columns": columns, "rows": rows}, {"columns": aims, "rows": goals(rows)}]
    return {"title": "Reading pictures", "tables": found}


def measure(quick: bool = False) -> dict[str, Any]:
    """Rates of all contestants on both data sets."""
    return result(compare(64, [0], 1, ["small"]) if quick else compare(600, [0, 2], 3, list(SETS)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=600, help="pictures in a data set and in a timed round")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--plan", type=int, metavar="ROWS", help="measure the order of so many rows, and nothing else")
    options = parser.parse_args()
    if options.plan is not None:
        print("\n".join(f"{name}: {value:.2f}" for name, value in plan_cost(options.plan)))
        return
    torch.set_num_threads(1)
    print(tables(result(compare(options.samples, options.workers, options.rounds, options.sets))))


if __name__ == "__main__":
    main()
