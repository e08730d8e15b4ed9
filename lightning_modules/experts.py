"""Experts: trajectories of projection heads on real pairs, which synthetic pairs are matched to (arXiv 2505.14705).

    z_x = P_x(E(x)), z_y = P_y(t(y))                   E, t frozen, their features kept; P: networks/projection.py
    l_ij = <z_x_i, z_y_j> / tau
    L    = 1/2 [CE(l, i = j) over texts + CE(l, i = j) over pictures]                              InfoNCE
    theta <- theta - 0.1 dL/dtheta                   each expert on batches of its own order, without momentum
    kept: theta*_0 (initial) and theta*_e at the end of epoch e = 1 ... E, of the picture and of the text head

    x, y   a pair: a caption and its picture;   theta  flat weights of a head [n];   tau  temperature

All experts of a run are trained side by side, stacked in one tensor [N, n]; processes take them in turn, so that one
and several train the same. `trainer.max_steps` decides E: a snapshot is taken whenever every pair has been seen.
expert-NNNN.safetensors in the run's folder `trajectories`: image [E + 1, n_x], text [E + 1, n_y], float32.

Deviations: no augmentation, one view of each picture; captions are encoded in eval mode, where the published code
leaves BERT's dropout on. Pairs that do not fill a last batch are left out of an epoch, as there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_t2i.batch import Batch
from lightning_t2i.errors import UserError
from lightning_t2i.keys import Keys
from lightning_t2i.method import MethodModule
from lightning_t2i.networks.frozen_pair import Encoders, facts_of
from lightning_t2i.networks.projection import Branches, Student, each
from lightning_t2i.networks.tensors import Tensors
from lightning_t2i.options import GroupOptions, MethodOptions
from lightning_t2i.pair_features import PairFeatures
from lightning_t2i.soft_contrast import contrast
from lightning_t2i.state_io import full_tensor
from lightning_t2i.trajectory_matching import Segment

FOLDER, PARTS = "trajectories", "parts"


@dataclass(frozen=True)
class Recipe:
    """How experts are trained: their number, epochs, pairs of a batch and learning rate."""

    count: int = 20
    epochs: int = 10
    batch_size: int = 128
    rate: float = 0.1

    def __post_init__(self) -> None:
        for name in ("count", "epochs", "batch_size"):
            if (given := getattr(self, name)) < 1:
                raise UserError("Must be at least 1", where=f"model.recipe.{name}", given=given)

    def steps(self, pairs: int) -> int:
        """Batches of an epoch."""
        return max(1, pairs // min(self.batch_size, pairs))


class Course:
    """The batches of each expert and its loss on them.

    Args:
        student: the heads.
        features: of the real pairs.
        recipe: the sizes of batches.
        seed: of all draws.
    """

    def __init__(self, student: Student, features: PairFeatures, recipe: Recipe, seed: int):
        self.student, self.features = student, features
        self.size, self.epoch_steps = min(recipe.batch_size, len(features)), recipe.steps(len(features))
        self.keys = Keys(seed).fork("experts")
        self._order: dict[tuple[int, int], Tensor] = {}

    def rows(self, step: int, expert: int) -> Tensor:
        """Pairs [B] of an expert's batch."""
        epoch, place = divmod(step, self.epoch_steps)
        if (epoch, expert) not in self._order:
            self._order = {key: order for key, order in self._order.items() if key[0] == epoch}
            positions = expert * len(self.features) + torch.arange(len(self.features))
            self._order[epoch, expert] = self.keys.at(epoch).uniform("order", positions, (), torch.float64).argsort()
        return self._order[epoch, expert][place * self.size : (place + 1) * self.size]

    def losses(self, step: int, experts: Sequence[int], weights: Branches) -> Tensor:
        """The loss [N] of each of some experts, with their weights [N, n]."""
        device, found = weights[0].device, self.features
        rows = torch.stack([self.rows(step, n) for n in experts]).to(device)
        slots = torch.tensor(experts)[:, None] * self.size + torch.arange(self.size)
        keep = self.student.keep(self.keys.at(step), "dropout", slots.flatten().to(device))
        stacked = each(lambda k: k.view(len(experts), self.size, -1), keep)
        logits = self.student.logits(weights, found.images[found.owner[rows]], found.texts[rows], stacked)
        return contrast(logits)


