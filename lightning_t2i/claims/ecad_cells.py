"""Cells of ECAD's claims: searches on pictures, their fronts on held-out prompts and noise, searches on a surrogate."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from lightning_t2i.batch import Records
from lightning_t2i.caching import Cost, Executor, Schedule
from lightning_t2i.caching.archive import hypervolume, non_dominated
from lightning_t2i.caching.comparison import drawn
from lightning_t2i.caching.heuristics import baselines, first_generation
from lightning_t2i.caching.rewards import Detector
from lightning_t2i.caching.search import Search, SearchOptions
from lightning_t2i.claims.spec import Cell, Measured
from lightning_t2i.claims.training import RUN, fit, prompts
from lightning_t2i.cli.restore import trained
from lightning_t2i.keys import Keys
from lightning_t2i.networks.load import build_network

POINTS = 10  # of a front that are judged on held-out prompts, evenly spaced from its cheapest to its best
REPEATS = 3  # a time is the median of so many


def searched(cell: Cell) -> Measured:
    """A search by the ordinary command; `least_gain` is the smallest change of its hypervolume in a generation."""
    numbers = dict(fit(cell).numbers)
    found = json.loads((cell.folder / RUN / "front.json").read_text(encoding="utf-8"))
    gains = np.diff(found["hypervolume"])
    return Measured({**numbers, "hypervolume": found["hypervolume"][-1], "least_gain": float(gains.min(initial=0.0))})


def front_after(archive: Any, generations: int) -> list[Schedule]:
    """At most POINTS schedules of the front that an archive had after so many generations."""
    keys = [key for key, facts in archive.facts.items() if facts[2] and facts[3] < generations]
    facts = np.array([archive.facts[key] for key in keys])
    front = non_dominated(facts[:, 0], facts[:, 1])
    places = np.unique(np.linspace(0, len(front) - 1, min(POINTS, len(front))).round().astype(int))
    return [archive.schedule(keys[front[i]]) for i in places]


class HeldOut:
    """Judges schedules on the first n test prompts with the noise of a seed, each once.

    Args:
        method: an ECAD method with its networks.
        batches: prompts that no search saw.
        seed: of the noise.
    """

    def __init__(self, method: Any, batches: list[Records], seed: int):
        self.method, self.batches, self.keys = method.open(), batches, Keys(seed).fork("claims")
        self.detector, self.known = Detector(), dict[bytes, tuple[np.ndarray, np.ndarray]]()
        self.plain: list[Tensor] = []
        self.plain = [images for images, _ in self.pictures(None)]

    @torch.no_grad()
    def pictures(self, schedule: Schedule | None) -> list[tuple[Tensor, Records]]:
        """Of every batch."""
        method, found = self.method, []
        for records in self.batches:
            z = self.keys.normal("z", records.position, method.sampler.shape)
            found.append((drawn(method, schedule, z, method.condition(records)), records))
        return found

    def judge(self, schedule: Schedule) -> tuple[np.ndarray, np.ndarray]:
        """Per prompt: whether the detector finds what is asked for (scenes alone), and minus the mean squared distance
        to the picture without a cache."""
        if schedule.key not in self.known:
            right, close = [], []
            for plain, (images, records) in zip(self.plain, self.pictures(schedule), strict=True):
                right.append(self.detector(images, records) if records.scene else torch.zeros(len(images)))
                close.append(-(images - plain).square().flatten(1).double().mean(1))
            self.known[schedule.key] = torch.cat(right).numpy(), torch.cat(close).numpy()
        return self.known[schedule.key]

    def hypervolume(self, front: list[Schedule], judge: int) -> float:
        """Of a front, by its held-out judgement; see `caching.archive`."""
        progress = self.method.progress
        quality = np.array([self.judge(schedule)[judge].mean() for schedule in front])
        macs = np.array([progress.macs(schedule) for schedule in front], float)
        worst, none = (float(self.judge(s)[judge].mean()) for s in (progress.only_first, progress.full))
        return hypervolume(quality, macs, worst, none, progress.macs(progress.full))


def margin(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The mean paired difference in standard errors; equal judgements give 0."""
    difference = ours - theirs
    error = difference.std(ddof=1) / len(difference) ** 0.5
    return float(difference.mean() / error) if error > 0 else 0.0


def held_out(cell: Cell) -> Measured:
    """Options of, n, generations: hypervolumes on held-out prompts after these generations, and margins over FORA and
    TGATE of the schedule that calibration prefers among those of no more MACs."""
    method: Any = trained(cell.after[cell.options["of"]] / RUN)
    held = HeldOut(method, prompts("test", cell.options["n"]), cell.seed)
    progress, numbers = held.method.progress, {}
    for generations in cell.options["generations"]:
        front = front_after(progress.archive, generations)
        numbers[f"hv@{generations}"] = held.hypervolume(front, 0)
        numbers[f"hv_closeness@{generations}"] = held.hypervolume(front, 1)
    if cell.options.get("baselines"):
        numbers |= against(held, progress)
    ids = torch.cat([records.id for records in held.batches])
    return Measured(numbers, {}, hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:12])


def against(held: HeldOut, progress: Any) -> dict[str, float]:
    """Margins over hand-written schedules, by detector and closeness."""
    archive, numbers = progress.archive, {}
    for name, schedule in baselines(progress.full.layout, progress.full.steps).items():
        ours = preferred(archive, progress.macs(schedule))
        for i, judge in enumerate(("detector", "closeness")):
            numbers[f"{name} {judge}"] = margin(held.judge(ours)[i], held.judge(schedule)[i])
    return numbers


