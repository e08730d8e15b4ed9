"""Cells of Wukong's claims: an English image tower, trainings of Chinese towers on it, and what they know."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import normalize

from datamodules.shards import Index, ShardWriter, finish
from datamodules.worlds import shapes
from datamodules.worlds.shapes_captions import captions
from datamodules.worlds.shapes_draw import png, render
from lightning_modules.wukong import Wukong
from lightning_t2i.claims.spec import Cell, Measured
from lightning_t2i.claims.training import RUN, fit
from lightning_t2i.claims.wukong_knowledge import (
    Complete,
    binding,
    full_loss,
    location,
    records_of,
    retrieval,
    zero_shot,
)
from lightning_t2i.cli.restore import trained
from lightning_t2i.keys import Keys
from lightning_t2i.metrics.retrieval import RetrievalRecall
from lightning_t2i.processes.similarity import contrastive_loss, token_similarity, top_tokens

TOWER, ENGLISH = "tower", "english"
PAIRS_SEEN = 2000  # pictures with Chinese captions
OTHER_SEED = 1  # of the world whose scenes the English tower sees


def digest_of(picture: bytes) -> bytes:
    return hashlib.blake2b(picture, digest_size=8).digest()


def other_scenes(folder: Path, n: int, excluded: set[bytes]) -> int:
    """Writes n scenes of another seed with English captions as a data set; returns how many were left out.

    Args:
        excluded: digests of pictures that must not be among them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    world, left_out, index = {"seed": OTHER_SEED, "n": n}, 0, 0
    with ShardWriter(folder, "train", 1000, world) as writer:
        while len(writer) < n:
            found = shapes.scene(OTHER_SEED, "train", index)
            picture, index = png(render(found)), index + 1
            if digest_of(picture) in excluded:
                left_out += 1
                continue
            writer.write(f"{index:06d}", picture, "png", {"caption": captions(found, "train")})
    finish(folder, "shapes-english", {"train": Index.load(folder, "train")}, shapes.LICENCE, world)
    return left_out


def seen_elsewhere(n: int) -> set[bytes]:
    """Digests of the pictures of the Chinese pairs, of validation and of the tests."""
    wanted = {"train": n, "val": 1000, "test": 1000, "retrieval": 500}
    parameters = replace(shapes.Parameters(), **wanted)
    return {digest_of(png(render(found))) for split in wanted for found in shapes.scenes(parameters, split)}


def pretrain(cell: Cell) -> Measured:
    """A CLIP on English captions of other scenes, exported to `tower`: options config, overrides, scenes."""
    data, tower = cell.folder / ENGLISH, cell.folder / TOWER
    left_out = 0
    if not (data / "dataset.json").is_file():
        left_out = other_scenes(data, cell.options["scenes"], seen_elsewhere(PAIRS_SEEN))
    overrides = {**cell.options["overrides"], "data.main.source": str(data)}
    found = fit(replace(cell, options={**cell.options, "overrides": overrides}))
    method: Any = trained(cell.folder / RUN)
    if not (tower / "config.json").is_file():
        method.export(tower, [])
    return Measured({**found.numbers, "left_out": float(left_out)})


