"""What is timed is what teacher and student sample, and the figures are what their times make of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from benchmarks import sampling
from benchmarks.sampling import Contest, amdahl, clocked
from lightning_modules.teacher import Teacher

STEPS, COUNT = 3, 2


@pytest.fixture(scope="module")
def contest() -> Contest:
    (found,) = sampling.contests([COUNT], STEPS)
    return found


def test_contestants_sample_what_teacher_and_student_do(contest) -> None:
    method, records = contest.method, contest.records
    teacher = Teacher("assets/tiny/sd", guidance=4.5, steps=STEPS)
    teacher.configure_model()
    cond = method.condition(records)
    assert torch.equal(contest.samplers["teacher"](contest.z, cond), teacher.couple(contest.z, cond))
    with torch.no_grad():
        pictures = method.codec.decode(contest.samplers["student"](contest.z, cond)).clamp(-1, 1)
    assert torch.equal(pictures, method.sample(cond, method.keys, records.position))


def test_times_rows_and_ratios_of_a_turn(contest, monkeypatch) -> None:
    monkeypatch.setattr(sampling, "contests", lambda counts, steps: [contest])
    times, network, whole = (table["rows"] for table in sampling.result([COUNT], STEPS, rounds=1, often=2)["tables"])
    for (count, side, rows, *stages, total, rate), name, passed in zip(
        times, sampling.SIDES, (2 * STEPS, 1), strict=True
    ):
        assert (count, side, rows) == (COUNT, name, passed) and len(stages) == len(sampling.STAGES)
        assert min(stages) > 0 and sum(stages) == pytest.approx(total) and rate == pytest.approx(1000 * COUNT / total)
    ratio, share, (teacher, student) = network[0][2], whole[0][1], times
    assert network[0][1] == 2 * STEPS and ratio == pytest.approx(teacher[4] / student[4])
    assert network[0][5] == pytest.approx(ratio / (2 * STEPS))
    assert network[0][6] == ("yes" if network[0][5] >= 0.8 else "no")
    assert share == pytest.approx(teacher[4] / teacher[7]) and whole[0][2] == pytest.approx(teacher[7] / student[7])
    ours, theirs = sum(teacher[4:6]), sum(student[4:6])  # U-Net and solver
    predictions = [amdahl(share, ratio), amdahl(share, 2 * STEPS), amdahl(ours / teacher[7], ours / theirs)]
    assert whole[0][5:] == pytest.approx(predictions)


def test_amdahls_law() -> None:
    assert amdahl(0.5, 1) == 1 and amdahl(1, 50) == 50 and amdahl(0, 50) == 1
    assert math.isclose(amdahl(0.9, 10), 1 / 0.19)


def test_calls_of_a_network_are_clocked_while_it_is_asked_for() -> None:
    network = nn.Linear(2, 2)
    with clocked(network) as passes:
        for _ in range(3):
            network(torch.zeros(1, 2))
    network(torch.zeros(1, 2))
    assert len(passes) == 3 and min(passes) > 0
