"""Samples per second of the loader against webdataset's own decoding, tarfile + PIL and PIL alone.

    python -m benchmarks.loader [--samples 600] [--workers 0 2] [--rounds 3] [--sets small large]
    python -m benchmarks.loader --plan 100000000      the order of so many rows: seconds and memory, and to seek in it
    python -m benchmarks.loader --plan 100000000 --index FOLDER      the same of an index file that is written there

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
import multiprocessing
import statistics
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import webdataset
from PIL import Image

from benchmarks.rendering import tables
from callbacks.throughput import resident_peak
from datamodules.buckets import Buckets
from datamodules.encode import encode
from datamodules.image_text import ImageText
from datamodules.index_file import FORMAT, index_path
from datamodules.order import GlobalOrder
from datamodules.pictures import to_images
from datamodules.shards import ShardWriter
from datamodules.streams import StreamLoader

BATCH = 64
DECODED, MAPPED = 1.3, 50.0  # goals: decoded pictures against webdataset's, latents against decoded pictures
PER_SHARD = 10_000  # rows of a shard of the large index
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
    before, start = resident_peak(), time.perf_counter()
    order = GlobalOrder(n, "sha", 0)
    order.rows(np.arange(1024))
    planned = time.perf_counter()
    memory = (resident_peak() - before) / 1e9
    GlobalOrder(n, "sha", 0).rows(np.arange(2 * n + n // 2, 2 * n + n // 2 + 1024))
    return [("plan, s", planned - start), ("plan, GB", memory), ("seek, s", time.perf_counter() - planned)]


def write_large_index(folder: Path, n: int) -> None:
    """An index of n rows as `datamodules.index` joins it, a group of rows for each tar of 10,000."""
    (folder / "dataset.json").write_text(json.dumps({"name": "large", "splits": {"train": n}}))
    shards = [f"https://example.org/{i:05d}.tar" for i in range(-(-n // PER_SHARD))]
    facts = {"format": FORMAT, "split": "train", "shards": shards, "sha256": dict.fromkeys(shards, ""), "n": n}
    generator, writer = np.random.default_rng(0), None
    for start in range(0, n, 100 * PER_SHARD):
        rows = np.arange(start, min(start + 100 * PER_SHARD, n))
        sizes, places = generator.integers(20_000, 100_000, len(rows)), rows % PER_SHARD * 120_000
        width, height = (generator.integers(256, 2048, len(rows), np.int32) for _ in range(2))
        columns = {
            "shard": (rows // PER_SHARD).astype(np.int32),
            "key": pc.utf8_lpad(pa.array(rows).cast(pa.string()), 9, "0"),
            "ext": pa.repeat("jpg", len(rows)),
            "offset": places + 512,
            "size": sizes,
            "json_offset": places + 110_000,
            "json_size": sizes // 100,
            "txt_offset": places + 115_000,
            "txt_size": sizes // 500,
            "width": width,
            "height": height,
            "caption_length": generator.integers(1, 300, len(rows), np.int32),
            "caption_en": rows % 50 > 0,
            "aesthetic": generator.uniform(3, 8, len(rows)),
        }
        table = pa.table(columns).replace_schema_metadata({b"t2i": json.dumps(facts).encode()})
        writer = writer or pq.ParquetWriter(folder / "index.part", table.schema, compression="zstd")
        writer.write_table(table, row_group_size=PER_SHARD)
    assert writer is not None
    writer.close()
    (folder / "index.part").replace(index_path(folder, "train"))


def open_and_seek(folder: str, options: dict[str, Any], epochs: float) -> dict[str, float]:
    """Seconds until a stream of an index file knows the first 1024 samples after so many epochs; GB; in this process.

    "CPU" is time of the processor, which other programs of the machine do not lengthen, of all parts together. "held"
    is memory of the process's own, "resident" includes pages of mapped files, which the system may take back.
    """
    own, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            own[0] = max(own[0], int(status["RssAnon"].split()[0]) / 1e6)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start, busy = time.perf_counter(), time.process_time()
    stream = ImageText(folder, batch_size=1024, **options)
    stream.setup()
    opened = time.perf_counter()
    stream.begin(0, "main")
    begun = time.perf_counter()
    rows = stream.order.rows(int(epochs * len(stream)) // 1024 * 1024 + np.arange(1024))
    for row in rows.tolist():
        stream.shards.id(row)
        assert stream.shards.extents is not None
        stream.shards.extents.extent_of(row)
    found = time.perf_counter()
    done.set()
    watcher.join()
    return {
        "rows": len(stream),
        "open, s": opened - start,
        "identity, s": begun - opened,
        "plan, s": found - begun,
        "all, s": found - start,
        "CPU, s": time.process_time() - busy,
        "held, GB": own[0],
        "resident, GB": resident_peak() / 1e9,
    }


def index_cost(n: int, folder: Path) -> list[tuple[str, float]]:
    """What an index file of n rows in `folder` costs, each line of figures from a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    if not index_path(folder, "train").is_file():
        write_large_index(folder, n)
    found = [("written, s", time.perf_counter() - start)]
    found.append(("index, GB", index_path(folder, "train").stat().st_size / 1e9))
    where = {"width": [512, None], "aesthetic": [4.5, None]}
    cases: dict[str, dict[str, Any]] = {
        "first use": {},
        "captions in English": {},
        "filters, first use": {"where": where},
        "filters": {"where": where},
        "filters and buckets": {"where": where, "buckets": Buckets(side=512)},
    }
    for name, options in cases.items():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            figures = pool.submit(open_and_seek, str(folder), options, 2.5).result()
        found += [(f"{name}: {figure}", value) for figure, value in figures.items()]
    columns = sum(path.stat().st_size for path in folder.glob(".columns-*/*"))
    return [*found, ("mapped columns, GB", columns / 1e9)]


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
    parser.add_argument("--index", type=Path, metavar="FOLDER", help="with --plan: of an index file in this folder")
    options = parser.parse_args()
    if options.plan is not None:
        costs = plan_cost(options.plan) if options.index is None else index_cost(options.plan, options.index)
        print("\n".join(f"{name}: {value:.2f}" for name, value in costs))
        return
    torch.set_num_threads(1)
    print(tables(result(compare(options.samples, options.workers, options.rounds, options.sets))))


if __name__ == "__main__":
    main()
