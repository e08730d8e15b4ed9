"""The shapes world: 32x32 scenes of one to three objects with captions that a detector can check exactly.

Splits: `train`; `val` and `test`, whose captions are prompts of the six tasks in turn, so that any first n of them are
balanced; `retrieval`, whose captions tell everything and belong to one picture only. A quarter of the test prompts
that name colours ask for (shape, colour) pairs that no other split shows (`held_out`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from datamodules.shards import Index, ShardWriter, finish
from datamodules.worlds.draws import Draws
from datamodules.worlds.shapes_captions import Kind, captions
from datamodules.worlds.shapes_draw import png, render
from datamodules.worlds.shapes_scenes import PAIRS, TASKS, draw

VERSION = 1  # raise it when the same parameters give other samples
LICENCE = "CC0-1.0"
NAMING_COLOURS = ("colors", "color_attr")
# How often a task is trained on, in twentieths: relations and counts take longest to learn.
TRAIN_TASKS = dict(zip(TASKS, (2, 3, 4, 3, 5, 3), strict=True))
RETRIEVAL_TASKS = ("counting", "position", "color_attr", "position")


@dataclass(frozen=True)
class Parameters:
    """What the shapes world depends on.

    Args:
        seed: of all draws; scene i of a split is the same whatever the sizes of the splits.
        train, val, test, retrieval: scenes of each split, 0 leaves it out; retrieval at most 600.
        samples_per_shard: scenes of a shard.
    """

    seed: int = 0
    train: int = 20_000
    val: int = 1000
    test: int = 1000
    retrieval: int = 500
    samples_per_shard: int = 1000


def scene(seed: int, split: str, index: int) -> dict[str, Any]:
    """Scene `index` of `train`, `val` or `test`, by key alone."""
    draws = Draws("shapes", VERSION, seed, split, index)
    if split == "train":
        return draw(draws, draws.choose([task for task, weight in TRAIN_TASKS.items() for _ in range(weight)]))
    task = TASKS[index % len(TASKS)]
    held_out = split == "test" and task in NAMING_COLOURS and index // len(TASKS) % 4 == 3
    return draw(draws, task, held_out)


def retrieval_scenes(seed: int, n: int) -> Iterator[dict[str, Any]]:
    """Scenes no two of which show the same things before the same background."""
    seen = set()
    for index in range(n):
        for attempt in range(10_000):
            draws = Draws("shapes", VERSION, seed, "retrieval", index, attempt)
            found = draw(draws, RETRIEVAL_TASKS[index % len(RETRIEVAL_TASKS)])
            content = (found["background"], *sorted((o["shape"], o["colour"]) for o in found["objects"]))
            if content not in seen:
                break
        seen.add(content)
        yield found


def label(found: dict[str, Any]) -> int:
    """The (shape, colour) pair of the first object, 0 to 31."""
    return PAIRS.index((found["objects"][0]["shape"], found["objects"][0]["colour"]))


def scenes(parameters: Parameters, split: str) -> Iterator[dict[str, Any]]:
    """All scenes of a split."""
    n = getattr(parameters, split)
    if split == "retrieval":
        return retrieval_scenes(parameters.seed, n)
    return (scene(parameters.seed, split, index) for index in range(n))


def write(folder: Path, parameters: Parameters) -> None:
    """Writes all splits and `dataset.json` into an empty folder."""
    world = {"version": VERSION, **asdict(parameters)}
    kinds: dict[str, Kind] = {"train": "train", "val": "prompt", "test": "prompt", "retrieval": "full"}
    indices = {}
    with tqdm(total=sum(getattr(parameters, split) for split in kinds), desc="shapes", unit="scene") as bar:
        for split, kind in kinds.items():
            if not getattr(parameters, split):
                continue
            with ShardWriter(folder, split, parameters.samples_per_shard, world) as writer:
                for index, found in enumerate(scenes(parameters, split)):
                    meta = {"caption": captions(found, kind), "label": label(found), "scene": found}
                    columns = {"task": found["task"], "held_out": found["held_out"], "objects": len(found["objects"])}
                    writer.write(f"{index:06d}", png(render(found)), "png", meta, columns)
                    bar.update()
            indices[split] = Index.load(folder, split)
    finish(folder, "shapes", indices, LICENCE, world)
