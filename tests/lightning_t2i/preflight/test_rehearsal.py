"""A rehearsed training costs what the training costs: networks, states, operations, kinds of steps, shards."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from toy import DIM, MLP, Toy

from lightning_t2i.errors import UserError
from lightning_t2i.options import MethodOptions
from lightning_t2i.preflight import records
from lightning_t2i.preflight.bill import tensors_of
from lightning_t2i.preflight.rehearsal import build, kinds_of_steps, rehearse
from lightning_t2i.preflight.world import World

ALONE, WIDTH = World(1, 1, None), 16


@dataclass
class Points:
    batch_size: int = 8


@pytest.fixture
def data(monkeypatch):
    monkeypatch.setitem(records.SHAPES, Points, lambda stream, rows, method: {"latent": torch.zeros(rows, DIM)})
    return SimpleNamespace(training={"main": Points()})


def sizes(out: int) -> list[tuple[int, ...]]:
    """Shapes of the toy's MLP."""
    inner = [(WIDTH, WIDTH), (WIDTH,)] * 2
    return [(WIDTH, DIM), (WIDTH,), *inner, (out, WIDTH), (out,)]


def numel(out: int) -> int:
    return sum(math.prod(shape) for shape in sizes(out))


def test_networks_and_states_are_those_of_the_training(data):
    """Three averages of the generator, one of them a network; a checkpoint holds what the real one holds."""
    bill = rehearse(Toy(), data, ALONE, steps=20)
    found = {n.name: (n.kind, n.parameters, n.trained) for n in bill.networks}
    ours, critic = numel(DIM), numel(1)
    assert found == {
        "scale": ("frozen", DIM * DIM + DIM, 0),
        "generator": ("trained", ours, ours),
        "generator_ema": ("EMA", ours, 0),
        "critic": ("trained", critic, critic),
    }
    real = Toy()
    build(real, data, ALONE)
    states = [x for group in real.groups.values() for x in tensors_of(group.optimizer.state)]
    assert bill.checkpoint == sum(x.nbytes for x in [*real.state_dict().values(), *states])
    assert bill.snapshot == 2 * 3 * ours
    assert bill.memory["weights"] == 4 * (ours + critic) and bill.memory["EMA"] == 4 * 3 * ours
    assert bill.memory["optimizer"] == sum(x.nbytes for x in states)
    assert bill.memory["frozen"] == 4 * (DIM * DIM + DIM) and sum(bill.memory.values()) == bill.peak
    assert bill.optimizers == {"generator": "AdamW", "critic": "AdamW"}


def test_operations_by_network_in_a_mean_step(data):
    """Multiplications of the linear layers; the generator's step is one of five and passes through the critic."""
    bill = rehearse(Toy(), data, ALONE, steps=20)

    def forward(out: int) -> int:
        return 2 * 8 * (DIM * WIDTH + 2 * WIDTH * WIDTH + WIDTH * out)

    first = 2 * 8 * DIM * WIDTH  # the gradient of its input is not needed
    critic = 3 * (3 * forward(1) - first)  # fake, x and x again
    due = forward(1) + forward(1) + forward(1)  # forward, weights, input: backward of all that has gradients
    ours = forward(DIM) + (2 * forward(DIM) - first) / 5
    assert bill.flops_of["generator"] == pytest.approx(ours, rel=1e-4)
    assert bill.flops_of["critic"] == pytest.approx(critic + due / 5, rel=1e-4)
    assert bill.flops_of["generator_ema"] == pytest.approx(forward(DIM) / 5, rel=1e-4)


def test_kinds_of_steps_and_their_shares(data):
    method = Toy()
    build(method, data, ALONE)
    assert kinds_of_steps(method, 20) == [(0, 0.2), (1, 0.8)]
    method.weight = {0: 0.0, 10: 0.5, 30: 1.0}
    assert sorted(kinds_of_steps(method, 20)) == [(0, 0.1), (1, 0.4), (10, 0.1), (11, 0.4)]


