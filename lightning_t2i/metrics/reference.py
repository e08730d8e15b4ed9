"""Writes the statistics of reference pictures, once for every run that is measured against them.

    python -m lightning_t2i.metrics.reference --source shapes --split val

Runs on latents need them, since their data holds no pictures; others need them to compare with the whole split.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datamodules.image_text import ImageText
from lightning_t2i.metrics.frechet import FrechetDistance, KernelDistance
from lightning_t2i.metrics.scorers import ScorerOptions, build_distance, pictures_of, statistics_file


def write_statistics(stream: ImageText, options: ScorerOptions) -> list[Path]:
    """Writes `fd-NAME.safetensors` and `kd-NAME.safetensors` over the whole split; NAME as in "shapes-val".

    Under the data set's own name the files hold what its pictures are known by, and serve no others.

    Args:
        stream: pictures, read in index order.
        options: network, folder and, if it shall not be the data set's, name of the reference.
    """
    stream.prepare()
    stream.setup()
    stream.begin(0, "val", shuffle=False)
    name = options.reference or stream.identity["data"].replace("/", "-")
    metrics = [build_distance(kind, options, name) for kind in (FrechetDistance, KernelDistance)]
    for k, start in enumerate(range(0, len(stream), stream.batch_size)):
        images = stream.load(range(start, min(start + stream.batch_size, len(stream))), k).image
        for metric in metrics:
            metric.update(images, real=True)
    files = [statistics_file(metric.symbol, options, name) for metric in metrics]
    for metric, file in zip(metrics, files, strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        metric.save_reference(file, None if options.reference else {**pictures_of(stream), "limit": stream.limit})
    return files


def main(arguments: list[str] | None = None) -> None:
    defaults = ScorerOptions()
    parser = argparse.ArgumentParser(prog="python -m lightning_t2i.metrics.reference", description=__doc__)
    parser.add_argument("--source", required=True, help="an embedded world or a data-set folder")
    parser.add_argument("--split", default="val")
    parser.add_argument("--size", type=int, default=32, help="side of the square pictures in pixels")
    parser.add_argument("--limit", type=int, help="only the first so many pictures")
    parser.add_argument("--name", help="name of the reference, by default DATA-SPLIT")
    parser.add_argument("--classifier", default=defaults.classifier, help="folder of the metric network")
    parser.add_argument("--inception", help="file of Inception weights, instead of the metric network")
    parser.add_argument("--statistics", default=defaults.statistics, help="folder to write to")
    given = parser.parse_args(arguments)
    stream = ImageText(given.source, given.split, batch_size=100, size=given.size, limit=given.limit)
    options = ScorerOptions(given.classifier, given.inception, given.name, given.statistics)
    for file in write_statistics(stream, options):
        print(file)


if __name__ == "__main__":
    main()