def train(cell: Cell) -> Measured:
    """`fit` on the tower of the cell `pretrain` of the same seed; with `negatives`, batches are cut into so many."""
    tower = cell.options.get("image", str(cell.after["pretrain"] / TOWER))
    overrides = {**cell.options["overrides"], "model.image": tower}
    inner = replace(cell, options={**cell.options, "overrides": overrides})
    if (size := cell.options.get("negatives")) is None:
        return fit(inner)
    whole = Wukong.loss

    def cut(self: Wukong, features: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        rows, rest = features[:3], features[3:]
        found = [whole(self, (*part, *rest)) for part in zip(*(f.split(size) for f in rows), strict=True)]
        return torch.stack([loss for loss, _ in found]).mean(), found[0][1]

    with patch.object(Wukong, "loss", cut):
        return fit(inner)


@torch.no_grad()
def know(cell: Cell) -> Measured:
    """What a training knows: options of (its arm), world, n."""
    method: Any = trained(cell.after[cell.options["of"]] / RUN)
    world, n = cell.options["world"], cell.options["n"]
    found = retrieval(method, records_of(world, "retrieval" if world == "shapes" else "test", n))
    if world == "shapes":
        test = records_of(world, "test", 2 * n)
        for part in (zero_shot, binding, location, full_loss):
            found |= part(method, test)
    return Measured({**found, "above_chance": found["mr"] - found["chance"]})


def cost(cell: Cell) -> Measured:
    """What the loss costs with all tokens over what it costs with `tokens`: options all, tokens, pairs, width, chosen.

    With `chosen` they are not there but are chosen among all, of pictures and of texts, which costs as well.
    """
    options, share = cell.options, cell.options["tokens"] / cell.options["all"]
    chosen = options.get("chosen", False)
    seconds = {}
    for count in (options["all"], options["tokens"]):
        made = options["all"] if chosen else count
        x, y = (
            normalize(Keys(cell.seed).normal(name, torch.arange(options["pairs"]), (k, options["width"])), dim=-1)
            for name, k in (("x", made), ("y", 20))
        )
        times = []
        for _ in range(options["turns"]):
            a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
            start = time.process_time()
            mask = None
            if chosen and count < made:
                whole = torch.ones(b.shape[:2], dtype=torch.bool)
                (a, _), (b, mask) = top_tokens(a, None, b, whole, share), top_tokens(b, whole, a, None, share)
            there, back = token_similarity(a, b, None, mask, back=True)
            assert back is not None
            contrastive_loss(there, back, torch.tensor(20.0)).backward()
            times.append(time.process_time() - start)
        seconds[count] = sorted(times)[len(times) // 2]
    return Measured({"ratio": seconds[options["all"]] / seconds[options["tokens"]]})


def compare(cell: Cell) -> Measured:
    """The loss of one arm over that of another: options arm, baseline."""
    a, b = (cell.measured(cell.options[name]).of("loss") for name in ("arm", "baseline"))
    return Measured({"loss_ratio": a / b})


@torch.no_grad()
def bag(cell: Cell) -> Measured:
    """Retrieval by a ridge regression from the tower's mean vector to a bag of characters: options n."""
    from lightning_t2i.networks.image_tower import ImageTower

    tower = ImageTower.build(str(cell.after["pretrain"] / TOWER), tokens=True)
    sets = [records_of("openmoji", split, n) for split, n in (("train", 10_000), ("test", cell.options["n"]))]
    letters = sorted({c for batches in sets[:1] for r in batches for own in r.captions for c in "".join(own)})
    place = {c: i for i, c in enumerate(letters)}

    def parts(batches: Sequence[Complete]) -> tuple[Tensor, Tensor]:
        images = torch.cat([tower(r.image).mean(1) for r in batches])
        rows = [own for r in batches for own in r.captions]
        bags = torch.zeros(len(rows), len(letters))
        for row, own in enumerate(rows):
            bags[row, [place[c] for c in "".join(own) if c in place]] = 1.0
        return torch.cat([images, torch.ones(len(images), 1)], 1), bags

    (x, y), (u, v) = parts(sets[0]), parts(sets[1])
    weights = torch.linalg.solve(x.T @ x + cell.options["ridge"] * torch.eye(x.shape[1]), x.T @ (y - y.mean(0)))
    recall, ids = RetrievalRecall(), torch.arange(len(u))
    recall.add(normalize(u @ weights, dim=-1), ids, normalize(v - y.mean(0), dim=-1), ids)
    found = recall.compute(lambda a, b: (a @ b.T, b @ a.T))
    return Measured({"mr": found["mean"], "r1": (found["i2t/r1"] + found["t2i/r1"]) / 2,
                     "r10": (found["i2t/r10"] + found["t2i/r10"]) / 2})  # fmt: skip
