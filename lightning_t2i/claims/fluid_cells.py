"""Cells of Fluid's claims: trainings of several widths, and what their checkpoints give."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_modules.fluid import Fluid
from lightning_modules.tokenizer import psnr
from lightning_t2i.batch import Cond, Records
from lightning_t2i.binned import BinnedMean
from lightning_t2i.claims.spec import Cell, Measured
from lightning_t2i.claims.training import RUN, fit, measure, prompts
from lightning_t2i.cli.restore import constructed, restore
from lightning_t2i.keys import Keys
from lightning_t2i.metrics.scorers import ScorerOptions, build_scorer
from lightning_t2i.networks.codec import LatentCodec
from lightning_t2i.networks.load import read_architecture
from lightning_t2i.scaling_study import losses_of, pearson

NETWORK = "configs/networks/tiny_fluid_tokens.json"
BATCH = 100


def train(cell: Cell) -> Measured:
    """`fit` of a network of another width; numbers: loss@STEP of each validation."""
    facts = {**read_architecture(NETWORK), "width": cell.options["width"]}
    file = cell.folder / "network.json"
    file.write_text(json.dumps(facts), encoding="utf-8")
    overrides = {**cell.options["overrides"], "model.network": str(file)}
    found = fit(replace(cell, options={**cell.options, "overrides": overrides}))
    losses = {f"loss@{step}": loss for step, loss in losses_of(cell.folder / RUN).items()}
    return Measured({**found.numbers, **losses})


def at(run: Path, step: int) -> Fluid:
    """The method of a run with the weights of a training step, in eval mode."""
    method = constructed(run / "config.yaml")
    assert isinstance(method, Fluid)
    restore(method, run, run / "checkpoints" / f"step-{step:08d}")
    return method


def draw(cell: Cell) -> Measured:
    """The metrics of pictures of a checkpoint: options of, step, split, n, metrics, sampling.

    With `shuffled` each gets the caption of another prompt; with `variety` its numbers are measured too.
    """
    options, method = cell.options, at(cell.after[cell.options["of"]] / RUN, cell.options["step"])
    sampling: Mapping[str, Any] = options.get("sampling", {})
    subject = Shuffled(method) if options.get("shuffled") else method
    found = Measured()
    if options["metrics"]:
        found = measure(subject, options["split"], options["n"], cell.seed, options["metrics"], **sampling)
    more = variety(method, cell.seed, sampling) if options.get("variety") else {}
    return Measured({**found.numbers, **more}, found.scores, found.prompts)


def rolled(records: Records) -> Records:
    """Each with the caption of the next."""
    captions = records.caption or []
    return replace(records, caption=[*captions[1:], *captions[:1]])


class Shuffled:
    """A method that gets the captions of other prompts."""

    def __init__(self, method: Fluid):
        self.method, self.condition_of = method, method.condition

    def condition(self, records: Records) -> Cond:
        return self.condition_of(rolled(records))

    def sample(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.method.sample(*args, **kwargs)


@torch.no_grad()
def variety(method: Fluid, seed: int, sampling: Mapping[str, Any]) -> dict[str, float]:
    """Of 24 prompts x 4 draws: `diversity`, the root mean square distance of two pictures of one prompt, and `edges`,
    the mean absolute difference of neighbouring pixels.
    """
    (records, *_) = prompts("val", 24)
    cond, keys = method.condition(records), Keys(seed).fork("variety")
    images = torch.stack([method.sample(cond, keys, records.position + 1000 * i, **sampling) for i in range(4)], 1)
    distances = torch.stack([torch.pdist(one.flatten(1)).mean() for one in images])
    edges = images.diff(dim=-1).abs().mean()
    return {"diversity": float(distances.mean() / images[0, 0].numel() ** 0.5), "edges": float(edges)}


@torch.no_grad()
def validate(cell: Cell) -> Measured:
    """Validation loss of a checkpoint with its captions, and with those of other pictures: options of, step, n."""
    options = cell.options
    method = at(cell.after[options["of"]] / RUN, options["step"])
    network, keys = method.generator_of("transformer"), method.keys.fork("validation")
    data = scenes("val", options["n"])
    found = {}
    for name in ("captions", "shuffled"):
        mean = BinnedMean(1)
        for records in data:
            shown = rolled(records) if name == "shuffled" else records
            terms, weight, _, _ = method.terms(network, shown, keys, method.val_copies, stratified=True)
            values = next(iter(terms.parts.values()))
            mean.add(values, weight[:, None].expand_as(values), torch.zeros_like(values))
        found[name] = float(mean.means()[0])
    return Measured({"loss": found["captions"], "shuffled_loss": found["shuffled"],
                     "caption_gain": found["shuffled"] - found["captions"]})  # fmt: skip


def scenes(split: str, n: int) -> list[Records]:
    """The first n pictures of a split with captions, in batches."""
    from datamodules.image_text import ImageText

    data = ImageText("shapes", split, batch_size=BATCH, limit=n, in_memory=True)
    data.prepare()
    data.setup()
    data.begin(0, split, shuffle=False)
    return [data.load(range(i, min(i + BATCH, n)), i // BATCH) for i in range(0, n, BATCH)]


def correlate(cell: Cell) -> Measured:
    """Pearson correlations over checkpoints: options points [(arm of the training, step, arm of its scores)]."""
    losses, scores, distances = [], [], []
    for trained, step, scored in cell.options["points"]:
        losses.append(cell.measured(trained).of(f"loss@{step}"))
        scores.append(cell.measured(scored).of("shapes_score"))
        distances.append(cell.measured(scored).of("fd"))
    found = {"r_score": pearson(losses, scores), "r_fd": pearson(losses, distances)}
    return Measured({name: value if value is not None else 0.0 for name, value in found.items()})


@torch.no_grad()
def tokenizers(cell: Cell) -> Measured:
    """PSNR and Fréchet distance of pictures through both autoencoders: options n, split."""
    n, split = cell.options["n"], cell.options["split"]
    batches = scenes(split, n)
    found: dict[str, float] = {}
    for name, folder in (("continuous", "assets/tiny/vae"), ("discrete", "assets/tiny/vq")):
        codec, scorer = (
            LatentCodec.from_pretrained(folder).eval(),
            build_scorer("fd", ScorerOptions(), f"shapes-{split}"),
        )
        quality = []
        for records in batches:
            x = records.image
            assert x is not None
            y = codec.decode(codec.encode(x)) if name == "continuous" else codec.decode_tokens(codec.encode_tokens(x))
            quality.append(float(psnr(x, y.clamp(-1, 1))) * len(x))
            scorer.add(y.clamp(-1, 1), records)
        found |= {f"psnr_{name}": sum(quality) / n, f"fd_{name}": next(iter(scorer.results().values()))}
    return Measured({**found, "psnr_gain": found["psnr_continuous"] - found["psnr_discrete"]})


def floor(cell: Cell) -> Measured:
    """How far the pictures of discrete tokens are above what their autoencoder alone reaches: options drawn."""
    reached, least = cell.measured(cell.options["drawn"]).of("fd"), cell.measured("tokenizers").of("fd_discrete")
    return Measured({"above_floor": reached - least})