def preferred(archive: Any, macs: float) -> Schedule:
    """The best schedule of an archive's front that needs no more MACs; its cheapest where none does."""
    front = archive.front()
    cheap = [key for key in front if archive.facts[key][1] <= macs] or front[:1]
    return archive.schedule(max(cheap, key=archive.quality))


def halved(cell: Cell) -> Measured:
    """A third of the population against a third of the generations: the difference in hypervolume, and how far it lies
    above minus a tenth and below a tenth of what the full search gains."""
    full, small = (cell.measured(cell.options[name]).numbers for name in ("full", "small"))
    early, late = cell.options["early"], cell.options["late"]
    gain = full[f"hv@{late}"] - full["hv@1"]
    difference = small[f"hv@{late}"] - full[f"hv@{early}"]
    return Measured({"difference": difference, "above": difference + gain / 10, "below": gain / 10 - difference})


def gained(cell: Cell) -> Measured:
    """How much the hypervolume on held-out prompts rose from the first generation to the last."""
    numbers = cell.measured(cell.options["of"]).numbers
    last = cell.options["last"]
    return Measured({name: numbers[f"{name}@{last}"] - numbers[f"{name}@1"] for name in ("hv", "hv_closeness")})


def transferred(cell: Cell) -> Measured:
    """Schedules of one network on its fine-tuned sibling: margin over FORA in closeness to the sibling's own pictures.

    Options of (a search), sibling (a training), n, k (of FORA).
    """
    from datamodules.prompts import Prompts
    from lightning_t2i.networks.build import save_pipeline

    found: Any = trained(cell.after[cell.options["sibling"]] / RUN)
    folder = cell.folder / "sibling"
    if not (folder / "model_index.json").is_file():
        save_pipeline(folder, found.generator_of("denoiser"), found.codec, found.text)
    source: Any = trained(cell.after[cell.options["of"]] / RUN)
    archive = source.open().progress.archive
    method = type(source)(str(folder), steps=source.steps, guidance=source.guidance, solver=source.solver)
    method.configure_model()
    stream = Prompts("openmoji", "test", batch_size=cell.options["n"], limit=cell.options["n"])
    stream.prepare()
    stream.setup()
    stream.begin(0, "test", shuffle=False)
    held = HeldOut(method.eval(), [stream.load(range(len(stream)), 0)], cell.seed)
    fora = baselines(archive.template.layout, source.steps)[f"FORA {cell.options['k']}"]
    ours = preferred(archive, held.method.progress.macs(fora))
    return Measured({"margin": margin(held.judge(ours)[1], held.judge(fora)[1])})


def timed(cell: Cell) -> Measured:
    """Rank correlation of time and MACs over a front, and hooks against static programs.

    Options of (a search), batch (pictures that are made at a time).
    """
    method: Any = trained(cell.after[cell.options["of"]] / RUN).eval()
    progress = method.open().progress
    method.executor.detach()
    records = prompts("test", cell.options["batch"])[0]
    z, cond = Keys(cell.seed).normal("z", records.position, method.sampler.shape), method.condition(records)
    front = front_after(progress.archive, method.steps * 1000)
    seconds = {}
    for kind in ("hooks", "static"):
        with Executor(method.denoiser.backbone, method.sampler.times, kind) as executor:
            seconds[kind] = timings([partial(drawn_by, executor, method, s, z, cond) for s in front])
    macs = [progress.macs(schedule) for schedule in front]
    ratio = statistics.median(h / s for h, s in zip(*seconds.values(), strict=True))
    return Measured({"rank_correlation": float(spearmanr(seconds["static"], macs).statistic), "static_gain": ratio})


def drawn_by(executor: Executor, method: Any, schedule: Schedule | None, z: Tensor, cond: Any) -> Tensor:
    """Pictures under a schedule, by an executor."""
    executor.use(schedule)
    return method.sampler.pictures(z, cond)


def timings(runs: Sequence[Callable[[], Any]]) -> list[float]:
    """Median seconds of each call, after one that warms up; they take turns, so that what else runs hits all alike."""
    found: list[list[float]] = [[] for _ in runs]
    for _ in range(1 + REPEATS):
        for run, seconds in zip(runs, found, strict=True):
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
    return [statistics.median(seconds[1:]) for seconds in found]


def surrogate(cell: Cell) -> Measured:
    """A search of the 1680 bits of PixArt-alpha's schedules where every computation has a gain of its own.

    Options population, generations, initial, mutate, mutate_bit. Gains grow with the square root of the MACs, times a
    draw of an exponential distribution that belongs to the seed.
    """
    options = dict(cell.options)
    generations, steps = options.pop("generations"), 20
    settings = SearchOptions(fix_first_step=False, sdpa=False, **options)
    with torch.device("meta"):
        network = build_network("configs/networks/pixart_alpha_512.json")
    cost = Cost.of(network, (4, 32, 32), 120)
    price = np.tile(cost.priced(sdpa=False), steps).astype(float)
    uniform = Keys(cell.seed).fork("surrogate").uniform("gain", torch.arange(len(price)), dtype=torch.float64).numpy()
    gain = -np.log(uniform) * np.sqrt(price)
    search = Search(len(price), settings, cell.seed, first_generation(settings, cost, steps))
    seen: list[np.ndarray] = []
    for _ in range(generations):
        genomes = search.ask()
        objectives = np.stack([1 - genomes @ gain / gain.sum(), genomes @ price / price.sum()], 1)
        seen.append(objectives[objectives[:, 1] < 1])
        search.tell(objectives)
    found = np.concatenate(seen)
    volumes = [hypervolume(1 - f[:, 0], f[:, 1], 0.0, 1.0, 1.0) for f in (seen[0], found)]
    return Measured({"hv": volumes[1], "first_hv": volumes[0]})
