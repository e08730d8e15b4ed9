"""What a search leaves: front.json, and plots of the front, of its schedules, and of the hypervolume."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_t2i.caching.archive import Archive, chosen
from lightning_t2i.caching.cost import Cost
from lightning_t2i.caching.schedule import Schedule
from lightning_t2i.state_io import write_atomically

PICKS = {"fast": 1.5, "faster": 2.0, "fastest": 2.5}  # what a pick is at least, in MACs without a cache over its own


def entry(schedule: Schedule, quality: float, cost: Cost, sdpa: bool) -> dict[str, Any]:
    """A schedule of a front as JSON holds it: quality, TMACs, their share of no cache, bytes kept for a picture."""
    macs = cost.macs(schedule, sdpa)
    return {
        "quality": quality,
        "tmacs": macs / 1e12,
        "relative_macs": macs / cost.full(schedule.steps, sdpa),
        "slot_bytes": cost.slot_bytes(schedule),
        "schedule": schedule.plain(),
    }


def content(archive: Archive, cost: Cost, sdpa: bool, **facts: Any) -> dict[str, Any]:
    """The front of an archive from its cheapest schedule on, and facts about the search."""
    points = [entry(archive.schedule(key), archive.quality(key), cost, sdpa) for key in archive.front()]
    return {**facts, "evaluated": len(archive), "front": points}


def write_front(folder: Path, found: Mapping[str, Any]) -> None:
    """Writes front.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "front.json", (json.dumps(found, indent=1) + "\n").encode())


def picks(front: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Members of a front by name: the best ones at 1.5, 2 and 2.5 times fewer MACs, where there are, and the knee."""
    found = {name: chosen(front, speed) for name, speed in PICKS.items()
             if min(point["relative_macs"] for point in front) <= 1 / speed}  # fmt: skip
    return {"knee": chosen(front), **found}


def write_picks(folder: Path, found: Mapping[str, Any]) -> None:
    """Writes schedules/NAME.json of each pick."""
    for name, place in picks(found["front"]).items():
        facts = {**found["front"][place], "made_for": found.get("made_for")}
        Schedule.from_plain(facts.pop("schedule")).save(folder / "schedules" / f"{name}.json", **facts)


def write_plots(folder: Path, found: Mapping[str, Any]) -> None:
    """Writes front.png, schedule.png (the knee) and hypervolume.png."""
    plot_front(folder / "front.png", found)
    plot_schedule(folder / "schedule.png", Schedule.from_plain(found["front"][chosen(found["front"])]["schedule"]))
    plot_hypervolume(folder / "hypervolume.png", found["hypervolume"])


def plot_front(file: Path, found: Mapping[str, Any]) -> None:
    """Quality over relative MACs: the front, and what it is compared with on the same pictures, where that is known."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes: Any = figure.subplots()
    front = found["front"]
    macs, fresh = [point["relative_macs"] for point in front], [point.get("fresh_quality") for point in front]
    axes.plot(macs, [point["quality"] for point in front], "o-", label="front, as the search saw it", alpha=0.4)
    if None not in fresh:
        axes.plot(macs, fresh, "o-", label="front, on fresh seeds", color="tab:blue")
    for place, name, side in labels(found.get("baselines", {})):
        axes.plot(*place, "x", color="tab:gray")
        facts = {"textcoords": "offset points", "fontsize": 7, "ha": "center", "va": "bottom" if side > 0 else "top"}
        axes.annotate(name, place, (0, 5 * side), **facts)
    axes.margins(0.09)
    axes.set(xlabel="MACs, share of no cache", ylabel="quality")
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=120)


def labels(baselines: Mapping[str, Mapping[str, float]]) -> Iterator[tuple[tuple[float, float], str, int]]:
    """Place, names and side (1: above) of what a front is compared with; labels point away from the nearest other."""
    names: dict[tuple[float, float], list[str]] = {}
    for name, point in baselines.items():
        names.setdefault((point["relative_macs"], point["quality"]), []).append(name)
    height = max((q for _, q in names), default=0.0) - min((q for _, q in names), default=0.0) or 1.0
    for place, found in names.items():
        away = {math.dist((place[0], place[1] / height), (m, q / height)): q for m, q in names if (m, q) != place}
        yield place, "\n".join(found), 1 if away and away[min(away)] < place[1] else -1


def plot_schedule(file: Path, schedule: Schedule) -> None:
    """What is computed (dark) in each step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 1.5 + schedule.layout.width / 12), layout="constrained")
    axes: Any = figure.subplots()
    axes.imshow(np.asarray(schedule.plan.live).T, aspect="auto", cmap="Blues", vmin=0, vmax=1.3, interpolation="none")
    names, step = schedule.layout.components, max(schedule.layout.width // 24, 1)
    axes.set_yticks(range(0, len(names), step), names[::step], fontsize=5)
    axes.set(xlabel="step", title=f"{schedule.plan.live.mean():.0%} of all components are computed")
    figure.savefig(file, dpi=120)


def plot_hypervolume(file: Path, values: Sequence[float]) -> None:
    """Hypervolume of the archive after each generation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes: Any = figure.subplots()
    axes.plot(range(1, len(values) + 1), values)
    axes.set(xlabel="generation", ylabel="hypervolume")
    figure.savefig(file, dpi=120)
