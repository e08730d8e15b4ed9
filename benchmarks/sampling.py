"""Time of one-step sampling against the teacher's sampler: in the network, and from prompts to pictures.

    python -m benchmarks --only sampling

The teacher of configs/dmd/tiny.yaml samples with that config's guidance in 25 DDIM steps, its student in one step
without guidance. The student is untrained, which changes pictures but no times. Both sample the same prompts of the
shapes world from the same noise, drawn before; both encode the prompts once (the empty one is known already) and
decode with the same autoencoder.

Rows that go through the U-Net are counted in a turn of each that is not timed (lightning_t2i/forward_units.py). Then
both take turns: one batch of the teacher, several of the student, one of which is too short to be timed well; their
mean counts. The clock is read between encoding, sampling and decoding, and by two hooks at each call of the U-Net:
"U-Net" is the time inside those calls, "solver" the rest of the sampling. A ratio is that of the two sides of a turn;
tables have the median over all turns and its quartiles.

    p               the U-Net's share of the teacher's whole time
    s               how much faster the student's U-Net is, measured, or as rows alone would have it
    Amdahl's law    the whole is 1 / ((1 - p) + p / s) times as fast

The law with p of the U-Net predicts too little, because the solver works less as well; it stands there once more with
p and s of U-Net and solver together.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.forward_units import prepared
from benchmarks.running import quartiles
from lightning_modules.dmd import DMD
from lightning_t2i.batch import Cond, Records
from lightning_t2i.cli.session import quiet
from lightning_t2i.forward_units import counting_units
from lightning_t2i.processes import sample

BAR = 0.8  # of the ratio of rows: how much faster the U-Net has to be
STAGES = ("text", "U-Net", "solver", "decoding")
SIDES = ("teacher", "student")
TIMES = [["prompts", "d"], ["sampler", ""], ["U-Net rows a picture", ".0f"], *([s + ", ms", ",.1f"] for s in STAGES)]
TIMES += [["all, ms", ",.1f"], ["pictures/s", ",.1f"]]
QUARTILES = [["lower quartile", ".2f"], ["upper quartile", ".2f"]]
NETWORK = [["prompts", "d"], ["ratio of rows", ".1f"], ["U-Net time, teacher / student", ".2f"], *QUARTILES]
NETWORK += [["share of the ratio of rows", ".2f"], ["at least 0.8", ""], ["turns", "d"]]
WHOLE = [["prompts", "d"], ["U-Net's share of the teacher's time", ".1%"], ["whole time, teacher / student", ".2f"]]
WHOLE += [*QUARTILES, ["Amdahl, U-Net time", ".2f"], ["Amdahl, rows", ".2f"], ["Amdahl, U-Net and solver", ".2f"]]
Sampler = Callable[[Tensor, Cond | None], Tensor]


@contextmanager
def clocked(network: nn.Module) -> Iterator[list[float]]:
    """The seconds of each call of a network while it is open."""
    taken: list[float] = []
    started: list[float] = []
    handles = [
        network.register_forward_pre_hook(lambda *_: started.append(time.perf_counter())),
        network.register_forward_hook(lambda *_: taken.append(time.perf_counter() - started.pop())),
    ]
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()


class Contest:
    """A method's teacher and student, and what both sample: `count` prompts and noise [count, C, h, w]."""

    def __init__(self, method: DMD, records: Records, steps: int):
        student = method.generator_of("student")
        self.method, self.records = method, records
        self.z = method.keys.normal("z", records.position, method.shape)
        self.networks = {"teacher": method.teacher.backbone, "student": student.backbone}
        self.samplers: dict[str, Sampler] = {
            "teacher": lambda z, cond: sample(method.teacher, z, cond, steps, method.guidance),
            "student": lambda z, cond: method.generate(student, z, cond, method.keys, records.position),
        }

    @torch.no_grad()
    def turn(self, side: str) -> list[float]:
        """Seconds of each of STAGES on one batch."""
        with clocked(self.networks[side]) as passes:
            start = time.perf_counter()
            cond = self.method.condition(self.records)
            encoded = time.perf_counter()
            x = self.samplers[side](self.z, cond)
            sampled = time.perf_counter()
            self.method.codec.decode(x).clamp(-1, 1)
            decoded = time.perf_counter()
        return [encoded - start, sum(passes), sampled - encoded - sum(passes), decoded - sampled]

    def rows(self) -> list[float]:
        """How many rows go through the U-Net for each picture, of SIDES."""
        with counting_units(self.method) as units:
            for side in SIDES:
                self.turn(side)
        student = "student" if self.method.groups["student"].ema is None else "student_ema"
        return [units.passed[name] / len(self.records) for name in ("teacher", student)]


