"""Time of making teacher pairs against the bare sampler on the same prompts and noise.

    python -m benchmarks.pairs [--pairs 100] [--rounds 5] [--network assets/tiny/sd] [--guidance 4.5] [--steps 25]

A pair costs steps x 2 network rows with guidance (steps without); the count is printed. "bare" is `sample` on batches
whose noise and conditions are ready. "job" is what `train.py predict` does once its networks are loaded: reading
prompts, noise seeds, noise, text encoding, sampling, float16, shards, checksums, fsync and the index. Both take turns;
a ratio is that of one turn each, and the median counts.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from benchmarks.rendering import tables
from datamodules.pair_prompts import PairPrompts
from datamodules.streams import Streams
from lightning_modules.teacher import Teacher
from lightning_t2i.batch import Cond
from lightning_t2i.cli.pair_job import PairJob
from lightning_t2i.cli.session import quiet
from lightning_t2i.pairs import noise

Ready = list[tuple[Tensor, Cond | None]]


def job(method: Teacher, options: argparse.Namespace, folder: Path) -> PairPrompts:
    """Makes the pairs as the command does; returns the stream of prompts."""
    prompts = PairPrompts(
        options.source, str(folder), limit=options.pairs, batch_size=options.batch_size, samples_per_shard=options.pairs
    )
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[PairJob(prompts)],
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.predict(method, datamodule=Streams(predict=prompts), return_predictions=False)
    return prompts


@torch.no_grad()
def ready_for(method: Teacher, prompts: PairPrompts) -> Ready:
    """The noise and the conditions of each batch of the job."""
    ready: Ready = []
    for batch, positions in enumerate(prompts.batches()):
        records = prompts.load(positions, batch)
        assert records.noise_seed is not None
        ready.append((noise(records.noise_seed, method.latent_shape()), method.condition(records)))
    return ready


def bare(method: Teacher, ready: Ready) -> None:
    for z, cond in ready:
        method.couple(z, cond)


def turns(options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds of each turn of the bare sampler and of the job."""
    method = Teacher(options.network, guidance=options.guidance, steps=options.steps)
    times: tuple[list[float], list[float]] = [], []
    with tempfile.TemporaryDirectory() as temporary:
        prompts = job(method, options, Path(temporary) / "first")  # builds the networks and the data
        ready = ready_for(method, prompts)
        for turn in range(options.rounds):
            for kept, run in (
                (times[0], lambda _: bare(method, ready)),
                (times[1], lambda folder: job(method, options, folder)),
            ):
                start = time.perf_counter()
                run(Path(temporary) / str(turn))
                kept.append(time.perf_counter() - start)
    return times


def result(options: argparse.Namespace) -> dict[str, Any]:
    alone, with_all = turns(options)
    ratios = [b / a for a, b in zip(alone, with_all, strict=True)]
    rows = options.steps * (2 if options.guidance != 1 else 1)
    speeds = (options.pairs / statistics.median(alone), options.pairs / statistics.median(with_all))
    columns = [["pairs", "d"], ["network rows a pair", "d"], ["bare, pairs/s", ".2f"], ["job, pairs/s", ".2f"]]
    columns += [["job / bare", ".3f"], ["least", ".3f"], ["greatest", ".3f"], ["turns", "d"]]
    row = [options.pairs, rows, *speeds, statistics.median(ratios), min(ratios), max(ratios), options.rounds]
    return {"title": "Teacher pairs against the bare sampler", "tables": [{"columns": columns, "rows": [row]}]}


def measure(quick: bool = False) -> dict[str, Any]:
    """The job that makes teacher pairs against the sampler alone."""
    silence()
    return result(parser().parse_args(["--pairs", "10", "--rounds", "1"] if quick else []))


def silence() -> None:
    quiet()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="assets/tiny/sd")
    parser.add_argument("--source", default="shapes", help="where prompts come from")
    parser.add_argument("--pairs", type=int, default=100, help="pairs of a turn")
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=4.5)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=5)
    return parser


def main() -> None:
    options = parser().parse_args()
    torch.set_num_threads(1)
    silence()
    print(tables(result(options)))


if __name__ == "__main__":
    main()
