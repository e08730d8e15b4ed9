"""Schedules written by hand: what a search starts from, and what it is compared with (arXiv 2506.15682).

All give bool [N, G], True where a component is computed; steps are counted from 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np

from lightning_t2i.caching.cost import Cost
from lightning_t2i.caching.layout import PER_BLOCK, Layout
from lightning_t2i.caching.schedule import Schedule
from lightning_t2i.caching.search import SearchOptions
from lightning_t2i.errors import UserError
from lightning_t2i.paths import resolve

ATTENTION = ("attn1", "attn2", "attn")


def every(layout: Layout, steps: int, k: int) -> np.ndarray:
    """FORA (arXiv 2407.01425): everything in every k-th step, nothing between."""
    return np.repeat(np.arange(steps)[:, None] % k == 0, layout.width, axis=1)


def attention_every(layout: Layout, steps: int, k: int) -> np.ndarray:
    """Attention in every k-th step, all else always."""
    found = np.ones((steps, layout.width), bool)
    found[np.arange(steps) % k != 0, np.array(layout.columns(*ATTENTION))[:, None]] = False
    return found


def tgate(layout: Layout, steps: int, m: int, k: int, warmup: int = 2) -> np.ndarray:
    """TGATE (arXiv 2404.02747) without its average of both cross-attentions, for networks with cross-attention.

    Before step m cross-attention is computed, self-attention in the first `warmup` steps and every k-th; from m on
    cross-attention is reused and self-attention computed. Feed-forwards are always computed.
    """
    found, n = np.ones((steps, layout.width), bool), np.arange(steps)
    found[:, layout.columns("attn1")] = ((n >= m) | (n < warmup) | (n % k == 0))[:, None]
    found[:, layout.columns("attn2")] = (n < m)[:, None]
    return found


def spaced(layout: Layout, steps: int, p: int, q: int, component: int, middle: bool = False) -> np.ndarray:
    """In p evenly spaced steps, one component is reused in q evenly spaced blocks, or in the q central ones.

    Args:
        component: its number within each block.
    """
    blocks = layout.width // PER_BLOCK
    rows, chosen = _evenly(steps, p), _evenly(blocks, q)
    if middle:
        chosen = np.arange((blocks - q) // 2, (blocks - q) // 2 + q)
    found = np.ones((steps, layout.width), bool)
    found[np.ix_(rows, PER_BLOCK * chosen + component)] = False
    return found


def _evenly(n: int, count: int) -> np.ndarray:
    return np.ceil(np.linspace(0, n + 1, count + 2)[1:-1] - 1).astype(int)


def families(layout: Layout, steps: int) -> Iterable[tuple[str, np.ndarray]]:
    """Named schedules of every family, sparser ones later."""
    blocks = layout.width // PER_BLOCK
    for k in range(2, steps + 1):
        yield f"FORA {k}", every(layout, steps, k)
    for k in range(2, steps + 1):
        yield f"attention every {k}", attention_every(layout, steps, k)
    if layout.columns("attn2"):
        for m in sorted({max(steps * part // 20, 1) for part in range(1, 20, 2)}):
            for k in (1, 3, 5):
                yield f"TGATE {m}, {k}", tgate(layout, steps, m, k)
    for p in range(1, steps, 2):
        for q in range(1, blocks + 1, max(blocks // 10, 2)):
            for component in range(PER_BLOCK):
                for middle in (False, True):
                    name = f"{'middle' if middle else 'spaced'} {p}, {q}, {component}"
                    yield name, spaced(layout, steps, p, q, component, middle)


def initial(cost: Cost, steps: int, count: int) -> np.ndarray:
    """A spread of heuristic schedules: bool [count, N, G]. FORA's first ones, then quantiles of the others by MACs.

    Networks and steps too small to give so many different ones get those that there are.
    """
    distinct: dict[bytes, tuple[str, Schedule]] = {}
    full = Schedule.full(cost.layout, steps)
    for name, rows in families(cost.layout, steps):
        schedule = Schedule(rows, cost.layout).canonical()
        if schedule.key != full.key:
            distinct.setdefault(schedule.key, (name, schedule))
    fora = [s for name, s in distinct.values() if name.startswith("FORA")][: max(count // 3, 1)]
    taken = {s.key for s in fora}
    others = sorted((s for _, s in distinct.values() if s.key not in taken), key=lambda s: (cost.macs(s), s.key))
    left = min(count - len(fora), len(others))
    places = np.unique(np.linspace(0, len(others) - 1, left).round().astype(int)) if left else []
    return np.stack([s.recompute for s in [*fora, *(others[i] for i in places)]][:count])


def baselines(layout: Layout, steps: int) -> dict[str, Schedule]:
    """What every front is compared with, by name."""
    found = {f"FORA {k}": every(layout, steps, k) for k in (2, 3, 4)}
    if layout.columns("attn2"):
        found["TGATE"] = tgate(layout, steps, steps // 2, 3)
    return {name: Schedule(rows, layout).canonical() for name, rows in found.items()}


def first_generation(options: SearchOptions, cost: Cost, steps: int) -> np.ndarray | None:
    """Genomes that a search begins with, bool [k, n]; None draws random bits.

    Raises:
        UserError: the front of another search does not fit.
    """
    if options.initial == "random":
        return None
    found = [Schedule(rows, cost.layout) for rows in initial(cost, steps, options.population)]
    if options.initial != "heuristic":
        file = resolve(options.initial)
        if not file.is_file():
            allowed = "heuristic, random or the front.json of a search"
            raise UserError("No such beginning", where="model.search.initial", given=options.initial, allowed=allowed)
        front = [Schedule.from_plain(point["schedule"]) for point in json.loads(file.read_text("utf-8"))["front"]]
        for schedule in front:
            schedule.check(cost.layout, steps)
        known = {schedule.key for schedule in front}
        found = [*front, *(schedule for schedule in found if schedule.key not in known)][: options.population]
    return np.stack([schedule.canonical().genome(not options.fix_first_step) for schedule in found])
