"""Cells of combinations: one method on what another one left, see `combinations.py` and `repblend_sets.py`.

An arm that makes a pipeline leaves it in the folder FLOW of its cell, and one that makes pairs in PAIRS. Options
`teacher`, `network` and `pairs` name such arms, which come in `after`, or folders that are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamodules.records import Shards, data_folder
from datamodules.shards import Index, ShardWriter, finish
from datamodules.worlds import shapes
from datamodules.worlds.shapes_draw import png
from lightning_t2i.claims import dmd, ecad_cells
from lightning_t2i.claims.deme_cells import chosen, experts_of
from lightning_t2i.claims.instaflow_cells import FLOW, PAIRS, place
from lightning_t2i.claims.repblend_cells import best_checkpoint, stream_of
from lightning_t2i.claims.spec import Cell, Measured
from lightning_t2i.claims.training import RUN, fit, measure, pictures, prompts
from lightning_t2i.claims.wukong_knowledge import records_of, retrieval
from lightning_t2i.cli.restore import constructed, restore, trained
from lightning_t2i.coresets import drawn_pairs
from lightning_t2i.keys import Keys
from lightning_t2i.synthetic_set import nearest_captions

SET = "set"  # folder of a distilled set
TRAIN = 4000  # scenes that the set was distilled from


def with_overrides(cell: Cell, **more: Any) -> Cell:
    """The cell with further overrides; "__" stands for a dot."""
    own = {name.replace("__", "."): value for name, value in more.items()}
    return replace(cell, options={**cell.options, "overrides": {**cell.options["overrides"], **own}})


def merge(cell: Cell) -> Measured:
    """Writes the pipeline that DeMe merged: options of (its experts), weights (the arm that chose them)."""
    method = experts_of(cell.after[cell.options["of"]] / RUN)
    weights = chosen(cell, cell.options["weights"])
    method.save(cell.folder / FLOW, method.plain(weights))
    return Measured({f"w{i}": weight for i, weight in enumerate(weights)})


def teach(cell: Cell) -> Measured:
    """`dmd.teach` of a pipeline: options network, guidance, steps, split, n, metrics."""
    return dmd.teach(replace(cell, options={**cell.options, "network": place(cell, "network", FLOW)}))


def distil(cell: Cell) -> Measured:
    """`fit` of DMD from a teacher and its pairs: options config, overrides, teacher, pairs."""
    teacher, pairs = place(cell, "teacher", FLOW), place(cell, "pairs", PAIRS)
    return fit(with_overrides(cell, model__teacher=teacher, data__pairs__teacher=teacher, data__pairs__source=pairs))


def draw(cell: Cell) -> Measured:
    """The metrics of a student's pictures: options of, split, n, metrics."""
    options = cell.options
    return measure(trained(cell.after[options["of"]] / RUN), options["split"], options["n"], cell.seed,
                   options["metrics"])  # fmt: skip


def search(cell: Cell) -> Measured:
    """A search of ECAD on a pipeline: options config, overrides, network."""
    return ecad_cells.searched(with_overrides(cell, model__network=place(cell, "network", FLOW)))