def trained(course: Course, experts: Sequence[int], recipe: Recipe) -> Iterator[Branches]:
    """Snapshots of some experts, [N, n] each: the initial one, then one after each epoch; by plain descent."""
    weights = course.student.initial(course.keys, torch.tensor(experts))
    weights = each(lambda w: w.to(course.features.texts.device), weights)
    yield each(torch.clone, weights)
    for step in range(recipe.epochs * course.epoch_steps):
        leaves = each(lambda w: w.detach().requires_grad_(), weights)
        with torch.enable_grad():
            gradients = torch.autograd.grad(course.losses(step, experts, leaves).sum(), leaves)
        weights = each(lambda w, g: w - recipe.rate * g, weights, gradients)
        if (step + 1) % course.epoch_steps == 0:
            yield each(torch.clone, weights)


class Trajectories:
    """Snapshots of experts, in memory or in the files of a folder, of which only those asked for are read.

    Args:
        source: folder, or the snapshots of all experts: image [N, E + 1, n_x] and text [N, E + 1, n_y].
        facts: what they have to come from; None takes any.

    Raises:
        UserError: no experts in the folder, or those of other encoders, temperature or widths.
    """

    def __init__(self, source: Path | Branches, facts: dict[str, Any] | None = None):
        self.whole, self.files = (None, []) if isinstance(source, Path) else (source, [])
        if isinstance(source, Path):
            self.files = sorted(source.glob("expert-*.safetensors"))
            if not self.files:
                fix = "./run fit --config configs/repblend/tiny_experts.yaml trains some"
                raise UserError("There are no experts in this folder", where="model.experts", given=source, fix=fix)
            with safe_open(self.files[0], "pt") as file:
                self.length = file.get_slice("image").get_shape()[0]
                known = json.loads((file.metadata() or {}).get("facts", "{}"))
            for name, value in (facts or {}).items():
                if known.get(name) != value:
                    what = f"The experts were trained with another '{name}'"
                    raise UserError(what, where="model.experts", given=known.get(name), allowed=str(value))
        else:
            self.length = source[0].shape[1]

    def __len__(self) -> int:
        return len(self.files) if self.whole is None else len(self.whole[0])

    def snapshot(self, expert: int, epoch: int, device: Any = "cpu") -> Branches:
        """Weights of both heads, [n] each; copies."""
        if self.whole is not None:
            return each(lambda w: w[expert, epoch].to(device, copy=True), self.whole)
        with safe_open(self.files[expert], "pt") as file:
            return each(lambda name: file.get_slice(name)[epoch : epoch + 1][0].to(device), ("image", "text"))

    def segment(self, expert: int, start: int, epochs: int, device: Any = "cpu") -> Segment:
        """From one epoch to a later one.

        Raises:
            UserError: a head did not move.
        """
        found = Segment(self.snapshot(expert, start, device), self.snapshot(expert, start + epochs, device))
        if any(torch.equal(a, b) for a, b in zip(found.start, found.target, strict=True)):
            what, given = "A head of an expert does not move", f"expert {expert}, epochs {start} to {start + epochs}"
            raise UserError(what, where="model.experts", given=given, fix="train the experts again")
        return found