def test_activations_grow_with_the_batch_and_nothing_else_does(data):
    small, large = (rehearse(Toy(), SimpleNamespace(training={"main": Points(n)}), ALONE, steps=20) for n in (80, 800))
    assert large.memory["activations"] > 9 * small.memory["activations"]
    assert large.batch["main"] == 10 * small.batch["main"]
    for name in ("weights", "optimizer", "EMA", "frozen"):
        assert large.memory[name] == small.memory[name] > 0


class Single(Toy):
    """The critic alone."""

    def configure_model(self):
        self.add_group("critic", MLP(1), self.options["critic"])

    def training_step(self, batch, batch_idx):
        self.backward("critic", self.critic(batch["main"].latent).square().mean())


def test_what_processes_gather_is_moved_and_as_long_as_they_are_many(data):
    found = []

    class Gathers(Single):
        def training_step(self, batch, batch_idx):
            found.append(len(self.gathered(batch["main"].latent)) / len(batch["main"]))
            super().training_step(batch, batch_idx)

    rehearse(Gathers(), data, World(4, 1, (2, 2)), steps=20)
    assert set(found) == {4.0}


def test_shards_and_accumulation(data):
    """Of four processes, two share each copy. Until the last micro-batch each keeps gradients of a whole network; of
    several groups each micro-batch is reduced."""
    world = World(4, 2, (2, 2))
    bill = rehearse(Toy(), data, world, steps=20)
    halves = [4 * math.ceil(s[0] / 2) * math.prod(s[1:]) for out in (DIM, 1) for s in sizes(out)]
    assert bill.memory["weights"] == sum(halves)
    assert {name for (name, between) in bill.moved if between} == {"allreduce_"}
    assert bill.moved["_allgather_base_", False] > 0
    one, three = (rehearse(Single(MethodOptions(accumulate=n)), data, world, steps=20) for n in (1, 3))
    assert three.memory["gradients"] >= 4 * numel(1) > 1.5 * one.memory["gradients"]
    accumulated = rehearse(Toy(MethodOptions(accumulate=3)), data, world, steps=20)
    assert accumulated.memory["gradients"] < 4 * (numel(DIM) + numel(1))  # shards, and those of other groups meanwhile
    assert accumulated.flops_of["critic"] == pytest.approx(3 * bill.flops_of["critic"], rel=1e-4)
    alone = rehearse(Toy(), data, ALONE, steps=20)
    assert alone.checkpoint == bill.checkpoint, "whole tensors, whatever the mesh"


def test_what_the_processes_cannot_do_is_told(data):
    with pytest.raises(UserError, match="does not divide") as error:
        rehearse(Toy(), data, World(3, 1, (3, 1)), steps=20)
    assert "data.main.batch_size" in str(error.value) and "9" in str(error.value)
    with pytest.raises(UserError, match="not known beforehand"):
        rehearse(Toy(), SimpleNamespace(training={"main": SimpleNamespace(batch_size=8)}), ALONE, steps=20)
    assert not torch.distributed.is_initialized()


def test_a_step_that_depends_on_values_is_told(data):
    class Branches(Toy):
        def training_step(self, batch, batch_idx):
            if float(batch["main"].latent.mean()) > 0:
                super().training_step(batch, batch_idx)

    with pytest.raises(UserError, match="depends on the values"):
        rehearse(Branches(), data, ALONE, steps=20)


def test_eight_bit_states_are_counted_as_they_are(data):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from lightning_t2i.options import GroupOptions

    group = GroupOptions(lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-3, min_8bit_size=WIDTH * DIM))
    bill = rehearse(Toy(generator=group, critic=group), data, ALONE, steps=20)
    full = rehearse(Toy(), data, ALONE, steps=20)
    assert 0 < bill.memory["optimizer"] < full.memory["optimizer"]