def middle(values: Sequence[float]) -> list[float]:
    """Median and quartiles of some values."""
    low, median, high = quartiles(values)
    return [median, low, high]


def amdahl(p: float, s: float) -> float:
    """How many times as fast the whole is when a share p of its time shrinks to 1 / s of it."""
    return 1 / ((1 - p) + p / s)


def compare(contest: Contest, rounds: int, often: int) -> tuple[list[list[Any]], list[Any], list[Any]]:
    """The lines of one batch: of TIMES for both sides, of NETWORK, of WHOLE."""
    count, rows = len(contest.records), contest.rows()  # the turns that are counted warm up as well
    turns: list[list[list[float]]] = [[], []]
    for _ in range(rounds):
        for kept, side, times in zip(turns, SIDES, (1, often), strict=True):
            repeated = [contest.turn(side) for _ in range(times)]
            kept.append([statistics.mean(stage) for stage in zip(*repeated, strict=True)])
    lines: list[list[Any]] = []
    for side, passed, kept in zip(SIDES, rows, turns, strict=True):
        stages = [statistics.median(stage) for stage in zip(*kept, strict=True)]
        whole = statistics.median(sum(turn) for turn in kept)
        lines.append([count, side, passed, *(1000 * stage for stage in stages), 1000 * whole, count / whole])
    pairs = list(zip(*turns, strict=True))
    network, whole_ratio = middle([a[1] / b[1] for a, b in pairs]), middle([sum(a) / sum(b) for a, b in pairs])
    share, ratio = statistics.median(turn[1] / sum(turn) for turn in turns[0]), rows[0] / rows[1]
    sampling_share = statistics.median(sum(turn[1:3]) / sum(turn) for turn in turns[0])
    sampling = statistics.median(sum(a[1:3]) / sum(b[1:3]) for a, b in pairs)
    good = "yes" if network[0] >= BAR * ratio else "no"
    predictions = [amdahl(share, network[0]), amdahl(share, ratio), amdahl(sampling_share, sampling)]
    return lines, [count, ratio, *network, network[0] / ratio, good, rounds], [count, share, *whole_ratio, *predictions]


def contests(counts: Sequence[int], steps: int) -> Iterator[Contest]:
    """Contests on the first so many prompts of the tiny config."""
    method, data = prepared("dmd")
    method.configure_model()
    data.prepare_data()
    data.setup("fit")
    for count in counts:
        yield Contest(method, data.training["main"].load(range(count), 0), steps)


def result(counts: Sequence[int], steps: int, rounds: int, often: int) -> dict[str, Any]:
    """The tables of batches of so many prompts, in so many turns."""
    found = [compare(contest, rounds, often) for contest in contests(counts, steps)]
    times, network, whole = zip(*found, strict=True)
    parts = ((TIMES, [line for lines in times for line in lines]), (NETWORK, network), (WHOLE, whole))
    tables = [{"columns": columns, "rows": list(rows)} for columns, rows in parts]
    return {"title": "One step against the teacher's sampler", "tables": tables}


def measure(quick: bool = False) -> dict[str, Any]:
    """One-step sampling against the teacher's sampler."""
    quiet()
    return result([2], 25, 1, 1) if quick else result([16, 50], 25, 15, 5)