def save_experts(folder: Path, snapshots: Sequence[Branches], facts: dict[str, Any]) -> list[Path]:
    """Writes expert-NNNN.safetensors of snapshots [N, n] in the order of epochs."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for expert in range(len(snapshots[0][0])):
        found = {name: torch.stack([s[i][expert] for s in snapshots]) for i, name in enumerate(("image", "text"))}
        files.append(folder / f"expert-{expert:04d}.safetensors")
        save_file(found, files[-1], metadata={"facts": json.dumps(facts)})
    return files


class Experts(MethodModule):
    """Trains experts and keeps their trajectories.

    Args:
        encoders: the frozen ones.
        count: experts of this run.
        batch_size: pairs of a batch of each expert; the data module's batches only beat time.
        heads: how the weights are updated.
        common: options of the engine; jobs with other seeds train other experts.
    """

    may_rest = ()

    def __init__(
        self,
        encoders: Encoders,
        count: int = 20,
        batch_size: int = 128,
        heads: GroupOptions | None = None,
        common: MethodOptions | None = None,
    ):
        super().__init__(common)
        if min(count, batch_size) < 1:
            raise UserError("There must be an expert and a pair", where="model.count", given=min(count, batch_size))
        self.encoders, self.recipe = encoders, Recipe(count, batch_size=batch_size)
        self.options = heads or GroupOptions(partial(torch.optim.SGD, lr=0.1), clip=None)

    def configure_model(self) -> None:
        self.student = self.encoders.into(self)
        numbers = torch.arange(self.recipe.count)
        initial = self.student.initial(Keys(self.common.seed).fork("experts"), numbers)
        self.add_group("heads", Tensors(image=initial[0], text=initial[1]), self.options)

    def on_fit_start(self) -> None:
        """Refuses more processes than experts; reads or makes the features of the pairs."""
        if self.trainer.world_size > self.recipe.count:
            given, fix = f"{self.recipe.count} experts on {self.trainer.world_size} processes", "more experts"
            raise UserError("A process has no expert", where="model.count", given=given, fix=fix)
        identities = [self.frozen_identities[name] for name in ("image", "text")]
        stream = self.trainer.datamodule.training["main"]
        features = PairFeatures.of(stream, (self.image, self.text), identities, self.device)
        self.course = Course(self.student, features, self.recipe, self.common.seed)
        self.folder = Path(self.trainer.default_root_dir) / FOLDER

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        step = self.counters.step * self.common.accumulate + self.counters.micro
        if step % self.course.epoch_steps == 0:
            self.snapshot(step // self.course.epoch_steps)
        world = self.trainer.world_size
        own = range(self.global_rank, self.recipe.count, world)
        image, text = self.heads()
        losses = self.course.losses(step, own, (image[own.start :: world], text[own.start :: world]))
        # The sum over experts, of which each has its own weights; the engine takes the mean over processes.
        total = world * losses.sum()
        mean = losses.mean().detach()
        self.backward("heads", total, mean=mean)

    def snapshot(self, epoch: int) -> None:
        """Keeps copies of all weights as they are; a collective call."""
        found = {name: full_tensor(parameter) for name, parameter in self.heads.named_parameters()}
        if self.global_rank == 0:
            (self.folder / PARTS).mkdir(parents=True, exist_ok=True)
            save_file(found, self.folder / PARTS / f"epoch-{epoch:04d}.safetensors")

    def finish(self) -> None:
        """Joins the snapshots."""
        steps = self.counters.step * self.common.accumulate
        if steps % self.course.epoch_steps == 0:
            self.snapshot(steps // self.course.epoch_steps)
        if self.global_rank == 0:
            files = sorted((self.folder / PARTS).glob("epoch-*.safetensors"))[: steps // self.course.epoch_steps + 1]
            parts = [load_file(file) for file in files]
            save_experts(
                self.folder, [(p["image"], p["text"]) for p in parts], facts_of(self.frozen_identities, self.student)
            )

    @torch.no_grad()
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Loss of the experts on the drawn captions of a batch."""
        main = batch["main"]
        logits = self.student.logits(self.heads(), self.image(main.image), self.text(main.caption))
        self.log("val/loss", contrast(logits).mean(), batch_size=len(main), sync_dist=True)