def write_pairs(folder: Path, images: Tensor, metas: Sequence[dict[str, Any]]) -> None:
    """A data set of pictures [M, 3, H, W] in [-1, 1] with what is told of them."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    with ShardWriter(folder, "train", len(metas)) as writer:
        for number, (picture, meta) in enumerate(zip(pixels, metas, strict=True)):
            writer.write(f"{number:06d}", png(picture), "png", meta)
    finish(folder, "combination", {"train": Index.load(folder, "train")}, shapes.LICENCE, {})


@torch.no_grad()
def write_set(cell: Cell) -> Measured:
    """A distilled set and as many real pairs, in two forms each: options of (its arm).

    SET and `real` are sets of text vectors. `near` and `real_near` are data sets with captions: each pair has the scene
    of the real picture one of whose captions is nearest to its vector.
    """
    run = cell.after[cell.options["of"]] / RUN
    method: Any = constructed(run / "config.yaml")
    restore(method, run, best_checkpoint(run))
    found, shards = method.synthetic_set(), Shards(data_folder("shapes"), "train", ("en", "zh"), TRAIN)
    found.save(cell.folder / SET)
    metas = [shards.meta(row) for row in range(len(shards))]
    of = {text: meta for meta in reversed(metas) for text in meta["caption"]["en"]}
    captions = list(of)
    known = torch.cat([method.text(captions[i : i + 500]) for i in range(0, len(captions), 500)])
    near = [texts[0] for texts in nearest_captions(found.texts, known, captions, 1)]
    write_pairs(cell.folder / "near", found.images, [of[text] for text in near])
    rows = drawn_pairs(len(found), len(metas), Keys(cell.seed).fork("combination")).tolist()
    images = torch.cat([records.image for records in records_of("shapes", "train", TRAIN)])[rows]
    texts = method.text([metas[row]["caption"]["en"][0] for row in rows])
    replace(found, images=images, texts=texts, factors=(), captions=[]).save(cell.folder / "real")
    write_pairs(cell.folder / "real_near", images, [metas[row] for row in rows])
    return Measured({"pairs": float(len(found)), "captions": float(len(set(near)))})


def read_set(cell: Cell) -> Measured:
    """`fit` of Wukong on what `write_set` wrote: options config, overrides, of, kind."""
    folder = str(cell.after[cell.options["of"]] / cell.options["kind"])
    more = {} if cell.options["kind"].endswith("near") else {"model__targets": folder}
    return fit(with_overrides(cell, data__main__source=folder, **more))


@torch.no_grad()
def know(cell: Cell) -> Measured:
    """Retrieval of a trained Wukong in a language: options of, n, language."""
    method: Any = trained(cell.after[cell.options["of"]] / RUN)
    if cell.options["language"] == "zh":
        batches = records_of("shapes", "retrieval", cell.options["n"])
    else:
        stream = stream_of("shapes", "retrieval", cell.options["n"])
        batches = [stream.load(range(i, min(i + 100, len(stream))), i // 100) for i in range(0, len(stream), 100)]
    found = retrieval(method, batches)
    return Measured({**found, "above_chance": found["mr"] - found["chance"]})


@torch.no_grad()
def judge(cell: Cell) -> Measured:
    """Pictures as a Wukong and the detector see them: options judge (an arm), of (an arm or a pipeline), n, shuffled.

    Numbers: found, how often the picture's own Chinese caption is the nearest of those of its batch of 100 test
    prompts; and the shapes score. `of` null takes the real pictures, `shuffled` those of other prompts.
    """
    options, right, total = cell.options, 0, 0
    reader: Any = trained(cell.after[options["judge"]] / RUN)
    maker = None if options["of"] is None else maker_of(cell)
    known = records_of("shapes", "test", options["n"])
    for records, real in zip(prompts("test", options["n"]), known, strict=True):
        assert torch.equal(records.id, real.id)
        images = real.image if maker is None else pictures(maker, records, cell.seed)
        images = images.roll(1, 0) if options.get("shuffled") else images
        there, _ = reader.pipeline.similarity(reader.encode_image(images), reader.encode_text(list(real.caption)))
        right += int((there.argmax(1) == torch.arange(len(records))).sum())
        total += len(records)
    return Measured({"found": right / total})


def maker_of(cell: Cell) -> Any:
    """What makes the pictures of `judge`: a trained student, a Fluid, or a pipeline of one step."""
    from lightning_modules.teacher import Teacher
    from lightning_t2i.token_pipeline import TokenPipeline

    of, options = cell.options["of"], cell.options
    if of in cell.after:
        return trained(cell.after[of] / RUN)
    if options.get("tokens"):
        return TokenPipeline.from_pretrained(of)
    teacher = Teacher(of, guidance=options["guidance"], steps=options["steps"])
    teacher.configure_model()
    return teacher.eval()
