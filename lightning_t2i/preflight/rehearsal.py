"""Runs training steps of a method on tensors without data, with its own code and the engine's, and keeps the bill.

    networks     as `configure_model` builds them, sharded on the mesh of the config; weights are never read
    batch        `records.batch_of`
    steps        one of each kind: every set of groups that is due together, every number of the method's that is
                 switched on or off on the way, and both ends of a draw that a whole training step shares
    micro-batch  the first and, where gradients are accumulated, a last one beside the gradients of the first

So memory, operations and collectives of any MethodModule come from one path and no formulas.
"""

from __future__ import annotations

import gc
import logging
import math
import warnings
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from lightning_t2i.batch import Batch
from lightning_t2i.checkpoints.snapshots import twins
from lightning_t2i.errors import UserError
from lightning_t2i.networks.text_encoder import TextEncoder
from lightning_t2i.preflight.allocator import Allocator
from lightning_t2i.preflight.attribution import attributing, filing_gradients
from lightning_t2i.preflight.bill import Bill, Encoding, checkpoint_bytes, networks, snapshot_bytes, tensors_of
from lightning_t2i.preflight.copies import in_copies
from lightning_t2i.preflight.records import batch_of, text_encoder
from lightning_t2i.preflight.remembered import Remembered
from lightning_t2i.preflight.stand_ins import Noted, stand_ins
from lightning_t2i.preflight.world import World, fake_mesh
from lightning_t2i.protocols import Searches
from lightning_t2i.schedules import value_at


class Stage:
    """What a method asks of a Trainer in a training step."""

    global_rank = global_step = 0
    loggers: tuple[()] = ()
    progress_bar_callback = None
    training, testing = True, False

    def __init__(self, data: Any, ranks: int):
        self.datamodule, self.world_size = data, ranks
        self.fit_loop: Any = Ignored()
        self.strategy = self

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        rows = tensor.expand(self.world_size, *tensor.shape).clone()
        return rows if sync_grads else rows.detach()


