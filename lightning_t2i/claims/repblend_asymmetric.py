"""LoRS as it was (arXiv 2406.03793): the whole picture encoder is matched, against a text head into its space."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_t2i import coresets
from lightning_t2i.claims.repblend_cells import stream_of
from lightning_t2i.claims.spec import Cell, Measured
from lightning_t2i.cli.restore import constructed
from lightning_t2i.keys import Keys
from lightning_t2i.networks.frozen_pair import FrozenImages
from lightning_t2i.networks.projection import Branches, Head, each
from lightning_t2i.pair_features import PairFeatures
from lightning_t2i.paths import resolve
from lightning_t2i.soft_contrast import contrast, wbce
from lightning_t2i.trajectory_matching import Segment, tesla


class Asymmetric:
    """LoRS as it was: the picture branch is the whole encoder, the text branch a head into its space.

    Args:
        image: the encoder, of whose weights the flat vectors are made; width of texts.
    """

    def __init__(self, image: FrozenImages, texts: int):
        self.image, self.head = image, Head(texts, image.width)
        self.names = {name: p.shape for name, p in image.named_parameters()}
        self.weights = torch.cat([p.detach().flatten() for p in image.parameters()])

    def logits(self, theta: Branches, pixels: Tensor, texts: Tensor, temperature: float = 0.07) -> Tensor:
        parts = theta[0].split([shape.numel() for shape in self.names.values()])
        named = {name: part.view(shape) for part, (name, shape) in zip(parts, self.names.items(), strict=True)}
        x = normalize(torch.func.functional_call(self.image, named, (pixels,)), dim=-1)
        return x @ self.head(theta[1], texts).mT / temperature


def asymmetric(cell: Cell) -> Measured:
    """Distillation by the whole encoder: late matching losses of both branches and how far apart they are, seconds of a
    step, and the parameters that are matched, as a multiple of those of heads alone.

    Options: config, world, limits, batch, epoch (batches), epochs, steps, pairs, rates of X and Y, inner_batch, rate.
    """
    options = cell.options
    method: Any = constructed(resolve(options["config"]))
    method.configure_model()
    stream = stream_of(options["world"], "train", options["train"])
    features = PairFeatures.of(stream, (method.image, method.text), method.identities, "cpu")
    whole = Asymmetric(method.image, features.texts.shape[1])
    keys = Keys(cell.seed).fork("asymmetric")
    theta = (whole.weights, whole.head.initial(keys, "text", torch.tensor([cell.seed]))[0])
    snapshots = [theta]
    every: Any = stream.load(range(len(stream)), 0).image
    for step in range(options["epochs"] * options["epoch"]):
        rows = keys.at(step).integers("rows", torch.arange(options["batch"]), 0, len(features))
        at = each(lambda t: t.detach().requires_grad_(), theta)
        loss = contrast(whole.logits(at, every[features.owner[rows]], features.texts[rows]))
        theta = each(lambda t, g: (t - options["rate"] * g).detach(), at, torch.autograd.grad(loss, at))
        if (step + 1) % options["epoch"] == 0:
            snapshots.append(theta)
    chosen = coresets.drawn_pairs(options["pairs"], len(features), keys)
    leaves = [every[features.owner[chosen]].clone().requires_grad_(), features.texts[chosen].clone().requires_grad_()]
    groups = [{"params": [leaf], "lr": rate} for leaf, rate in zip(leaves, options["rates"], strict=True)]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    rates, losses, began = torch.full((2,), options["rate"]), [], time.process_time()
    for step in range(options["steps"]):
        start = int(keys.at(step).integers("start", torch.tensor([0]), 0, options["epochs"]))
        segment = Segment(snapshots[start], snapshots[start + 1])
        orders = [keys.at(step).uniform(f"pairs/{k}", torch.arange(options["pairs"])).argsort() for k in range(8)]

        def inner(k: int, at: Branches, orders: list[Tensor] = orders) -> Tensor:
            rows = orders[k][: options["inner_batch"]]
            return wbce(whole.logits(at, leaves[0][rows], leaves[1][rows]), torch.eye(len(rows)))

        found = tesla(inner, leaves, rates, segment, 8)
        losses.append([float(branch) for branch in found.branches])
        for leaf, gradient in zip(leaves, found.gradients, strict=False):  # those of the rates are left out
            leaf.grad = gradient
        optimizer.step()
    late = torch.tensor(losses[len(losses) // 2 :]).mean(0).tolist()
    seconds = (time.process_time() - began) / options["steps"]
    heads = method.student.image.numel + method.student.text.numel
    return Measured({"image": late[0], "text": late[1], "seconds": seconds, "excess": late[0] - late[1],
                     "parameters": (whole.weights.numel() + whole.head.numel) / heads})  # fmt: skip