class Ignored:
    """Takes any call and any attribute, and does nothing."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *args: Any) -> None: ...


def rehearse(method: Any, data: Any, world: World, steps: int) -> Bill:
    """The bill of a method that is not built yet.

    Args:
        method: a MethodModule; it is of no other use afterwards.
        data: its data module, with `training` streams; without them only networks are counted.
        world: the processes.
        steps: training steps of the whole training.

    Raises:
        UserError: what the method, its networks or the batch refuse.
    """
    noted, bill = Noted(), Bill()
    gc.freeze()  # what is loaded by now stays: the collector need not look at it again and again
    with ExitStack() as stack:
        stack.callback(gc.unfreeze)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of libraries, about deliberate choices; training shows them
        logging.disable(logging.WARNING)
        stack.callback(logging.disable, logging.NOTSET)
        mesh = stack.enter_context(fake_mesh(world))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(stand_ins(noted))
        remembered = Remembered()
        with Allocator(remembered):  # for what it leaves out
            build(method, data, world, mesh)
        bill.networks = list(networks(method))
        bill.checkpoint, bill.snapshot = checkpoint_bytes(method), snapshot_bytes(method)
        bill.optimizers = {name: type(group.optimizer).__name__ for name, group in method.groups.items()}
        streams = getattr(data, "training", {})
        if method.groups and streams:
            batch = batch_of(streams, world.ranks, method)
            bill.batch = {name: sum(x.nbytes for x in tensors_of(records)) for name, records in batch.items()}
            bill.encodings = encodings(method, batch, remembered)
            kinds = kinds_of_steps(method, steps)
            costs = in_copies(lambda step: _costs(method, batch, step, noted, remembered), [step for step, _ in kinds])
            for (step, share), found in zip(kinds, costs, strict=True):
                for cost in found:
                    _enter(cost, step, share / len(found), world, bill)
        elif method.frozen_identities:
            bill.memory["frozen"] = sum(network.bytes for network in bill.networks)
            if isinstance(method, Searches):
                bill.memory["kept values"] = method.kept_bytes()
            bill.peak = bill.memory.total()
    bill.absent = noted.absent
    return bill


def build(method: Any, data: Any, world: World, mesh: Any = None) -> None:
    """Networks, optimizers and the states that these keep, as after a first training step."""
    method.common = replace(method.common, compile="none", check_finite=False)
    method.quantizes = False  # without values there is nothing to quantise: such networks count as whole
    method._trainer = Stage(data, world.ranks)
    if mesh is not None:
        method._device_mesh = mesh
    method.configure_model()
    method.configure_optimizers()
    for group in method.groups.values():
        for parameter in group.parameters:
            parameter.grad = torch.zeros_like(parameter)
        settings = group.optimizer.param_groups
        chosen = [{name: s[name] for name in ("foreach", "fused") if name in s} for s in settings]
        for known, choice in zip(settings, chosen, strict=True):  # the quickest way here to states, whatever is chosen
            known.update(dict.fromkeys(choice, False), **({"foreach": mesh is None} if "foreach" in choice else {}))
        group.optimizer.step()
        group.clear_gradients()
        for known, choice in zip(settings, chosen, strict=True):
            known.update(choice)
            if world.gpu and mesh is None and "foreach" in choice and not any(choice.values()):
                known["foreach"] = True  # torch's own choice for plain parameters on a GPU
    for module in method.modules():
        if (
            isinstance(module, TextEncoder)
            and not module.zero_null
            and not any(p.requires_grad for p in module.parameters())
        ):
            module._frozen_null()  # encoded once in a training
    method.train()


def training_step(method: Any, batch: Batch, allocator: Allocator, step: int) -> tuple[Counter[Any], Counter[Any]]:
    """One training step at a position of the training; of its micro-batches the first and the last are run.

    Returns:
        Operations by network and bytes moved by (collective, ranks), each of all micro-batches.
    """
    counters, last = method.counters, method.common.accumulate - 1
    counters.step, counters.micro = step, 0
    flops: Counter[Any] = Counter()
    moved: Counter[Any] = Counter()
    with attributing(method, allocator), filing_gradients(method, allocator):
        for micro, times in ((0, last), (last, 1)) if last else ((0, 1),):
            counters.micro = micro
            allocator.flops_of.clear()
            allocator.moved.clear()
            method.training_step(batch, micro)
            for total, part in ((flops, allocator.flops_of), (moved, allocator.moved)):
                for key, amount in part.items():
                    total[key] += times * amount
    return flops, moved


def adopt(method: Any, allocator: Allocator, batch: Batch) -> None:
    """Files what is there between two training steps."""
    allocator.adopt([*method.parameters(), *method.buffers()], "frozen")
    allocator.adopt((tensor for _, tensor in twins(method.groups.values())), "EMA")
    for group in method.groups.values():
        allocator.adopt(group.parameters, "weights")
        allocator.adopt(tensors_of(group.optimizer.state), "optimizer")
    allocator.adopt(tensors_of(batch), "batch")


@torch.no_grad()
def encodings(method: Any, batch: Batch, remembered: Remembered) -> dict[str, Encoding]:
    """What it takes to encode the captions of each stream."""
    found: dict[str, Encoding] = {}
    encoder = text_encoder(method)
    for name, records in batch.items():
        if encoder is None or records.caption is None:
            continue
        with Allocator(remembered) as allocator:
            embeds, _, pooled = encoder.encode(encoder.tokenize(records.caption))
        width = 0 if pooled is None else pooled.shape[1]
        found[name] = Encoding(len(records), allocator.total, embeds.shape[2], width)
    return found


@dataclass(frozen=True)
class Cost:
    """Of one training step: operations by network, bytes moved by (collective, ranks), and the worst moment."""

    flops: Counter[str]
    moved: Counter[tuple[str, tuple[int, ...]]]
    peak: int
    memory: Counter[str]


def _costs(method: Any, batch: Batch, step: int, noted: Noted, remembered: Remembered) -> list[Cost]:
    """Those of one kind of training step: one, or one for each end of a draw that the whole step shares."""
    noted.last = noted.branched = False
    try:
        costs = [_measure(method, batch, step, remembered)]
        if noted.branched:
            noted.last = True
            costs.append(_measure(method, batch, step, remembered))
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        what = "A training step depends on the values of tensors, which are not there"
        fix = "draw what decides by keys.integers at one position; --debug shows where"
        raise UserError(what, where="model", given=str(error), fix=fix) from error
    except RuntimeError as error:  # of shapes that do not go together
        what, fix = "A training step fails on batches of the declared shapes", "--debug shows where"
        raise UserError(what, where="data or model", given=str(error).splitlines()[0], fix=fix) from error
    return costs


def _measure(method: Any, batch: Batch, step: int, remembered: Remembered) -> Cost:
    with Allocator(remembered) as allocator:
        adopt(method, allocator, batch)
        allocator.forget_peak()
        flops, moved = training_step(method, batch, allocator, step)
        return Cost(flops, moved, allocator.peak, +allocator.at_peak)


def _enter(cost: Cost, step: int, share: float, world: World, bill: Bill) -> None:
    """Adds the cost of a training step that is this share of all to the bill."""
    for name, count in cost.flops.items():
        bill.flops_of[name] += round(share * count)
    for (name, ranks), size in cost.moved.items():
        bill.moved[name, world.between_nodes(ranks)] += round(share * size)
    if cost.peak > bill.peak:
        bill.peak, bill.memory, bill.worst = cost.peak, cost.memory, step


def kinds_of_steps(method: Any, steps: int) -> list[tuple[int, float]]:
    """(an example, share of all steps) of each kind of training step.

    Kinds differ in the groups that are due and in which of the method's stepwise numbers are zero.
    """
    schedules = [v for v in vars(method).values() if isinstance(v, dict) and v and all(type(k) is int for k in v)]
    starts = [group.options.start for group in method.groups.values()]
    begins = sorted({0, *(b for many in [*schedules, starts] for b in many if 0 < b < steps)})
    period = math.lcm(1, *(group.options.every for group in method.groups.values()))
    shares: Counter[tuple[Any, ...]] = Counter()
    examples: dict[tuple[Any, ...], int] = {}
    for begin, end in zip(begins, [*begins[1:], max(steps, begins[-1] + 1)], strict=True):
        for step in range(begin, min(begin + period, end)):
            kind = (*(g.due(step) for g in method.groups.values()), *(bool(value_at(s, step)) for s in schedules))
            examples.setdefault(kind, step)
            shares[kind] += (end - begin) / min(period, end - begin)
    return [(examples[kind], share / shares.total()) for kind, share in shares.items()]
